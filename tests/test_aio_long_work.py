"""What grows, and what somebody else left to be done, is never done on an event loop's own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import AsyncKVCacheManager, AsyncKVPool, CapacityError, KeysValues, KVCacheManager, KVPool
from concurrent_kv.aio.cell import Cell
from concurrent_kv.errors import WaitTimeoutError
from concurrent_kv.locks.shards import ShardLocks
from concurrent_kv.search.state import SearchState
from tests.async_support import LOOPS, always_in_workers, join_workers, run_on, shards_held
from tests.conftest import MakeManager, MakePool
from tests.flight_support import counted_waiters
from tests.support import HANG_SECONDS, LOCKS, append, assert_same, config, layout, stacked, tokens
from tests.threading_support import JOIN_SECONDS, Background, Gate

on_every_loop = pytest.mark.parametrize("loop", LOOPS)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads in which searches were ended."""
    threads: list[int] = []
    end = SearchState.end

    def seen(self: SearchState, *arguments: Any) -> None:
        threads.append(threading.get_ident())
        end(self, *arguments)

    monkeypatch.setattr(SearchState, "end", seen)
    return threads


def counts(facade: AsyncKVPool | AsyncKVCacheManager) -> tuple[int, int]:
    stats = facade.offload_stats()
    return stats.inline_count, stats.worker_count


@on_every_loop
def test_a_search_that_was_dropped_unclosed_is_ended_by_a_worker(
    manager: KVCacheManager, loop: str, ends: list[int]
) -> None:
    facade = AsyncKVCacheManager(manager)

    async def main() -> None:
        manager.search([0])  # dropped at once
        assert ends == []
        await facade.wm_pool.get("key")
        assert len(ends) == 1
        assert threading.get_ident() not in ends
        assert counts(facade) == (0, 1)

    run_on(loop, main)


@on_every_loop
def test_a_search_that_is_dropped_while_an_operation_runs_is_not_ended_by_it(
    manager: KVCacheManager, loop: str, ends: list[int]
) -> None:
    """Between the facade's look and the operation's own: a garbage collection may come anywhere."""
    facade = AsyncKVCacheManager(manager)
    enter = manager.storage.enter

    def and_drop(*of_pool: Any) -> Any:
        manager.storage.enter = enter  # type: ignore[method-assign]
        manager.search([0])
        return enter(*of_pool)

    async def main() -> None:
        manager.storage.enter = and_drop  # type: ignore[method-assign, assignment]
        await facade.wm_pool.get("key")
        assert counts(facade) == (1, 0)
        assert ends == []
        manager.wm_pool.peek("key")
        assert len(ends) == 1

    run_on(loop, main)


@on_every_loop
def test_a_search_waits_in_its_task_for_the_room_of_another(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(env_num=1)
    facade = AsyncKVCacheManager(manager)

    async def open_another() -> None:
        async with facade.search([0]):
            pass

    async def main() -> None:
        first = manager.search([0])
        async with anyio.create_task_group() as group:
            group.start_soon(open_another)
            while not manager.storage.ledger.waiters:
                await anyio.lowlevel.checkpoint()
            assert counts(facade) == (0, 0)
            first.close()
        assert counts(facade) == (2, 0)  # its opening, and its end
        with manager.search([0]), pytest.raises(CapacityError):
            await facade.search([0], timeout=0.0).__aenter__()

    run_on(loop, main)


@on_every_loop
def test_many_evictions_are_made_in_a_worker(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(16, wait_timeout=HANG_SECONDS)
    facade = AsyncKVPool(pool, inline_entries=4)

    async def main() -> None:
        for key in range(16):
            await facade.put(key, tokens(1, 8))
        await facade.put(16, tokens(1, 8))
        assert counts(facade)[1] == 0
        many = KVCacheManager(config(max_cache_size=64), 1, recur_slots=64 * 8, wait_timeout=HANG_SECONDS)
        async with AsyncKVCacheManager(many, inline_entries=4) as manager:
            for key in range(64):
                await manager.set_recur_cache(key, tokens(1, 8))
            before = counts(manager)
            async with manager.search([0], entries=3):
                assert counts(manager)[1] == before[1]
            async with manager.search([0], entries=32):
                assert counts(manager)[1] == before[1] + 1  # this, and not the end of the one before
            many.check_integrity()

    run_on(loop, main)


def grown(search: Any, entries: int) -> None:
    """Children of the root, so many."""
    for number in range(entries):
        batch = search.gather(["root"], [0])
        append(batch, [number])
        search.commit([number], batch)


@on_every_loop
def test_a_small_search_is_closed_on_its_loops_thread_before_any_other_task_runs(
    make_manager: MakeManager, loop: str, ends: list[int]
) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager, inline_entries=1)

    async def main() -> None:
        manager.set_init_cache(0, "root", tokens(1, 2))
        async with facade.search([0], entries=8, tokens=40) as search:
            grown(search.sync, 8)  # with the root 9, which is one time eight
        assert ends == [threading.get_ident()]
        assert counts(facade) == (2, 0)
        closing = (await facade.search([0], entries=8, tokens=40).__aenter__()).close()
        await anyio.lowlevel.checkpoint()
        steps = closing.__await__()
        next(steps)  # as far as its first checkpoint
        assert manager.recur_pool.stats().open_searches == 0
        closing.close()

    run_on(loop, main)


@on_every_loop
def test_a_search_of_many_entries_or_with_large_batches_is_closed_by_a_worker(
    make_manager: MakeManager, loop: str, ends: list[int]
) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager, inline_entries=1)

    async def main() -> None:
        manager.set_init_cache(0, "root", tokens(1, 2))
        async with facade.search([0], entries=15, tokens=40) as search:
            grown(search.sync, 15)  # with the root twice eight
        async with facade.search([0], entries=8, tokens=40) as search:
            batch = search.sync.gather(["root"] * 15, [0] * 15)
        assert batch.closed
        assert counts(facade) == (2, 2)
        here = threading.get_ident()
        assert [thread == here for thread in ends] == [True, False] * 2  # there it was seen to be too much

    run_on(loop, main)


@on_every_loop
def test_a_search_whose_shard_is_busy_is_closed_by_a_worker(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager)

    async def main() -> None:
        search = await facade.search([0], entries=2).__aenter__()
        with shards_held(manager.recur_pool) as let_go:
            async with anyio.create_task_group() as group:
                group.start_soon(search.close)
                while not counts(facade)[1]:
                    await anyio.lowlevel.checkpoint()
                assert not search.closed
                let_go()
        assert search.closed
        assert counts(facade) == (1, 1)

    run_on(loop, main)


@on_every_loop
def test_a_search_is_not_closed_on_a_loop_where_others_left_something_to_be_done(
    make_manager: MakeManager, loop: str, ends: list[int]
) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager)

    async def main() -> None:
        async with facade.search([0], entries=2):
            manager.search([0], entries=2)  # dropped at once
        assert len(ends) == 2
        assert threading.get_ident() not in ends

    run_on(loop, main)


@on_every_loop
def test_a_search_that_is_dropped_while_another_is_closed_on_a_loop_is_not_ended_there(
    make_manager: MakeManager, loop: str, ends: list[int]
) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager)

    async def main() -> None:
        search = await facade.search([0], entries=2).__aenter__()
        check_process = manager.storage.check_process

        def and_drop() -> None:
            manager.storage.check_process = check_process  # type: ignore[method-assign]
            manager.search([0], entries=2)
            check_process()

        manager.storage.check_process = and_drop  # type: ignore[method-assign]
        await search.close()
        assert len(ends) == 1
        manager.wm_pool.peek("key")
        assert len(ends) == 2

    run_on(loop, main)


@on_every_loop
def test_a_search_that_is_over_is_left_without_a_worker(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager, inline_entries=0)

    async def main() -> None:
        async with facade.search([0], entries=2) as search:
            before = counts(facade)
            search.sync.close()
        await search.close()
        assert counts(facade) == before

    run_on(loop, main)


@on_every_loop
def test_operations_on_many_entries_run_in_a_worker(make_manager: MakeManager, loop: str) -> None:
    manager = make_manager(wait_timeout=HANG_SECONDS)
    facade = AsyncKVCacheManager(manager, inline_entries=2)
    pool = facade.recur_pool

    async def ran(where: str, operation: Callable[[], Any]) -> Any:
        before = counts(facade)
        result = await operation()
        inline, worker = (new - old for old, new in zip(before, counts(facade), strict=True))
        assert (inline, worker) == ((1, 0) if where == "inline" else (0, 1))
        return result

    async def main() -> None:
        await ran("inline", lambda: pool.put_many(["a", "b"], stacked(tokens(1, 2), tokens(2, 2))))
        await ran("worker", lambda: pool.put_many(["a", "b", "c"], stacked(tokens(1, 2), tokens(2, 2), tokens(3, 2))))
        (await ran("inline", lambda: pool.gather(["a", "b"]))).close()
        (await ran("worker", lambda: pool.gather(["a", "b", "c"]))).close()
        assert sorted(await ran("worker", pool.keys)) == ["a", "b", "c"]
        await pool.pop("c")
        assert sorted(await ran("inline", pool.keys)) == ["a", "b"]
        manager.set_init_cache(0, "root", tokens(1, 2))
        async with facade.search([0, 1]) as search:
            for number in range(4):
                batch = await search.gather(["root"], [0])
                append(batch, [number])
                await search.commit([number], batch)
            await ran("worker", lambda: search.keep([0, 1, 2]))
            await ran("worker", lambda: search.release([0, 1, 2]))

    run_on(loop, main)


@on_every_loop
def test_arguments_that_can_be_read_once_serve_an_operation_that_is_made_again(
    manager: KVCacheManager, loop: str
) -> None:
    """First on the loop's thread, which finds a shard busy, then in a worker."""
    facade = AsyncKVCacheManager(manager)
    refused: list[Any] = []

    def busy_on_a_loop(kind: str) -> None:
        lock = getattr(LOCKS[-1], kind)

        def locked(self: ShardLocks, shards: Any, deadline: Any) -> Any:
            if deadline.on_loop:
                refused.append(shards)
                raise WaitTimeoutError("busy")
            return lock(self, shards, deadline)

        patch.setattr(LOCKS[-1], kind, locked)

    async def main() -> None:
        manager.set_init_cache(0, "root", tokens(1, 2))
        async with facade.search(iter([0])) as search:
            busy_on_a_loop("read")
            busy_on_a_loop("write")
            batch = await search.gather(iter(["root"]), iter([0]))  # type: ignore[arg-type]
            append(batch, [1])
            await search.commit(iter(["child"]), batch, rows=iter([0]), sides=iter(["side"]))  # type: ignore[arg-type]
            await search.release(iter(["child"]))
            kv = stacked(tokens(1, 2), tokens(2, 2))
            rows: dict[str, Any] = {"sides": iter("xy"), "priorities": iter([1.0, 2.0])}
            await facade.recur_pool.put_many(iter("ab"), kv, **rows)  # type: ignore[arg-type]
            await facade.hierarchical_get(0, "a", order=iter(["init", "recur"]))  # type: ignore[arg-type]
            patch.undo()

    with pytest.MonkeyPatch.context() as patch:
        run_on(loop, main)
    assert len(refused) == 5


# --- what a cancelled task leaves ------------------------------------------------------------------------------------


def test_a_task_that_leaves_takes_no_lock(manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be left by a finaliser, which comes at any point of any thread: inside the mutex, too."""
    manager.set_init_cache(0, "root", tokens(1, 2))
    facade = AsyncKVCacheManager(manager)
    cells: list[Cell[Any]] = []
    deliver = Cell.deliver

    def seen(self: Cell[Any], result: Any) -> None:
        deliver(self, result)
        cells.append(self)

    monkeypatch.setattr(Cell, "deliver", seen)

    async def main() -> None:
        search = facade.search([0])
        with always_in_workers():
            await search.__aenter__()
            await search.gather(["root"], [0])
            await facade.init_pools[0].gather(["root"])
            await facade.init_pools[0].pin("root")

    run_on("asyncio", main)
    assert len(cells) == 4
    for cell in reversed(cells):
        with manager.storage.ledger.mutex:
            Background(cell.leave).result()
    cells.clear()
    assert manager.check_integrity().handles == 0
    assert not manager.recur_pool.searches


@pytest.mark.parametrize("first", ["worker", "task"])
def test_of_worker_and_task_the_second_to_come_undoes_once(first: str) -> None:
    undone: list[str] = []
    cell: Cell[str] = Cell(undone.append)
    sides: list[Callable[[], None]] = [partial(cell.deliver, "result"), cell.leave]
    for side in sides if first == "worker" else reversed(sides):
        assert undone == []
        side()
    assert undone == ["result"]


# --- computations in workers -----------------------------------------------------------------------------------------


@on_every_loop
def test_computations_that_wait_for_each_other_lend_their_places(pool: KVPool, loop: str) -> None:
    """One place for computations; the one that holds it waits for another that needs it."""
    facade = AsyncKVPool(pool, max_workers=1)

    async def main() -> None:
        claim = facade.try_claim("a")
        async with anyio.create_task_group() as group:
            group.start_soon(facade.get_or_compute, "b", lambda: pool.get_or_compute("a", lambda: tokens(9, 2)))
            await anyio.to_thread.run_sync(waiters.wait_for, 1)
            assert_same(await facade.get_or_compute("c", lambda: tokens(3, 2)), tokens(3, 2))
            await facade.fulfil(claim, tokens(1, 2))
        assert_same(pool.get("b"), tokens(1, 2))
        assert facade._offload._computing_limiter.get().total_tokens == 1

    with counted_waiters() as waiters:
        run_on(loop, main)


@on_every_loop
def test_a_computation_that_asks_its_loop_for_another_lends_its_place(pool: KVPool, loop: str) -> None:
    facade = AsyncKVPool(pool, max_workers=1)

    def outer() -> KeysValues:
        return anyio.from_thread.run(facade.get_or_compute, "inner", lambda: tokens(1, 2))

    async def main() -> None:
        with anyio.fail_after(JOIN_SECONDS):
            assert_same(await facade.get_or_compute("outer", outer), tokens(1, 2))

    run_on(loop, main)


@on_every_loop
def test_computations_beyond_the_places_wait_for_one(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(8)
    facade = AsyncKVPool(pool, max_workers=2)
    gate = Gate()

    def compute(value: int) -> KeysValues:
        gate.pass_through()
        return tokens(value, 2)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for value in range(6):
                group.start_soon(facade.get_or_compute, value, partial(compute, value))
            await anyio.to_thread.run_sync(gate.entered.wait, JOIN_SECONDS)
            limiter = facade._offload._computing_limiter.get()
            while limiter.statistics().tasks_waiting < 4:
                await anyio.lowlevel.checkpoint()
            assert limiter.borrowed_tokens == 2
            gate.opened.set()

    run_on(loop, main)
    assert len(pool) == 6


@on_every_loop
def test_who_finds_no_place_to_compute_in_time_leaves_the_computation_to_others(make_pool: MakePool, loop: str) -> None:
    pool = make_pool(wait_timeout=JOIN_SECONDS)
    facade = AsyncKVPool(pool, max_workers=1)
    gate = Gate()

    def held_up() -> KeysValues:
        gate.pass_through()
        return tokens(1, 2)

    async def in_vain() -> None:
        with pytest.raises(WaitTimeoutError, match="none of its event loop's 1 workers was free within"):
            await facade.get_or_compute("key", lambda: tokens(9, 2), timeout=0.05)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(facade.get_or_compute, "other", held_up)
            await anyio.to_thread.run_sync(gate.entered.wait, JOIN_SECONDS)
            group.start_soon(in_vain)
            while len(pool.flights) < 2:
                await anyio.lowlevel.checkpoint()
            waiter = Background(lambda: pool.get_or_compute("key", lambda: tokens(2, 2)))
            assert_same(await anyio.to_thread.run_sync(waiter.result), tokens(2, 2))
            gate.opened.set()

    run_on(loop, main)


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "trio"])  # whose scopes wait for the worker
def test_a_computation_that_was_left_still_hands_on_what_it_computes_inside(pool: KVPool, loop: str) -> None:
    """asyncio's cancel() of the outer one, while its worker computes the inner one, for which a thread waits."""
    facade = AsyncKVPool(pool)
    gate = Gate()

    def inner() -> KeysValues:
        gate.pass_through()
        return tokens(1, 2)

    def outer() -> KeysValues:
        pool.get_or_compute("inner", inner)
        return tokens(2, 2)

    async def main() -> None:
        task = asyncio.ensure_future(facade.get_or_compute("outer", outer))
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        asking = Background(lambda: pool.get_or_compute("inner", lambda: tokens(9, 2)))
        await asyncio.to_thread(waiters.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Who asks for the outer one does not wait for the worker that was left.
        assert_same(await facade.get_or_compute("outer", lambda: tokens(3, 2)), tokens(3, 2))
        gate.opened.set()
        assert_same(await asyncio.to_thread(asking.result), tokens(1, 2))

    with counted_waiters() as waiters:
        run_on(loop, main)
    join_workers()
    assert_same(pool.get("inner"), tokens(1, 2))
    assert_same(pool.get("outer"), tokens(3, 2))


# --- iterating --------------------------------------------------------------------------------------------------------


@on_every_loop
def test_pools_and_searches_are_iterated_over_as_the_sync_ones(manager: KVCacheManager, loop: str) -> None:
    facade = AsyncKVCacheManager(manager)
    pool = facade.recur_pool

    async def main() -> None:
        for letter in ("a", "b"):
            await pool.put(letter, tokens(1, 2))
        seen: list[Any] = []
        async for key in pool:
            seen.append(key)
            await pool.pop(key)  # a list of its own: what happens to the pool meanwhile does not matter
        assert sorted(seen) == ["a", "b"]
        assert list(manager.recur_pool) == []
        manager.set_init_cache(0, "root", tokens(1, 2))
        async with facade.search([0, 1]) as search:
            batch = await search.gather(["root", "root"], [0, 0])
            append(batch, [1, 2])
            await search.commit(["x", "y"], batch)
            assert [own async for own in search] == list(search.sync) == ["x", "y"]

    run_on(loop, main)


@on_every_loop
def test_a_layout_of_any_size_has_the_thresholds_it_was_given(make_pool: MakePool, loop: str) -> None:
    tiny = make_pool(200, layout(num_layers=1, num_heads=1, head_dim=1, max_tokens=2))
    facade = AsyncKVPool(tiny)

    async def main() -> None:
        keys = list(range(65))
        rows = stacked(*[tokens(1, 1, layout=tiny.layout) for _ in keys])
        await facade.put_many(keys, rows)
        assert counts(facade) == (0, 1)

    run_on(loop, main)
