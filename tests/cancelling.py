"""Operations cancelled at their n-th checkpoint, for every n: by anyio's scopes, and by asyncio's own `cancel()`.

A checkpoint is where a coroutine hands control to its loop. They are counted by stepping the coroutine by hand.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import anyio

from concurrent_kv import AsyncKVCacheManager, AsyncSearch, Batch, KVCacheManager, Pin
from tests.async_support import join_workers, run_on
from tests.support import append, config, snapshot, stacked, tokens


class CancelledAt:
    """Awaits a coroutine, and calls `cancel` at its n-th checkpoint; `reached` says whether it came that far."""

    def __init__(self, awaitable: Awaitable[Any], n: int, cancel: Callable[[Any], object]) -> None:
        self._awaitable = awaitable
        self._n = n
        self._cancel = cancel
        self.reached = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        count = 0
        send, value = steps.send, None
        while True:
            try:
                waited_for = send(value)
            except StopIteration as end:
                return end.value
            count += 1
            if count == self._n:
                self.reached = True
                self._cancel(waited_for)
            try:
                send, value = steps.send, (yield waited_for)
            except BaseException as error:
                send, value = steps.throw, error


async def by_scope(work: Awaitable[Any], n: int) -> tuple[bool, Any]:
    with anyio.CancelScope() as scope:
        step = CancelledAt(work, n, lambda waited_for: scope.cancel())
        result = await step
        scope.shield = True  # what comes after the call is not what is cancelled here
        return step.reached, result
    return True, None


async def by_cancel(work: Awaitable[Any], n: int) -> tuple[bool, Any]:
    """asyncio's own `cancel()`, while the task waits."""
    return await _in_a_task(work, n, lambda task, waited_for: task.cancel())


async def by_cancel_as_it_wakes(work: Awaitable[Any], n: int) -> tuple[bool, Any]:
    """asyncio's own `cancel()`, when what the task waited for is there and the task has not run yet."""

    def cancel(task: asyncio.Task[Any], waited_for: Any) -> None:
        if waited_for is None:
            task.cancel()
        else:
            waited_for.add_done_callback(lambda _: task.cancel())

    return await _in_a_task(work, n, cancel)


async def _in_a_task(
    work: Awaitable[Any], n: int, cancel: Callable[[asyncio.Task[Any], Any], object]
) -> tuple[bool, Any]:
    step = CancelledAt(work, n, lambda waited_for: cancel(task, waited_for))

    async def run() -> Any:
        return await step

    task = asyncio.ensure_future(run())
    try:
        return step.reached, await task
    except asyncio.CancelledError:
        return True, None


WAYS: dict[str, tuple[str, Callable[[Awaitable[Any], int], Awaitable[tuple[bool, Any]]]]] = {
    "asyncio scope": ("asyncio", by_scope),
    "trio scope": ("trio", by_scope),
    "asyncio cancel": ("asyncio", by_cancel),
    "asyncio cancel as it wakes": ("asyncio", by_cancel_as_it_wakes),
}


@dataclass
class World:
    """A manager with something in each pool, an open search with a child, and what an operation needs at hand."""

    manager: KVCacheManager = field(default_factory=lambda: KVCacheManager(config(), 2, wait_timeout=30.0))

    async def prepare(self) -> None:
        self.aio = AsyncKVCacheManager(self.manager)
        self.pool = self.aio.recur_pool
        self.search = self.aio.search([0, 1], entries=8)
        for key, value in (("a", 1), ("b", 2)):
            self.pool.sync.put(key, tokens(value, 3))
            self.manager.set_init_cache(0, key, tokens(value, 3))
        self.manager.set_wm_cache("a", tokens(1, 2))
        await self.search.__aenter__()
        batch = self.search.sync.gather(["a"], [0])
        append(batch, [3])
        self.search.sync.commit(["child"], batch)
        self.batch = self.pool.sync.gather(["a", "b"])
        append(self.batch, [4, 5])
        self.search_batch = self.search.sync.gather(["child"], [0])
        append(self.search_batch, [6])
        self.claim = self.pool.try_claim("claimed")
        self.rows = stacked(tokens(7, 2), tokens(8, 3))

    def state(self) -> dict[str, Any]:
        """What is there, when nobody holds anything any more."""
        self.claim.abandon()
        for batch in (self.batch, self.search_batch):
            batch.close()
        if not self.manager.storage.closed:
            self.manager.wm_pool.peek("nothing")  # the next operation does what finalisers left
        self.manager.check_integrity()
        state = snapshot(self.manager.storage)
        state["free"] = len(state["free"])
        state["generations"] = [s.generation for p in self.manager.storage.pools for s in p.scopes()]
        state["flights"] = [len(pool.flights) for pool in self.manager.storage.pools]
        state["closed"] = self.manager.storage.closed, self.search.closed
        return state

    def end(self) -> None:
        self.search.sync.close()
        if not self.manager.storage.closed:
            assert self.manager.check_integrity().handles == 0
        self.manager.close()

    def state_among(self, expected: list[dict[str, Any]]) -> dict[str, Any]:
        """As `state`; looks again after a garbage collection if that is none of `expected`."""
        state = self.state()
        if state not in expected:
            gc.collect()  # what only a dead task's traceback still holds
            state = self.state()
        return state


Operation = Callable[[World], Awaitable[Any]]


def close_handle(result: Any) -> None:
    if isinstance(result, (Batch, Pin)):
        result.close()
    elif isinstance(result, AsyncSearch):
        result.sync.close()


def state_after(loop: str, operation: Operation | None) -> dict[str, Any]:
    """What is there after an operation that nobody cancelled (or after none)."""
    world = World()

    async def main() -> None:
        await world.prepare()
        if operation is not None:
            close_handle(await operation(world))

    run_on(loop, main)
    state = world.state()
    world.end()
    return state


def states_when_cancelled(operation: Operation, way: str, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is there after the operation was cancelled at its first checkpoint, its second, and so on to its last."""
    loop, cancelling = WAYS[way]
    states: list[dict[str, Any]] = []
    reached = True
    while reached:
        world = World()

        async def main(world: World, n: int) -> bool:
            await world.prepare()
            reached, result = await cancelling(operation(world), n)
            close_handle(result)
            return reached

        reached = run_on(loop, main, world, len(states) + 1)
        join_workers()
        states.append(world.state_among(expected))
        world.end()
    return states[:-1]  # the last was not reached by the cancellation
