"""Each promise's guard taken out: the stress run that keeps it then fails, every time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from threading import current_thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch

from concurrent_kv import AsyncKVCacheManager
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Hold, Scope
from concurrent_kv.device.buffers import new_buffer
from concurrent_kv.device.layout import KVLayout
from concurrent_kv.flights.table import Claim, FlightTable
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from concurrent_kv.locks.shards import ShardLocks
from concurrent_kv.pool.core import PoolCore
from concurrent_kv.pool.storage import KVStorage
from stress import actors, runner
from stress.profiles import PROFILES, Profile, parse_mix
from stress.runner import run_profile
from stress.workloads import WORKLOADS
from stress.world import Settings
from tests.support import LOCKS, LOOPS, loops_of

Removal = Callable[[pytest.MonkeyPatch], None]
CLOSE = PROFILES["hot-key"]  # few keys, many who want them
COMPUTING = parse_mix("computes=5,pops=5")
# Every entry is pinned now and then, by tasks that unpin when their loop goes on.
PINNED = replace(CLOSE, threads=0, tasks=60, keys=4, capacity=6, mix=parse_mix("pins=1,writes=1"))
LOST = "no room|was not over within|pending|slots|references|counts"
STUCK = "was not (free|over) .*within|not every actor stood still|do not end"
MIXED_UP = "torn|several writes|padding|asked for key|came with the side data|version .* was read|a pin of"


RUNS = 6  # in which a promise's own failure has to be the first, once: the books may be seen to be wrong before it

WORKERS = "AnyIO worker thread"

kept: list[Any] = []  # locks that a removal keeps: given back at the end, or threads would wait for ever


def run(profile: Profile, *faults: str, seed: int = 0, seconds: float = 20.0) -> list[str]:
    """The failures of a run that ends with its first."""
    run_settings = Settings(
        profile, WORKLOADS["cartpole"], seconds=seconds, faults=frozenset(faults), bound_seconds=4.0, seed=seed
    )
    return [f"{failure.kind}: {failure.message}" for failure in run_profile(run_settings).failures]


def without_holding(*what: str) -> Removal:
    """Entries are not kept for those who read them."""

    def guard_off(patch: pytest.MonkeyPatch) -> None:
        extend = Ledger.extend

        def register_only(self: Ledger, hold: Hold, entries: list[Entry]) -> None:
            extend(self, hold, [] if hold.what in what else entries)

        patch.setattr(Ledger, "extend", register_only)

    return guard_off


def without_shard_locks(patch: pytest.MonkeyPatch) -> None:
    def unlocked(self: ShardLocks, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        return nullcontext()

    for kind in LOCKS:
        patch.setattr(kind, "read", unlocked)
        patch.setattr(kind, "write", unlocked)


def with_clears_that_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolCore, "renew", lambda self, deadline, scopes=None: None)


def with_one_buffer_for_all(patch: pytest.MonkeyPatch) -> None:
    """What is read is aliased by what is read next."""
    buffers: dict[tuple[int, int], torch.Tensor] = {}

    def same_buffer(layout: KVLayout, batch: int, columns: int, *, spare: int = 0) -> torch.Tensor:
        return buffers.setdefault((batch, columns), new_buffer(layout, batch, columns))

    for name in ("device.buffers", "pool.reading"):
        patch.setattr(f"concurrent_kv.{name}.new_buffer", same_buffer)


def with_everybody_computing(patch: pytest.MonkeyPatch) -> None:
    join = FlightTable.join

    def join_alone(self: FlightTable, scope: Scope, key: Any, generation: Any, claim: Claim) -> bool:
        return join(self, scope, (key, object()), generation, claim)

    patch.setattr(FlightTable, "join", join_alone)


def with_slots_lost_on_errors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("concurrent_kv.pool.writing.cancel", lambda *arguments: None)


def with_handles_lost_when_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "abandon", lambda self, release: None)


def without_replacing_stuck_locks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardedRWLock, "_replace", lambda self, shard, lock: None)


def without_looking_at_the_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVStorage, "check_process", lambda self: None)


def without_looking_whether_it_is_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolCore, "check_open", lambda self: None)
    patch.setattr(KVStorage, "enter", lambda self, timeout=None, account=None: Deadline(5.0))


def with_one_scope_for_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolCore, "scope", lambda self, name: self.default_scope)


def with_clears_that_reach_into_searches(patch: pytest.MonkeyPatch) -> None:
    """What a search has is cleared as everybody's."""

    def all_scopes(self: PoolCore) -> tuple[Scope, ...]:
        return (*self.registered_scopes(), *(search.scope for search in list(self.searches)))

    patch.setattr(PoolCore, "scopes", all_scopes)


def with_a_mutex_that_is_not_given_back(patch: pytest.MonkeyPatch) -> None:
    release, numbers = Ledger.release, iter(range(1_000_000))
    of_others = set(enumerate_threads())  # an actor that an earlier removal left stuck has a pool that no run uses

    def release_and_keep(self: Ledger, hold: Hold) -> bool:
        first = release(self, hold)
        thread = current_thread()
        # By one of the actors, while everybody is at work.
        if thread in of_others or not thread.name.startswith(("thread", "task")):
            return first
        if next(numbers) > 100 and not kept:
            self.mutex.acquire()
            kept.append(self.mutex)
        return first

    patch.setattr(Ledger, "release", release_and_keep)


def with_tasks_that_wait_on_the_loop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Deadline, "leave_loop", lambda self, name: None)
    patch.setattr(Deadline, "hands_over", False)
    patch.setattr(runner, "AsyncKVCacheManager", partial(AsyncKVCacheManager, inline_wait_seconds=10.0))


def without_repair(patch: pytest.MonkeyPatch) -> None:
    from concurrent_kv import RepairReport

    patch.setattr(PoolCore, "repair", lambda self: RepairReport(0, 0, 0))


# What is promised: the guard taken out, the profile and the faults that miss it, and what the failure says.
GUARDS: dict[str, tuple[Removal, Profile, tuple[str, ...], str]] = {
    "never torn": (without_holding("read", "batch"), CLOSE, (), MIXED_UP),
    "each its own": (with_one_scope_for_all, CLOSE, (), MIXED_UP),
    "all at once": (without_shard_locks, CLOSE, (), f"{MIXED_UP}|written together"),
    "nothing older than a clear": (with_clears_that_forget, CLOSE, (), "version .* was read"),
    "nothing aliased": (with_one_buffer_for_all, CLOSE, (), MIXED_UP),
    "a search's roots stay": (without_holding("search"), PROFILES["scopes"], (), MIXED_UP),
    "a search's own entries are hits": (
        with_clears_that_reach_into_searches,
        PROFILES["scopes"],
        (),
        "was a miss|has no entry|a batch has rows of",
    ),
    "one computation": (with_everybody_computing, replace(CLOSE, mix=COMPUTING), (), "was computed by .* at once"),
    "no slot lost on errors": (with_slots_lost_on_errors, CLOSE, ("copies",), LOST),
    "no handle lost when dropped": (
        with_handles_lost_when_dropped,
        PROFILES["scopes"],
        ("abandon",),
        f"no actor has one|{LOST}",
    ),
    "no thread stuck": (without_replacing_stuck_locks, CLOSE, ("interrupts",), STUCK),
    "no lock kept": (with_a_mutex_that_is_not_given_back, CLOSE, (), STUCK),
    "no task holds the loop": (with_tasks_that_wait_on_the_loop, PINNED, (), f"no room|{STUCK}"),
    "what is cut loose comes back": (without_repair, CLOSE, ("interrupts",), f"no actor has one|{LOST}"),
    "one process": (without_looking_at_the_process, CLOSE, ("fork",), "a forked child"),
    "closed stays closed": (without_looking_whether_it_is_closed, CLOSE, ("close",), "is closed and answers"),
}

# Without these, entries that are gone are read. Their rows, free or of others by then, may be refused by the tables
# before the promise's own failure.
REFUSED = ("never torn", "all at once", "a search's roots stay")
REFUSALS = r"row must be less than|row -?\d+ is free|no more kept than there are|was not counted in"
# Compiled locks are never stuck, and compiled books are rarely cut off in the middle.
OF_PYTHON = ("no thread stuck", "what is cut loose comes back")
CASES = [
    (promise, kind)
    for promise in GUARDS
    for kind in (LOOPS if promise in REFUSED else LOOPS[:1] if promise in OF_PYTHON else LOOPS[-1:])
]


@pytest.mark.parametrize(("promise", "kind"), CASES)
def test_a_run_without_the_guard_of_a_promise_fails(promise: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_off, profile, faults, message = GUARDS[promise]
    if promise in REFUSED:
        message = f"{message}|{REFUSALS}"
    monkeypatch.setattr(actors, "MOST_FAILURES", 1)
    monkeypatch.setattr(runner, "QUIET_SECONDS", 0.5)
    guard_off(monkeypatch)
    failures: list[str] = []
    try:
        for seed in range(RUNS):
            with loops_of(kind):
                failures += run(profile, *faults, seed=seed)
            if any(re.search(message, failure) for failure in failures):
                break
    finally:
        while kept:
            kept.pop().release()
        for thread in enumerate_threads():
            if thread.name == WORKERS:  # of a loop that has ended: stuck, as the guard is out
                thread.name = "left behind without a guard"
    assert failures, "without its guard the promise should have been broken"
    assert any(re.search(message, failure) for failure in failures), failures
