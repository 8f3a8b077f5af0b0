"""`FreeBuffers`: the buffers of closed batches, for later gathers of the same shape. A known shape takes no lock."""

from __future__ import annotations

import threading
from contextlib import suppress
from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor

from ..locks.gate import gate
from .layout import KVLayout
from .modes import plain_torch_state
from .streams import NO_TICKS, Ticks

__all__ = ["FreeBuffers", "new_buffer"]

MAX_SHAPES = 16  # whose buffers are kept
KEPT = 4  # of a shape


class FreeBuffer(NamedTuple):
    """A buffer that waits for the next gather of its shape."""

    data: Tensor
    ticks: Ticks  # uses that the next one has to be ordered after
    thread: int  # that gave it back


class FreeBuffers:
    """Those of a storage or, over these, of a search: what threads that search apart do not hand to each other.

    Args:
        layout: of what is gathered.
        others: where a buffer is looked for next, and left in the end.
    """

    def __init__(self, layout: KVLayout, others: FreeBuffers | None = None) -> None:
        self._layout = layout
        self._others = others
        # By batch and columns. Each list is popped from and appended to without the lock, which is for the dict.
        self.by_shape: dict[tuple[int, int], list[FreeBuffer]] = {}
        self._lock = threading.Lock()
        self._closed = False

    def take(self, batch: int, columns: int) -> tuple[Tensor, Ticks]:
        """A buffer `[2 * layers, batch, heads, columns, head_dim]` and the uses it has to be ordered after."""
        free = self.by_shape.get((batch, columns))
        if free:
            # Rather one that this thread gave back: another's lies in the other core's caches.
            here, place = get_ident(), -1
            with suppress(IndexError):  # another thread took the last
                if free[-1].thread != here:
                    place = next((place for place, buffer in enumerate(free) if buffer.thread == here), -1)
                buffer = free.pop(place)
                return buffer.data, buffer.ticks
        if self._others is not None:
            return self._others.take(batch, columns)
        return new_buffer(self._layout, batch, columns), NO_TICKS

    def give_back(self, buffer: Tensor, ticks: Ticks) -> None:
        """Take a buffer back for the next gather of its shape; at most `KEPT` of a shape are kept."""
        # Detached: whatever its user wrote into it, with whatever gradients, ends with its user.
        sizes, returned = buffer.shape, FreeBuffer(buffer.detach(), ticks, get_ident())
        shape = (sizes[1], sizes[3])
        free = self.by_shape.get(shape)
        if free is None:
            free = self._free_of(shape)
        free.append(returned)
        if len(free) > KEPT:  # each thread that makes it one too many takes one off
            with suppress(IndexError):
                free.pop()
        if self._closed or (self._others is not None and self._others._closed):  # perhaps just now
            free.clear()

    def _free_of(self, shape: tuple[int, int]) -> list[FreeBuffer]:
        """The free buffers of a shape, which is remembered from now on."""
        with gate.lock, self._lock:
            if shape not in self.by_shape and len(self.by_shape) >= MAX_SHAPES:
                del self.by_shape[next(iter(self.by_shape))]
            return self.by_shape.setdefault(shape, [])

    def leave(self) -> None:
        """Give what there is to the others: a search has ended."""
        assert self._others is not None
        for free in list(self.by_shape.values()):
            with suppress(IndexError):  # as in `take`
                while free:
                    buffer = free.pop()
                    self._others.give_back(buffer.data, buffer.ticks)

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        with gate.lock, self._lock:
            known, self.by_shape = self.by_shape, {}
        for free in known.values():
            free.clear()


def new_buffer(layout: KVLayout, batch: int, columns: int) -> Tensor:
    """A buffer that is the caller's for good, and no inference tensor, whatever mode the thread is in."""
    shape = (2 * layout.num_layers, batch, layout.num_heads, columns, layout.head_dim)
    if not torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)
    with plain_torch_state():
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)
