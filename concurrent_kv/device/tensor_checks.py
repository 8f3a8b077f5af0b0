"""`check_tensor`: tensors that callers pass in; `address_of`: whether compiled code may read them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError

__all__ = ["LARGE_BYTES", "address_of", "check_tensor"]

LARGE_BYTES = 4 << 20  # of a copy that torch does sooner, if it has several threads


def check_tensor(name: str, tensor: object) -> Tensor:
    """`tensor` if it is dense, or an error that names the argument. (It may be on a device without data, as "meta".)"""
    if not isinstance(tensor, Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        what = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout} and dtype {tensor.dtype}"
        makes = "dequantize" if tensor.is_quantized else "to_padded_tensor" if tensor.is_nested else "to_dense"
        raise InvalidArgumentError(f"{name} must be a dense tensor, got {what}; its {makes}() makes one")
    return tensor


def address_of(tensor: Tensor, nbytes: int = 0) -> int:
    """Where the numbers of a contiguous tensor in host memory lie, for compiled code that copies so many bytes.

    0 if they are not simply there, or if torch does it sooner.
    """
    if type(tensor) is not Tensor or (nbytes >= LARGE_BYTES and torch.get_num_threads() > 1):
        return 0
    if tensor.is_neg():  # what lies there has the other sign
        return 0
    try:
        return tensor.data_ptr()  # 0: zeros without any memory
    except RuntimeError:  # wrapped by a transform of torch.func
        return 0
