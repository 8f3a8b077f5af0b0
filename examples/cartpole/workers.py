"""Who runs the walks of all environments: the event loop of their tasks, or threads, each of several walks together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import anyio
import anyio.to_thread

from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluator, Walk
from examples.cartpole.episode import Asked
from examples.cartpole.search import Run
from examples.cartpole.tree import Evaluation

AnyWalk = Walk[Asked, Evaluation, Any]

IDLE_SECONDS = 0.01  # after which a thread without walks is waited for no longer; environments take a step in less


@asynccontextmanager
async def on_the_loop(evaluator: Evaluator[Asked, Evaluation]) -> AsyncGenerator[Run, None]:
    """The tasks' own loop runs the walks; it calls the model on its own thread, for all of them at once."""
    yield AsyncEvaluator(evaluator, on_loop=True).run


class RunsWalks(Protocol):
    """A worker of an evaluator, or what does without a cache."""

    def run_many(self, walks: Sequence[AnyWalk], /) -> list[Any]:
        """What the walks return."""
        ...


@asynccontextmanager
async def in_threads(
    workers: Sequence[Callable[[], AbstractContextManager[RunsWalks]]], *, walks_per_thread: int
) -> AsyncGenerator[Run, None]:
    """A thread for each worker runs the walks; the leaves of those that are one evaluator's are evaluated together.

    Args:
        workers: for each thread, what makes it a worker, for as long as it has walks: then others wait for it.
        walks_per_thread: that a thread runs together, at most.
    """
    queue = _Queue()
    limiter = anyio.CapacityLimiter(len(workers))

    async def serve(new_worker: Callable[[], AbstractContextManager[RunsWalks]]) -> None:
        while group := await queue.take(walks_per_thread):
            with new_worker() as worker:
                while group:
                    walks = [each.walk for each in group]
                    results = await anyio.to_thread.run_sync(worker.run_many, walks, limiter=limiter)
                    for each, result in zip(group, results, strict=True):
                        each.result = result
                        each.done.set()
                    group = await queue.take(walks_per_thread, within=IDLE_SECONDS)

    async with anyio.create_task_group() as threads:
        for worker in workers:
            threads.start_soon(serve, worker)
        with queue:
            yield queue.run


@dataclass(eq=False)
class _Waiting:
    """A walk whose task waits for its result."""

    walk: AnyWalk
    done: anyio.Event = field(default_factory=anyio.Event)
    result: Any = None


class _Queue:
    """Walks on their way to a thread. Leaving its `with` ends the tasks that take from it."""

    def __init__(self) -> None:
        self._given, self._waiting = anyio.create_memory_object_stream[_Waiting](float("inf"))
        self._taking = anyio.Lock()

    async def run(self, walk: AnyWalk) -> Any:
        """What the walk returns."""
        waiting = _Waiting(walk)
        self._given.send_nowait(waiting)
        await waiting.done.wait()
        return waiting.result

    async def take(self, most: int, within: float = inf) -> list[_Waiting]:
        """The next walks that a thread is to run together; none when there are no more, or none came within seconds."""
        group: list[_Waiting] = []
        with anyio.move_on_after(within) as waiting, suppress(anyio.EndOfStream, anyio.WouldBlock):
            async with self._taking:  # one after the other, or each would take a share of those who come together
                group.append(await self._waiting.receive())
                waiting.deadline = inf  # what has been received must not be lost
                await anyio.lowlevel.checkpoint()  # environments that move on together are here then
                while len(group) < most:
                    group.append(self._waiting.receive_nowait())
        return group

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self._given.close()
