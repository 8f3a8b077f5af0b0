"""New tokens of a caller's into a batch in host memory: one call of compiled code, where it can read their tensors.

Its counterpart, for every other tensor and device, is `Batch.append`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from ..native import native
from .tensor_checks import address_of

__all__ = ["ALL_LAYERS", "HostMemory", "append_in", "host_memory"]

ALL_LAYERS = -1

# See `append` in _native.pyi.
HostMemory: TypeAlias = "tuple[()] | tuple[Tensor, Any, int, int, int, int, int, int, int]"


def host_memory(buffer: Tensor) -> HostMemory:
    """A batch `[2 * layers, batch, heads, columns, head_dim]` as compiled code appends to it; empty if torch does."""
    plain = native is not None and buffer.is_cpu and buffer.dim() == 5
    address = address_of(buffer) if plain and buffer.is_contiguous() else 0
    if not address:
        return ()
    planes, batch, heads, columns, head_dim = buffer.shape
    return buffer, buffer.dtype, address, planes // 2, batch, heads, columns, head_dim, buffer.itemsize


def append_in(memory: HostMemory, layer: int, end: int, keys: Tensor, values: Tensor) -> int:
    """Copy new tokens of a layer, or stacked of `ALL_LAYERS`, into a batch from column `end` on; returns how many.

    0, with nothing copied, where torch has to do it, or to say why it cannot be done.
    """
    # Tangents go where torch copies.
    if not memory or forward_ad._current_level >= 0:
        return 0
    tokens: int = native.append(memory, layer, end, keys, values)
    if tokens and not memory[0].is_inference():
        increment_version(memory[0])
    return tokens
