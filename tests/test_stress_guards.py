"""Each promise's guard taken out: the stress run that keeps it then fails, every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from concurrent_kv.deadline import Deadline
from concurrent_kv.entry import Entry, Hold, Scope
from concurrent_kv.flights import Claim, FlightTable
from concurrent_kv.ledger import Ledger
from concurrent_kv.locks import ShardedRWLock
from concurrent_kv.pool_core import PoolCore
from concurrent_kv.storage import KVStorage
from concurrent_kv.tensors import SlotTensor
from stress import actors, runner
from stress.profiles import PROFILES, Profile, parse_mix
from stress.runner import run_profile
from stress.workloads import WORKLOADS
from stress.world import Settings

Removal = Callable[[pytest.MonkeyPatch], None]
CLOSE = PROFILES["hot-key"]  # few keys, many who want them


def run(profile: Profile, *faults: str, seconds: float = 20.0) -> list[str]:
    """The failures of a run that ends with its first."""
    run_settings = Settings(
        profile, WORKLOADS["cartpole"], seconds=seconds, faults=frozenset(faults), bound_seconds=4.0
    )
    return [f"{failure.kind}: {failure.message}" for failure in run_profile(run_settings).failures]


def without_holding(*what: str) -> Removal:
    """Entries are not kept for those who read them."""

    def guard_off(patch: pytest.MonkeyPatch) -> None:
        extend = Ledger.extend

        def register_only(self: Ledger, hold: Hold, entries: Sequence[Entry]) -> None:
            extend(self, hold, [] if hold.what in what else entries)

        patch.setattr(Ledger, "extend", register_only)

    return guard_off


def without_shard_locks(patch: pytest.MonkeyPatch) -> None:
    def unlocked(self: ShardedRWLock, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        return nullcontext()

    patch.setattr(ShardedRWLock, "read", unlocked)
    patch.setattr(ShardedRWLock, "write", unlocked)


def with_clears_that_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolCore, "renew", lambda self, deadline, scopes=None: None)


def with_one_buffer_for_all(patch: pytest.MonkeyPatch) -> None:
    """What is read is aliased by what is read next."""
    buffers: dict[tuple[int, int], torch.Tensor] = {}
    new_buffer = SlotTensor.new_buffer

    def same_buffer(self: SlotTensor, batch: int, columns: int) -> torch.Tensor:
        return buffers.setdefault((batch, columns), new_buffer(self, batch, columns))

    patch.setattr(SlotTensor, "new_buffer", same_buffer)


def with_everybody_computing(patch: pytest.MonkeyPatch) -> None:
    join = FlightTable.join

    def join_alone(self: FlightTable, scope: Scope, key: Any, generation: Any, claim: Claim) -> bool:
        return join(self, scope, (key, object()), generation, claim)

    patch.setattr(FlightTable, "join", join_alone)


def with_slots_lost_on_errors(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("concurrent_kv.writing.cancel", lambda *arguments: None)


def with_handles_lost_when_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "abandon", lambda self, release: None)


def without_replacing_stuck_locks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ShardedRWLock, "_replace", lambda self, shard, lock: None)


def without_looking_at_the_process(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVStorage, "check_process", lambda self: None)


def without_looking_whether_it_is_closed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PoolCore, "check_open", lambda self: None)
    patch.setattr(PoolCore, "_enter", lambda self, timeout: Deadline(5.0))


def without_repair(patch: pytest.MonkeyPatch) -> None:
    from concurrent_kv import RepairReport

    patch.setattr(PoolCore, "repair", lambda self: RepairReport(0, 0, 0))


GUARDS: dict[str, tuple[Removal, Profile, tuple[str, ...]]] = {
    "never torn": (without_holding("read", "batch"), CLOSE, ()),
    "all at once": (without_shard_locks, CLOSE, ()),
    "nothing older than a clear": (with_clears_that_forget, CLOSE, ()),
    "nothing aliased": (with_one_buffer_for_all, CLOSE, ()),
    "a search's roots stay": (without_holding("search"), PROFILES["scopes"], ()),
    "one computation": (with_everybody_computing, replace(CLOSE, mix=parse_mix("computes=5,pops=5")), ()),
    "no slot lost on errors": (with_slots_lost_on_errors, CLOSE, ("copies",)),
    "no handle lost when dropped": (with_handles_lost_when_dropped, PROFILES["scopes"], ("abandon",)),
    "nobody stuck": (without_replacing_stuck_locks, CLOSE, ("interrupts",)),
    "what is cut loose comes back": (without_repair, CLOSE, ("interrupts",)),
    "one process": (without_looking_at_the_process, CLOSE, ("fork",)),
    "closed stays closed": (without_looking_whether_it_is_closed, CLOSE, ("close",)),
}


@pytest.mark.parametrize("promise", GUARDS)
def test_a_run_without_the_guard_of_a_promise_fails(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guard_off, profile, faults = GUARDS[promise]
    monkeypatch.setattr(actors, "MOST_FAILURES", 1)
    monkeypatch.setattr(runner, "QUIET_SECONDS", 0.5)
    guard_off(monkeypatch)
    assert run(profile, *faults), "without its guard the promise should have been broken"
