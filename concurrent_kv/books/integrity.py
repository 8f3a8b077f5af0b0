"""`compare` and `rebuild`: the books of a storage against a recount of its accounts and handles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import add
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..device.streams import NO_TICKS, Ticks
from ..errors import shown
from .ledger import Ledger
from .records import Account, Entry, Hold, Place, Scope
from .tables import MOST, Tables, Uses

__all__ = [
    "IntegrityReport",
    "Problem",
    "Recount",
    "RepairReport",
    "compare",
    "compare_accounts",
    "index_problems",
    "rebuild",
    "rebuild_search",
    "recount_of",
    "scopes_of",
    "slots_of_entries",
    "summed",
]


R = TypeVar("R", "IntegrityReport", "RepairReport")


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


def summed(first: R, second: R) -> R:
    """What two reports say together."""
    return type(first)(*map(add, first, second))


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


def recount_of(ledger: Ledger, scopes: dict[Account, list[Scope]]) -> Recount:
    """Count what the indexes of some scopes, and the holds, name. All locks held."""
    published = {
        account: [entry for scope in of_account for part in scope.entries for entry in part.values()]
        for account, of_account in scopes.items()
    }
    indexed = Counter(entry for entries in published.values() for entry in entries)
    held: Counter[Entry] = Counter()
    pinned: Counter[Entry] = Counter()
    for hold in ledger.holds:
        held.update(hold.entries)
        if hold.pinning:
            pinned.update(hold.entries)
    return Recount(published, indexed, held, pinned)


def scopes_of(accounts: Sequence[Account]) -> dict[Account, list[Scope]]:
    """Those of pools, without their searches'. Mutex held."""
    return {account: list(account.scopes.values()) for account in accounts}


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
    slots = np.zeros(ledger.num_slots + 1, dtype=np.int32)
    for page, of_page in content.items():
        np.add.at(slots, of_page, min(pages[page], MOST))
    slots[0] = 0
    return _Named(dict(pages), slots)


def compare(
    ledger: Ledger, recount: Recount, foreign: npt.NDArray[np.bool_] | None = None
) -> tuple[list[Problem], IntegrityReport]:
    """What contradicts a recount, and what it counted. All locks held.

    Args:
        foreign: slots of the storage's that a search names, too.
    """
    alive = recount.alive()
    named = _named_by(ledger, alive)
    own = named.slots > 0 if foreign is None else (named.slots > 0) & ~foreign
    problems = [Problem(text) for text in ledger.slots.problems(own)]
    differs = named.differs(ledger.tables)
    if differs is not None:
        problems.append(Problem(differs))
    problems += _entry_problems(ledger, recount, alive)
    report = IntegrityReport(len(alive), ledger.slots.free_count, int(np.count_nonzero(own)), len(ledger.holds))
    return problems, report


def slots_of_entries(ledger: Ledger, entries: list[Entry]) -> npt.NDArray[np.bool_]:
    """Of each slot, whether one of these names it. Mutex held."""
    return _named_by(ledger, entries).slots > 0


def compare_accounts(ledger: Ledger, recount: Recount) -> list[Problem]:
    """What contradicts a recount in the accounts of pools. All locks held."""
    return [
        problem
        for account, entries in recount.published.items()
        for problem in _account_problems(ledger, account, entries)
    ]


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
    found: list[Problem] = []
    named = _named_by(ledger, published)

    def note(text: str, entry: Entry | None = None) -> None:
        found.append(Problem(text, entry))

    if account.entries != len(published):
        note(f"{account.name} counts {account.entries} entries, {len(published)} are in its index")
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
    if not held <= set(published):
        note(f"the policy of {account.name} holds entries that are not in its index")
    reserved = _reserved_by(account)
    if (account.reserved_entries, account.reserved_slots) != reserved:
        note(
            f"{account.name} counts {account.reserved_entries} entries and {account.reserved_slots} slots as reserved, "
            f"its searches {reserved}"
        )
    return found + index_problems(account.scopes.values())


def index_problems(scopes: Iterable[Scope]) -> list[Problem]:
    """Entries that are not where they belong. Shards held."""
    found: list[Problem] = []
    for scope in scopes:
        for number, part in enumerate(scope.entries):
            found += [Problem("is in the index under another key's hash", entry) for entry in part.misplaced()]
            found += [
                Problem("is in the index of another scope or shard", entry)
                for entry in part.values()
                if entry.scope is not scope or scope.part_of(entry.key_hash) != number
            ]
    return found


def rebuild(
    ledger: Ledger,
    accounts: Sequence[Account],
    used: Ticks,
    taken: npt.NDArray[np.bool_],
    kept: list[object],
) -> RepairReport:
    """Set every count of a storage as a recount finds it, and free the rest. All locks held.

    Args:
        used: what the writers of free slots have to wait for.
        taken: slots that open searches have.
        kept: what the caller has to keep until it has let go of the locks joins it.
    """
    for account in accounts:
        kept += account.policy
    end_cut_off(ledger, kept)
    for account in accounts:
        for scope in account.scopes.values():
            drop_nameless(scope, kept)
    recount = recount_of(ledger, scopes_of(accounts))
    pending = 0
    for account, published in recount.published.items():
        pending += account.pending_entries
        _repair_account(account, published)
    alive = recount.alive()
    entries = count_anew(recount, alive)
    ledger.tables.keep(sorted({entry.row for entry in alive}))
    has = ~taken
    has[0] = False
    slots = ledger.slots.rebuild(has, _named_by(ledger, alive).slots > 0, used)
    ledger.candidates.forget_parked()
    for account, published in recount.published.items():
        ledger.candidates.arrange(account, published)
    return RepairReport(slots, entries, pending)


def rebuild_search(
    ledger: Ledger, scope: Scope, stand_ins: Hold, kept: list[object]
) -> tuple[RepairReport, npt.NDArray[np.bool_]]:
    """As `rebuild`, of a search's books, which have no free slot then. All locks held.

    Args:
        stand_ins: of its roots, whose slots are not its own.

    Returns also which slots are its own.
    """
    end_cut_off(ledger, kept, stand_ins)
    drop_nameless(scope, kept)
    recount = recount_of(ledger, {scope.account: [scope]})
    alive = recount.alive()
    entries = count_anew(recount, alive)
    ledger.tables.keep(sorted({entry.row for entry in alive}))
    own = slots_of_entries(ledger, alive) & ~slots_of_entries(ledger, stand_ins.entries)
    ledger.slots.rebuild(own, own, NO_TICKS)
    pending, ledger.grants, ledger.borrowed = ledger.grants, 0, 0
    return RepairReport(0, entries, pending), own


def end_cut_off(ledger: Ledger, kept: list[object], *but: Hold) -> None:
    """Release the holds of operations, and of finalisers, that were cut off before they could. Mutex held."""
    kept += ledger.holds
    for hold in ledger.holds.difference(but):
        hold.users = 0
        if hold.released or hold.what in ("read", "commit") or hold.is_orphan:
            ledger.holds.discard(hold)
            hold.released = True


def count_anew(recount: Recount, alive: list[Entry]) -> int:
    """Set the references of entries as they were counted; returns how many had others. Mutex held."""
    wrong = sum([entry.refs != recount.references(entry) for entry in alive])
    for entry in alive:
        entry.refs, entry.pins = recount.references(entry), recount.pinned[entry]
        if not recount.indexed[entry]:
            entry.place = Place.NONE
    return wrong


def drop_nameless(scope: Scope, kept: list[object]) -> None:
    """Take out entries that were cut off before they were given slots, and cells that were cut off before that."""
    for part in scope.entries:
        part.drop_empty()
        for entry in [entry for entry in part.values() if entry.row < 0]:
            kept.append(entry)
            part.remove(entry)


def _repair_account(account: Account, published: list[Entry]) -> None:
    account.pending_entries = account.pending_slots = 0
    account.turns.clear()
    account.uses.keep([entry.row for entry in published])
    account.entries = len(published)
    account.reserved_entries, account.reserved_slots = _reserved_by(account)


def _reserved_by(account: Account) -> tuple[int, int]:
    """Entries and slots that open searches have set aside."""
    budgets = account.budgets
    return sum(budget.max_entries for budget in budgets), sum(budget.max_slots for budget in budgets)
