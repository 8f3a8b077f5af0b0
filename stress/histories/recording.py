"""Programs run by threads, by tasks, or by both together on one pool; when each call began and ended is noted."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from random import Random
from typing import Any

import anyio
import anyio.to_thread
import torch

from concurrent_kv import AsyncKVPool, KeysValues, KVLayout, KVPool
from stress.access import Awaited, drive
from stress.histories.checker import Call
from stress.histories.programs import Operation, Shape

__all__ = ["BOUND_SECONDS", "Crew", "Recorder", "eager_switching", "new_pool"]

BOUND_SECONDS = 60.0
YIELDING = 0.3  # share of the copies that let others go first
LAYOUT = KVLayout(num_layers=1, num_heads=1, head_dim=2, max_tokens=3)

Program = Sequence[Operation]


@contextmanager
def eager_switching(seconds: float = 2e-6) -> Iterator[None]:
    """Threads take turns so often that operations really overlap."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def new_pool(shape: Shape, *, seed: int = 0, **settings: Any) -> KVPool:
    """A pool for histories of that shape."""
    pool = KVPool(LAYOUT, shape.capacity, wait_timeout=BOUND_SECONDS / 2, **{"shards": 2, **settings})
    if shape.slow:
        _yield_in_copies(pool, Random(seed))
    return pool


def _yield_in_copies(pool: KVPool, rng: Random) -> None:
    tensor = pool.storage.tensor

    def yielding(copy: Callable[..., Any]) -> Callable[..., Any]:
        def copy_and_yield(*arguments: Any, **options: Any) -> Any:
            if rng.random() < YIELDING:
                time.sleep(0)  # lets another thread run; how long does not matter
            return copy(*arguments, **options)

        return copy_and_yield

    vars(tensor).update(gather=yielding(tensor.gather), scatter=yielding(tensor.scatter))


def row_of(value: int) -> KeysValues:
    """An entry that says `value` throughout; its length depends on it too."""
    length = 1 + value % LAYOUT.max_tokens
    return KeysValues.from_packed(torch.full((2, 1, 1, length, LAYOUT.head_dim), float(value)))


def value_of(packed: torch.Tensor) -> int:
    """What `row_of` wrote, of `[2, 1, 1, length, head_dim]`; -1 if it is not one value's row."""
    value = int(packed.flatten()[0])
    whole = bool((packed == value).all()) and packed.shape[3] == 1 + value % LAYOUT.max_tokens
    return value if whole else -1


class Recorder:
    """Runs programs and notes what was called when, and what it answered.

    Args:
        calls_in_threads: the pool, or what has its methods, for the processes that are threads.
    """

    def __init__(self, calls_in_threads: Any) -> None:
        self._in_threads = Awaited(calls_in_threads)
        self.calls: list[Call] = []

    async def run(self, process: str, program: Program, calls: Any) -> None:
        """One process: `calls` are the awaited calls of the pool."""
        for operation in program:
            began = time.monotonic_ns()
            result = await self._perform(operation, calls)
            ended = time.monotonic_ns()
            argument = operation.value or None
            self.calls.append(Call(process, operation.action, operation.keys, argument, result, began, ended))

    async def _perform(self, operation: Operation, calls: Any) -> object:
        action, keys = operation.action, operation.keys
        if action == "put":
            return await calls.put(keys[0], row_of(operation.value))
        if action == "put_many":
            row = row_of(operation.value)
            packed = torch.cat([row.keys, row.values]).expand(-1, len(keys), -1, -1, -1)
            return await calls.put_many(keys, KeysValues.from_packed(packed))
        if action == "clear":
            return await calls.clear()
        if action == "release":
            return await calls.release(keys[0])
        if action == "gather":
            with await calls.gather(keys) as batch:
                rows = zip(batch.hits, batch.lengths, strict=True)
                return tuple(
                    value_of(batch.data[:, row : row + 1, :, batch.end - length : batch.end]) if hit else None
                    for row, (hit, length) in enumerate(rows)
                )
        kv = await (calls.pop if action == "pop" else calls.get)(keys[0])
        return (None if kv is None else value_of(torch.cat([kv.keys, kv.values])),)

    def run_in_thread(self, process: str, program: Program) -> None:
        """One process in the calling thread."""
        drive(self.run(process, program, self._in_threads))


class Crew:
    """Threads that run one piece of work each, all begun together, again and again."""

    def __init__(self, count: int) -> None:
        self._queues: list[SimpleQueue[Callable[[], object] | None]] = [SimpleQueue() for _ in range(count)]
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._barrier = threading.Barrier(count)
        self._threads = [threading.Thread(target=self._work, args=(queue,), daemon=True) for queue in self._queues]
        for thread in self._threads:
            thread.start()

    def begin(self, work: Sequence[Callable[[], object]]) -> None:
        """A piece for each thread."""
        for queue, piece in zip(self._queues, work, strict=True):
            queue.put(piece)

    def wait(self) -> None:
        """Until all have ended; raises the first error."""
        errors = [self._ended.get(timeout=BOUND_SECONDS) for _ in self._queues]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join(BOUND_SECONDS)

    def _work(self, queue: SimpleQueue[Callable[[], object] | None]) -> None:
        while (piece := queue.get()) is not None:
            error: BaseException | None = None
            try:
                self._barrier.wait(BOUND_SECONDS)
                piece()
            except BaseException as raised:
                error = raised
            self._ended.put(error)


async def run_tasks(recorder: Recorder, pool: AsyncKVPool, programs: Sequence[Program]) -> None:
    """Each program in a task of its own."""
    async with anyio.create_task_group() as group:
        for number, program in enumerate(programs):
            group.start_soon(recorder.run, f"task {number}", program, pool)


async def wait_for(crew: Crew) -> None:
    """Without holding the loop."""
    await anyio.to_thread.run_sync(crew.wait)
