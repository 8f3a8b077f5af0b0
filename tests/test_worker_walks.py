"""Walks of registered workers: calls wait for the walks while they run, and for their worker before and afterwards."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import Any

import anyio
import pytest

from concurrent_kv import KVCacheManager, WaitTimeoutError
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluator, Leaf
from concurrent_kv.evaluation.queue import Group, LeafQueue
from concurrent_kv.evaluation.tickets import Run
from concurrent_kv.locks.gate import gate
from tests.async_support import LOOPS, join_workers, run_on
from tests.evaluating import counted_now, look_every, new_manager, root_sum, value_after
from tests.support import HANG_SECONDS
from tests.test_async_evaluator import until
from tests.test_evaluator import Gated, Threads, leaf, wait_until

EACH_LOOP = pytest.mark.parametrize("loop", LOOPS)
ON_LOOP = pytest.mark.parametrize("on_loop", [False, True])
OWN_THREAD = pytest.mark.parametrize("own_thread", [False, True])


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager(recur_slots=10_000)
    yield made
    made.check_integrity()
    made.close()


@pytest.fixture
def calls() -> Gated:
    """The model, whose calls' rows are noted."""
    return Gated(held=-1)


def chain(search: Any, name: str, steps: int) -> Generator[Leaf[int], int, str]:
    """A path, each answer of which is compared with what it says itself; returns its name."""
    total, parent = root_sum(0), "root"
    for step in range(steps):
        value = yield leaf(search, parent, f"{name}{step}", step)
        expected, total = value_after(total, step)
        assert value == expected
        parent = f"{name}{step}"
    return name


def patient(manager: KVCacheManager, calls: Gated, *, own_thread: bool = False) -> Evaluator[int, int]:
    return Evaluator(manager, calls, max_wait_seconds=HANG_SECONDS, timeout=HANG_SECONDS, own_thread=own_thread)


def waited_for(evaluator: Evaluator[int, int]) -> int:
    """Those whom calls wait for."""
    waits: Any = evaluator.queue
    with waits._lock:
        waits._note_gone()
        number: int = waits._count_workers()
    return number


def is_left(evaluator: Evaluator[int, int]) -> bool:
    """Whether the evaluator knows of nobody any more."""
    waits: Any = evaluator.queue
    return not any(counted_now(evaluator)) and not waits._away


@OWN_THREAD
def test_calls_wait_for_a_worker_before_and_after_its_walks(
    manager: KVCacheManager, calls: Gated, own_thread: bool
) -> None:
    evaluator, threads = patient(manager, calls, own_thread=own_thread), Threads()
    one, other = evaluator.worker(), evaluator.worker()
    with manager.search([0]) as search:
        threads.start(lambda: other.run(chain(search, "b", 3)))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        assert calls.rows == []
        for before in ([], [2]):  # again, as after its first walk it is waited for as before
            assert calls.rows == before
            assert one.run(chain(search, "ac"[len(before)], 1)) == "ac"[len(before)]
            wait_until(lambda: evaluator.queue.waiting_rows == 1)
        assert calls.rows == [2, 2]
        one.close()
        assert threads.join() == ["b"]
    assert calls.rows == [2, 2, 1]
    other.close()
    assert is_left(evaluator)
    evaluator.close()


@OWN_THREAD
def test_calls_wait_for_a_worker_from_the_moment_its_last_walk_has_ended(
    manager: KVCacheManager, calls: Gated, own_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, threads = patient(manager, calls, own_thread=own_thread), Threads()
    one, other = evaluator.worker(), evaluator.worker()
    ended, go_on = threading.Event(), threading.Event()
    leave_run = LeafQueue.leave_run

    def late(queue: LeafQueue, run: Run) -> None:
        if run.seat is one.seat:
            ended.set()
            assert go_on.wait(HANG_SECONDS)
        leave_run(queue, run)

    monkeypatch.setattr(LeafQueue, "leave_run", late)
    with manager.search([0]) as search:
        threads.start(lambda: one.run(chain(search, "a", 1)))
        threads.start(lambda: other.run(chain(search, "b", 2)))
        assert ended.wait(HANG_SECONDS)
        wait_until(lambda: evaluator.queue.waiting_rows == 1 or len(calls.rows) == 2)
        assert waited_for(evaluator) == 2
        go_on.set()
        wait_until(lambda: 0 in threads.results)
        assert calls.rows == [2]
        one.close()
        assert threads.join() == ["a", "b"]
    assert calls.rows == [2, 1]
    evaluator.close()


@OWN_THREAD
def test_a_worker_whose_walks_run_is_not_waited_for_beside_them(
    manager: KVCacheManager, calls: Gated, own_thread: bool
) -> None:
    evaluator = patient(manager, calls, own_thread=own_thread)
    with manager.search([0]) as search, evaluator.worker() as worker:
        assert worker.run_many([chain(search, "a", 3), chain(search, "b", 2)]) == ["a", "b"]
        assert calls.rows == [2, 2, 1]
        assert worker.run_many([]) == []
        assert worker.evaluate(leaf(search, "root", "c", 5)) == value_after(root_sum(0), 5)[0]
        assert waited_for(evaluator) == 1
    assert is_left(evaluator)
    evaluator.close()


def test_a_worker_that_is_closed_while_its_walk_runs_is_waited_for_no_longer(
    manager: KVCacheManager, calls: Gated
) -> None:
    evaluator, threads = patient(manager, calls), Threads()
    one, other = evaluator.worker(), evaluator.worker()

    def closes() -> Generator[Leaf[int], int, str]:
        yield from chain(search, "a", 1)
        one.close()
        return (yield from chain(search, "c", 1))

    with manager.search([0]) as search:
        threads.start(lambda: other.run(chain(search, "b", 3)))
        assert one.run(closes()) == "c"
        assert threads.join() == ["b"]
    assert calls.rows == [2, 2, 1]
    assert waited_for(evaluator) == 1
    other.close()
    assert is_left(evaluator)


def fails(search: Any) -> Generator[Leaf[int], int, None]:
    yield from chain(search, "f", 1)
    raise LookupError("planted")


def test_a_worker_whose_walk_failed_or_waited_too_long_is_waited_for_again(
    manager: KVCacheManager, calls: Gated
) -> None:
    evaluator, threads = patient(manager, calls), Threads()
    one, other, third = [evaluator.worker() for _ in range(3)]
    with manager.search([0]) as search:
        with pytest.raises(WaitTimeoutError):
            one.run(chain(search, "t", 1), timeout=0.01)
        assert waited_for(evaluator) == 3
        third.close()
        threads.start(lambda: other.run(chain(search, "b", 2)))
        with pytest.raises(LookupError, match="planted"):
            one.run(fails(search))
        wait_until(lambda: evaluator.queue.waiting_rows == 1)
        assert calls.rows == [2]
        one.close()
        assert threads.join() == ["b"]
    assert calls.rows == [2, 1]
    other.close()
    assert is_left(evaluator)


def test_what_a_finaliser_left_of_a_workers_run_brings_it_back_but_not_beside_its_next(
    manager: KVCacheManager, calls: Gated
) -> None:
    evaluator = patient(manager, calls)
    queue = evaluator.queue
    with manager.search([0]) as search, evaluator.worker() as worker:
        dropped, following = (Run([chain(search, name, 1)], lambda: None, seat=worker.seat) for name in "ab")
        queue.start(dropped)
        with gate.lock:  # as in a finaliser that came inside a critical section
            queue.leave_run(dropped)
        queue.start(following)
        group = Group(following)
        for _ in range(2):  # the walk that was dropped ends, the other one comes to its leaf
            assert queue.take(group)
            evaluator.work(group)
        assert waited_for(evaluator) == 1
        assert queue.waiting_rows == 1
        queue.leave_run(following)
        assert waited_for(evaluator) == 1
        empty = Run([], lambda: None, seat=worker.seat)
        queue.start(empty)
        with gate.lock:
            queue.leave_run(empty)
        assert waited_for(evaluator) == 1
    assert is_left(evaluator)


# Tasks ---------------------------------------------------------------------------------------------------------------


@EACH_LOOP
@ON_LOOP
def test_calls_wait_for_a_task_that_is_a_worker_before_and_after_its_walks(
    manager: KVCacheManager, calls: Gated, loop: str, on_loop: bool
) -> None:
    sync = patient(manager, calls)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    async def main() -> None:
        one, other = evaluator.worker(), evaluator.worker()
        with manager.search([0]) as search:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other.run, chain(search, "b", 3))
                await until(lambda: sync.queue.waiting_rows == 1)
                for before in ([], [2]):
                    assert calls.rows == before
                    assert await one.run(chain(search, "ac"[len(before)], 1)) == "ac"[len(before)]
                    await until(lambda: sync.queue.waiting_rows == 1)
                assert calls.rows == [2, 2]
                one.close()
        assert calls.rows == [2, 2, 1]
        other.close()

    run_on(loop, main)
    assert is_left(sync)
    join_workers()


@EACH_LOOP
@ON_LOOP
def test_a_task_whose_walks_run_is_not_waited_for_beside_them(
    manager: KVCacheManager, calls: Gated, loop: str, on_loop: bool
) -> None:
    sync = patient(manager, calls)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    async def main() -> None:
        with manager.search([0]) as search, evaluator.worker() as worker:
            assert await worker.run_many([chain(search, "a", 3), chain(search, "b", 2)]) == ["a", "b"]
            assert calls.rows == [2, 2, 1]
            assert await worker.evaluate(leaf(search, "root", "c", 5)) == value_after(root_sum(0), 5)[0]
            assert waited_for(sync) == 1

    run_on(loop, main)
    assert is_left(sync)
    join_workers()


@EACH_LOOP
@ON_LOOP
def test_a_task_that_is_cancelled_in_its_walk_is_waited_for_again(
    manager: KVCacheManager, calls: Gated, loop: str, on_loop: bool
) -> None:
    sync = patient(manager, calls)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    async def main() -> None:
        one, other, third = [evaluator.worker() for _ in range(3)]
        with manager.search([0]) as search:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other.run, chain(search, "b", 1))
                async with anyio.create_task_group() as cut_off:
                    cut_off.start_soon(one.run, chain(search, "a", 1))
                    await until(lambda: sync.queue.waiting_rows == 2)
                    cut_off.cancel_scope.cancel()
                assert waited_for(sync) == 3
                third.close()
                assert calls.rows == []
                one.close()
        assert calls.rows == [1]
        other.close()

    run_on(loop, main)
    assert is_left(sync)
    join_workers()
