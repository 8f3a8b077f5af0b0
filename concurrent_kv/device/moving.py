"""Numbers and tensors from one device to another; issued in the current streams of both.

Host memory on the way to a GPU is pinned, so that nothing waits for the copy. What is pinned here is torch's: its
allocator hands such a block on only when the copies from it are done, so that it can be dropped at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cuda import backend_for

__all__ = ["joined_on", "upload"]


def upload(numbers: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """`numbers` on `device`. On a CPU they share the memory; elsewhere the caller can reuse it at once."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def joined_on(device: torch.device, parts: Sequence[Tensor]) -> Tensor:
    """The concatenation along the first dimension of `parts`, of one device and dtype: a copy of its own on `device`.

    Parts in host memory, pinned or not, can be written to and freed as soon as this returns. To a CPU it blocks until
    the copy is done; otherwise the copy comes in the order of the current streams of both devices.
    """
    source = parts[0].device
    if source == device:
        joined = torch.cat(list(parts))
        if source.type != "cpu":
            _protect(parts)
        return joined
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if source.type == "cpu":
        # Through memory of our own: a copy straight from the caller's pinned memory would read what is written there
        # after this has returned.
        joined = torch.empty(shape, dtype=parts[0].dtype, device=source, pin_memory=backend_for(device) is not None)
        torch.cat(list(parts), out=joined)
    else:
        joined = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        _protect(parts)
    moved = torch.empty(shape, dtype=joined.dtype, device=device)
    return moved.copy_(joined, non_blocking=device.type != "cpu")


def _protect(parts: Sequence[Tensor]) -> None:
    """Have tensors of the caller's outlive the copy, whichever stream they were allocated on."""
    backend = backend_for(parts[0].device)
    if backend is not None:
        for part in parts:
            backend.protect(part, backend.current())
