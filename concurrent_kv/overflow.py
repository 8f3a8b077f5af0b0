"""What a commit does with a row that outgrows the window: the caller's stated policy.

A row overflows when its length *after* the new tokens were appended reaches `limit`; its oldest `count` tokens are
dropped. UniZero drops 2 at a limit of window - 1, leaving window - 3 (LightZero's `update_cache_context`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cuda import refuse_capture, settle
from .errors import InvalidArgumentError, InvalidTypeError
from .layout import KVLayout, positive_int

__all__ = [
    "DropAndCorrect",
    "DropLazily",
    "DropOldest",
    "Overflow",
    "PositionTable",
    "RaiseOnOverflow",
    "check_overflow",
]


def _packed_difference(name: str, difference: Tensor, layout: KVLayout) -> Tensor:
    """`[layers, 2, heads, tokens, head_dim]` as the storage orders it: `[2 * layers, tokens, heads, head_dim]`."""
    if not isinstance(layout, KVLayout):
        raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
    if not isinstance(difference, Tensor):
        raise InvalidTypeError(f"{name} must be a torch.Tensor, got {type(difference).__name__}")
    expected = (layout.num_layers, 2, layout.num_heads, layout.head_dim)
    if difference.dim() != 5 or (*difference.shape[:3], difference.shape[4]) != expected:
        raise InvalidArgumentError(
            f"{name} must have the shape [layers={expected[0]}, 2 (K and V), heads={expected[2]}, tokens, "
            f"head_dim={expected[3]}], got {tuple(difference.shape)}"
        )
    if difference.dtype != layout.dtype:
        raise InvalidArgumentError(f"{name} must have the dtype {layout.dtype}, got {difference.dtype}")
    refuse_capture(layout.device)
    difference = difference.detach().to(layout.device)
    return difference.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()


@dataclass(frozen=True)
class RaiseOnOverflow:
    """A row that reaches `limit` is an error (`WindowOverflowError`), and nothing is stored."""

    limit: int

    def __post_init__(self) -> None:
        positive_int("limit", self.limit)


@dataclass(frozen=True)
class DropOldest:
    """Drop the oldest `count` tokens at `limit`, changing nothing else: for rotary positions. Copies nothing."""

    limit: int
    count: int

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count)


def _check_drop(limit: int, count: int) -> None:
    positive_int("limit", limit)
    positive_int("count", count)
    if count >= limit:
        raise InvalidArgumentError(f"count must be below limit={limit}, or nothing would be left, got {count}")


@dataclass(frozen=True, eq=False)
class DropAndCorrect:
    """Drop the oldest `count` tokens at `limit` and add `difference` to the K and V of those that stay.

    For absolute positions, eagerly: the rows concerned get slots of their own, bit for bit what adding the difference
    in the model gives.

    Args:
        limit: length after appending at which a row overflows.
        count: tokens dropped.
        difference: `[layers, 2 (K and V), heads, tokens, head_dim]`; `difference[..., i, :]` is added to the token
            that *becomes* token `i`. At least `limit - count` tokens, and as many as any row keeps, which is more where
            several tokens are appended before a commit.
        layout: the layout of the pool it is for.
    """

    limit: int
    count: int
    difference: Tensor = field(repr=False)
    layout: KVLayout
    packed: Tensor = field(init=False, repr=False)  # [2 * layers, tokens, heads, head_dim]
    _firsts: dict[int, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count)
        packed = _packed_difference("difference", self.difference, self.layout)
        if packed.shape[1] < self.limit - self.count:
            raise InvalidArgumentError(
                f"difference must cover the {self.limit - self.count} tokens that stay, got {packed.shape[1]}"
            )
        settle(packed.device)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "_firsts", {})

    def first(self, tokens: int) -> Tensor:
        """The differences of the first `tokens` tokens, `[2 * layers, tokens, heads, head_dim]`."""
        found = self._firsts.get(tokens)
        return self._firsts.setdefault(tokens, self.packed[:, :tokens]) if found is None else found


class PositionTable:
    """The model's position differences for every distance a token can have moved, in the storage's order.

    Args:
        layout: the layout of the pool it is for.
        difference_for: `difference_for(distance)` gives `[layers, 2 (K and V), heads, window - distance, head_dim]`:
            what is added to a token that stands at position `i` now and was written at position `i + distance`.
            Called once for every distance from 1 to window - 1.
    """

    def __init__(self, layout: KVLayout, difference_for: Callable[[int], Tensor]) -> None:
        if not isinstance(layout, KVLayout):
            raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        if not callable(difference_for):
            raise InvalidTypeError(f"difference_for must be a function of a distance, got {difference_for!r}")
        refuse_capture(layout.device)
        window = layout.max_tokens
        table = torch.zeros(
            (2 * layout.num_layers, window, window, layout.num_heads, layout.head_dim),
            dtype=layout.dtype,
            device=layout.device,
        )
        for distance in range(1, window):
            name = f"difference_for({distance})"
            packed = _packed_difference(name, difference_for(distance), layout)
            if packed.shape[1] < window - distance:
                raise InvalidArgumentError(f"{name} must cover {window - distance} tokens, got {packed.shape[1]}")
            table[:, distance, : window - distance] = packed[:, : window - distance]
        self.layout = layout
        self.window = window
        # [2 * layers, (distance, position, head), head_dim]: one index_select corrects a whole batch.
        self.rows = table.flatten(1, 3)
        settle(table.device)


@dataclass(frozen=True, eq=False)
class DropLazily:
    """Drop the oldest `count` tokens at `limit`, and correct the others only when they are read.

    For absolute positions, keeping prefixes shared: every slot remembers the position it was written at, and a gather
    adds the model's difference for the distance moved. Differs from `DropAndCorrect` by rounding.
    """

    limit: int
    count: int
    table: PositionTable = field(repr=False)

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count)
        if not isinstance(self.table, PositionTable):
            raise InvalidTypeError(f"table must be a PositionTable, got {type(self.table).__name__}")


Overflow = RaiseOnOverflow | DropOldest | DropAndCorrect | DropLazily


def check_overflow(overflow: Overflow | None, layout: KVLayout) -> None:
    """Raise unless `overflow` is a policy for pools of `layout`."""
    if overflow is None:
        return
    if not isinstance(overflow, (RaiseOnOverflow, DropOldest, DropAndCorrect, DropLazily)):
        raise InvalidTypeError(
            f"overflow must be a RaiseOnOverflow, DropOldest, DropAndCorrect or DropLazily, got {overflow!r}"
        )
    if overflow.limit > layout.max_tokens:
        raise InvalidArgumentError(
            f"overflow.limit must be at most the window of {layout.max_tokens}, got {overflow.limit}"
        )
    made_for = (
        overflow.layout
        if isinstance(overflow, DropAndCorrect)
        else overflow.table.layout
        if isinstance(overflow, DropLazily)
        else layout
    )
    if made_for is not layout and made_for != layout:
        raise InvalidArgumentError(f"overflow was made for {made_for}, and the pool has {layout}")
