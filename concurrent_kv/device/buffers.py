"""`FreeBuffers`: the buffers of closed batches, for later gathers of about their size. A known size takes no lock."""

from __future__ import annotations

import math
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

MAX_SIZES = 16  # of which buffers are kept
KEPT = 4  # of a size
MAX_SHAPES = 256  # that are looked up without arithmetic


class FreeBuffer(NamedTuple):
    """A buffer that waits for the next gather of its size."""

    data: Tensor  # of its last batch's shape, at the start of its memory
    batch: int
    columns: int
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
        # By size, see `size_of`, and once more by the batch and the columns that have been asked for, which are small
        # ints: without the GIL, CPython locks a dict where a key is another thread's object. Each list is popped from
        # and appended to without the lock, which is for the dicts.
        self.by_size: dict[int, list[FreeBuffer]] = {}
        self._by_shape: dict[int, dict[int, list[FreeBuffer]]] = {}
        self._shapes = 0
        self._lock = threading.Lock()
        self._closed = False

    def take(self, batch: int, columns: int) -> tuple[Tensor, Ticks]:
        """A buffer `[2 * layers, batch, heads, columns, head_dim]` and the uses it has to be ordered after."""
        try:
            free = self._by_shape[batch][columns]
        except KeyError:
            free = self._free_of(batch, columns) if self.by_size else []
        if free:
            # Rather one that this thread gave back: another's lies in the other core's caches.
            here, place = get_ident(), -1
            with suppress(IndexError):  # another thread took the last
                if free[-1].thread != here:
                    place = next((place for place, buffer in enumerate(free) if buffer.thread == here), -1)
                buffer = free.pop(place)
                if buffer.columns == columns and buffer.batch == batch:
                    return buffer.data, buffer.ticks
                data = _in_shape(buffer.data, batch, columns)
                if data is not None:
                    return data, buffer.ticks
        if self._others is not None:
            return self._others.take(batch, columns)
        return new_buffer(self._layout, batch, columns, spare=size_of(batch * columns) - batch * columns), NO_TICKS

    def give_back(self, buffer: Tensor, ticks: Ticks) -> None:
        """Take a buffer back for the next gather of its size; at most `KEPT` of a size are kept."""
        # Detached: whatever its user wrote into it, with whatever gradients, ends with its user.
        _, batch, _, columns, _ = buffer.shape
        returned = FreeBuffer(buffer.detach(), batch, columns, ticks, get_ident())
        try:
            free = self._by_shape[batch][columns]
        except KeyError:
            free = self._free_of(batch, columns)
        free.append(returned)
        if len(free) > KEPT:  # each thread that makes it one too many takes one off
            with suppress(IndexError):
                free.pop()
        if self._closed or (self._others is not None and self._others._closed):  # perhaps just now
            free.clear()

    def _free_of(self, batch: int, columns: int) -> list[FreeBuffer]:
        """The free buffers for a shape, which is remembered from now on."""
        size = size_of(batch * columns)
        with gate.lock, self._lock:
            if self._shapes >= MAX_SHAPES:
                self._by_shape, self._shapes = {}, 0
            if size not in self.by_size and len(self.by_size) >= MAX_SIZES:
                self._by_shape, self._shapes = {}, 0
                del self.by_size[next(iter(self.by_size))]
            self._shapes += 1  # or one too many, where another thread was faster
            return self._by_shape.setdefault(batch, {}).setdefault(columns, self.by_size.setdefault(size, []))

    def leave(self) -> None:
        """Give what there is to the others: a search has ended."""
        assert self._others is not None
        for free in list(self.by_size.values()):
            with suppress(IndexError):  # as in `take`
                while free:
                    buffer = free.pop()
                    self._others.give_back(buffer.data, buffer.ticks)

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        with gate.lock, self._lock:
            known, self.by_size, self._by_shape, self._shapes = self.by_size, {}, {}, 0
        for free in known.values():
            free.clear()


def size_of(tokens: int) -> int:
    """Tokens that a buffer has memory for which is to hold so many: four sizes from each power of two to the next.

    The batches of a growing tree have a few more columns every time, and share a buffer that the caches know.
    """
    step = 1 << max(0, tokens.bit_length() - 3)
    return -(-tokens // step) * step


def _in_shape(buffer: Tensor, batch: int, columns: int) -> Tensor | None:
    """A buffer's memory as that of another batch; None if its last user has given it other memory."""
    planes, _, heads, _, head_dim = buffer.shape
    shape = (planes, batch, heads, columns, head_dim)
    if buffer.untyped_storage().nbytes() < math.prod(shape) * buffer.itemsize:
        return None
    with plain_torch_state():
        return _at_start(buffer, shape)


def _at_start(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The start of a buffer's memory, contiguous in another shape. No view of it, as far as gradients go."""
    _, _, heads, columns, head_dim = shape
    of_row = heads * columns * head_dim
    return buffer.as_strided(shape, (shape[1] * of_row, of_row, columns * head_dim, head_dim, 1), 0).detach()


def new_buffer(layout: KVLayout, batch: int, columns: int, *, spare: int = 0) -> Tensor:
    """A buffer that is the caller's for good, and no inference tensor, whatever mode the thread is in.

    `spare`: tokens that its memory has room for behind it.
    """
    shape = (2 * layout.num_layers, batch, layout.num_heads, columns, layout.head_dim)
    if not torch.is_inference_mode_enabled() and not spare:
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)
    with plain_torch_state():
        if not spare:
            return torch.empty(shape, dtype=layout.dtype, device=layout.device)
        numbers = math.prod(shape) // (batch * columns) * (batch * columns + spare)
        return _at_start(torch.empty(numbers, dtype=layout.dtype, device=layout.device), shape)
