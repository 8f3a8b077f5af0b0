"""`CommitShape`: which tokens a commit stores and which slots it shares, as far as lengths alone decide it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..device.native import native
from ..device.tensors import Block, Indices
from ..errors import WindowOverflowError
from ..model.overflow import DropAndCorrect, Overflow, RaiseOnOverflow
from ..remembered import remembered

__all__ = ["CommitShape", "Drop", "commit_shape", "share_shape"]

REMEMBERED = 256  # shapes; the commits of a search repeat a few
REMEMBERED_BYTES = 16 << 20  # of their arrays, which grow with rows times window


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
    sharing: list[int]  # entries that share slots with their parents
    parents: Indices  # [window] columns of the parents' tables that become the columns of theirs
    shared: npt.NDArray[np.bool_]  # [entries, window] which of these are shared
    own: npt.NDArray[np.bool_]  # [entries, window] tokens that get slots of their own
    written_at: Indices  # [own tokens] position that each one's bytes are for
    rows: Indices  # [own tokens] where they come from in the batch's buffer
    columns: Indices  # [own tokens]
    block: Block | None  # the same as rows and columns, if they are a block
    corrected: list[int]  # tokens of each corrected entry
    moved: int  # tokens of the longest entry that overflowed; 0: none did
    # What compiled code takes for `parents`, `shared`, `own` and `written_at`.
    views: tuple[Any, ...] = ()


def _bytes_of(shape: CommitShape) -> int:
    arrays = (shape.parents, shape.shared, shape.own, shape.written_at, shape.rows, shape.columns)
    return sum([array.nbytes for array in arrays])


@remembered(most_bytes=REMEMBERED_BYTES, most=REMEMBERED, size_of=_bytes_of)
def commit_shape(
    rows: tuple[int, ...],
    gathered: tuple[int, ...],
    hits: tuple[bool, ...],
    new: int,
    end: int,
    window: int,
    drop: Drop,
) -> CommitShape:
    """The shape of a commit of `rows` that had `gathered` tokens each and got `new` ones, up to column `end`.

    Raises:
        WindowOverflowError: a row grew too long.
    """
    total = np.array(gathered, dtype=np.int64) + new
    over = total >= drop.limit
    _check_lengths(total, over, drop)
    whole = ~np.array(hits) | (over & drop.corrects)
    # The corrected rows first, so that their tokens are one range of the copy.
    order = np.argsort(~over, kind="stable") if drop.corrects else np.arange(len(rows))
    total, over, whole = total[order], over[order], whole[order]
    kept = total - drop.tokens * over
    first = window - kept  # column of a table at which an entry begins
    columns = np.arange(window)
    own = columns >= (window - np.where(whole, kept, np.minimum(new, kept)))[:, None]
    which, at = np.nonzero(own)
    moved = drop.tokens * (over & (not drop.corrects))  # written for a position that the drop has left behind
    shared = ~own & (columns >= first[:, None]) & ~whole[:, None]
    parents = np.minimum(columns + new, window - 1)
    from_rows = np.array(rows, dtype=np.int64)[order][which]
    from_columns = at - window + end
    corrected = kept[over].tolist() if drop.corrects else []
    # A block is corrected as a whole or not at all.
    block = _block_of(from_rows, from_columns) if len(corrected) in (0, len(rows)) else None
    shape = CommitShape(
        order=order.tolist(),
        lengths=kept.tolist(),
        over=over.tolist(),
        sharing=np.flatnonzero(shared.any(axis=1)).tolist(),
        parents=parents,
        shared=shared,
        own=own,
        written_at=at - first[which] + moved[which],
        rows=from_rows,
        columns=from_columns,
        block=block,
        corrected=corrected,
        moved=int(kept[over].max(initial=0)),
    )
    return _read_only(shape)


@remembered(most_bytes=REMEMBERED_BYTES, most=REMEMBERED, size_of=_bytes_of)
def share_shape(length: int, window: int) -> CommitShape:
    """The shape of one entry of `length` tokens that shares them all with another."""
    none = np.empty(0, dtype=np.int64)
    columns = np.arange(window)
    shared = (columns >= window - length)[None]
    return _read_only(
        CommitShape(
            order=[0],
            lengths=[length],
            over=[False],
            sharing=[0],
            parents=columns,
            shared=shared,
            own=np.zeros_like(shared),
            written_at=none,
            rows=none,
            columns=none,
            block=None,
            corrected=[],
            moved=0,
        )
    )


def _read_only(shape: CommitShape) -> CommitShape:
    for array in (shape.parents, shape.shared, shape.own, shape.written_at, shape.rows, shape.columns):
        array.setflags(write=False)
    if native is None:
        return shape
    viewed = (shape.parents, shape.shared, shape.own, shape.written_at)
    return shape._replace(views=tuple([native.View(array) for array in viewed]))


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
