"""`Batch`: many entries read at once into one padded buffer that a model appends to; an open handle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias
from weakref import ref

import numpy as np
from torch import Tensor

from .._checks import numbers_or_none, positive_int, sequence_of
from ..books.entries import Described
from ..books.records import Entry, Generation, Hold, Scope
from ..device.modes import plain_torch_state, writing_to
from ..device.moving import upload
from ..device.positions import Correction
from ..device.stream_uses import StreamUses
from ..device.streams import NO_TICKS
from ..errors import ClosedError, InvalidArgumentError, WindowOverflowError, shown
from ..locks.gate import gate
from ..model.kv import KeysValues, check_fits
from ..never_copied import is_owned_elsewhere
from .padded_rows import PaddedRows
from .storage import Domain

__all__ = ["Batch"]

# Of some rows: the column where they ended, how many tokens each had, which were found, where their slots are listed,
# and what they were corrected by.
Before: TypeAlias = tuple[int, tuple[int, ...], tuple[bool, ...], list[int], list[Correction]]


class Batch(PaddedRows):
    """The result of a gather: K and V of many entries, and the references that a commit needs to share their slots.

    It keeps its entries alive until every row is committed or it is closed (leaving its `with` closes it, and so does
    the end of its search). Its buffer then goes back to the storage and must not be used any more.

    Attributes:
        scope, generation: where, and as of when, its rows can be committed.
        table_rows: the rows of their slot tables in the ledger.
        corrections: what the entries are corrected by on reading.
        others: those of the entries that are of other scopes.
        hold: what keeps them alive.
        first_row: where its rows begin in the buffer, which they may have in common with other batches'.
    """

    _internal = frozenset(
        (
            "abandon",
            "before",
            "committable",
            "end_rows",
            "first_row",
            "gathered",
            "pending_rows",
            "why_closed",
        )
    )

    first_row = 0

    instead_of_copy = "gather once more, or clone its `data`"

    def __init__(
        self,
        domain: Domain,
        scope: Scope,
        generation: Generation,
        hold: Hold,
        entries: Sequence[Entry | None],
        described: Described,
        data: Tensor,
        start: int,
        owns_buffer: bool,
        uses: StreamUses | None = None,
    ) -> None:
        self.data = data
        self.scope = scope
        self.generation = generation
        self.entries = entries
        storage = self._storage = domain.storage
        self._ledger, self._buffers = domain.ledger, domain.buffers
        self.hold = hold
        hold.owner = ref(self)
        self._owns_buffer = owns_buffer
        self._uses = uses
        self.opened = time.monotonic()  # the place of its commit in the queue for room
        self._start = start
        self._layers = storage.layout.num_layers
        self._ends = [start] * self._layers
        self.table_rows, self._gathered, self.corrections, self.others = described
        self._committed = [False] * len(entries)

    # Misses --------------------------------------------------------------------------------------------------------

    def fill(self, row: int, kv: KeysValues, *, side: object = None) -> None:
        """Give a row that missed its tokens; it is then committed whole.

        Fill before anything is appended. If `kv` is longer than the longest row so far, every row moves right.

        Args:
            row: a row of which `hits` is False.
            kv: one row of 1 to `columns` tokens.
            side: what `side` says of the row from now on.

        Raises:
            InvalidArgumentError: the row hit or was filled before, or `kv` does not fit the layout.
            WindowOverflowError: `kv` is longer than the buffer.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        if not 0 <= positive_int("row", row, minimum=0) < self.batch_size:
            raise InvalidArgumentError(f"row must be 0 to {self.batch_size - 1}, got {row}")
        if self._gathered[row]:
            raise InvalidArgumentError(f"row {row} has its tokens already; only rows that missed can be filled")
        if any(end != self._start for end in self._ends):
            raise InvalidArgumentError(f"row {row} must be filled before tokens are appended to the batch")
        self._storage.clock.current()  # before anything is copied, which a capture would take into its graph
        kv = check_fits(kv, self._storage.layout, rows=1)
        length = kv.lengths[0]
        if length > self.data.shape[3]:
            raise WindowOverflowError(
                f"kv has {length} tokens, and the batch {self.data.shape[3]} columns; gather with "
                f"room={length - self._start} or more, or without room="
            )
        self.use_here(kv.keys, kv.values)
        with plain_torch_state(self.data):
            if length > self._start:
                self._move_right(length - self._start)
            columns = slice(self._start - length, self._start)
            source = kv.row(0)
            self.data[: self._layers, row, :, columns] = source.keys[:, 0].detach()
            self.data[self._layers :, row, :, columns] = source.values[:, 0].detach()
        self._gathered[row] = length
        self._side = (*self.side[:row], side, *self.side[row + 1 :])
        self._padding = None

    def _move_right(self, columns: int) -> None:
        start = self._start
        if start:
            self.data[:, :, :, columns : columns + start] = self.data[:, :, :, :start].clone()
        self.data[:, :, :, :columns] = 0
        self._start = start + columns
        self._ends = [self._start] * self._layers

    # Beams ---------------------------------------------------------------------------------------------------------

    def reorder(self, rows: Sequence[int]) -> None:
        """Have each row go on from what row `rows[row]` is: its parent and what was appended to it.

        For beam search: rows that are named twice split, those that are not named end. Of rows with the same parent
        only the new tokens are copied.

        Args:
            rows: one for each row, 0 to `batch_size - 1`.

        Raises:
            InvalidArgumentError: other numbers, or rows of it were committed.
            ClosedError: the batch is closed; SearchEndedError: by the end of its search.
        """
        self.check_open()
        checked = [positive_int("rows", row, minimum=0) for row in sequence_of("rows", rows, "row numbers")]
        if len(checked) != self.batch_size or max(checked) >= self.batch_size:
            raise InvalidArgumentError(
                f"rows must be {self.batch_size} numbers from 0 to {self.batch_size - 1}, got {shown(rows)}"
            )
        if True in self._committed:
            raise InvalidArgumentError("rows must not be reordered once some of them were committed")
        if checked == [*range(self.batch_size)]:
            return
        entries, side = self.entries, self.side
        shared = all(entry is not None and entry is entries[row] for entry, row in zip(entries, checked, strict=True))
        first, last = self._start if shared else 0, max(self._ends)
        self.use_here()
        # Nothing of it can be committed until bytes and books agree again: an asynchronous exception may come between.
        committed, self._committed = self._committed, [True] * self.batch_size
        if last > first:
            with writing_to(self.data):
                of_batch = self.data[:, self.first_row : self.first_row + self.batch_size, :, first:last]
                of_batch.copy_(of_batch.index_select(1, upload(np.array(checked, dtype=np.int64), self.data.device)))
        self.entries = [entries[row] for row in checked]
        self.table_rows = [self.table_rows[row] for row in checked]
        self.corrections = [self.corrections[row] for row in checked]
        self._gathered = [self._gathered[row] for row in checked]
        self._side = tuple([side[row] for row in checked])
        self._hits = self._padding = None
        self._committed = committed

    # For commits ---------------------------------------------------------------------------------------------------

    def pending_rows(self) -> list[int]:
        """Rows not committed yet."""
        return [row for row, committed in enumerate(self._committed) if not committed]

    def committable(
        self, rows: Sequence[int] | None, lengths: Sequence[int] | None = None
    ) -> tuple[Sequence[int], int | tuple[int, ...]]:
        """Rows that a commit is of, all that are left if not given, and the new tokens of every row, or of each.

        Or an error that says why they cannot be committed. A range of rows is the whole batch. `lengths`: how many each
        of them got, of those appended; all of them if left out. The caller uses the hold.
        """
        gathered, committed = self._gathered, self._committed
        if rows is not None:
            rows = self._check_rows(rows)
        else:
            rows = self.pending_rows() if True in committed else range(len(committed))
        ends = self._ends
        if ends.count(ends[0]) < len(ends):
            raise InvalidArgumentError(
                f"batch has layers with different numbers of new tokens, which end at {ends}: append() to those that "
                "have fewer first"
            )
        new = ends[0] - self._start
        if lengths is not None:
            return rows, self._check_new_lengths(rows, lengths, new)
        if not new:
            raise InvalidArgumentError("batch has no new tokens: append() or advance() before commit")
        if 0 not in gathered and True not in committed:
            return rows, new
        for row in rows:
            if not gathered[row]:
                raise InvalidArgumentError(
                    f"row {row} missed and was not filled: fill() it, or say in lengths= how many of the appended "
                    "tokens are its whole content"
                )
            self._check_not_committed(row)
        return rows, new

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        checked = [positive_int("rows", row, minimum=0) for row in sequence_of("rows", rows, "row numbers")]
        if any(row >= self.batch_size for row in checked) or len(set(checked)) != len(checked):
            raise InvalidArgumentError(f"rows must be different numbers from 0 to {self.batch_size - 1}, got {checked}")
        return checked

    def _check_new_lengths(self, rows: Sequence[int], lengths: Sequence[int], new: int) -> int | tuple[int, ...]:
        checked = numbers_or_none("lengths", lengths) or []
        if len(checked) != len(rows):
            raise InvalidArgumentError(
                f"lengths must have one number for each of {len(rows)} committed rows, got {len(checked)}"
            )
        for row, length in zip(rows, checked, strict=True):
            if positive_int("lengths", length, minimum=0) > new:
                raise InvalidArgumentError(
                    f"lengths must be at most the {new} tokens appended to every row, got {length} for row {row}"
                )
            if not length and not self._gathered[row]:
                raise InvalidArgumentError(
                    f"lengths must be at least 1 for row {row}, which missed and was not filled, got 0"
                )
            self._check_not_committed(row)
        # As whole numbers of Python's own, in whatever they came: commits of the same lengths have the same shape.
        of_each = tuple([int(length) for length in checked])
        return of_each[0] if of_each.count(of_each[0]) == len(of_each) else of_each

    def _check_not_committed(self, row: int) -> None:
        if self._committed[row]:
            raise InvalidArgumentError(f"row {row} was committed before")

    def gathered(self, row: int) -> int:
        """Tokens that a row had before the new ones."""
        return self._gathered[row]

    def before(self, rows: Sequence[int]) -> Before:
        """What `rows` were before the new tokens, or all of the batch where they are a range."""
        gathered, entries, table_rows, corrections = self._gathered, self.entries, self.table_rows, self.corrections
        if type(rows) is not range:
            gathered, entries = [gathered[row] for row in rows], [entries[row] for row in rows]
            table_rows, corrections = [table_rows[row] for row in rows], [corrections[row] for row in rows]
        hits = tuple([entry is not None for entry in entries]) if None in entries else (True,) * len(entries)
        return self._start, tuple(gathered), hits, table_rows, corrections

    def end_rows(self, rows: Sequence[int], *, ended: bool) -> None:
        """Note rows that were committed; `ended`: the batch is over, and its buffer goes back."""
        committed = self._committed
        if len(rows) == len(committed):
            self._committed = [True] * len(committed)
        else:
            for row in rows:
                committed[row] = True
        if ended and self._owns_buffer:
            ready = NO_TICKS if self._uses is None else self._uses.finish(self.data)
            if ready is not None:
                self._buffers.give_back(self.data, ready)

    # Life ----------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or committed whole, or its search closed."""
        return self.hold.released

    def close(self) -> None:
        """Let the entries go and give the buffer back. Never blocks; nothing happens the second time.

        Inside a critical section of the calling thread (in a finaliser, say) it is left to the next operation.
        """
        if not self.hold.released:
            self._storage.check_process()
            if gate.is_inside:
                self.abandon()
                return
            # Only who ends the hold, and only here, in its user's own thread: a search that closes meanwhile must not
            # hand the buffer on.
            if self._ledger.release(self.hold):
                self.end_rows((), ended=True)

    def check_open(self) -> None:
        """Raise `ClosedError` if it is closed; `SearchEndedError`, which says why, if its search has ended."""
        self._storage.check_process()
        if self.hold.released:
            raise self.why_closed()

    def why_closed(self) -> ClosedError:
        """What is raised where it is used after its end."""
        ended = self.scope.why_ended()
        return (
            ClosedError("this batch is closed: it was committed or closed before; gather its keys for another")
            if ended is None
            else ended
        )

    def abandon(self) -> None:
        """Leave it to the next operation to close this. Takes no lock: finalisers come here, at any point."""
        hold = getattr(self, "hold", None)
        if hold is not None and not hold.released:
            self._ledger.abandon(hold)

    def __del__(self) -> None:
        hold = getattr(self, "hold", None)
        if hold is not None and not hold.released and not is_owned_elsewhere(hold.owner, self):
            self.abandon()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{sum(self.hits)} hits, lengths={self.lengths}, room={self.room}"
        return f"<Batch of {self.batch_size} rows, {state}>"
