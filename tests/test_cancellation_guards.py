"""Each guard of cancelled calls taken out: what a task leaves is then left open, done late, or done by half."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    AsyncSearch,
    KVCacheManager,
    KVPool,
)
from concurrent_kv.aio.cell import Cell
from concurrent_kv.aio.offload import Offload
from concurrent_kv.locks.deadline import Deadline
from tests.async_support import LOOPS, join_workers, run_on, shards_held
from tests.guards import Removal, shown_by
from tests.support import LAYOUT, config, tokens
from tests.threading_support import JOIN_SECONDS, Gate

# --- what a worker makes for nobody -----------------------------------------------------------------------------------

Opening = Callable[[AsyncKVCacheManager], Awaitable[Any]]
HANDLES: dict[str, Opening] = {
    "batch": lambda aio: aio.recur_pool.gather(["key"]),
    "pin": lambda aio: aio.recur_pool.pin("key"),
    "search": lambda aio: aio.search([0], entries=2).__aenter__(),
}


def handles_left(opening: Opening, first: str) -> int:
    """After asyncio's own `cancel()`, before (`first` is "task") or after ("worker") the worker has delivered."""
    manager = KVCacheManager(config(), 1, wait_timeout=JOIN_SECONDS)
    manager.set_recur_cache("key", tokens(1, 2))
    aio = AsyncKVCacheManager(manager, inline_bytes=0, inline_entries=0)
    gate, delivered = Gate(), threading.Event()
    kept: list[object] = []  # as a traceback somewhere would
    deliver = Cell.deliver

    def held_up(self: Cell[Any], result: object) -> None:
        kept.append(result)
        gate.pass_through()
        deliver(self, result)
        delivered.set()

    async def main() -> None:
        task = asyncio.ensure_future(opening(aio))
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        if first == "worker":
            gate.opened.set()
            assert delivered.wait(JOIN_SECONDS)  # holds the loop: the task has not seen it when it is cancelled
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cell, "deliver", held_up)
        asyncio.run(main())
        join_workers()
    assert kept
    manager.recur_pool.get("nothing")  # does what was left to the next operation
    handles = manager.check_integrity().handles
    manager.close()
    return handles


def without_undoing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cell, "_drop", lambda self: None)


def without_leaving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cell, "leave", lambda self: None)


@pytest.mark.parametrize("guard_off", [without_undoing, without_leaving])
@pytest.mark.parametrize("first", ["task", "worker"])
@pytest.mark.parametrize("kind", HANDLES)
def test_what_nobody_takes_would_stay_open_if_the_second_to_come_did_not_undo_it(
    kind: str, first: str, guard_off: Removal
) -> None:
    shown_by(lambda: handles_left(HANDLES[kind], first), 0, guard_off)


def what_a_cancelled_put_leaves() -> object:
    """asyncio's own `cancel()` while the worker waits for its shard."""
    pool = KVPool(LAYOUT, 4, wait_timeout=JOIN_SECONDS)
    aio = AsyncKVPool(pool, inline_bytes=0)
    begun = threading.Event()
    contention = pool.storage.locks.contention
    wait_until = contention.wait_until

    def seen(*arguments: Any) -> None:
        begun.set()
        wait_until(*arguments)

    contention.wait_until = seen  # type: ignore[method-assign, assignment]

    async def main() -> None:
        with shards_held(pool) as let_go:
            task = asyncio.ensure_future(aio.put("key", tokens(1, 2)))
            assert await asyncio.to_thread(begun.wait, JOIN_SECONDS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            let_go()

    asyncio.run(main())
    join_workers()
    return pool.contains("key")


def without_revoking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Deadline, "check", lambda self, name: None)


def test_a_put_that_was_not_revoked_would_take_effect_after_its_task_was_cancelled() -> None:
    shown_by(what_a_cancelled_put_leaves, False, without_revoking)


def what_a_cancelled_clear_of_everything_leaves() -> object:
    """asyncio's own `cancel()` after its first step, the first pool's new epoch; then it comes to a held shard."""
    manager = KVCacheManager(config(), 1, wait_timeout=JOIN_SECONDS)
    manager.set_init_cache(0, "key", tokens(1, 2))
    manager.set_recur_cache("key", tokens(1, 2))
    aio = AsyncKVCacheManager(manager)
    gate, plain = Gate(), Deadline.left

    def left(deadline: Deadline) -> float:
        gate.pass_through()
        seconds = plain(deadline)
        if seconds:
            let_go()
        return seconds

    async def main() -> None:
        clearing = asyncio.ensure_future(aio.clear_all())
        await asyncio.to_thread(gate.entered.wait, JOIN_SECONDS)
        clearing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await clearing
        gate.opened.set()

    with pytest.MonkeyPatch.context() as patch, shards_held(manager.recur_pool) as let_go:
        patch.setattr(Deadline, "left", left)
        asyncio.run(main())
        join_workers()
    return [manager.get_init_cache(0, "key"), manager.get_recur_cache("key")]


def revoking_what_has_begun(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offload, "in_worker_whole", Offload.in_worker)


def test_a_clear_of_everything_that_could_be_revoked_would_be_left_half_made() -> None:
    shown_by(what_a_cancelled_clear_of_everything_leaves, [None, None], revoking_what_has_begun)


# --- the end of something ---------------------------------------------------------------------------------------------


class Closable:
    """A pool, a manager and a search, each in a facade of its own."""

    def __init__(self) -> None:
        self.manager = AsyncKVCacheManager(config=config(), env_num=1, wait_timeout=JOIN_SECONDS)
        self.pool = AsyncKVPool(KVPool(LAYOUT, 4, wait_timeout=JOIN_SECONDS))
        self.search: AsyncSearch = self.manager.search([0], entries=2)

    def closed(self, kind: str) -> bool:
        return self.manager.sync.storage.closed if kind == "manager" else getattr(self, kind).sync.closed


KINDS = ["pool", "search", "manager"]


def whether_it_is_closed_that_a_cancelled_task_left(kind: str, loop: str) -> object:
    closable = Closable()

    async def main() -> bool:
        with anyio.CancelScope() as scope:
            async with getattr(closable, kind):
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        return closable.closed(kind)

    return run_on(loop, main)


def ending_like_any_operation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offload, "to_the_end", lambda self, operation, *on_loop: self.in_worker(operation))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_end_without_its_shield_would_not_be_reached_by_a_cancelled_task(kind: str, loop: str) -> None:
    shown_by(lambda: whether_it_is_closed_that_a_cancelled_task_left(kind, loop), True, ending_like_any_operation)


def how_asyncios_cancel_finds_an_end_that_waits(kind: str) -> object:
    """Whether the task is done before the end can be reached, and whether the end is reached when it is done."""
    closable = Closable()
    closing = getattr(closable, kind)
    stats = closable.pool.offload_stats if kind == "pool" else closable.manager.offload_stats

    async def main() -> list[bool]:
        await closing.__aenter__()
        with shards_held(closing.sync if kind == "pool" else closable.manager.sync.recur_pool) as let_go:
            before = stats().worker_count
            task = asyncio.ensure_future(closing.__aexit__(None, None, None))
            while stats().worker_count == before:
                await asyncio.sleep(0)
            task.cancel()
            for _ in range(20):  # of the loop's turns, in which a task that heard it would be done
                await asyncio.sleep(0)
            done = task.done()
            let_go()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [done, closable.closed(kind)]

    return run_on("asyncio", main)


def ending_under_a_shield_alone(patch: pytest.MonkeyPatch) -> None:
    async def shielded(self: Offload, operation: Callable[[], object], *on_loop: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.in_worker_whole(operation)

    patch.setattr(Offload, "to_the_end", shielded)


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_under_a_shield_alone_would_not_be_waited_for_after_asyncios_cancel(kind: str) -> None:
    shown_by(lambda: how_asyncios_cancel_finds_an_end_that_waits(kind), [False, True], ending_under_a_shield_alone)
