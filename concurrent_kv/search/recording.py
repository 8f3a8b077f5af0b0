"""Searches that record whose child each entry is. They have other books than all others, which have no step more.

A parent is noted where an entry gets its row of the slot tables, in the same hold of the mutex: of two commits that
replace each other's key, the record is that of the one that is stored. It has numbers alone: what the search has let go
of is not kept alive by it, nor is there ever more of it than rows.
"""

from __future__ import annotations

import time
from itertools import count
from typing import Any, NamedTuple

from ..books.ledger import Ledger
from ..books.records import Entry
from ..device.slot_numbers import SlotArray, Slots
from .state import SearchState

__all__ = ["Record", "RecordingState"]

NO_PARENT = 0


class Record(NamedTuple):
    """What was noted of an entry when it got its row."""

    number: int  # from 1, in the order of making: a child's is above its parent's
    parent: int  # the parent's number; 0: it was stored whole
    own: int  # tokens that got slots of their own
    shared: int  # tokens whose slots are its parent's, or of a root the init pool's
    made: float  # in seconds of the monotonic clock


class RecordingLedger(Ledger):
    """The books of a search, with a record for each row. `records` and `numbers` are under the mutex."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.records: dict[int, Record] = {}  # by row; of a row that is free, the last
        self.numbers = count(1)

    def make(
        self,
        entries: list[Entry],
        parents: list[int],
        kept: list[int],
        own: list[int],
        taken: Slots,
        positions: SlotArray,
    ) -> list[int]:
        """See `Ledger.make`. Mutex held."""
        above = [self.records[parent].number if parent else NO_PARENT for parent in parents]  # row 0 is of no entry
        rows = super().make(entries, parents, kept, own, taken, positions)
        try:
            now = time.monotonic()
            for row, parent, new, shared in zip(rows, above, own, kept, strict=True):
                self.records[row] = Record(next(self.numbers), parent, new, shared, now)
        except Exception:
            self.leave(rows)
            raise
        return rows

    def note_roots(self, stand_ins: list[Entry]) -> None:
        """Note roots that are adopted. Mutex held."""
        now = time.monotonic()
        for entry in stand_ins:
            self.records[entry.row] = Record(next(self.numbers), NO_PARENT, 0, entry.length, now)


class RecordingState(SearchState):
    """What a search owns that records its tree."""

    ledger_kind = RecordingLedger
    ledger: RecordingLedger

    def _hold_roots(self, origins: list[Entry], stand_ins: list[Entry]) -> None:
        """See `SearchState`. Mutex held."""
        self.ledger.note_roots(stand_ins)
        super()._hold_roots(origins, stand_ins)

    def recorded(self) -> list[tuple[Entry, Record, object]]:
        """Its own entries and its roots with their records, in the order of making, and the environments of roots.

        Mutex and shard held.
        """
        envs: dict[Entry, object] = {entry: env_id for (env_id, _), entry in self.roots.items()}
        entries = [*self.stand_ins.entries, *self.own.values()]
        found = [(entry, self.ledger.records[entry.row], envs.get(entry)) for entry in entries]
        return sorted(found, key=_number_of)


def _number_of(recorded: tuple[Entry, Record, object]) -> int:
    return recorded[1].number
