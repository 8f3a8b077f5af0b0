"""`compare` and `rebuild`: the books of a storage against a recount of its accounts and handles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..device.streams import Ticks
from ..errors import shown
from .ledger import Ledger
from .records import Account, Entry, Place, Scope
from .tables import MOST, Tables, Uses

__all__ = ["IntegrityReport", "Problem", "Recount", "RepairReport", "compare", "rebuild", "recount_of"]


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


class Recount(NamedTuple):
    """What the indexes and the holds name."""

    published: dict[Account, list[Entry]]
    indexed: Counter[Entry]
    held: Counter[Entry]
    pinned: Counter[Entry]

    def alive(self) -> list[Entry]:
        """Every entry that something names."""
        return list(self.indexed | self.held)

    def references(self, entry: Entry) -> int:
        """How many name it."""
        return self.held[entry] + self.indexed[entry]


def recount_of(ledger: Ledger, accounts: Sequence[Account]) -> Recount:
    """Count what the indexes and the holds name. All locks held."""
    published: dict[Account, list[Entry]] = {}
    for account in accounts:
        scopes = account.all_scopes()
        published[account] = [entry for scope in scopes for part in scope.entries for entry in part.values()]
    indexed = Counter(entry for entries in published.values() for entry in entries)
    held: Counter[Entry] = Counter()
    pinned: Counter[Entry] = Counter()
    for hold in ledger.holds:
        held.update(hold.entries)
        if hold.pinning:
            pinned.update(hold.entries)
    return Recount(published, indexed, held, pinned)


class _Named(NamedTuple):
    """What a recount of some rows finds of pages and slots."""

    pages: dict[int, int]  # rows that name each
    slots: npt.NDArray[np.int32]  # each one's weight, as `Uses` counts it

    def differs(self, counts: Tables | Uses) -> str | None:
        """Where counts say something else, or None."""
        pages, slots = (np.frombuffer(array, dtype=np.int32) for array in counts.counted())
        wrong = np.flatnonzero(slots != self.slots).tolist()
        if wrong:
            return f"use counts differ from the entries at slots {wrong[:8]} ({len(wrong)} in all)"
        counted = {page: int(pages[page]) for page in np.flatnonzero(pages).tolist()}
        if counted != self.pages:
            return f"{len(counted.items() ^ self.pages.items())} counts of pages differ from the entries"
        if counts.used != np.count_nonzero(self.slots):
            return f"{counts.used} slots counted, {np.count_nonzero(self.slots)} in use"
        return None


def _named_by(ledger: Ledger, entries: list[Entry]) -> _Named:
    """What entries name, each row once: two entries of one row are a problem of their own. Mutex held."""
    pages: Counter[int] = Counter()
    content: dict[int, list[int]] = {}
    for row in {entry.row for entry in entries}:
        of_row = ledger.tables.pages_of(row)
        content.update(of_row)
        pages.update(page for page, _ in of_row)
    slots = np.zeros(ledger.slots.num_slots + 1, dtype=np.int32)
    for page, of_page in content.items():
        np.add.at(slots, of_page, min(pages[page], MOST))
    slots[0] = 0
    return _Named(dict(pages), slots)


def compare(ledger: Ledger, recount: Recount) -> tuple[list[Problem], IntegrityReport]:
    """What contradicts a recount, and what it counted. All locks held."""
    alive = recount.alive()
    named = _named_by(ledger, alive)
    problems = [Problem(text) for text in ledger.slots.problems(named.slots > 0)]
    differs = named.differs(ledger.tables)
    if differs is not None:
        problems.append(Problem(differs))
    problems += _entry_problems(ledger, recount, alive)
    for account, entries in recount.published.items():
        problems += _account_problems(ledger, account, entries)
    report = IntegrityReport(len(alive), ledger.slots.free_count, int(np.count_nonzero(named.slots)), len(ledger.holds))
    return problems, report


def _entry_problems(ledger: Ledger, recount: Recount, alive: list[Entry]) -> list[Problem]:
    found = []
    for entry in alive:
        slots = np.frombuffer(ledger.tables.slots_of(max(entry.row, 0)), dtype=np.int64)
        if entry.refs != recount.references(entry):
            found.append(Problem(f"counts {entry.refs} references, {recount.references(entry)} hold it", entry))
        if entry.pins != recount.pinned[entry]:
            found.append(Problem(f"counts {entry.pins} pins, {recount.pinned[entry]} pin it", entry))
        if len(slots) != entry.length or slots[-1] != entry.tail:
            found.append(Problem(f"has {entry.length} tokens, its row {len(slots)}", entry))
    rows = [entry.row for entry in alive]
    if len(set(rows)) != len(rows):
        found.append(Problem("two entries have the same row of the tables"))
    return found


def _account_problems(ledger: Ledger, account: Account, published: list[Entry]) -> list[Problem]:
    """What contradicts a recount of one account. All locks held."""
    own = [entry for entry in published if entry.scope.budget is None]
    found: list[Problem] = []
    named = _named_by(ledger, own)

    def note(text: str, entry: Entry | None = None) -> None:
        found.append(Problem(text, entry))

    if account.entries != len(own):
        note(f"{account.name} counts {account.entries} entries, {len(own)} are in its index")
    differs = named.differs(account.uses)
    if differs is not None:
        note(f"{account.name}: {differs}")
    if account.pending_entries or account.pending_slots:
        note(f"{account.name} has {account.pending_entries} entries and {account.pending_slots} slots pending")
    if len(account.turns):
        note(f"{account.name} has {len(account.turns)} operations waiting for room")
    if account.entries > account.max_entries or account.slots > account.max_slots:
        note(f"{account.name} is over its limits: {account.entries} entries, {account.slots} slots")
    held = set(account.policy)
    for entry in published:
        if (entry.place is Place.HELD) != (entry in held):
            note(f"is in place {entry.place.name}, the policy says otherwise", entry)
        if entry.place in (Place.NONE, Place.CLAIMED):
            note(f"is published, but in place {entry.place.name}", entry)
        if entry.place is Place.PINNED and not entry.pins:
            note("is set aside as pinned, and no handle pins it", entry)
        if entry.place is Place.SHARED and not ledger.candidates.shares_tail(entry):
            note("is set aside as shared, and shares nothing", entry)
    if not held <= set(own):
        note(f"the policy of {account.name} holds entries that are not in its index")
    for search in account.searches:
        entries = [entry for entry in published if entry.scope is search.scope]
        if search.budget.entries != len(entries):
            note(f"{search.scope.name} counts {search.budget.entries} entries, {len(entries)} are stored")
    budgets = [search.budget for search in account.searches]
    reserved = (sum(budget.max_entries for budget in budgets), sum(budget.size for budget in budgets))
    if (account.reserved_entries, account.reserved_slots) != reserved:
        note(
            f"{account.name} counts {account.reserved_entries} entries and {account.reserved_slots} slots as reserved, "
            f"its searches {reserved}"
        )
    for scope in account.all_scopes():
        for number, part in enumerate(scope.entries):
            for entry in part.misplaced():
                note("is in the index under another key's hash", entry)
            for entry in part.values():
                if entry.scope is not scope or scope.part_of(entry.key_hash) != number:
                    note("is in the index of another scope or shard", entry)
    return found


def rebuild(ledger: Ledger, accounts: Sequence[Account], used: Ticks, kept: list[object]) -> RepairReport:
    """Set every count as a recount finds it, and free the rest, which `used` has to be waited for. All locks held.

    What the caller has to keep until it has let go of them joins `kept`.
    """
    kept += ledger.holds
    for account in accounts:
        kept += account.policy
    for hold in list(ledger.holds):
        hold.users = 0
        if hold.released or hold.what in ("read", "commit") or hold.is_orphan:
            ledger.holds.discard(hold)  # an operation, or a finaliser, was cut off before it could let go
            hold.released = True
    for account in accounts:
        for search in list(account.searches):
            if search.roots_hold.released or search.ended is not None:
                kept += search.end_cut_off()
                kept += search.scope.entries[0].values()
                search.scope.entries[0].clear()  # an entry and its scope name each other
        for scope in account.all_scopes():
            _drop_nameless(scope, kept)
    recount = recount_of(ledger, accounts)
    entries = pending = 0
    for account, published in recount.published.items():
        pending += account.pending_entries
        _repair_account(ledger, account, published)
    alive = recount.alive()
    for entry in alive:
        entries += entry.refs != recount.references(entry)
        entry.refs, entry.pins = recount.references(entry), recount.pinned[entry]
        if not recount.indexed[entry]:
            entry.place = Place.NONE
    budgets = [search.budget for account in accounts for search in account.searches]
    ledger.slots.keep_reservations(budgets)
    ledger.promoting = {budget for budget in budgets if budget.promoted_to}
    ledger.tables.keep(sorted({entry.row for entry in alive}))
    slots = ledger.slots.rebuild(_named_by(ledger, alive).slots > 0, used)
    ledger.candidates.forget_parked()
    for account, published in recount.published.items():
        ledger.candidates.arrange(account, published)
    return RepairReport(slots, entries, pending)


def _drop_nameless(scope: Scope, kept: list[object]) -> None:
    """Take out entries that were cut off before they were given slots, and cells that were cut off before that."""
    for part in scope.entries:
        part.drop_empty()
        for entry in [entry for entry in part.values() if entry.row < 0]:
            kept.append(entry)
            part.remove(entry)


def _repair_account(ledger: Ledger, account: Account, published: list[Entry]) -> None:
    account.pending_entries = account.pending_slots = 0
    account.turns.clear()
    own = [entry for entry in published if entry.scope.budget is None]
    account.uses.keep([entry.row for entry in own])
    account.entries = len(own)
    for search in account.searches:
        search.budget.entries = sum(entry.scope is search.scope for entry in published)
    account.reserved_entries = sum(search.budget.max_entries for search in account.searches)
    account.reserved_slots = sum(search.budget.size for search in account.searches)
