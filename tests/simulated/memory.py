"""Memory of a simulated device and pinned memory of the host: what is in it before it is written and after it is freed.

An allocator hands memory on within its stream: what is freed while the stream still works on it may be handed out
again at once, to later work of the same stream. So memory becomes garbage, in the order of its stream, where it is
allocated (an earlier owner's work comes to an end) and where it is freed. Other streams are waited for only where the
allocator was told of them. Pinned memory is handed on when the copies from it are done.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .queues import Queues, SimStream

__all__ = ["GARBAGE", "Allocation", "Memory", "SimTensor"]

GARBAGE = 0xCB  # of every byte: as a float no label of a program, nor anything small; out of range as an index


class SimTensor(torch.Tensor):
    """A tensor in memory of a simulated device, or in pinned memory of the host."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    home: torch.device
    device = property(lambda self: self.home)

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        """In ordinary memory of the host: torch's own takes this memory, which is the host's, to be there already."""
        return torch.empty(self.shape, dtype=self.dtype).copy_(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} was called outside of the simulated device")


class Allocation:
    """One block of memory.

    Attributes:
        bytes: all of it, as the device sees it; not what its owners hold, who can be gone before the device is done.
        stream: the stream it was allocated on; None for pinned memory.
        told: streams that the allocator was told of.
        is_torchs: whether torch's allocator made it; others' pinned memory is told of no copies.
    """

    def __init__(self, where: torch.device, size: int, stream: SimStream | None) -> None:
        self.where = where
        self.memory = np.full(max(size, 8), GARBAGE, dtype=np.uint8)
        self.bytes = torch.from_numpy(self.memory)
        self.stream = stream
        self.told: set[SimStream] = set()
        self.is_torchs = True

    def spoil(self) -> None:
        """Fill it with garbage."""
        self.memory.fill(GARBAGE)


class Memory:
    """What is allocated, by the address of its first byte."""

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._allocations: dict[int, Allocation] = {}

    def new(self, shape: Sequence[int], dtype: torch.dtype, where: torch.device, stream: SimStream | None) -> SimTensor:
        """A tensor of garbage; freed with the last view of it."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        allocation = Allocation(where, size, stream)
        handle = allocation.memory.view()  # the storage owns this one, and nobody else does
        weakref.finalize(handle, self._free, allocation).atexit = False
        self._allocations[allocation.bytes.data_ptr()] = allocation
        tensor = torch.from_numpy(handle)[:size].view(dtype).view(tuple(shape))
        return self.wrap(tensor, where)

    def wrap(self, tensor: Tensor, where: torch.device) -> SimTensor:
        """A tensor that says that it is there."""
        wrapped = tensor if isinstance(tensor, SimTensor) else torch.Tensor._make_subclass(SimTensor, tensor)
        wrapped.home = where
        return wrapped

    def of(self, tensor: Tensor) -> Allocation | None:
        """The block that a tensor is in; None for ordinary memory of the host."""
        return self._allocations.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, SimTensor) else None

    def seen_by_device(self, tensor: Tensor) -> Tensor:
        """The same elements without a claim to the memory: what an operator that runs later reads and writes."""
        allocation = self.of(tensor)
        if allocation is None:
            return tensor
        with _disable_current_modes():
            whole = allocation.bytes[: len(allocation.bytes) // tensor.dtype.itemsize * tensor.dtype.itemsize]
            return whole.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())

    def _free(self, allocation: Allocation) -> None:
        self._allocations.pop(allocation.bytes.data_ptr(), None)
        left = {*allocation.told, allocation.stream} - {None}

        def let_go(stream: SimStream | None) -> None:
            left.discard(stream)
            if not left:
                allocation.spoil()

        for stream in tuple(left) or (None,):
            if stream is None:
                let_go(stream)
            else:
                self._queues.pass_by(stream, partial(let_go, stream))
