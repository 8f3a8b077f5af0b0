"""Leaves evaluated together for tasks: of either kind of loop, of several loops, beside threads; cancelled ones too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import ClosedError, KeyNotFoundError, KVCacheManager, WaitTimeoutError
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluator
from tests.async_support import LOOPS, run_on
from tests.evaluating import ENVS, model, new_manager, root_sum, value_after
from tests.support import HANG_SECONDS
from tests.test_evaluator import Gated, Threads, leaf, play_tree

ON_LOOP = pytest.mark.parametrize("on_loop", [False, True])
EACH_LOOP = pytest.mark.parametrize("loop", LOOPS)


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
