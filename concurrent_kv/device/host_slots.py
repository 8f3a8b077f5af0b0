"""`HostSlots`: slots in host memory, and the two copies between them and a tensor of slots on a device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ClosedError
from .layout import KVLayout
from .modes import plain_torch_state
from .moving import upload
from .slot_numbers import SlotArray
from .tensors import SlotTensor, in_units

__all__ = ["HostSlots", "runs_of"]

FEW_RUNS = 8  # of slots that follow each other, each a copy of its own


class HostSlots:
    """Slots for tokens in host memory. Slot 0 is not used.

    Beside a GPU they are `[slots + 1, 2 * layers, heads, head_dim]`. A token is contiguous: tokens in slots that follow
    each other are copied to and from the GPU in one piece. Only copies of streams touch them, in the order in which
    those run: the host never reads or writes a byte by itself. Where the device is the host, they are
    `[2 * layers, slots + 1, heads, head_dim]`, as the slots of the pool.

    Allocated once, and not written to before a token is stored.

    Args:
        layout: shapes and dtype of the tokens, and the device that they come from.
        num_slots: usable slots (1 to `num_slots`).
        pinned: whether the memory is page-locked, so that copies from and to a GPU run by themselves.
    """

    def __init__(self, layout: KVLayout, num_slots: int, *, pinned: bool) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self._on_host = layout.device.type == "cpu"
        planes = 2 * layout.num_layers
        sizes = (planes, num_slots + 1) if self._on_host else (num_slots + 1, planes)
        shape = (*sizes, layout.num_heads, layout.head_dim)
        self._heads: SlotArray = np.arange(layout.num_heads, dtype=np.int64)[:, None]
        with plain_torch_state():
            self.data: Tensor = torch.empty(shape, dtype=layout.dtype, pin_memory=pinned)

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise ClosedError("the storage of this tier was freed by close()")
        raise AttributeError(name)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self.data.nbytes

    def store(self, tensor: SlotTensor, source: SlotArray, slots: SlotArray) -> tuple[Tensor, ...]:
        """Copy slot `source[i]` of `tensor` into slot `slots[i]`, for every `i`.

        Returns what has to live until the copies are done.
        """
        with plain_torch_state():
            if self._on_host:
                _copy_slots(tensor.data, source, self.data, slots)
                return ()
            index = upload(source, self.layout.device)
            found = tensor.data.index_select(1, index)  # [2 * layers, tokens, heads, head_dim]
            tokens = found.transpose(0, 1).contiguous()
            for first, last, slot in runs_of(slots):
                self.data[slot : slot + last - first].copy_(tokens[first:last], non_blocking=True)
            return index, found, tokens

    def load(self, slots: SlotArray) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A copy of the tokens in some slots, on the device: `[2 * layers, 1, heads, tokens, head_dim]`, contiguous.

        Returns also what has to live until the copies are done.
        """
        with plain_torch_state():
            if self._on_host:
                planes, _, heads, head_dim = self.data.shape
                by_head = torch.from_numpy((slots * heads + self._heads).ravel())
                found = self.data.view(planes, -1, head_dim).index_select(1, by_head)
                return found.view(planes, 1, heads, len(slots), head_dim), ()
            shape = (len(slots), *self.data.shape[1:])
            tokens = torch.empty(shape, dtype=self.layout.dtype, device=self.layout.device)
            for first, last, slot in runs_of(slots):
                tokens[first:last].copy_(self.data[slot : slot + last - first], non_blocking=True)
            row = tokens.permute(1, 2, 0, 3).contiguous().unsqueeze(1)
        return row, (tokens, row)

    def restore(self, slots: SlotArray, tensor: SlotTensor, target: SlotArray) -> tuple[Tensor, ...]:
        """Copy slot `slots[i]` into slot `target[i]` of `tensor`, for every `i`; otherwise as `store`."""
        if self._on_host:
            with plain_torch_state():
                _copy_slots(self.data, slots, tensor.data, target)
            return ()
        row, temporaries = self.load(slots)
        rows, columns = np.zeros(len(slots), dtype=np.int64), np.arange(len(slots), dtype=np.int64)
        return temporaries + tensor.scatter(row, rows, columns, target)

    def read(self, slots: SlotArray) -> Tensor:
        """The tokens of some slots: contiguous `[slots, 2 * layers, heads, head_dim]`.

        The host reads them: what the device does with these slots must be over.
        """
        with plain_torch_state():
            index = torch.from_numpy(slots)
            if self._on_host:
                return self.data.index_select(1, index).transpose(0, 1).contiguous()
            return self.data.index_select(0, index)

    def may_block_to_store(self, count: int) -> bool:
        """Whether storing so many slots may wait for a disk: never."""
        return False

    def may_block_to_load(self, slots: SlotArray) -> bool:
        """Whether loading these may wait for a disk: never."""
        return False

    def free(self) -> None:
        """Give the memory back; copies under way keep theirs until they are done."""
        self.__dict__.pop("data", None)


def _copy_slots(source: Tensor, slots: SlotArray, target: Tensor, into: SlotArray) -> None:
    """Copy slots of one tensor of planes into slots of another one, both of the host."""
    edges = np.flatnonzero((slots[1:] - slots[:-1] != 1) | (into[1:] - into[:-1] != 1)) + 1
    if len(edges) < FEW_RUNS:  # no copy on the way
        for first, last in pairwise([0, *edges.tolist(), len(slots)]):
            from_slot, to_slot = int(slots[first]), int(into[first])
            target[:, to_slot : to_slot + last - first].copy_(source[:, from_slot : from_slot + last - first])
    else:
        found = source.index_select(1, torch.from_numpy(slots))
        in_units(target).index_copy_(1, torch.from_numpy(into), in_units(found))


def runs_of(slots: SlotArray) -> Iterator[tuple[int, int, int]]:
    """Where slots follow each other: the first and the last place, and the slot at the first."""
    edges = [0, *(np.flatnonzero(slots[1:] - slots[:-1] != 1) + 1).tolist(), len(slots)]
    for first, last in pairwise(edges):
        if first < last:
            yield first, last, int(slots[first])
