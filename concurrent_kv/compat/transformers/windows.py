"""What layers with a sliding window keep of a text: its newest tokens, in a store beside that of the other layers.

A text is one entry in each of the two stores, under one key. Both name the write that they are of. A reader that finds
one without the other, or two of different writes, has a miss: so they can be written one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from ...errors import CapacityError
from ...model.overflow import DropOldest
from ...pool.batch import Batch
from ...pool.pool import KVPool
from ...search.search import Search

__all__ = ["WindowCapacityError", "WindowedSide", "commit_window", "new_write", "side_of", "write_of"]


class WindowCapacityError(CapacityError):
    """It is the store of layers that slide that has no room."""


@dataclass(frozen=True, eq=False)
class WindowedSide:
    """Side data of an entry that has another one, for layers with a sliding window.

    Attributes:
        side: the side data that was given.
        write: what the other entry has as its side data.
    """

    side: object
    write: UUID


def new_write() -> UUID:
    """The name of a write, of this process or any other."""
    return uuid4()


def side_of(side: object) -> object:
    """The side data that was given."""
    return side.side if isinstance(side, WindowedSide) else side


def write_of(side: object) -> UUID | None:
    """The write that an entry is of; None where it has no other one."""
    return side.write if isinstance(side, WindowedSide) else None


def commit_window(
    store: Search | KVPool,
    keys: Sequence[Hashable],
    batch: Batch,
    lengths: Sequence[int],
    tokens: int,
    writes: Sequence[UUID],
) -> None:
    """Store each row's newest `tokens`, sharing those that its parent has. May block.

    The batch is the caller's to close: rows of a key that comes again are not stored.

    Args:
        keys, lengths, writes: of all rows: its key, how many of the appended tokens it has, and the write it is of.

    Raises:
        CapacityError, ClosedError, WaitTimeoutError: as `store.commit`. Some of the rows may be stored then.
    """
    by_dropped = dict[int, list[int]]()  # a policy drops as many tokens of every row
    for row in {key: row for row, key in enumerate(keys)}.values():  # of a key that comes twice, the last
        by_dropped.setdefault(max(0, batch.gathered(row) + lengths[row] - tokens), []).append(row)
    for dropped, rows in by_dropped.items():
        try:
            store.commit(
                [keys[row] for row in rows],
                batch,
                rows=rows,
                lengths=[lengths[row] for row in rows],
                overflow=DropOldest(tokens + dropped, dropped) if dropped else None,
                sides=[writes[row] for row in rows],
            )
        except CapacityError as error:
            raise WindowCapacityError(
                str(error), required_entries=error.required_entries, required_slots=error.required_slots
            ) from error
