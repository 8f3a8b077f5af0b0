"""Loops over entries: in compiled code where there is some, which does the same with less."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import repeat
from operator import attrgetter, setitem
from typing import TYPE_CHECKING, TypeAlias

from ..device.streams import Ticks
from ..native import compiled, native
from .records import HELD, NO_PLACE, Entry, Generation, Place, Scope

if TYPE_CHECKING:
    from ..device.positions import Correction

__all__ = [
    "Described",
    "count_hits",
    "describe",
    "displace",
    "let_go",
    "name_rows",
    "new_entries",
    "occupy",
    "retain",
    "row_of",
]

Described: TypeAlias = "tuple[list[int], list[int], list[Correction], list[Entry]]"  # of `describe`

if native is not None:
    native.bind(Entry, NO_PLACE)


@compiled
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
    of_each = zip(keys, lengths, sides, priorities, hashes, corrections, strict=True)
    return [
        Entry(key, scope, generation, length, side, priority, key_hash, correction, written)
        for key, length, side, priority, key_hash, correction in of_each
    ]


@compiled
def describe(entries: list[Entry | None], scope: Scope | None) -> Described:
    """What reading entries takes that the caller keeps alive.

    Returns the rows in the ledger's tables (of None: 0, which is a row of zeros), the lengths, the corrections, and the
    entries of other scopes than `scope`.
    """
    rows: list[int] = []
    lengths: list[int] = []
    corrections: list[Correction] = []
    others: list[Entry] = []
    for entry in entries:
        rows.append(0 if entry is None else entry.row)
        lengths.append(0 if entry is None else entry.length)
        corrections.append(None if entry is None else entry.correction)
        if entry is not None and entry.scope is not scope:
            others.append(entry)
    return rows, lengths, corrections, others


row_of: Callable[[Entry], int] = attrgetter("row")
_REFS: Callable[[Entry], int] = attrgetter("refs")
_TICKS: Callable[[Entry], Ticks] = attrgetter("ticks")


@compiled
def retain(entries: list[Entry], held: list[Entry]) -> None:
    """Take one more reference of each, for who holds `held`. All of it, or nothing where it raises. Mutex held."""
    before = zip(entries, list(map(_REFS, entries)), strict=True)
    try:
        for entry in entries:
            entry.refs += 1
        held += entries
    except Exception:
        for entry, refs in before:  # no call in here, and nothing that needs memory
            entry.refs = refs
        raise


@compiled
def let_go(entries: list[Entry]) -> tuple[list[Entry], list[int], list[Ticks]]:
    """Drop one reference of each; returns those that died, their rows, and the ticks that some of them have.

    All of it, or nothing where it raises. Mutex held.
    """
    dead: list[Entry] = []
    before = zip(entries, list(map(_REFS, entries)), strict=True)
    try:
        for entry in entries:
            entry.refs -= 1
            if not entry.refs:
                dead.append(entry)
        return dead, list(map(row_of, dead)), list(filter(None, map(_TICKS, dead)))
    except Exception:
        for entry, refs in before:  # no call in here: there may be no frame for one; and nothing that needs memory
            entry.refs = refs
        raise


@compiled
def name_rows(entries: list[Entry], rows: list[int], tails: list[int]) -> None:
    """Give new entries what they have got in the tables, and the reference of the index. Mutex held."""
    for entry, row, tail in zip(entries, rows, tails, strict=True):
        entry.row, entry.tail, entry.refs = row, tail, 1


@compiled
def displace(entries: list[Entry]) -> None:
    """Note that entries have left the index. Mutex held."""
    for entry in entries:
        entry.place = NO_PLACE


@compiled
def occupy(cells: list[list[Entry]], entries: list[Entry], held: list[Entry | None], place: Place) -> None:
    """Put entries into cells of the index, in the stead of what each held. Mutex and shards held."""
    for entry, previous in zip(entries, held, strict=True):
        entry.place = place
        if previous is not None:
            entry.index_key = previous.index_key  # a dict keeps the key object that it has
    # In one call of C functions: what cuts in from outside comes before all of them, or after.
    any(map(setitem, cells, repeat(slice(None)), zip(entries)))


def count_hits(hits: list[Entry]) -> None:
    """Note the hits of a read with the statistics and the policy of each entry's pool. Mutex held."""
    for entry in hits:
        account = entry.scope.account
        account.counters.hit_count += 1
        if entry.place is HELD and account.policy.observes_hits:
            account.policy.touch(entry)
