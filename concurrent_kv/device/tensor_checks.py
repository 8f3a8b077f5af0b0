"""`check_tensor`: tensors that callers pass in."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError

__all__ = ["check_tensor"]


def check_tensor(name: str, tensor: object) -> Tensor:
    """`tensor` if it is dense, or an error that names the argument. (It may be on a device without data, as "meta".)"""
    if not isinstance(tensor, Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        what = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout} and dtype {tensor.dtype}"
        makes = "dequantize" if tensor.is_quantized else "to_padded_tensor" if tensor.is_nested else "to_dense"
        raise InvalidArgumentError(f"{name} must be a dense tensor, got {what}; its {makes}() makes one")
    return tensor
