"""`KVLayout`: the shape of one token's keys and values, and what it costs in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .._checks import positive_int
from ..errors import InvalidArgumentError, InvalidTypeError, shown

__all__ = ["SUPPORTED_DEVICES", "KVLayout", "device_of", "slots_of_capacity"]

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SUPPORTED_DEVICES = ("cpu", "cuda")


def device_of(device: object, name: str = "device") -> torch.device:
    """`device` as a `torch.device`, as tensors there name it, or an error that names the argument."""
    try:
        found: torch.device = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"{name} must name a torch device ('cpu', 'cuda:0'), got {shown(device)}") from error
    if found.type == "cpu":
        return torch.device("cpu")  # a tensor's device is never "cpu:0", which does not equal it
    if found.type == "cuda" and found.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return found


@dataclass(frozen=True)
class KVLayout:
    """The shape of a model's K/V cache. Immutable; two pools can share entries only if their layouts are equal.

    Args:
        num_layers: transformer layers.
        num_heads: attention heads of each layer.
        head_dim: numbers of one head's key (or value).
        max_tokens: the window: the largest number of tokens that an entry holds.
        dtype: float32, float16 or bfloat16; what goes in comes out in the same dtype.
        device: where the slots live.

    Raises:
        InvalidArgumentError: a size below 1, an unsupported dtype, a device that torch does not know.
        InvalidTypeError: a size that is no int, a dtype that is no `torch.dtype`.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    max_tokens: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "max_tokens"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))
        if not isinstance(self.dtype, torch.dtype):
            raise InvalidTypeError(f"dtype must be a torch.dtype, got {self.dtype!r}")
        if self.dtype not in SUPPORTED_DTYPES:
            raise InvalidArgumentError(f"dtype must be one of {SUPPORTED_DTYPES}, got {self.dtype}")
        device = device_of(self.device)
        if device.type not in SUPPORTED_DEVICES:
            raise InvalidArgumentError(f"device must be a CPU or a CUDA device, got {device}")
        if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
            raise InvalidArgumentError(f"device must be there, and torch finds no {device}")
        object.__setattr__(self, "device", device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one slot: K and V of one token over all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of an entry that fills the window and shares nothing."""
        return self.bytes_per_token * self.max_tokens


def slots_of_capacity(layout: KVLayout, max_entries: int, max_slots: int | None, max_bytes: int | None) -> int:
    """The slot quota that a caller stated, in slots, in bytes, or not at all (full windows)."""
    if max_slots is not None and max_bytes is not None:
        raise InvalidArgumentError(f"give max_slots or max_bytes, not both: got {max_slots} and {max_bytes}")
    if max_bytes is not None:
        max_slots = positive_int("max_bytes", max_bytes) // layout.bytes_per_token
        given = f"max_bytes={max_bytes}"
    elif max_slots is not None:
        max_slots = positive_int("max_slots", max_slots)
        given = f"max_slots={max_slots}"
    else:
        return max_entries * layout.max_tokens
    if max_slots < layout.max_tokens:
        raise InvalidArgumentError(
            f"{given} is room for {max_slots} tokens, less than one window of {layout.max_tokens} tokens; "
            f"max_slots={layout.max_tokens} or max_bytes={layout.bytes_per_entry} is the least"
        )
    return max_slots
