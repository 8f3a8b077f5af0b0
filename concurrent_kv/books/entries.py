"""Loops over entries: in compiled code where there is some, which does the same with less."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import repeat
from operator import attrgetter, setitem
from typing import TYPE_CHECKING, NamedTuple

from ..device.streams import Ticks
from ..native import native
from .records import Entry, Generation, Place, Scope

if TYPE_CHECKING:
    from ..device.positions import Correction

__all__ = ["Described", "describe", "displace", "let_go", "new_entries", "occupy", "retain", "row_of", "rows_of"]

if native is not None:
    native.bind(Entry, Place.NONE)


def new_entries(
    keys: list[Hashable],
    scope: Scope,
    generation: Generation,
    lengths: list[int],
    sides: list[object],
    priorities: list[float],
    hashes: list[int],
    corrections: list[Correction],
    written: Ticks,
) -> list[Entry]:
    """An entry for each key, of its length, side data, priority, key's hash and correction."""
    if native is not None:
        return native.new_entries(  # type: ignore[no-any-return]
            keys, scope, generation, lengths, sides, priorities, hashes, corrections, written
        )
    of_each = zip(keys, lengths, sides, priorities, hashes, corrections, strict=True)
    return [
        Entry(key, scope, generation, length, side, priority, key_hash, correction, written)
        for key, length, side, priority, key_hash, correction in of_each
    ]


class Described(NamedTuple):
    """What reading some entries takes; of None: 0, which is a row of zeros, 0, and None."""

    rows: list[int]  # in the ledger's tables
    lengths: list[int]
    corrections: list[Correction]
    others: list[Entry]  # those of other scopes than the reader's


def describe(entries: list[Entry | None], scope: Scope | None = None) -> Described:
    """What reading entries takes, in `scope`, that the caller keeps alive."""
    if native is not None:
        return Described._make(native.describe(entries, scope))
    present = [entry for entry in entries if entry is not None]
    return Described(
        rows=rows_of(entries),
        lengths=[0 if entry is None else entry.length for entry in entries],
        corrections=[None if entry is None else entry.correction for entry in entries],
        others=[entry for entry in present if entry.scope is not scope],
    )


row_of: Callable[[Entry], int] = attrgetter("row")
_TICKS: Callable[[Entry], Ticks] = attrgetter("ticks")


def rows_of(entries: Sequence[Entry | None]) -> list[int]:
    """Rows in the ledger's tables of entries that the caller keeps alive; 0, a row of zeros, for None."""
    return [0 if entry is None else entry.row for entry in entries]


def retain(entries: list[Entry], held: list[Entry]) -> None:
    """Take one more reference of each, for who holds `held`. Mutex held."""
    if native is not None:
        native.retain(entries, held)
        return
    for entry in entries:
        entry.refs += 1
    held += entries


def let_go(entries: list[Entry]) -> tuple[list[Entry], list[int], list[Ticks]]:
    """Drop one reference of each; returns those that died, the rows that they lose, and the ticks that some have.

    All of it, or nothing where it raises. Mutex held.
    """
    if native is not None:
        return native.let_go(entries)  # type: ignore[no-any-return]
    left = 0
    dead: list[Entry] = []
    try:
        for entry in entries:
            entry.refs -= 1
            left += 1
            if not entry.refs:
                dead.append(entry)
        result = dead, list(map(row_of, dead)), list(filter(None, map(_TICKS, dead)))
    except Exception:
        for entry in entries[:left]:
            entry.refs += 1
        raise
    for entry in dead:
        entry.row = -1
    return result


def displace(entries: list[Entry]) -> None:
    """Note that entries have left the index. Mutex held."""
    if native is not None:
        native.displace(entries)
        return
    for entry in entries:
        entry.place = Place.NONE


def occupy(cells: list[list[Entry]], entries: list[Entry], held: list[Entry | None], place: Place) -> None:
    """Put entries into cells of the index, in the stead of what each held. Mutex and shards held."""
    if native is not None:
        native.occupy(cells, entries, held, place)
        return
    for entry, previous in zip(entries, held, strict=True):
        entry.place = place
        if previous is not None:
            entry.index_key = previous.index_key  # a dict keeps the key object that it has
    # In one call of C functions: what cuts in from outside comes before all of them, or after.
    any(map(setitem, cells, repeat(slice(None)), zip(entries)))
