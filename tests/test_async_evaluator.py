"""Leaves evaluated together for tasks: of either kind of loop, of several loops, beside threads; cancelled ones too."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import ClosedError, InvalidTypeError, KeyNotFoundError, KVCacheManager, WaitTimeoutError
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.aio import evaluator as async_module
from concurrent_kv.evaluation import Evaluator
from concurrent_kv.evaluation import queue as queue_module
from tests.async_support import LOOPS, join_workers, run_on
from tests.cancelling import WAYS
from tests.evaluating import ENVS, cheap_collections, counted_now, look_every, model, new_manager, root_sum, value_after
from tests.interrupting import cut_at
from tests.support import HANG_SECONDS
from tests.test_evaluator import Gated, Looks, Threads, leaf, play_tree, wait_until

ON_LOOP = pytest.mark.parametrize("on_loop", [False, True])
EACH_LOOP = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager(recur_slots=100_000)
    yield made
    made.check_integrity()
    made.close()


async def until(condition: Any) -> None:
    with anyio.fail_after(HANG_SECONDS):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def grow(evaluator: AsyncEvaluator[int, int], search: Any, env: int, steps: int) -> None:
    """A chain, each answer of which is compared with what its path says."""
    total, parent = root_sum(env), "root"
    with evaluator.worker() as worker:
        for step in range(steps):
            key = f"{env}, {step}"
            value = await worker.evaluate(leaf(search, parent, key, step, env))
            expected, total = value_after(total, step)
            assert value == expected
            parent = key


@EACH_LOOP
@ON_LOOP
def test_tasks_of_a_loop_get_what_their_own_paths_say(manager: KVCacheManager, loop: str, on_loop: bool) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=0.05), on_loop=on_loop)

    async def main() -> None:
        with manager.search(range(ENVS)) as search:
            async with anyio.create_task_group() as tasks:
                for env in range(ENVS):
                    tasks.start_soon(grow, evaluator, search, env, 20)

    run_on(loop, main)
    stats = evaluator.stats()
    assert stats.rows == 20 * ENVS
    # Tasks of one loop hand in one after the other, and the last of them calls for all.
    assert stats.calls <= 20 + ENVS


def test_what_is_no_evaluator_is_refused_when_the_facade_is_made(manager: KVCacheManager) -> None:
    wrong: Any = manager
    with pytest.raises(InvalidTypeError, match=r"got KVCacheManager: AsyncEvaluator\(Evaluator\(manager, model\)\)"):
        AsyncEvaluator(wrong)


@EACH_LOOP
def test_leaves_handed_in_during_one_turn_of_a_loop_share_a_call_without_workers(
    manager: KVCacheManager, loop: str
) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), on_loop=True)

    async def main() -> None:
        with manager.search([0]) as search:
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(evaluator.evaluate, leaf(search, "root", number, number))

    run_on(loop, main)
    assert evaluator.stats().calls == 1


def test_tasks_of_two_loops_and_threads_share_calls(manager: KVCacheManager) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=0.05)
    evaluator = AsyncEvaluator(sync)
    threads = Threads()
    with manager.search(range(ENVS), tokens=20_000) as search:
        for env, loop in enumerate(("asyncio", "trio")):
            threads.start(lambda env=env, loop=loop: run_on(loop, lambda: grow(evaluator, search, env, 15)))  # type: ignore[misc]
        for env in (2, 3):
            threads.start(lambda env=env: play_tree(sync.evaluate, search, env, env, 15))  # type: ignore[misc]
        assert threads.join() == [None] * ENVS
    assert sync.stats().rows == 15 * ENVS


@EACH_LOOP
@ON_LOOP
def test_errors_are_heard_by_whom_they_concern(manager: KVCacheManager, loop: str, on_loop: bool) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), on_loop=on_loop)

    async def main() -> None:
        heard: list[Any] = []

        async def one(worker: Any, parent: str, number: int) -> None:
            try:
                heard.append(await worker.evaluate(leaf(search, parent, number, number)))
            except KeyNotFoundError as error:
                heard.append(type(error))

        with manager.search([0]) as search, evaluator.worker() as first, evaluator.worker() as second:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one, first, "nowhere", 1)
                tasks.start_soon(one, second, "root", 2)
        assert sorted(heard, key=str) == sorted([KeyNotFoundError, value_after(root_sum(0), 2)[0]], key=str)

    run_on(loop, main)


@EACH_LOOP
def test_a_cancelled_task_takes_its_leaf_out_and_nobody_waits_for_it(manager: KVCacheManager, loop: str) -> None:
    gated = Gated(held=-1)
    evaluator = AsyncEvaluator(Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS))

    async def main() -> None:
        with manager.search([0]) as search:
            scope, over = anyio.CancelScope(), anyio.Event()

            async def cancelled(worker: Any) -> None:
                with worker, scope:
                    await worker.evaluate(leaf(search, "root", 1, 1))
                over.set()

            async def other(worker: Any) -> None:
                with worker:
                    await over.wait()
                    assert await worker.evaluate(leaf(search, "root", 2, 2)) == value_after(root_sum(0), 2)[0]

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancelled, evaluator.worker())
                tasks.start_soon(other, evaluator.worker())
                await until(lambda: evaluator.sync.queue.waiting_rows == 1)
                scope.cancel()
            assert search.keys() == [2]
        assert gated.rows == [1]

    run_on(loop, main)


@EACH_LOOP
def test_a_task_cancelled_during_its_own_call_leaves_the_others_theirs(manager: KVCacheManager, loop: str) -> None:
    gated = Gated()
    evaluator = AsyncEvaluator(Evaluator(manager, gated))

    async def main() -> None:
        with manager.search([0]) as search:
            scope = anyio.CancelScope()

            async def calls() -> None:
                with scope:
                    await evaluator.evaluate_many([leaf(search, "root", 1, 1)])

            async def waits() -> None:
                assert await evaluator.evaluate(leaf(search, "root", 2, 2)) == value_after(root_sum(0), 2)[0]

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(calls)
                await until(gated.entered.is_set)
                tasks.start_soon(waits)
                await until(lambda: evaluator.sync.queue.waiting_rows == 1)
                scope.cancel()
                await anyio.lowlevel.checkpoint()
                gated.go_on.set()
            with anyio.fail_after(HANG_SECONDS):
                while not (search.contains(1) and search.contains(2)):
                    await anyio.lowlevel.checkpoint()

    run_on(loop, main)


@EACH_LOOP
def test_a_task_that_waits_too_long_and_one_whose_evaluator_closes_hear_so(manager: KVCacheManager, loop: str) -> None:
    gated = Gated()
    sync = Evaluator(manager, gated)
    evaluator = AsyncEvaluator(sync)
    threads = Threads()

    async def main() -> None:
        with pytest.raises(WaitTimeoutError, match=r"within 0\.01 s"):
            await evaluator.evaluate(leaf(search, "root", 2, 2), timeout=0.01)
        async with anyio.create_task_group() as tasks:

            async def closed() -> None:
                with pytest.raises(ClosedError):
                    await evaluator.evaluate(leaf(search, "root", 3, 3))

            tasks.start_soon(closed)
            await until(lambda: sync.queue.waiting_rows == 1)
            evaluator.close()

    with manager.search([0]) as search:
        threads.start(lambda: sync.evaluate(leaf(search, "root", 1, 1)))
        assert gated.entered.wait(HANG_SECONDS)
        run_on(loop, main)
        gated.go_on.set()
        assert threads.join() == [value_after(root_sum(0), 1)[0]]


def test_a_loop_that_ends_with_tasks_in_the_air_holds_nobody_up(manager: KVCacheManager) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS))
    threads = Threads()
    with manager.search([0]) as search:
        ended = asyncio.new_event_loop()

        async def waits() -> None:
            with evaluator.worker() as worker:
                await worker.evaluate(leaf(search, "root", 1, 1))

        async def begins() -> Any:
            task = asyncio.ensure_future(waits())
            while evaluator.sync.queue.waiting_rows < 1:
                await asyncio.sleep(0)
            return task

        with evaluator.sync.worker() as worker:
            task = ended.run_until_complete(begins())
            ended.stop()
            ended.close()
            del task
            threads.start(lambda: worker.evaluate(leaf(search, "root", 2, 2)))
            assert threads.join() == [value_after(root_sum(0), 2)[0]]


@pytest.mark.parametrize("way", WAYS)
@ON_LOOP
@pytest.mark.parametrize("waits_first", [False, True])
def test_a_task_cancelled_at_any_checkpoint_holds_nobody_up_and_is_counted_no_more(
    manager: KVCacheManager, way: str, on_loop: bool, waits_first: bool
) -> None:
    loop, cancelling = WAYS[way]
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), on_loop=on_loop)

    async def main(n: int) -> bool:
        async def joins(second: Any) -> None:
            with second:
                await until(lambda: evaluator.sync.queue.waiting_rows == 1 or over)
                await second.evaluate(leaf(other, "root", 2, 2, 1))

        with manager.search([0]) as search, manager.search([1]) as other:
            over = False
            async with anyio.create_task_group() as tasks:
                if waits_first:  # then it is woken by the other, who makes the call
                    tasks.start_soon(joins, evaluator.worker())
                with evaluator.worker() as worker:
                    reached, value = await cancelling(worker.evaluate(leaf(search, "root", 1, 1)), n)
                over = True
            assert value in (None, value_after(root_sum(0), 1)[0])
            assert evaluator.sync.evaluate(leaf(other, "root", 3, 3, 1)) == value_after(root_sum(1), 3)[0]
        return reached

    n = 1
    while run_on(loop, main, n):
        join_workers()
        assert counted_now(evaluator.sync) == (0, 0, 0, 0, 0)
        n += 1
    assert n > 1 + waits_first


@EACH_LOOP
def test_a_task_that_is_woken_between_its_look_and_its_wait_looks_again_and_once(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS))
    one, other, leaving = [evaluator.worker() for _ in range(3)]
    looks = Looks(leaving.close, monkeypatch)

    async def main() -> None:
        async def waits() -> None:
            assert await one.evaluate(leaf(search, "root", 1, 1)) == value_after(root_sum(0), 1)[0]

        with manager.search([0]) as search:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(waits)
                await until(lambda: looks.count == 2)
                for _ in range(200):  # it sleeps now: the event that woke it is not that which it waits for
                    await anyio.lowlevel.checkpoint()
                assert looks.count == 2
                other.close()

    run_on(loop, main)


@EACH_LOOP
def test_a_call_finds_a_worker_where_all_places_are_taken_by_those_who_wait_for_it(
    manager: KVCacheManager, loop: str
) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync)

    async def main() -> None:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 2
        answers: list[int] = []

        async def in_a_place(worker: Any, number: int) -> None:
            answers.append(await anyio.to_thread.run_sync(worker.evaluate, leaf(search, "root", number, 1)))

        with manager.search([0]) as search, evaluator.worker() as last:
            async with anyio.create_task_group() as tasks:
                for number in range(2):
                    tasks.start_soon(in_a_place, sync.worker(), number)
                await until(lambda: sync.queue.waiting_rows == 2)
                answers.append(await last.evaluate(leaf(search, "root", 2, 1)))
        assert answers == [value_after(root_sum(0), 1)[0]] * 3

    run_on(loop, main)


@pytest.mark.parametrize("loop", ["asyncio"])
def test_a_loop_that_has_stopped_is_not_waited_for(
    manager: KVCacheManager, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_every(0.01, monkeypatch)
    gated = Gated()
    sync = Evaluator(manager, gated)
    evaluator = AsyncEvaluator(sync)
    stopped, threads = asyncio.new_event_loop(), Threads()

    async def begins() -> Any:
        task = asyncio.ensure_future(evaluator.evaluate(leaf(search, "root", 1, 1)))
        await until(lambda: sync.queue.waiting_rows == 1)
        return task

    with manager.search([0]) as search:
        threads.start(lambda: sync.evaluate(leaf(search, "root", 9, 9)))
        assert gated.entered.wait(HANG_SECONDS)
        task = stopped.run_until_complete(begins())
        threads.start(lambda: sync.evaluate(leaf(search, "root", 2, 2)))
        wait_until(lambda: sync.queue.waiting_rows == 2)
        gated.go_on.set()  # whose leaf came first is told to look, and does not
        assert threads.join() == [value_after(root_sum(0), number)[0] for number in (9, 2)]
        # It was served with the others, and finds it when its loop runs again.
        assert stopped.run_until_complete(task) == value_after(root_sum(0), 1)[0]
    stopped.close()


@EACH_LOOP
def test_a_call_in_a_worker_runs_in_the_streams_of_its_task(
    manager: KVCacheManager, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[int] = []

    @contextmanager
    def of_task() -> Iterator[None]:
        entered.append(threading.get_ident())
        yield
        entered.append(threading.get_ident())

    monkeypatch.setattr("concurrent_kv.aio.evaluator.current_streams", of_task)
    called_in: list[int] = []

    def looking(batch: Any, numbers: Any) -> Any:
        called_in.append(threading.get_ident())
        return model(batch, numbers)

    evaluator = AsyncEvaluator(Evaluator(manager, looking))

    async def main() -> None:
        with manager.search([0]) as search:
            await evaluator.evaluate(leaf(search, "root", 1, 1))

    run_on(loop, main)
    assert entered == called_in * 2
    assert threading.get_ident() not in called_in


@ON_LOOP
def test_a_task_that_is_cut_off_anywhere_leaves_nothing_waiting(manager: KVCacheManager, on_loop: bool) -> None:
    files = {str(module.__file__) for module in (async_module, queue_module)}
    evaluator = AsyncEvaluator(Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), on_loop=on_loop)
    number, was_cut = 0, True
    with cheap_collections():
        while was_cut:
            number += 1
            with manager.search([0], entries=20) as search:

                async def main(search: Any = search) -> None:
                    with evaluator.worker() as worker:
                        await worker.evaluate(leaf(search, "root", 1, 1))

                was_cut = cut_at(number, partial(run_on, "asyncio", main), files)
                join_workers()
                gc.collect()
                assert counted_now(evaluator.sync) == (0, 0, 0, 0, 0)
    assert number > 30
