"""`KeysValues`: keys and values of a batch of token sequences; what goes into a pool and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int
from ..device.layout import SUPPORTED_DEVICES, KVLayout, device_of
from ..device.modes import plain_torch_state
from ..device.moving import joined_on
from ..device.tensor_checks import check_tensor
from ..errors import InvalidArgumentError, InvalidTypeError, shown

__all__ = ["KeysValues", "check_fits", "whole_row"]


class KeysValues:
    """Keys and values `[layers, batch, heads, tokens, head_dim]`, with the number of valid tokens of each row.

    Rows are left-padded: the valid tokens of row `b` are the columns `end - lengths[b]` to `end`, so that every row's
    newest token stands in the same column.

    Args:
        keys: `[layers, batch, heads, tokens, head_dim]`.
        values: the same shape, dtype and device.
        lengths: valid tokens of each row, 1 to `end` (0 for an empty row); all `end` if left out.
        end: the column after the newest token; all columns if left out.

    Raises:
        InvalidTypeError: `keys` or `values` is no tensor.
        InvalidArgumentError: one is sparse or quantised, shapes, dtypes or devices differ, or a length is out of range.
    """

    __slots__ = ("end", "keys", "lengths", "packed", "values")

    keys: Tensor  # [layers, batch, heads, tokens, head_dim]
    values: Tensor  # [layers, batch, heads, tokens, head_dim]
    packed: Tensor | None  # [2 * layers, batch, heads, tokens, head_dim], where keys and values are views of one tensor
    lengths: tuple[int, ...]
    end: int

    def __init__(
        self, keys: Tensor, values: Tensor, lengths: Sequence[int] | None = None, end: int | None = None
    ) -> None:
        for name, tensor in (("keys", keys), ("values", values)):
            if check_tensor(name, tensor).dim() != 5:
                raise InvalidArgumentError(
                    f"{name} must have the five dimensions [layers, batch, heads, tokens, head_dim], "
                    f"got the shape {tuple(tensor.shape)}; KeysValues.single() takes one sequence without the batch"
                )
        for name in ("shape", "dtype", "device"):
            if getattr(keys, name) != getattr(values, name):
                raise InvalidArgumentError(
                    f"keys and values must have the same {name}, got {getattr(keys, name)} and {getattr(values, name)}"
                )
        batch, tokens = keys.shape[1], keys.shape[3]
        self.end = tokens if end is None else positive_int("end", end, minimum=0)
        if self.end > tokens:
            raise InvalidArgumentError(f"end must be at most the {tokens} columns of keys, got {self.end}")
        if lengths is None:
            self.lengths = (self.end,) * batch
        else:
            if not isinstance(lengths, Iterable):
                raise InvalidTypeError(f"lengths must be a sequence of {batch} numbers, got {shown(lengths)}")
            self.lengths = tuple(positive_int("lengths", length, minimum=0) for length in lengths)
            if len(self.lengths) != batch:
                raise InvalidArgumentError(f"lengths must have one number for each of {batch} rows, got {self.lengths}")
            if any(length > self.end for length in self.lengths):
                raise InvalidArgumentError(f"lengths must be at most end={self.end}, got {self.lengths}")
        self.keys, self.values, self.packed = keys, values, None

    @classmethod
    def from_packed(cls, packed: Tensor, lengths: Sequence[int] | None = None, end: int | None = None) -> KeysValues:
        """Views of one tensor `[2 * layers, batch, heads, tokens, head_dim]`: all layers' keys, then all values."""
        if check_tensor("packed", packed).dim() != 5 or packed.shape[0] % 2:
            raise InvalidArgumentError(
                f"packed must have the shape [2 * layers, batch, heads, tokens, head_dim], got {tuple(packed.shape)}"
            )
        layers = packed.shape[0] // 2
        keys_values = cls(packed[:layers], packed[layers:], lengths, end)
        keys_values.packed = packed
        return keys_values

    @classmethod
    def single(cls, keys: Tensor, values: Tensor) -> KeysValues:
        """One sequence, `[layers, heads, tokens, head_dim]` each, as a batch of one row; no copy."""
        for name, tensor in (("keys", keys), ("values", values)):
            if check_tensor(name, tensor).dim() != 4:
                raise InvalidArgumentError(
                    f"{name} must have the four dimensions [layers, heads, tokens, head_dim], "
                    f"got the shape {tuple(tensor.shape)}"
                )
        return cls(keys.unsqueeze(1), values.unsqueeze(1))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.keys.shape[1]

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return self.keys.shape[0]

    def row(self, index: int) -> KeysValues:
        """Row `index` alone, with its valid tokens only; views, no copy."""
        if not -self.batch_size <= index < self.batch_size:
            raise IndexError(f"index must be 0 to {self.batch_size - 1}, or as far from the end, got {index}")
        index %= self.batch_size
        rows, columns = slice(index, index + 1), slice(self.end - self.lengths[index], self.end)
        if self.packed is not None:
            return KeysValues.from_packed(self.packed[:, rows, :, columns])
        return KeysValues(self.keys[:, rows, :, columns], self.values[:, rows, :, columns])

    def rows(self) -> Iterator[KeysValues]:
        """Every row alone, in order."""
        return (self.row(index) for index in range(self.batch_size))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer up to `end`, `[batch, heads, end, head_dim]` each; views, no copy."""
        return self.keys[index, :, :, : self.end], self.values[index, :, :, : self.end]

    def to(self, device: torch.device | str) -> KeysValues:
        """The same on another device (the same object where it is there already); see `copy`."""
        target = device_of(device)
        return self if self.keys.device == target else self.copy(target)

    def copy(self, device: torch.device | None = None) -> KeysValues:
        """A copy that shares no memory with this one, packed, without the columns after `end`.

        Args:
            device: where it is made; where this is, if left out. A copy to a CPU is complete when this returns; one
                between GPUs, or from a CPU to a GPU, comes in the order of their current streams.

        Raises:
            InvalidArgumentError: these tokens are on a device without data ("meta"), and `device` is another.
        """
        target = self.keys.device if device is None else device_of(device)
        if self.keys.is_meta and target.type != "meta":
            raise InvalidArgumentError(f"device must be meta for tokens on meta, which have no data, got {target}")
        whole = (self.keys, self.values) if self.packed is None else (self.packed,)
        parts = [tensor[..., : self.end, :].detach() for tensor in whole]
        return KeysValues.from_packed(joined_on(target, parts), self.lengths)

    def __copy__(self) -> KeysValues:
        """Another one over the same tensors."""
        same = KeysValues(self.keys, self.values, self.lengths, self.end)
        same.packed = self.packed
        return same

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled and deep-copied as `copy()` makes it. Slot by slot, the memory that its tensors share, perhaps with
        # much else, would be written three times, and what has a gradient could not be copied at all.
        return KeysValues.from_packed, (self.copy().packed, self.lengths)

    def __repr__(self) -> str:
        layers, batch, heads, tokens, head_dim = self.keys.shape
        return (
            f"KeysValues(layers={layers}, batch={batch}, heads={heads}, tokens={tokens}, head_dim={head_dim}, "
            f"lengths={self.lengths}, end={self.end}, dtype={self.keys.dtype}, device={self.keys.device})"
        )


def whole_row(packed: Tensor, tokens: int | None = None) -> KeysValues:
    """As `KeysValues.from_packed`, of one row that was made to fit: nothing is checked.

    Its first `tokens` columns are valid, all of them if left out.
    """
    layers = packed.shape[0] // 2
    if tokens is None:
        tokens = packed.shape[3]
    made = KeysValues.__new__(KeysValues)
    made.keys, made.values = torch.split_with_sizes(packed, (layers, layers))
    made.packed = packed
    made.lengths, made.end = (tokens,), tokens
    return made


def check_fits(kv: object, layout: KVLayout, *, rows: int | None = None) -> KeysValues:
    """`kv` on the device of `layout` if each of its rows can be an entry there, or an error that says why not.

    What is on another device is copied, in the current stream; from a CPU it is the caller's again when this returns.
    """
    if not isinstance(kv, KeysValues):
        raise InvalidTypeError(f"kv must be a KeysValues, got {type(kv).__name__}")
    layers, batch, heads, _, head_dim = kv.keys.shape
    expected = (layout.num_layers, layout.num_heads, layout.head_dim)
    if (layers, heads, head_dim) != expected:
        raise InvalidArgumentError(
            f"kv must have layers={expected[0]}, heads={expected[1]}, head_dim={expected[2]}, "
            f"got layers={layers}, heads={heads}, head_dim={head_dim}"
        )
    if rows is not None and batch != rows:
        raise InvalidArgumentError(f"kv must have {rows} row{'s' if rows != 1 else ''}, got {batch}")
    if kv.keys.dtype != layout.dtype:
        raise InvalidArgumentError(f"kv must have the dtype {layout.dtype}, got {kv.keys.dtype}")
    if min(kv.lengths) < 1 or max(kv.lengths) > layout.max_tokens:
        raise InvalidArgumentError(f"kv must have 1 to {layout.max_tokens} tokens in every row, got {kv.lengths}")
    if kv.keys.device != layout.device:
        if kv.keys.device.type not in SUPPORTED_DEVICES:
            raise InvalidArgumentError(
                f"kv must be on {layout.device}, got {kv.keys.device}, from where nothing is copied"
            )
        with plain_torch_state():
            return kv.copy(layout.device)
    return kv
