"""What the tests of the compiled module share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concurrent_kv.native import native
from tests.support import bits, choose_loops

needs_native = pytest.mark.skipif(native is None, reason="the compiled module was not built, or is switched off")


def without_native(patch: pytest.MonkeyPatch) -> None:
    """Have every module use the counterparts in Python."""
    choose_loops(patch, "torch")


def random_numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers around 0 and, here and there, an infinity or a negative zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator)
    chosen = torch.rand(shape, generator=generator)
    numbers[chosen < 0.02] = float("inf")
    numbers[chosen > 0.98] = -0.0
    return numbers.to(dtype)


def random_bits(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits at all: NaN with payloads and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    wide = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, wide, generator=generator, dtype=torch.uint8).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether both have the same bytes."""
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))
