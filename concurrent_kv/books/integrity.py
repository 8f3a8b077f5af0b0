"""`check_integrity` and `repair`: the books of a storage against a recount of its pools and handles."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..device.streams import Ticks
from ..errors import IntegrityError, shown
from ..locks.gate import gate
from .entry import Entry, Place, Scope
from .ledger import wake

if TYPE_CHECKING:
    from ..pool.core import PoolCore
    from ..pool.storage import KVStorage

__all__ = ["IntegrityReport", "RepairReport", "check_integrity", "repair"]


class IntegrityReport(NamedTuple):
    """What a check without findings counted."""

    entries: int
    free_slots: int
    referenced_slots: int
    handles: int


class RepairReport(NamedTuple):
    """What `repair` returned to circulation."""

    slots: int
    entries: int
    pending_writes: int


class Problem(NamedTuple):
    """One contradiction. It becomes a text where no lock is held, as a key's `__repr__` may do anything."""

    what: str
    entry: Entry | None = None

    def text(self) -> str:
        """What the error says of it."""
        return self.what if self.entry is None else f"{shown(self.entry.key)} {self.what}"


class _Recount(NamedTuple):
    published: dict[PoolCore, list[Entry]]
    indexed: Counter[Entry]
    held: Counter[Entry]
    pinned: Counter[Entry]

    def alive(self) -> list[Entry]:
        return list(self.indexed | self.held)

    def references(self, entry: Entry) -> int:
        return self.held[entry] + self.indexed[entry]


def _recount(storage: KVStorage) -> _Recount:
    published: dict[PoolCore, list[Entry]] = {}
    for pool in storage.pools:
        published[pool] = [entry for scope in _scopes(pool) for part in scope.entries for entry in part.values()]
    indexed = Counter(entry for entries in published.values() for entry in entries)
    held: Counter[Entry] = Counter()
    pinned: Counter[Entry] = Counter()
    for hold in storage.ledger.holds:
        held.update(hold.entries)
        if hold.pinning:
            pinned.update(hold.entries)
    return _Recount(published, indexed, held, pinned)


def _scopes(pool: PoolCore) -> list[Scope]:
    return [*pool.registered_scopes(), *(search.scope for search in pool.searches)]


def _slot_counts(storage: KVStorage, entries: list[Entry]) -> npt.NDArray[np.int32]:
    counts = np.zeros_like(storage.ledger.slots.counts)
    if entries:
        np.add.at(counts, storage.ledger.tables_of(entries).ravel(), 1)
        counts[0] = 0
    return counts


def check_integrity(storage: KVStorage) -> IntegrityReport:
    """Compare every count with a recount; to be called when no operation is under way.

    Raises:
        IntegrityError: with every contradiction found.
    """
    ledger = storage.ledger
    deadline = storage.enter_quietly()
    zero_slot_is_zero = storage.closed or storage.zero_slot_is_zero()
    with gate.lock, storage.locks.read(range(storage.locks.count), deadline), ledger.mutex:
        recount = _recount(storage)
        problems, report = _compare(storage, recount)
    del recount  # here, where no lock is held: keys and side data may be finalised
    if not zero_slot_is_zero:
        problems.append(Problem("slot 0, which serves all padding, is not zero"))
    if problems:
        raise IntegrityError(tuple([problem.text() for problem in problems]))
    return report


def _compare(storage: KVStorage, recount: _Recount) -> tuple[list[Problem], IntegrityReport]:
    """All locks held."""
    ledger = storage.ledger
    alive = recount.alive()
    counts = _slot_counts(storage, alive)
    problems = [Problem(text) for text in ledger.slots.problems(counts)]
    problems += _entry_problems(storage, recount, alive)
    for pool, entries in recount.published.items():
        problems += _pool_problems(pool, entries)
    report = IntegrityReport(len(alive), ledger.slots.free_count, int(np.count_nonzero(counts)), len(ledger.holds))
    return problems, report


def _entry_problems(storage: KVStorage, recount: _Recount, alive: list[Entry]) -> list[Problem]:
    found = []
    tables = storage.ledger.tables_of(alive) if alive else np.zeros((0, 1), dtype=np.int64)
    lengths = np.count_nonzero(tables, axis=1)
    for entry, length, tail in zip(alive, lengths.tolist(), tables[:, -1].tolist(), strict=True):
        if entry.refs != recount.references(entry):
            found.append(Problem(f"counts {entry.refs} references, {recount.references(entry)} hold it", entry))
        if entry.pins != recount.pinned[entry]:
            found.append(Problem(f"counts {entry.pins} pins, {recount.pinned[entry]} pin it", entry))
        if length != entry.length or tail != entry.tail:
            found.append(Problem(f"has {entry.length} tokens, its table {length}", entry))
    rows = [entry.row for entry in alive]
    if len(set(rows)) != len(rows):
        found.append(Problem("two entries have the same row of the slot tables"))
    if not storage.ledger.free_rows().isdisjoint(rows):
        found.append(Problem("an entry's row of the slot tables is free"))
    return found


def _pool_problems(pool: PoolCore, published: list[Entry]) -> list[Problem]:
    quota, ledger = pool.quota, pool.storage.ledger
    own = [entry for entry in published if entry.scope.budget is None]
    found: list[Problem] = []
    counts = _slot_counts(pool.storage, own)

    def note(text: str, entry: Entry | None = None) -> None:
        found.append(Problem(text, entry))

    if quota.entries != len(own):
        note(f"{pool.name} counts {quota.entries} entries, {len(own)} are in its index")
    if quota.slots != np.count_nonzero(counts) or not np.array_equal(quota.counts[1:], counts[1:]):
        note(f"{pool.name} counts {quota.slots} slots, its entries have {np.count_nonzero(counts)}")
    if quota.pending_entries or quota.pending_slots:
        note(f"{pool.name} has {quota.pending_entries} entries and {quota.pending_slots} slots pending")
    if quota.entries > quota.max_entries or quota.slots > quota.max_slots:
        note(f"{pool.name} is over its quota: {quota.entries} entries, {quota.slots} slots")
    held = set(pool.policy)
    for entry in published:
        if (entry.place is Place.HELD) != (entry in held):
            note(f"is in place {entry.place.name}, the policy says otherwise", entry)
        if entry.place in (Place.NONE, Place.CLAIMED):
            note(f"is published, but in place {entry.place.name}", entry)
        if entry.place is Place.PINNED and not entry.pins:
            note("is set aside as pinned, and nobody pins it", entry)
        if entry.place is Place.SHARED and not ledger.shares_tail(entry):
            note("is set aside as shared, and shares nothing", entry)
    if not held <= set(own):
        note(f"the policy of {pool.name} holds entries that are not in its index")
    for search in pool.searches:
        entries = [entry for entry in published if entry.scope is search.scope]
        if search.budget.entries != len(entries):
            note(f"{search.scope.name} counts {search.budget.entries} entries, {len(entries)} are stored")
    budgets = [search.budget for search in pool.searches]
    reserved = (sum(budget.max_entries for budget in budgets), sum(budget.reservation.size for budget in budgets))
    if (quota.reserved_entries, quota.reserved_slots) != reserved:
        note(
            f"{pool.name} counts {quota.reserved_entries} entries and {quota.reserved_slots} slots as reserved, "
            f"its searches {reserved}"
        )
    for scope in _scopes(pool):
        for number, part in enumerate(scope.entries):
            for entry in part.misplaced():
                note("is in the index under another key's hash", entry)
            for entry in part.values():
                if entry.scope is not scope or scope.part_of(entry.key_hash) != number:
                    note("is in the index of another scope or shard", entry)
    return found


def repair(storage: KVStorage) -> RepairReport:
    """Rebuild every count from the indexes and the open handles; to be called when no operation is under way."""
    ledger = storage.ledger
    deadline = storage.enter_quietly()
    used = storage.clock.everything()
    with gate.lock, storage.locks.write(range(storage.locks.count), deadline), ledger.mutex:
        # Until no lock is held: what is dropped in here, and dies, has keys and side data.
        kept: list[object] = []
        report = _rebuild(storage, used, kept)
        waiters = ledger.take_waiters()
    wake(waiters)
    del kept
    for pool in storage.pools:
        pool.flights.abandon_orphans()
    return report


def _rebuild(storage: KVStorage, used: Ticks, kept: list[object]) -> RepairReport:
    """All locks held. What the caller has to keep until it has let go of them joins `kept`."""
    ledger = storage.ledger
    kept += ledger.holds
    for pool in storage.pools:
        kept += pool.policy
    for hold in list(ledger.holds):
        hold.users = 0
        if hold.released or hold.what in ("read", "commit") or hold.is_orphan:
            ledger.holds.discard(hold)  # an operation, or a finaliser, was cut off before it could let go
            hold.released = True
    for pool in storage.pools:
        for search in list(pool.searches):
            if search.roots_hold.released or search.ended is not None:
                search.end_cut_off()
                kept += search.own.values()
                search.own.clear()  # an entry and its scope name each other
        for scope in _scopes(pool):
            _drop_nameless(scope, kept)
    recount = _recount(storage)
    entries = pending = 0
    for pool, published in recount.published.items():
        pending += pool.quota.pending_entries
        _repair_pool(pool, published)
    alive = recount.alive()
    for entry in alive:
        entries += entry.refs != recount.references(entry)
        entry.refs, entry.pins = recount.references(entry), recount.pinned[entry]
        if not recount.indexed[entry]:
            entry.place = Place.NONE
    ledger.slots.keep_reservations([s.budget.reservation for pool in storage.pools for s in pool.searches])
    slots = ledger.slots.rebuild(_slot_counts(storage, alive), used)
    ledger.rebuild_rows({entry.row for entry in alive})
    ledger.reset_parked()
    for pool, published in recount.published.items():
        _settle_places(pool, published)
    return RepairReport(slots, entries, pending)


def _drop_nameless(scope: Scope, kept: list[object]) -> None:
    """Take out entries that were cut off before they were given slots, and cells that were cut off before that."""
    for part in scope.entries:
        part.drop_empty()
        for entry in [entry for entry in part.values() if entry.row < 0]:
            kept.append(entry)
            part.remove(entry)


def _repair_pool(pool: PoolCore, published: list[Entry]) -> None:
    quota = pool.quota
    quota.pending_entries = quota.pending_slots = 0
    own = [entry for entry in published if entry.scope.budget is None]
    quota.counts = _slot_counts(pool.storage, own)
    quota.entries, quota.slots = len(own), int(np.count_nonzero(quota.counts))
    for search in pool.searches:
        search.budget.entries = sum(entry.scope is search.scope for entry in published)
    quota.reserved_entries = sum(search.budget.max_entries for search in pool.searches)
    quota.reserved_slots = sum(search.budget.reservation.size for search in pool.searches)


def _settle_places(pool: PoolCore, published: list[Entry]) -> None:
    """Put every entry where it belongs: with its search, with the policy, or aside as pinned or shared."""
    ledger, policy = pool.storage.ledger, pool.policy
    known = set(published)
    for entry in [entry for entry in policy if entry not in known]:
        policy.remove(entry)
    for entry in published:
        if entry.scope.budget is not None:
            entry.place = Place.EXEMPT
        elif entry in policy:
            entry.place = Place.HELD
        elif entry.place is Place.SHARED and ledger.shares_tail(entry):
            ledger.park_shared(entry)
        elif entry.place is not Place.PINNED or not entry.pins:
            # It was on its way out, or set aside for a reason that is over: it has had its turn, and is next.
            entry.place = Place.HELD
            policy.give_back(entry)
