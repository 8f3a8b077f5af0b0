"""`HostSlots`: slots in host memory, and the two copies between them and a tensor of slots on a device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .layout import KVLayout
from .modes import plain_torch_state
from .moving import upload
from .slot_numbers import SlotArray
from .tensors import SlotTensor

__all__ = ["HostSlots"]


class HostSlots:
    """Slots for tokens in host memory, `[slots + 1, 2 * layers, heads, head_dim]`. Slot 0 is not used.

    A token is contiguous: tokens in slots that follow each other are copied to and from a GPU in one piece. Only copies
    of streams touch them, in the order in which those run: the host never reads or writes a byte by itself, unless the
    device is the host. Allocated once, and not written to before a token is stored.

    Args:
        layout: shapes and dtype of the tokens, and the device that they come from.
        num_slots: usable slots (1 to `num_slots`).
        pinned: whether the memory is page-locked, so that copies from and to a GPU run by themselves.
    """

    def __init__(self, layout: KVLayout, num_slots: int, *, pinned: bool) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.freed = False
        self._on_host = layout.device.type == "cpu"
        shape = (num_slots + 1, 2 * layout.num_layers, layout.num_heads, layout.head_dim)
        with plain_torch_state():
            self.data: Tensor = torch.empty(shape, dtype=layout.dtype, pin_memory=pinned)

    def store(self, tensor: SlotTensor, source: SlotArray, slots: SlotArray) -> tuple[Tensor, ...]:
        """Copy slot `source[i]` of `tensor` into slot `slots[i]`, for every `i`.

        Returns what has to live until the copies are done.
        """
        with plain_torch_state():
            index = upload(source, self.layout.device)
            tokens = tensor.data.index_select(1, index).transpose(0, 1)  # [tokens, 2 * layers, heads, head_dim]
            if self._on_host:
                self.data.index_copy_(0, torch.from_numpy(slots), tokens)
                return ()
            whole = tokens.contiguous()
            for first, last, slot in _runs_of(slots):
                self.data[slot : slot + last - first].copy_(whole[first:last], non_blocking=True)
            return index, tokens, whole

    def load(self, slots: SlotArray) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A copy of the tokens in some slots, on the device: `[2 * layers, 1, heads, tokens, head_dim]`, contiguous.

        Returns also what has to live until the copies are done.
        """
        with plain_torch_state():
            if self._on_host:
                tokens = self.data.index_select(0, torch.from_numpy(slots))
            else:
                tokens = torch.empty(
                    (len(slots), *self.data.shape[1:]), dtype=self.layout.dtype, device=self.layout.device
                )
                for first, last, slot in _runs_of(slots):
                    tokens[first:last].copy_(self.data[slot : slot + last - first], non_blocking=True)
            row = tokens.permute(1, 2, 0, 3).contiguous().unsqueeze(1)
        return row, () if self._on_host else (tokens, row)

    def free(self) -> None:
        """Give the memory back; nothing may still use it."""
        self.freed = True
        self.data = self.data.new_empty(0)


def _runs_of(slots: SlotArray) -> Iterator[tuple[int, int, int]]:
    """Where slots follow each other: the first and the last place, and the slot at the first."""
    edges = [0, *(np.flatnonzero(slots[1:] - slots[:-1] != 1) + 1).tolist(), len(slots)]
    for first, last in pairwise(edges):
        if first < last:
            yield first, last, int(slots[first])
