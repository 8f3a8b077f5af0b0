"""Searches written as generators, awaited by tasks of either kind of loop, of several loops, beside threads.

No task or thread looks by itself here (`woken_or_never`): a hand-over that is missing is a hang.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import ClosedError, InvalidTypeError, KeyNotFoundError, KVCacheManager, WaitTimeoutError
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.aio import evaluator as async_module
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf, Walk
from concurrent_kv.evaluation import call as call_module
from concurrent_kv.evaluation import queue as queue_module
from concurrent_kv.evaluation import tickets as tickets_module
from concurrent_kv.evaluation.call import calls_here
from concurrent_kv.locks.gate import gate
from concurrent_kv.pool.joint import JointBatch
from tests.async_support import LOOPS, join_workers, run_on
from tests.cancelling import WAYS
from tests.evaluating import ENVS, cheap_collections, counted_now, look_every, model, new_manager, tree_walk
from tests.interrupting import cut_at
from tests.support import HANG_SECONDS
from tests.test_async_evaluator import until
from tests.test_evaluator import Gated, Threads, leaf, play_tree, wait_until
from tests.test_walks import NOTHING, Thing, Watched, answers, chain, is_closed, things

FILES = {str(module.__file__) for module in (async_module, call_module, queue_module, tickets_module)}
ON_LOOP = pytest.mark.parametrize("on_loop", [False, True])
EACH_LOOP = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager(recur_slots=100_000)
    yield made
    made.check_integrity()
    made.close()


@EACH_LOOP
@ON_LOOP
@pytest.mark.parametrize("parallel_calls", [1, 2])
@pytest.mark.parametrize("own_thread", [False, True])
def test_walks_of_the_tasks_of_a_loop_hear_what_their_own_paths_say(
    manager: KVCacheManager, loop: str, on_loop: bool, parallel_calls: int, own_thread: bool
) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=0.05, parallel_calls=parallel_calls, own_thread=own_thread)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)
    found: dict[int, list[int]] = {}

    async def main() -> None:
        async def grow(env: int) -> None:
            found[env] = await evaluator.run_many([tree_walk(search, env, env + seed, 10) for seed in (10, 20)])

        with manager.search(range(ENVS)) as search:
            async with anyio.create_task_group() as tasks:
                for env in range(ENVS):
                    tasks.start_soon(grow, env)
            assert await evaluator.run(tree_walk(search, 0, 99, 3)) == 99
            assert await evaluator.run_many([]) == []

    run_on(loop, main)
    assert found == {env: [env + 10, env + 20] for env in range(ENVS)}
    assert evaluator.stats().rows == 20 * ENVS + 3
    evaluator.close()
    assert counted_now(sync) == NOTHING


def test_walks_of_two_loops_and_of_threads_share_calls_with_plain_callers(manager: KVCacheManager) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=0.05)
    threads = Threads()
    with manager.search(range(ENVS), tokens=20_000) as search:
        for env, (loop, on_loop) in enumerate((("asyncio", False), ("trio", True))):
            of_loop = AsyncEvaluator(sync, on_loop=on_loop)
            work = partial(of_loop.run, tree_walk(search, env, env, 15))
            threads.start(partial(run_on, loop, work))
        threads.start(lambda: sync.run(tree_walk(search, 2, 2, 15)))
        threads.start(lambda: play_tree(sync.evaluate, search, 3, 3, 15))
        assert threads.join() == [0, 1, 2, None]
    assert sync.stats().rows == 15 * ENVS
    join_workers()
    assert counted_now(sync) == NOTHING


@EACH_LOOP
@ON_LOOP
def test_errors_are_heard_where_they_belong(manager: KVCacheManager, loop: str, on_loop: bool) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    def lost(search: Any, catches: bool) -> Walk[int, int, list[int]]:
        try:
            yield leaf(search, "nowhere", "never", 1)
        except KeyNotFoundError:
            if not catches:
                raise
        return (yield from chain(search, "caught", [1, 2]))

    async def main() -> None:
        with manager.search([0]) as search:
            assert await evaluator.run(lost(search, True)) == answers([1, 2])
            with pytest.raises(KeyNotFoundError):
                await evaluator.run_many([lost(search, False), chain(search, "a", [1, 2])])
            assert search.contains(("a", 1))
            nonsense: Any = 3
            with pytest.raises(InvalidTypeError, match="search must be a generator"):
                await evaluator.run(nonsense)
            with pytest.raises(WaitTimeoutError), evaluator.worker():
                await evaluator.run(chain(search, "b", [1]), timeout=0.0)

    run_on(loop, main)
    assert counted_now(sync) == NOTHING


async def count_in_turns(gated: Gated, turns: list[int]) -> None:
    """Note in each turn of the loop how many calls there were by then."""
    while True:
        turns.append(len(gated.rows))
        await anyio.lowlevel.checkpoint()


@EACH_LOOP
def test_the_other_tasks_of_a_loop_have_their_turn_after_each_call(manager: KVCacheManager, loop: str) -> None:
    gated = Gated(held=-1)
    evaluator = AsyncEvaluator(Evaluator(manager, gated), on_loop=True)
    turns: list[int] = []

    async def main() -> None:
        with manager.search([0]) as search:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(count_in_turns, gated, turns)
                await until(lambda: turns)
                await evaluator.run(chain(search, "a", range(8)))
                tasks.cancel_scope.cancel()

    run_on(loop, main)
    # Of trio's tasks that can go on, either may be the first: twice in a row, but not more.
    assert all(after - before <= 2 for before, after in pairwise(turns)), turns


@EACH_LOOP
def test_the_tasks_of_a_loop_that_run_walks_make_one_call_a_turn_together(manager: KVCacheManager, loop: str) -> None:
    gated = Gated(held=-1)
    evaluator = AsyncEvaluator(Evaluator(manager, gated), on_loop=True)
    turns: list[int] = []

    async def main() -> None:
        async def runs(number: int) -> None:
            for again in range(3):  # each begins at a moment of its own
                for _ in range(number):
                    await anyio.lowlevel.checkpoint()
                await evaluator.run(chain(search, f"{number} {again}", range(8)))

        with manager.search([0], entries=300) as search, anyio.CancelScope() as scope:
            async with anyio.create_task_group() as ticking:
                ticking.start_soon(count_in_turns, gated, turns)
                async with anyio.create_task_group() as tasks:
                    for number in range(8):
                        tasks.start_soon(runs, number)
                scope.cancel()

    run_on(loop, main)
    assert sum(gated.rows) == 8 * 3 * 8
    assert all(after - before <= 2 for before, after in pairwise(turns)), turns  # as above


@EACH_LOOP
@ON_LOOP
def test_a_cancelled_task_closes_its_walks_at_once_and_no_other_waits_for_them(
    manager: KVCacheManager, loop: str, on_loop: bool
) -> None:
    gated, watched = Gated(held=-1), Watched()
    sync = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    async def main() -> None:
        with manager.search([0]) as search:
            scope, over = anyio.CancelScope(), anyio.Event()

            async def cancelled() -> None:
                with scope:
                    await evaluator.run_many([watched(chain(search, name, [1, 2]), name) for name in "ab"])
                assert sorted(watched.closed) == ["a", "b"]
                over.set()

            async def other(worker: Any) -> None:
                with worker:
                    await over.wait()
                    assert await evaluator.run(chain(search, "other", [3])) == answers([3])

            async with anyio.create_task_group() as tasks:
                seat = evaluator.worker()
                tasks.start_soon(cancelled)
                await until(lambda: sync.queue.waiting_rows == 2)
                tasks.start_soon(other, seat)
                scope.cancel()
                await over.wait()
                seat.close()
            assert search.keys() == [("other", 0)]
        assert gated.rows == [1]

    run_on(loop, main)
    assert counted_now(sync) == NOTHING


@EACH_LOOP
def test_a_task_cancelled_while_its_worker_makes_a_call_leaves_the_others_theirs(
    manager: KVCacheManager, loop: str
) -> None:
    gated, watched = Gated(), Watched()
    sync = Evaluator(manager, gated, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync)

    async def main() -> None:
        with manager.search([0]) as search:
            scope, left = anyio.CancelScope(), anyio.Event()

            async def calls() -> None:
                with scope:
                    await evaluator.run(watched(chain(search, "cancelled", [1, 2])))
                left.set()

            async def waits() -> None:
                assert await evaluator.run(chain(search, "other", [2, 3])) == answers([2, 3])

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(calls)
                await until(gated.entered.is_set)
                tasks.start_soon(waits)
                await until(lambda: counted_now(sync)[2] == 2)
                scope.cancel()
                await left.wait()
                assert watched.closed_in == [threading.get_ident()]
                gated.go_on.set()
            assert not search.contains(("cancelled", 1))

    run_on(loop, main)
    join_workers()
    assert counted_now(sync) == NOTHING


@EACH_LOOP
def test_a_task_cancelled_while_its_worker_leads_its_walk_on_leaves_at_once_and_the_worker_closes_it(
    manager: KVCacheManager, loop: str
) -> None:
    in_walk, go_on, watched = threading.Event(), threading.Event(), Watched()
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync)

    def holds(search: Any) -> Walk[int, int, Any]:
        in_walk.set()
        assert go_on.wait(HANG_SECONDS)
        return (yield from chain(search, "held", [1, 2]))

    async def main() -> None:
        with manager.search([0]) as search:
            scope, left = anyio.CancelScope(), anyio.Event()

            async def cancelled() -> None:
                with scope:
                    await evaluator.run(held)
                left.set()

            async def waits() -> None:
                assert await evaluator.run(chain(search, "other", [2, 3])) == answers([2, 3])

            held = watched(holds(search))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancelled)
                await until(in_walk.is_set)
                tasks.start_soon(waits)
                await until(lambda: counted_now(sync)[2] == 2)
                scope.cancel()
                await left.wait()
                assert watched.closed == []
                go_on.set()
            join_workers() if loop == "trio" else await until(lambda: is_closed(held))
            assert watched.closed == [""]
            assert watched.closed_in != [threading.get_ident()]
            assert not search.contains(("held", 0))

    run_on(loop, main)
    join_workers()
    assert counted_now(sync) == NOTHING


@EACH_LOOP
@ON_LOOP
def test_a_task_whose_evaluator_is_closed_hears_so_where_its_walk_yielded(
    manager: KVCacheManager, loop: str, on_loop: bool
) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    def hears(search: Any, name: str) -> Walk[int, int, str]:
        for _ in range(2):
            with pytest.raises(ClosedError):
                yield leaf(search, "root", name, 1)
        return name

    async def main() -> None:
        found: list[str] = []

        async def runs(search: Any, name: str) -> None:
            found.append(await evaluator.run(hears(search, name)))

        with manager.search([0]) as search, evaluator.worker():
            async with anyio.create_task_group() as tasks:
                for name in "abc":
                    tasks.start_soon(runs, search, name)
                await until(lambda: sync.queue.waiting_rows == 3)
                evaluator.close()
            assert sorted(found) == ["a", "b", "c"]
            with pytest.raises(ClosedError):
                await evaluator.run(chain(search, "x", [1]))

    run_on(loop, main)
    join_workers()
    assert counted_now(sync) == NOTHING


@pytest.mark.parametrize("way", WAYS)
@ON_LOOP
@pytest.mark.parametrize("waits_first", [False, True])
def test_a_task_cancelled_at_any_checkpoint_closes_its_walks_and_is_counted_no_more(
    manager: KVCacheManager, way: str, on_loop: bool, waits_first: bool
) -> None:
    loop, cancelling = WAYS[way]
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)

    async def main(n: int) -> bool:
        async def joins(seat: Any) -> None:
            with seat:
                await until(lambda: sync.queue.waiting_rows == 2 or over)
            assert await evaluator.run(chain(other, "b", [1, 2], 1)) == answers([1, 2], 1)

        with manager.search([0]) as search, manager.search([1]) as other:
            over = False
            async with anyio.create_task_group() as tasks:
                if waits_first:  # then another leads its walks
                    tasks.start_soon(joins, evaluator.worker())
                walks = [chain(search, "a", [1]), chain(search, "c", [1, 2])]
                reached, values = await cancelling(evaluator.run_many(walks), n)
                over = True
            assert values in (None, [answers([1]), answers([1, 2])])
            await until(lambda: all(is_closed(w) or inspect.getgeneratorstate(w) == "GEN_CREATED" for w in walks))
            assert await anyio.to_thread.run_sync(sync.run, chain(other, "d", [3], 1)) == answers([3], 1)
        return reached

    n = 1
    while run_on(loop, main, n):
        join_workers()
        assert counted_now(sync) == NOTHING
        n += 1
    assert n > 1 + waits_first


def in_the_air(evaluator: AsyncEvaluator[int, int], walks: Sequence[Walk[int, int, Any]], rows: int) -> Any:
    """The coroutine of a task of a loop that has ended, whose walks wait for their leaves."""
    ended = asyncio.new_event_loop()
    coroutine = evaluator.run_many(walks)

    async def begins() -> None:
        task: Any = asyncio.ensure_future(coroutine)
        task._log_destroy_pending = False
        await until(lambda: evaluator.sync.queue.waiting_rows == rows)

    ended.run_until_complete(begins())
    ended.close()
    join_workers()
    return coroutine


def collect(coroutine: Any) -> None:
    """What the collector does, where nothing keeps the task, as anyio may."""
    with suppress(RuntimeError):  # of anyio's, which misses the loop
        coroutine.close()


@ON_LOOP
def test_a_loop_that_ends_with_walks_in_the_air_holds_no_other_up(manager: KVCacheManager, on_loop: bool) -> None:
    sync, watched, threads = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), Watched(), Threads()
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)
    with manager.search([0]) as search:
        with sync.worker():
            collect(in_the_air(evaluator, [watched(chain(search, "a", [1, 2])) for _ in range(2)], 2))
        assert watched.closed == ["", ""]
        threads.start(lambda: sync.run(chain(search, "b", [1])))
        assert threads.join() == [answers([1])]
    assert counted_now(sync) == NOTHING


@ON_LOOP
@pytest.mark.parametrize("others", ["a thread waits", "a walk waits", "they come later"])
def test_a_task_whose_frames_end_inside_the_queue_leaves_a_note_and_the_next_caller_closes_its_walks(
    manager: KVCacheManager, on_loop: bool, others: str
) -> None:
    sync, watched, threads = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS), Watched(), Threads()
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)
    with manager.search([0]) as search:
        with sync.worker():
            coroutine = in_the_air(evaluator, [watched(chain(search, "a", [1, 2])) for _ in range(2)], 2)
            waits = {
                "a thread waits": lambda: sync.evaluate(leaf(search, "root", "b", 1)),
                "a walk waits": lambda: sync.run(chain(search, "b", [1]))[0],
            }.get(others)
            if waits is not None:
                threads.start(waits)
                wait_until(lambda: sync.queue.waiting_rows == 3)
            queue: Any = sync.queue
            with gate.lock, queue._lock:
                collect(coroutine)
            if waits is None:
                assert watched.closed == []  # none was there
        if waits is None:
            threads.start(lambda: sync.run(chain(search, "b", [1]))[0])
        assert threads.join() == answers([1])
        assert watched.closed == ["", ""]
    assert counted_now(sync) == NOTHING


def test_walks_of_a_loop_that_has_stopped_are_led_on_by_others(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_every(0.01, monkeypatch)
    gated = Gated()
    sync = Evaluator(manager, gated)
    evaluator = AsyncEvaluator(sync)
    stopped, threads = asyncio.new_event_loop(), Threads()

    async def begins() -> Any:
        task = asyncio.ensure_future(evaluator.run(chain(search, "stopped", [1, 2])))
        await until(lambda: counted_now(sync)[2] == 1)
        return task

    with manager.search([0]) as search:
        threads.start(lambda: sync.evaluate(leaf(search, "root", 9, 9)))
        assert gated.entered.wait(HANG_SECONDS)
        task = stopped.run_until_complete(begins())
        threads.start(lambda: sync.evaluate_many([leaf(search, "root", n, n) for n in (2, 3)]))
        wait_until(lambda: sync.queue.waiting_rows == 2)
        gated.go_on.set()  # who is told to lead the walk on does not
        plain, many = threads.join()
        assert [plain, *many] == [answers([n])[0] for n in (9, 2, 3)]
        assert stopped.run_until_complete(task) == answers([1, 2])
        stopped.run_until_complete(stopped.shutdown_default_executor())
    stopped.close()
    join_workers()
    assert counted_now(sync) == NOTHING


class RowsOf:
    """How many leaves wait, asked without a place where the asking could be cut off."""

    def __init__(self, sync: Evaluator[int, int]) -> None:
        self._queue: Any = sync.queue

    def __len__(self) -> int:
        return len(self._queue._rows)


@ON_LOOP
@pytest.mark.parametrize("ends", ["hears", "leaves", "waits"])
def test_a_task_that_is_cut_off_anywhere_closes_its_walks_and_leaves_nothing_waiting(
    manager: KVCacheManager, on_loop: bool, ends: str
) -> None:
    sync = Evaluator(manager, model, max_wait_seconds=HANG_SECONDS)
    evaluator = AsyncEvaluator(sync, on_loop=on_loop)
    number, was_cut, rows = 0, True, RowsOf(sync)
    with cheap_collections():
        while was_cut:
            number += 1
            with manager.search([0], entries=20) as search:
                walks = [chain(search, "a", [1]), chain(search, "b", [1, 2])]

                async def main(walks: Any = walks) -> None:
                    async def frees(seat: Any) -> None:
                        with seat:
                            await until(lambda: len(rows) == 2)

                    if ends == "leaves":
                        with evaluator.worker(), pytest.raises(WaitTimeoutError):
                            await evaluator.run_many(walks, timeout=0.0)
                    elif ends == "waits":  # and goes to a worker once more
                        task = asyncio.ensure_future(frees(evaluator.worker()))  # in no group, which would wrap the cut
                        await evaluator.run_many(walks)
                        await task
                    else:
                        await evaluator.run_many(walks)

                was_cut = cut_at(number, partial(run_on, "asyncio", main), FILES)
                calls_here.set(())
                join_workers()
                gc.collect()
                assert counted_now(sync) == NOTHING
                assert all(is_closed(w) or inspect.getgeneratorstate(w) == "GEN_CREATED" for w in walks)
    assert number > (60 if on_loop else 30)
    manager.repair()  # what a commit had, and was cut off


@EACH_LOOP
@ON_LOOP
def test_what_a_task_ran_is_let_go_of_without_the_collector(manager: KVCacheManager, loop: str, on_loop: bool) -> None:
    evaluator: AsyncEvaluator[Any, Any] = AsyncEvaluator(Evaluator(manager, things), on_loop=on_loop)
    alive: list[weakref.ref[Any]] = []

    def watched(thing: Any) -> Any:
        alive.append(weakref.ref(thing))
        return thing

    def walk(search: Any) -> Walk[Any, Any, Any]:
        watched((yield Leaf(search, "root", "child", watched(Thing()), 0)))
        return watched(Thing())

    async def main() -> None:
        with manager.search([0]) as search:
            await evaluator.run(watched(walk(search)))
            assert len(alive) == 4
            await until(lambda: all(each() is None for each in alive))

    gc.collect()
    gc.disable()
    try:
        run_on(loop, main)
    finally:
        gc.enable()


def test_a_walk_of_a_task_asks_its_evaluator_in_vain(manager: KVCacheManager) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, model), on_loop=True)

    def asks(search: Any) -> Walk[int, int, list[int]]:
        inner = evaluator.run(chain(search, "x", [1]))
        with pytest.raises(Exception, match="a search that it leads on"):
            inner.send(None)
        return (yield from chain(search, "a", [1]))

    async def main() -> None:
        with manager.search([0]) as search:
            assert await evaluator.run(asks(search)) == answers([1])

    run_on("asyncio", main)


def raising(batch: JointBatch, numbers: Sequence[int]) -> Evaluated[int]:
    raise ValueError("no")


@EACH_LOOP
@ON_LOOP
def test_a_task_hears_what_the_model_raised_at_its_leaf(manager: KVCacheManager, loop: str, on_loop: bool) -> None:
    evaluator = AsyncEvaluator(Evaluator(manager, raising), on_loop=on_loop)

    async def main() -> None:
        with manager.search([0]) as search, pytest.raises(ValueError, match="no"):
            await evaluator.run(chain(search, "a", [1]))

    run_on(loop, main)
