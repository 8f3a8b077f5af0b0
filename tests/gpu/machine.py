"""A GPU with a few streams for a test, or a CPU in its place: the same programs run on both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from concurrent_kv import KeysValues, KVLayout, KVPool, KVStorage
from tests.support import HANG_SECONDS

__all__ = ["LAYOUT", "Machine", "tokens"]

LAYOUT = KVLayout(num_layers=2, num_heads=2, head_dim=16, max_tokens=8)
CYCLES_OF_A_MILLISECOND = 2_000_000  # about, of a GPU at 2 GHz


def tokens(names: tuple[int, ...], layout: KVLayout = LAYOUT) -> Tensor:
    """One row `[2 * layers, 1, heads, tokens, head_dim]`: random numbers for each token, the same for the same name."""
    made = []
    for name in names:
        generator = torch.Generator().manual_seed(name)
        made.append(torch.randn(2 * layout.num_layers, 1, layout.num_heads, 1, layout.head_dim, generator=generator))
    return torch.cat(made, dim=3)


class Machine:
    """Streams by number, delays in them, and pools too small for what is put into them.

    Attributes:
        seen: what was read, and what it must be once the device has done its work.
    """

    def __init__(self, *, streams: int = 4) -> None:
        self.has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.has_gpu else torch.device("cpu")
        self.layout = replace(LAYOUT, device=self.device)
        self.seen: list[tuple[Tensor, tuple[int, ...], str]] = []
        self._streams: list[Any] = [_stream(self.device) for _ in range(streams)]

    def pool(self, entries: int, *, headroom: int = LAYOUT.max_tokens, **settings: Any) -> KVPool:
        """A pool with room for so many whole entries, and slots for `headroom` tokens more."""
        slots = entries * LAYOUT.max_tokens
        storage = KVStorage(self.layout, slots, headroom_slots=headroom, wait_timeout=HANG_SECONDS)
        pool = KVPool(self.layout, entries, max_slots=slots, storage=storage, **settings)
        pool.owns_storage = True  # closed with it
        return pool

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Make a stream the current one of this thread."""
        if self.has_gpu:
            with torch.cuda.stream(self._streams[stream]):
                yield
        else:
            yield

    def stream(self, number: int) -> Any:
        """A stream to be named in a call; None on a CPU."""
        return self._streams[number]

    def delay(self, milliseconds: float) -> None:
        """Keep the current stream busy for a while; the host goes on."""
        if self.has_gpu:
            torch.cuda._sleep(int(milliseconds * CYCLES_OF_A_MILLISECOND))  # type: ignore[no-untyped-call]

    def after(self, earlier: int, later: int) -> None:
        """What a user does: order one stream after another."""
        if self.has_gpu:
            self._streams[later].wait_stream(self._streams[earlier])

    def settle(self) -> None:
        """Wait until the device has done everything."""
        if self.has_gpu:
            torch.cuda.synchronize(self.device)

    def row(self, names: tuple[int, ...]) -> KeysValues:
        """A row of named tokens on the device, made in the current stream."""
        return KeysValues.from_packed(self.upload(tokens(names)))

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy on the device that nobody waits for: from pinned memory, as one from pageable memory may block."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.has_gpu else tensor.clone()

    def see(self, tensor: Tensor, names: tuple[int, ...], what: str) -> None:
        """Copy what was read, in the current stream, to be compared at the end."""
        self.seen.append((tensor.clone(), names, what))

    def wrong(self) -> list[str]:
        """What was read wrongly, once everything is done."""
        self.settle()
        return [what for tensor, names, what in self.seen if not torch.equal(tensor.cpu(), tokens(names))]


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
