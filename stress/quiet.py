"""What has to hold whenever nothing is under way, and when everything is over."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

from concurrent_kv import IntegrityError, KVPool, KVStorage, RepairReport
from concurrent_kv.locks.deadline import Deadline
from stress.actors import Run

__all__ = ["QuietMoment", "check_emptied", "check_quiet"]

ATTEMPTS = 20  # a cancelled task may have left a worker behind, which ends within its own bound
PAUSE_SECONDS = 0.1


class QuietMoment(list[str]):
    """Problems found; and what `repair()` returned before anything was counted."""

    repaired: RepairReport = RepairReport(0, 0, 0)


def check_quiet(run: Run) -> QuietMoment:
    """Compare every book with a recount; after asynchronous exceptions, repair first."""
    storages = [*_storages(run)]
    moment = QuietMoment()
    waiting = threading.Event()
    attempts = ATTEMPTS if "cancel" in run.faults.enabled else 1
    for attempt in range(attempts):
        gc.collect()  # what was dropped in a cycle (with its traceback, say) is abandoned now
        moment.clear()
        moment.extend(run.computations.twice() if not attempt else ())
        twice = list(moment)
        for storage, pool in storages:
            moment += _problems(run, storage, pool, moment)
        if moment == twice or attempt == attempts - 1:
            break
        waiting.wait(PAUSE_SECONDS)
    return moment


def _storages(run: Run) -> Iterator[tuple[KVStorage, KVPool]]:
    """Every storage, with one of its pools."""
    manager = run.world.manager
    yield manager.storage, manager.wm_pool
    for owner in (run.faults.tiny, run.faults.doomed):
        if owner is not None:
            yield owner.pool.storage, owner.pool


def _problems(run: Run, storage: KVStorage, pool: KVPool, moment: QuietMoment) -> list[str]:
    """Of one storage."""
    found: list[str] = []
    try:
        if run.faults.may_starve:
            report = pool.repair()
            moment.repaired = RepairReport(*(a + b for a, b in zip(moment.repaired, report, strict=True)))
        report_of = pool.check_integrity()
        found += [f"{report_of.handles} handles are open, and no actor has one"] if report_of.handles else []
    except IntegrityError as error:
        found += error.problems
    bound = run.world.settings.bound_seconds
    with storage.locks.write(range(storage.locks.count), Deadline(bound)):
        pass  # every lock can be had
    for name, left in (
        ("searches", sum(len(each.searches) for each in storage.pools)),
        ("computations", sum(len(each.flights) for each in storage.pools)),
        ("abandoned handles", len(storage.ledger.abandoned)),
    ):
        found += [f"{left} {name} are left in {storage.name}, and no actor has one"] if left else []
    return found


def check_emptied(run: Run) -> list[str]:
    """Clear everything: no slot and no reservation may be left."""
    manager = run.world.manager
    manager.clear_all()
    found: list[str] = []
    for pool in (*manager.init_pools, manager.recur_pool, manager.wm_pool):
        stats = pool.stats()
        left = {
            name: getattr(stats, name) for name in ("entries", "slots_in_use", "reserved_entries", "reserved_slots")
        }
        if any(left.values()):
            found.append(f"{pool.name} still has {left} after everything was cleared")
    ledger = manager.storage.ledger
    if ledger.slots.free_count != ledger.num_slots:
        found.append(f"{ledger.num_slots - ledger.slots.free_count} slots are lost")
    return found
