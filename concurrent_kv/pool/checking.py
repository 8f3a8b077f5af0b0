"""`check_integrity` and `repair`: the books of a storage and of its open searches, one after the other, each under all
of its own locks."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

import numpy as np

from ..books.integrity import (
    IntegrityReport,
    Problem,
    RepairReport,
    compare,
    compare_accounts,
    rebuild,
    recount_of,
    scopes_of,
    summed,
)
from ..books.ledger import Ledger, wake
from ..books.tables import named_slots
from ..device.streams import Ticks
from ..errors import IntegrityError
from ..locks.gate import gate
from .storage import KVStorage, LowerTier, OpenSearch
from .tier import check_tier

__all__ = ["check_integrity", "repair"]

_SEARCHES = attrgetter("searches")


def check_integrity(storage: KVStorage) -> IntegrityReport:
    """Compare every count with a recount; to be called when no operation is under way.

    Raises:
        IntegrityError: with every contradiction found.
    """
    deadline = storage.enter_quietly()
    zero_slot_is_zero = storage.closed or storage.zero_slot_is_zero()
    ledger = storage.ledger
    of_searches = [search.check(deadline) for search in _open_searches(storage)]
    accounts = [pool.account for pool in storage.pools]
    with gate.lock, storage.locks.read(range(storage.locks.count), deadline), ledger.mutex:
        recount = recount_of(ledger, scopes_of(accounts))
        problems, report = compare(ledger, recount)
        problems += compare_accounts(ledger, recount)
        named = named_slots(ledger.tables)
        free = ledger.slots.free_slots()
        of_tier = None if storage.tier is None else _check_tier(storage.tier)
    del recount  # here, where no lock is held: keys and side data may be finalised
    has = [named, free, *(found.slots for found in of_searches)]
    owners = np.bincount(np.concatenate(has), minlength=ledger.num_slots + 1)
    for found in of_searches:
        problems += found.problems
        report = summed(report, found.report)
    if of_tier is not None:
        problems += of_tier[0]
        report = summed(report, of_tier[1])
    if not zero_slot_is_zero:
        problems.append(Problem("slot 0, which serves all padding, is not zero"))
    wrong = np.flatnonzero(owners[1:] != 1) + 1
    if len(wrong) and not problems:
        problems.append(Problem(f"{len(wrong)} slots are no ledger's, or several ledgers': {wrong[:8].tolist()}"))
    if problems:
        raise IntegrityError(tuple([problem.text() for problem in problems]))
    return report


def _check_tier(tier: LowerTier) -> tuple[list[Problem], IntegrityReport]:
    """What contradicts a recount of a tier, and what it counted. All locks held but the tier's mutex."""
    with gate.lock, tier.ledger.mutex:
        return check_tier(tier)


def _repair_tier(tier: LowerTier, above: Ledger, used: Ticks, kept: list[object]) -> RepairReport:
    """As `rebuild`, of a tier beneath rebuilt books. All locks held but the tier's mutex."""
    with gate.lock, tier.ledger.mutex:
        report = rebuild(tier.ledger, [tier.account], used, np.zeros(tier.ledger.num_slots + 1, dtype=np.bool_), kept)
        above.forget_copies()
        tier.ledger.forget_copies()
        return report


def _open_searches(storage: KVStorage) -> list[OpenSearch]:
    with gate.lock, storage.ledger.mutex:
        return list(chain.from_iterable(map(_SEARCHES, storage.pools)))


def repair(storage: KVStorage) -> RepairReport:
    """Rebuild every count from the indexes and the open handles; to be called when no operation is under way."""
    deadline = storage.enter_quietly()
    used = storage.clock.everything()
    ledger = storage.ledger
    # Until no lock is held: what is dropped in here, and dies, has keys and side data.
    kept: list[object] = []
    of_searches = [search.mend(deadline, used, kept) for search in _open_searches(storage)]
    taken = np.zeros(ledger.num_slots + 1, dtype=np.bool_)
    for _, slots in of_searches:
        taken[slots] = True
    accounts = [pool.account for pool in storage.pools]
    with gate.lock, storage.locks.write(range(storage.locks.count), deadline), ledger.mutex:
        report = rebuild(ledger, accounts, used, taken, kept)
        if storage.tier is not None:
            report = summed(report, _repair_tier(storage.tier, ledger, used, kept))
    for search in _open_searches(storage):
        search.top_up()
    for of_search, _ in of_searches:
        report = summed(report, of_search)
    with gate.lock, ledger.mutex:
        waiters = ledger.take_waiters()
    wake(waiters)
    del kept
    for pool in storage.pools:
        pool.flights.abandon_orphans()
    return report
