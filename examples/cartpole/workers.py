"""Who runs the walks of all environments: the event loop of their tasks, or threads, each of several walks together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import anyio.to_thread

from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluator, Walk
from examples.cartpole.episode import Asked
from examples.cartpole.search import Run
from examples.cartpole.tree import Evaluation

AnyWalk = Walk[Asked, Evaluation, Any]


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
    workers: Sequence[AbstractContextManager[RunsWalks]], *, walks_per_thread: int
) -> AsyncGenerator[Run, None]:
    """A thread for each worker runs the walks; the leaves of those that are one evaluator's are evaluated together.

    Args:
        workers: one for each thread.
        walks_per_thread: that a thread runs together, at most.
    """
    queue = _Queue()
    limiter = anyio.CapacityLimiter(len(workers))

    async def serve(worker: AbstractContextManager[RunsWalks]) -> None:
        with worker as runs:
            while group := await queue.take(walks_per_thread):
                results = await anyio.to_thread.run_sync(runs.run_many, [each.walk for each in group], limiter=limiter)
                for each, result in zip(group, results, strict=True):
                    each.result = result
                    each.done.set()

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

    async def take(self, most: int) -> list[_Waiting]:
        """The next walks that a thread is to run together; none when there are no more."""
        group: list[_Waiting] = []
        async with self._taking:  # one after the other, or each would take a share of those who come together
            try:
                group.append(await self._waiting.receive())
                await anyio.lowlevel.checkpoint()  # environments that move on together are here then
                while len(group) < most:
                    group.append(self._waiting.receive_nowait())
            except (anyio.EndOfStream, anyio.WouldBlock):
                pass
        return group

    def __enter__(self) -> _Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self._given.close()
