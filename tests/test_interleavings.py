"""Every promise, in every interleaving of a few operations on a tiny pool; and that the explorer looks at them all."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import pytest

from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock
from tests.explorer.parts import ModelEvent, ModelLock
from tests.explorer.pool_programs import POOL_PROGRAMS
from tests.explorer.programs import Program
from tests.explorer.random_programs import random_pool_program, random_search_program
from tests.explorer.scheduler import DeadlockError, Scheduler
from tests.explorer.search import explore, replay, sample
from tests.explorer.search_programs import SEARCH_PROGRAMS
from tests.explorer.tier_programs import TIER_PROGRAMS

EVERY_PROGRAM = [*POOL_PROGRAMS, *SEARCH_PROGRAMS, *TIER_PROGRAMS]
Tasks = Callable[[Scheduler], list[Callable[[], object]]]


@pytest.mark.parametrize("program", EVERY_PROGRAM, ids=lambda program: program.name)
def test_promises_hold_in_every_interleaving(program: Program) -> None:
    failure = explore(program, preemptions=program.preemptions).failure
    assert failure is None, str(failure)


@pytest.mark.parametrize("make", [random_pool_program, random_search_program])
@pytest.mark.parametrize("seed", range(20))
def test_promises_hold_in_random_programs(make: Callable[[int], Program], seed: int) -> None:
    failure = sample(make(seed), schedules=40, seed=seed).failure
    assert failure is None, str(failure)


# The explorer itself -------------------------------------------------------------------------------------------------


def running(tasks: Tasks) -> Callable[[Scheduler], None]:
    def run(scheduler: Scheduler) -> None:
        for task in tasks(scheduler):
            scheduler.spawn(task)
        scheduler.run()

    return run


def test_explorer_looks_at_every_schedule_once() -> None:
    seen: list[str] = []

    def run(scheduler: Scheduler) -> None:
        for _ in range(2):
            scheduler.spawn(lambda: [scheduler.step("works") for _ in range(3)])
        scheduler.run()
        seen.append("".join(scheduler.schedule))

    assert explore(run, preemptions=None).schedules == comb(8, 4)  # the start is a step too
    assert len(set(seen)) == len(seen) == comb(8, 4)


@pytest.mark.parametrize(("preemptions", "schedules"), [(0, 2), (1, 8), (2, 26)])
def test_explorer_stays_within_its_bound(preemptions: int, schedules: int) -> None:
    """Two tasks of four steps: each of the three inner points of the one that runs is a chance to preempt it."""
    run = running(lambda scheduler: [lambda: [scheduler.step("works") for _ in range(3)] for _ in range(2)])
    assert explore(run, preemptions=preemptions).schedules == schedules


def test_explorer_finds_a_deadlock_and_replays_it() -> None:
    def tasks(scheduler: Scheduler) -> list[Callable[[], object]]:
        first, second = ModelLock(scheduler), ModelLock(scheduler)

        def nested(outer: ModelLock, inner: ModelLock) -> None:
            with outer, inner:
                pass

        return [lambda: nested(first, second), lambda: nested(second, first)]

    failure = explore(running(tasks), preemptions=2).failure
    assert failure is not None
    assert isinstance(failure.error, DeadlockError)
    again = replay(running(tasks), failure.schedule)
    assert again is not None
    assert (again.schedule, again.trace) == (failure.schedule, failure.trace)


def test_model_time_passes_only_when_nobody_can_take_a_step() -> None:
    def run(scheduler: Scheduler) -> None:
        event, never, answers = ModelEvent(scheduler), ModelEvent(scheduler), dict[str, bool]()
        scheduler.spawn(lambda: answers.update(set=event.wait(1.0), never=never.wait(1.0)))
        scheduler.spawn(event.set)
        scheduler.run()
        assert answers == {"set": True, "never": False}

    failure = explore(run, preemptions=None).failure
    assert failure is None, str(failure)


@pytest.mark.parametrize("modes", ["rw", "ww", "rrw", "rww"])
def test_real_shard_locks_exclude_writers_and_let_everybody_in(modes: str) -> None:
    def tasks(scheduler: Scheduler) -> list[Callable[[], object]]:
        locks = ShardedRWLock(1, name="real", lock_factory=lambda: ModelLock(scheduler))
        inside: list[str] = []

        def hold(mode: str) -> None:
            with (locks.write if mode == "w" else locks.read)((0,), Deadline(1.0)):
                assert (mode == "r" and "w" not in inside) or not inside, f"{mode} came in with {inside}"
                inside.append(mode)
                scheduler.step("is inside")
                inside.remove(mode)

        return [lambda mode=mode: hold(mode) for mode in modes]  # type: ignore[misc]

    failure = explore(running(tasks), preemptions=None if modes == "ww" else 2).failure
    assert failure is None, str(failure)
