"""`check_integrity` and `repair`: the books of a storage, looked at and rebuilt under all of its locks."""

from __future__ import annotations

from ..books.integrity import IntegrityReport, Problem, RepairReport, compare, rebuild, recount_of
from ..books.ledger import wake
from ..errors import IntegrityError
from ..locks.gate import gate
from .storage import KVStorage

__all__ = ["check_integrity", "repair"]


def check_integrity(storage: KVStorage) -> IntegrityReport:
    """Compare every count with a recount; to be called when no operation is under way.

    Raises:
        IntegrityError: with every contradiction found.
    """
    deadline = storage.enter_quietly()
    zero_slot_is_zero = storage.closed or storage.zero_slot_is_zero()
    accounts = [pool.account for pool in storage.pools]
    with gate.lock, storage.locks.read(range(storage.locks.count), deadline), storage.ledger.mutex:
        recount = recount_of(storage.ledger, accounts)
        problems, report = compare(storage.ledger, recount)
    del recount  # here, where no lock is held: keys and side data may be finalised
    if not zero_slot_is_zero:
        problems.append(Problem("slot 0, which serves all padding, is not zero"))
    if problems:
        raise IntegrityError(tuple([problem.text() for problem in problems]))
    return report


def repair(storage: KVStorage) -> RepairReport:
    """Rebuild every count from the indexes and the open handles; to be called when no operation is under way."""
    deadline = storage.enter_quietly()
    used = storage.clock.everything()
    accounts = [pool.account for pool in storage.pools]
    with gate.lock, storage.locks.write(range(storage.locks.count), deadline), storage.ledger.mutex:
        # Until no lock is held: what is dropped in here, and dies, has keys and side data.
        kept: list[object] = []
        report = rebuild(storage.ledger, accounts, used, kept)
        waiters = storage.ledger.take_waiters()
    wake(waiters)
    del kept
    for pool in storage.pools:
        pool.flights.abandon_orphans()
    return report
