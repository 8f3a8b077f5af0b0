"""LightZero's `KeysValues` container, duck-typed: `[layer]`, `.size`, down to `_keys_values[layer]._k_cache._cache`.

LightZero left-aligns tokens: the valid ones are the columns 0 to `size`; what follows is room.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...device.layout import KVLayout
from ...device.modes import plain_torch_state
from ...device.tensor_checks import check_tensor
from ...errors import InvalidArgumentError, InvalidTypeError, WindowOverflowError
from ...model.kv import KeysValues, whole_row

__all__ = [
    "LightZeroCache",
    "LightZeroKVCache",
    "LightZeroKeysValues",
    "from_lightzero",
    "row_of_lightzero",
    "to_lightzero",
]

SMALL_BYTES = 16 << 10  # of one layer's keys


class LightZeroCache:
    """Keys (or values) of one layer: a buffer `[batch, heads, columns, head_dim]` and the number of valid columns."""

    __slots__ = ("_cache", "_size")

    def __init__(self, cache: Tensor, size: int) -> None:
        self._cache = cache
        self._size = size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, heads, size, head_dim)`."""
        batch, heads, _, head_dim = self._cache.shape
        return batch, heads, self._size, head_dim

    def get(self) -> Tensor:
        """The valid tokens, `[batch, heads, size, head_dim]`; a view."""
        return self._cache[:, :, : self._size]

    def update(self, x: Tensor, tokens: int) -> None:
        """Write `tokens` new tokens after the valid ones, in place.

        Raises:
            WindowOverflowError: the buffer has no such columns; it is unchanged then.
        """
        end = self._size + tokens
        if end > self._cache.shape[2]:
            raise WindowOverflowError(
                f"{tokens} new tokens do not fit: {self._size} of {self._cache.shape[2]} columns are taken"
            )
        self._cache[:, :, self._size : end] = x
        self._size = end

    def reset(self) -> None:
        """Forget every token."""
        self._size = 0

    def prune(self, mask: Any) -> None:
        """Keep the rows for which `mask`, a boolean array, is True."""
        if getattr(mask, "ndim", None) != 1 or mask.shape[0] != self._cache.shape[0]:
            raise InvalidArgumentError(
                f"mask must have one boolean for each of {self._cache.shape[0]} rows, got {mask!r}"
            )
        self._cache = self._cache[torch.as_tensor(mask, device=self._cache.device)]


class LightZeroKVCache:
    """Keys and values of one layer."""

    __slots__ = ("_k_cache", "_v_cache")

    def __init__(self, keys: LightZeroCache, values: LightZeroCache) -> None:
        self._k_cache = keys
        self._v_cache = values

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`(batch, heads, size, head_dim)`."""
        return self._k_cache.shape

    def get(self) -> tuple[Tensor, Tensor]:
        """The valid keys and values, `[batch, heads, size, head_dim]` each; views."""
        return self._k_cache.get(), self._v_cache.get()

    def update(self, k: Tensor, v: Tensor) -> None:
        """Append keys and values `[batch, heads, tokens, head_dim]`; see `LightZeroCache.update`."""
        self._k_cache.update(k, k.size(2))
        self._v_cache.update(v, v.size(2))

    def reset(self) -> None:
        """Forget every token."""
        self._k_cache.reset()
        self._v_cache.reset()

    def prune(self, mask: Any) -> None:
        """Keep the rows for which `mask`, a boolean array, is True."""
        self._k_cache.prune(mask)
        self._v_cache.prune(mask)


class LightZeroKeysValues:
    """All layers' keys and values over one buffer, with the interface of LightZero's `KeysValues` and a `clone`.

    Args:
        packed: `[2 * layers, batch, heads, columns, head_dim]`: all layers' keys, then all values. Not copied.
        size: valid columns.
    """

    # LightZero clones whatever its cache returns, and forgets what it cloned. So the first clone of a private container
    # that nobody has looked into gets its buffer on loan: whichever of the two is looked into while the other one is
    # there takes a copy first. Until then neither has handed out a tensor through which the bytes could change.
    __slots__ = ("__weakref__", "_is_open", "_layers", "_lender", "_loans", "_packed", "_size")

    def __init__(self, packed: Tensor, size: int = 0) -> None:
        self._packed = packed
        self._size = size  # until its layers are made, which know it from then on
        self._layers: tuple[LightZeroKVCache, ...] | None = None
        self._is_open = True  # its buffer is known outside, and may be written to
        self._loans = [True]  # one; taken by `pop`, so that two threads which clone at once do not both get it
        self._lender: weakref.ref[LightZeroKeysValues] | None = None

    @classmethod
    def private(cls, packed: Tensor, size: int) -> LightZeroKeysValues:
        """Over a buffer that nothing else knows or will know."""
        made = cls(packed, size)
        made._is_open = False
        return made

    @property
    def packed(self) -> Tensor:
        """`[2 * layers, batch, heads, columns, head_dim]`: all layers' keys, then all values."""
        if not self._is_open:
            self._open()
        return self._packed

    @property
    def _keys_values(self) -> tuple[LightZeroKVCache, ...]:
        layers = self._layers
        if layers is None:
            if not self._is_open:
                self._open()
            size = self._size
            # No views of each other, as far as gradients go: a model that has some writes to them in place.
            planes = [plane.data for plane in self._packed.unbind()]
            number = len(planes) // 2
            layers = self._layers = tuple(
                [
                    LightZeroKVCache(LightZeroCache(keys, size), LightZeroCache(values, size))
                    for keys, values in zip(planes[:number], planes[number:], strict=True)
                ]
            )
        return layers

    def _open(self) -> None:
        """Make the buffer this one's alone: it is about to be handed out."""
        lender = None if self._lender is None else self._lender()
        if lender is not None or not self._loans:
            with plain_torch_state():
                self._packed = self._packed.clone()
        self._lender, self._is_open = None, True

    @classmethod
    def empty(cls, layout: KVLayout, batch: int) -> LightZeroKeysValues:
        """Room for the window of `batch` rows; the bytes are whatever the memory holds."""
        shape = (2 * layout.num_layers, batch, layout.num_heads, layout.max_tokens, layout.head_dim)
        with torch.inference_mode(False):
            return cls(torch.empty(shape, dtype=layout.dtype, device=layout.device))

    def __getitem__(self, index: int) -> LightZeroKVCache:
        return self._keys_values[index]

    def __len__(self) -> int:
        return len(self._keys_values)

    def __iter__(self) -> Iterator[LightZeroKVCache]:
        return iter(self._keys_values)

    @property
    def size(self) -> int:
        """Valid columns."""
        return self._size if self._layers is None else self._layers[0]._k_cache._size

    def set_size(self, size: int) -> None:
        """State that the first `size` columns of every layer are valid."""
        self._size = size
        for layer in self._layers or ():
            layer._k_cache._size = layer._v_cache._size = size

    def reset(self) -> None:
        """Forget every token."""
        self.set_size(0)

    def remove_register_tokens(self, register_token_num: int) -> None:
        """Forget the newest tokens."""
        if register_token_num > 0:
            self.set_size(max(0, self.size - register_token_num))

    def prune(self, mask: Any) -> None:
        """Keep the rows for which `mask`, a boolean array, is True."""
        for layer in self._keys_values:
            layer.prune(mask)
        self._packed = torch.stack(
            [layer._k_cache._cache for layer in self] + [layer._v_cache._cache for layer in self]
        )

    def clone(self) -> LightZeroKeysValues:
        """A copy that shares no memory with this one, of the same dtype, on the same device."""
        if self._is_open:
            with plain_torch_state():
                packed = torch.stack(
                    [layer._k_cache._cache for layer in self] + [layer._v_cache._cache for layer in self]
                )
            return LightZeroKeysValues.private(packed, self.size)
        made = LightZeroKeysValues.private(self._packed, self._size)
        made._lender = weakref.ref(self)
        try:
            self._loans.pop()
        except IndexError:
            made._open()  # copies: a second borrower would not know of the first
        else:
            if self._lender is not None:
                made._open()  # copies: what is itself on loan is not lent again
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.clone().packed, self.size)


def _restored(packed: Tensor, size: int) -> LightZeroKeysValues:
    return LightZeroKeysValues.private(packed, size)


def from_lightzero(kv: Any) -> KeysValues:
    """LightZero's container, theirs or ours, as a `KeysValues` of its valid tokens. A copy, in one concatenation.

    Raises:
        InvalidTypeError: `kv` is no such container.
        InvalidArgumentError: its layers differ in size, or it holds no tokens.
    """
    buffers, size = _buffers_of(kv)
    with plain_torch_state():
        return KeysValues.from_packed(torch.stack([buffer.narrow(2, 0, size) for buffer in buffers]))


def row_of_lightzero(kv: Any) -> KeysValues:
    """As `from_lightzero`, of what should be one row, and not necessarily a copy of its valid tokens alone.

    Where most of a window is valid, or a window is small, all of it is copied at once, which takes a fifth of the time.
    """
    buffers, size = _buffers_of(kv)
    shape = buffers[0].shape
    is_row = shape[0] == 1 and len(shape) == 4 and all(buffer.shape == shape for buffer in buffers)
    if not is_row or (2 * size < shape[2] and buffers[0].nbytes > SMALL_BYTES):
        return from_lightzero(kv)
    with plain_torch_state():
        return whole_row(torch.cat(buffers).unsqueeze(1), size)


def _buffers_of(kv: Any) -> tuple[list[Tensor], int]:
    """The buffers of a container, all layers' keys before all values, and its valid columns."""
    layers = getattr(kv, "_keys_values", None)
    if not layers:
        raise InvalidTypeError(f"kv_cache must be a LightZero KeysValues, got {type(kv).__name__}")
    caches = [layer._k_cache for layer in layers] + [layer._v_cache for layer in layers]
    buffers = [check_tensor("kv_cache", cache._cache) for cache in caches]
    sizes = [cache._size for cache in caches]
    size: int = sizes[0]
    if sizes.count(size) != len(sizes):
        raise InvalidArgumentError(f"kv_cache must have one size in every layer, got {sizes}")
    if not 1 <= size <= buffers[0].shape[2]:
        raise InvalidArgumentError(f"kv_cache must hold 1 to {buffers[0].shape[2]} tokens, got {size}")
    return buffers, size


def to_lightzero(kv: KeysValues, layout: KVLayout) -> LightZeroKeysValues:
    """One row as LightZero's container: left-aligned, with the window's free columns behind it, which are zeros."""
    length = kv.lengths[0]
    row = kv.row(0)
    shape = (2 * layout.num_layers, 1, layout.num_heads, layout.max_tokens, layout.head_dim)
    packed = row.keys.new_zeros(shape)
    packed[: layout.num_layers, :, :, :length] = row.keys
    packed[layout.num_layers :, :, :, :length] = row.values
    return LightZeroKeysValues.private(packed, length)
