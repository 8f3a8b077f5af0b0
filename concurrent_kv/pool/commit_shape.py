"""`CommitShape`: which tokens a commit stores and which slots it shares, as far as lengths alone decide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..device.tensors import Block, Indices
from ..errors import WindowOverflowError
from ..model.overflow import DropAndCorrect, Overflow, RaiseOnOverflow

__all__ = ["CommitShape", "Drop", "commit_shape", "share_shape"]

# Of shapes; the commits of a search repeat a few.
REMEMBERED = 256
REMEMBERED_BYTES = 8 << 20
BYTES_OF_ENTRY = 80  # in lists, and in the tuples that it was made of
BYTES_OF_SHAPE = 2048  # its arrays' own records, and its own


class Drop(NamedTuple):
    """An overflow policy as far as it concerns lengths."""

    limit: int  # length after appending at which a row overflows
    tokens: int  # how many it drops then; 0: overflowing is an error
    corrects: bool  # the tokens that stay get slots of their own

    @classmethod
    def of(cls, overflow: Overflow | None, window: int) -> Drop:
        """What `overflow` does; without a policy, outgrowing the window is an error."""
        if overflow is None:
            return cls(window + 1, 0, False)
        if isinstance(overflow, RaiseOnOverflow):
            return cls(overflow.limit, 0, False)
        return cls(overflow.limit, overflow.count, isinstance(overflow, DropAndCorrect))


class CommitShape(NamedTuple):
    """Arrays that commits of the same lengths share; they are read-only. Token order is row by row, oldest first."""

    order: list[int]  # the committed rows by position, those to be corrected first
    lengths: list[int]  # [entries] tokens of each new entry
    over: list[bool]  # [entries] whether it overflowed
    kept: list[int]  # [entries] tokens that share slots with the parent: its newest
    owned: list[int]  # [entries] tokens that get slots of their own, after these
    written_at: Indices  # [own tokens] position that each one's bytes are for
    rows: Indices  # [own tokens] where they come from in the batch's buffer
    columns: Indices  # [own tokens]
    block: Block | None  # the same as rows and columns, if they are a block
    corrected: list[int]  # tokens of each corrected entry
    moved: int  # tokens of the longest entry that overflowed; 0: none did

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays and lists, and of what it was made of."""
        arrays = (self.written_at, self.rows, self.columns)
        return sum(array.nbytes for array in arrays) + BYTES_OF_ENTRY * len(self.lengths) + BYTES_OF_SHAPE


class _Remembered:
    """Shapes by what they were made of, bounded in number and in bytes, without a lock.

    Two generations: what is looked up moves into the younger one, and when that is full, the older one is forgotten.
    Every step is one operation on a dict or one assignment: a finaliser, a signal handler or an asynchronous exception
    at any point leaves a table that works, and threads that write at once lose a shape, which is made again.
    """

    def __init__(self, shapes: int, nbytes: int) -> None:
        self._most, self._most_bytes = shapes // 2, nbytes // 2  # of one generation
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self.young: dict[tuple[Any, ...], CommitShape] = {}
        self._old: dict[tuple[Any, ...], CommitShape] = {}
        self._young_bytes = 0

    def get(self, key: tuple[Any, ...]) -> CommitShape | None:
        """The shape that was made of `key`, if it is remembered."""
        found = self.young.get(key)
        if found is None:
            found = self._old.get(key)
            if found is not None:
                self.add(key, found)
        return found

    def add(self, key: tuple[Any, ...], shape: CommitShape) -> None:
        """Remember a shape, unless it is as large as a whole generation."""
        nbytes = shape.nbytes
        if nbytes > self._most_bytes:
            return
        if len(self.young) >= self._most or self._young_bytes + nbytes > self._most_bytes:
            self._old, self.young, self._young_bytes = self.young, {}, 0
        self.young[key] = shape
        self._young_bytes += nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        shapes = {id(shape): shape for shape in [*self.young.values(), *self._old.values()]}
        return sum(shape.nbytes for shape in shapes.values())

    def __len__(self) -> int:
        return len(self.young.keys() | self._old.keys())


remembered = _Remembered(REMEMBERED, REMEMBERED_BYTES)


def commit_shape(
    rows: Sequence[int],
    gathered: tuple[int, ...],
    hits: tuple[bool, ...],
    new: int | tuple[int, ...],
    start: int,
    window: int,
    drop: Drop,
) -> CommitShape:
    """The shape of a commit of `rows` that had `gathered` tokens each, up to column `start`, and got `new` ones.

    `new` is one number for all rows, or one for each.

    Raises:
        WindowOverflowError: a row grew too long.
    """
    key = (rows, gathered, hits, new, start, window, drop)
    shape = remembered.young.get(key) or remembered.get(key)
    if shape is None:
        shape = _commit_shape(rows, np.array(gathered, dtype=np.int64), np.array(hits), new, start, window, drop)
        remembered.add(key, shape)
    return shape


def _commit_shape(
    rows: Sequence[int],
    gathered: Indices,
    hits: npt.NDArray[np.bool_],
    new: int | tuple[int, ...],
    start: int,
    window: int,
    drop: Drop,
) -> CommitShape:
    added = np.broadcast_to(np.array(new, dtype=np.int64), gathered.shape)
    total = gathered + added
    over = total >= drop.limit
    _check_lengths(total, over, drop)
    whole = ~hits | (over & drop.corrects)
    # The corrected rows first, so that their tokens are one range of the copy.
    order = np.argsort(~over, kind="stable") if drop.corrects else np.arange(len(rows))
    added, total, over, whole = added[order], total[order], over[order], whole[order]
    length = total - drop.tokens * over
    owned = np.where(whole, length, np.minimum(added, length))
    kept = length - owned
    moved = drop.tokens * (over & (not drop.corrects))  # written for a position that the drop has left behind
    which = np.repeat(np.arange(len(rows)), owned)
    at = np.arange(len(which)) - np.repeat(np.cumsum(owned) - owned, owned)  # among the entry's own
    from_rows = np.array(rows, dtype=np.int64)[order][which]
    from_columns = at + (start + added - owned)[which]
    corrected = length[over].tolist() if drop.corrects else []
    # A block has as many tokens of every row, and is corrected as a whole or not at all.
    is_even = len(corrected) in (0, len(rows)) and (owned == owned[0]).all()
    shape = CommitShape(
        order=order.tolist(),
        lengths=length.tolist(),
        over=over.tolist(),
        kept=kept.tolist(),
        owned=owned.tolist(),
        written_at=at + (kept + moved)[which],
        rows=from_rows,
        columns=from_columns,
        block=_block_of(from_rows, from_columns) if is_even else None,
        corrected=corrected,
        moved=int(length[over].max(initial=0)),
    )
    for array in (shape.written_at, shape.rows, shape.columns):
        array.setflags(write=False)
    return shape


def share_shape(length: int, window: int) -> CommitShape:
    """The shape of one entry of `length` tokens that shares them all with another."""
    key = (length, window)
    shape = remembered.get(key)
    if shape is None:
        # As a commit of a row that hit, and got nothing.
        (gathered, hits), drop = (np.array([length]), np.array([True])), Drop.of(None, window)
        shape = _commit_shape(range(1), gathered, hits, 0, length, window, drop)
        remembered.add(key, shape)
    return shape


def _block_of(rows: Indices, columns: Indices) -> Block | None:
    """The block that some tokens are, row by row, or None."""
    if not len(rows):
        return None
    block = Block(slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
    width = block.columns.stop - block.columns.start
    if (block.rows.stop - block.rows.start) * width != len(rows):
        return None
    row, column = np.divmod(np.arange(len(rows)), width)
    return block if (rows == row + rows[0]).all() and (columns == column + columns[0]).all() else None


def _check_lengths(total: Indices, over: npt.NDArray[np.bool_], drop: Drop) -> None:
    if not drop.tokens and over.any():
        raise WindowOverflowError(
            f"rows reach {int(total.max())} tokens, the limit is {drop.limit - 1}; "
            "commit with overflow=DropOldest(...) or another policy that drops tokens"
        )
    if (total - drop.tokens >= drop.limit).any():
        raise WindowOverflowError(
            f"rows reach {int(total.max())} tokens: dropping {drop.tokens} leaves {drop.limit} or more; "
            "append fewer tokens before each commit, or drop more"
        )
