"""Operations cancelled at their n-th checkpoint, for every n: by anyio's scopes, and by asyncio's own `cancel()`.

A checkpoint is where a coroutine hands control to its loop. They are counted by stepping the coroutine by hand.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import anyio

from concurrent_kv import AsyncSearch, Batch, Pin
from tests.async_operations import Operation, World
from tests.async_support import join_workers, run_on


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
