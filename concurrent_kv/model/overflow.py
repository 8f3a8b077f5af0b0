"""What a commit does with a row that outgrows the window: the caller's stated policy.

A row overflows when its length *after* the new tokens were appended reaches `limit`; its oldest `count` tokens are
dropped. UniZero drops 2 at a limit of window - 1, leaving window - 3 (LightZero's `update_cache_context`).

With `step`, the most tokens that are appended before a commit, a policy is checked when it is made, and against the
window when a search or a commit is given it: rows of up to limit - 1 tokens get `step` more, which have to fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from .._checks import positive_int
from ..device.cuda import settle
from ..device.layout import KVLayout
from ..device.moving import upload
from ..device.positions import Correction, PositionSteps, PositionTable, packed_difference
from ..errors import InvalidArgumentError, InvalidTypeError, shown
from ..internal import ShowsPublic

__all__ = [
    "DropAndCorrect",
    "DropLazily",
    "DropOldest",
    "Overflow",
    "RaiseOnOverflow",
    "check_overflow",
]


class _Policy(metaclass=ShowsPublic):
    """What a commit asks a policy; each says what it does otherwise.

    Attributes:
        limit: length after appending at which a row overflows.
        count: how many tokens it drops then; 0: overflowing is an error.
        corrects: whether the tokens that stay get slots of their own.
        corrects_lazily: whether entries may need corrections on reading.
    """

    _internal = frozenset(
        ("corrections", "corrects", "corrects_lazily", "difference_of", "foreign", "made_for", "most_appended")
    )

    limit: int
    count: int
    corrects: ClassVar[bool] = False
    corrects_lazily: ClassVar[bool] = False

    def most_appended(self) -> int | None:
        """The most tokens that are appended before a commit, where that was stated."""
        return None

    def made_for(self) -> KVLayout | None:
        """The layout of the pools that it fits; None: every one."""
        return None

    def foreign(self, inherited: Sequence[Correction]) -> set[Correction]:
        """Those of the parents' corrections with which tokens cannot be shared.

        What was gathered of such a parent is corrected already, and is stored whole.
        """
        return set()

    def corrections(self, inherited: list[Correction], over: list[bool], moved: int) -> list[Correction]:
        """What new entries need on reading; `inherited` is what the tokens need that they share with their parents.

        Args:
            over: which of them overflowed.
            moved: tokens of the longest one that did.

        Raises:
            InvalidArgumentError: a table does not cover them.
        """
        return inherited

    def difference_of(self, lengths: Sequence[int]) -> tuple[Tensor, int] | None:
        """What is added to rows of these lengths when they are stored, and to how many runs of as many tokens.

        Raises:
            InvalidArgumentError: it does not cover them.
        """
        return None


@dataclass(frozen=True)
class RaiseOnOverflow(_Policy):
    """A row that reaches `limit` is an error (`WindowOverflowError`), and nothing is stored."""

    limit: int
    count: ClassVar[int] = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        positive_int("limit", self.limit)


@dataclass(frozen=True)
class DropOldest(_Policy):
    """Drop the oldest `count` tokens at `limit`, changing nothing else: for rotary positions. Copies nothing.

    Args:
        limit: length after appending at which a row overflows.
        count: tokens dropped.
        step: the most tokens that are appended before a commit, to have the others checked by it.
    """

    limit: int
    count: int
    step: int | None = None

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count, self.step)

    def most_appended(self) -> int | None:
        """As stated."""
        return self.step

    def foreign(self, inherited: Sequence[Correction]) -> set[Correction]:
        """All of them: tokens that moved without a correction would be taken for ones that are owed it."""
        return {*inherited} - {None}


def _check_drop(limit: int, count: int, step: int | None) -> None:
    positive_int("limit", limit)
    positive_int("count", count)
    if count >= limit:
        raise InvalidArgumentError(f"count must be below limit={limit}, or nothing would be left, got {count}")
    if step is not None and positive_int("step", step) > count:
        raise InvalidArgumentError(
            f"count must be at least step={step}, or rows that overflow would stay at their limit, got {count}"
        )


def _check_covers(name: str, tokens: int, covered: int) -> None:
    if tokens > covered:
        raise InvalidArgumentError(
            f"{name} must cover the {tokens} tokens that a row keeps here, got {covered}; rows keep more than "
            "limit - count where several tokens are appended before a commit"
        )


def _most_kept(limit: int, count: int, step: int | None) -> int:
    """The most tokens of a row that has dropped some, as far as it is known."""
    return limit - 1 + (step or 1) - count


@dataclass(frozen=True, eq=False)
class DropAndCorrect(_Policy):
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
        step: the most tokens that are appended before a commit, to have the others checked by it.
    """

    limit: int
    count: int
    difference: Tensor = field(repr=False)
    layout: KVLayout
    step: int | None = None
    packed: Tensor = field(init=False, repr=False)  # [2 * layers, tokens, heads, head_dim]
    _firsts: dict[int, Tensor] = field(init=False, repr=False)
    corrects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count, self.step)
        packed = packed_difference("difference", self.difference, self.layout)
        kept = _most_kept(self.limit, self.count, self.step)
        if packed.shape[1] < kept:
            raise InvalidArgumentError(f"difference must cover the {kept} tokens that stay, got {packed.shape[1]}")
        settle(packed.device)
        object.__setattr__(self, "packed", packed)
        object.__setattr__(self, "_firsts", {})

    def most_appended(self) -> int | None:
        """As stated."""
        return self.step

    def made_for(self) -> KVLayout | None:
        """Its difference has a layout."""
        return self.layout

    def difference_of(self, lengths: Sequence[int]) -> tuple[Tensor, int] | None:
        """That of the first tokens of each row."""
        packed, longest = self.packed, max(lengths)
        _check_covers("overflow.difference", longest, packed.shape[1])
        if min(lengths) == longest:
            first = self._firsts.get(longest)
            return (first if first is not None else self._firsts.setdefault(longest, packed[:, :longest])), len(lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        return packed.index_select(1, upload(position, packed.device)), 1


@dataclass(frozen=True, eq=False)
class DropLazily(_Policy):
    """Drop the oldest `count` tokens at `limit`, and correct the others only when they are read.

    For absolute positions, keeping prefixes shared: every slot remembers the position it was written at, and a gather
    adds what its token is owed for the distance moved.

    Args:
        limit: length after appending at which a row overflows.
        count: tokens dropped.
        table: `PositionSteps` reads bit for bit as `DropAndCorrect` stores, a `PositionTable` differs by rounding. A
            row whose parent's tokens moved by another table, or by none, is stored whole.
        step: the most tokens that are appended before a commit, to have the others checked by it.
    """

    limit: int
    count: int
    table: PositionTable | PositionSteps = field(repr=False)
    step: int | None = None
    corrects_lazily: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_drop(self.limit, self.count, self.step)
        table = self.table
        if not isinstance(table, (PositionTable, PositionSteps)):
            raise InvalidTypeError(f"table must be PositionSteps or a PositionTable, got {type(table).__name__}")
        if isinstance(table, PositionSteps) and table.count != self.count:
            raise InvalidArgumentError(f"count must be the table's, {table.count}, got {self.count}")
        _check_limit(self.limit, self.step, table.layout.max_tokens)  # first: a longer table would be no way out
        kept = _most_kept(self.limit, self.count, self.step)
        if isinstance(table, PositionSteps) and self.step is not None and table.covered < kept:
            raise InvalidArgumentError(f"table must cover the {kept} tokens that stay, got {table.covered}")

    def most_appended(self) -> int | None:
        """As stated."""
        return self.step

    def made_for(self) -> KVLayout | None:
        """Its table has a layout."""
        return self.table.layout

    def foreign(self, inherited: Sequence[Correction]) -> set[Correction]:
        """Other tables than its own."""
        return {*inherited} - {None, self.table}

    def corrections(self, inherited: list[Correction], over: list[bool], moved: int) -> list[Correction]:
        """Its table where a row overflowed."""
        if isinstance(self.table, PositionSteps):
            _check_covers("overflow.table", moved, self.table.covered)
        return [self.table if is_over else correction for is_over, correction in zip(over, inherited, strict=True)]


Overflow = RaiseOnOverflow | DropOldest | DropAndCorrect | DropLazily


def check_overflow(overflow: Overflow | None, layout: KVLayout) -> None:
    """Raise unless `overflow` is a policy for pools of `layout`."""
    if overflow is None:
        return
    if not isinstance(overflow, (RaiseOnOverflow, DropOldest, DropAndCorrect, DropLazily)):
        raise InvalidTypeError(
            f"overflow must be a RaiseOnOverflow, DropOldest, DropAndCorrect or DropLazily, got {shown(overflow)}"
        )
    if overflow.limit > layout.max_tokens:
        raise InvalidArgumentError(
            f"overflow.limit must be at most the window of {layout.max_tokens}, got {overflow.limit}"
        )
    _check_limit(overflow.limit, overflow.most_appended(), layout.max_tokens)
    made_for = overflow.made_for()
    if made_for is not None and made_for != layout:
        raise InvalidArgumentError(f"overflow was made for {made_for}, and the pool has {layout}")


def _check_limit(limit: int, step: int | None, window: int) -> None:
    """Raise unless rows below the limit have room for a step, where that was stated."""
    if step is not None and limit - 1 + step > window:
        raise InvalidArgumentError(
            f"overflow.limit must be at most {window + 1 - step} in a window of {window} with "
            f"overflow.step={step}: rows of limit - 1 tokens get {step} more, got {limit}"
        )
