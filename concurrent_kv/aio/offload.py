"""Running one pool operation for a task: inline where nothing has to wait, in a worker thread otherwise.

A cancelled call leaves the pool as if it had been made, or not at all. The worker delivers its result through a cell,
which worker and task each close once; whoever comes second undoes what was made: a batch, a pin, a search. What cannot
be undone and takes effect in several steps (clears, version bumps, the end of something) runs to its end once begun.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import torch

from ..errors import WaitTimeoutError
from ..flights import Flight, timed_out
from ..layout import positive_int
from ..locks import Cancellation, Deadline, cancellation
from ..storage import check_seconds

if TYPE_CHECKING:
    from ..storage import KVStorage

__all__ = [
    "INLINE_BYTES",
    "INLINE_WAIT_SECONDS",
    "MAX_WORKERS",
    "Offload",
    "OffloadStats",
    "wait_in_task",
]

INLINE_WAIT_SECONDS = 50e-6
INLINE_BYTES = 256 * 1024
MAX_WORKERS = 8

T = TypeVar("T")
Limiter = anyio.lowlevel.RunVar[anyio.CapacityLimiter]


@dataclass(frozen=True)
class OffloadStats:
    """Operations that ran on their loop's own thread, and in worker threads."""

    inline_count: int
    worker_count: int


class _Cell(Generic[T]):
    """Where a worker leaves its result, and a task picks it up. Each closes it once; the second to come undoes."""

    def __init__(self, undo: Callable[[T], object] | None) -> None:
        self._undo = undo
        self._lock = threading.Lock()
        self._left = False
        self._delivered = False
        self._result: T | None = None

    def deliver(self, result: T) -> None:
        """The worker's side. Undoes the result if the task has left."""
        with self._lock:
            left = self._left
            self._delivered, self._result = not left, result
        if left and self._undo is not None:
            self._undo(result)

    def leave(self) -> None:
        """The task's side, when it was cancelled. Undoes a result that is there already."""
        with self._lock:
            self._left = True
            delivered, result = self._delivered, self._result
            self._result = None
        if delivered and self._undo is not None:
            self._undo(result)  # type: ignore[arg-type]

    def take(self) -> T:
        """The task's side, when the worker has ended."""
        return self._result  # type: ignore[return-value]


class Offload:
    """Decides where an operation runs, and runs it.

    Args:
        storage: what the operations work on.
        inline_wait_seconds: how long an operation may wait for a lock on the loop's own thread.
        inline_bytes: the largest copy that is made on the loop's own thread. (On a GPU copies are only issued there.)
        max_workers: worker threads of each event loop.
    """

    def __init__(self, storage: KVStorage, *, inline_wait_seconds: float, inline_bytes: int, max_workers: int) -> None:
        self.storage = storage
        self.inline_wait_seconds = check_seconds("inline_wait_seconds", inline_wait_seconds)
        self.inline_bytes = positive_int("inline_bytes", inline_bytes, minimum=0)
        self._max_workers = positive_int("max_workers", max_workers)
        # Of each event loop its own: a limiter does not survive being shared. And another for what users compute,
        # which may wait for other computations: those must find a worker for their reads and writes meanwhile.
        self._limiter: Limiter = anyio.lowlevel.RunVar("concurrent_kv operations")
        self._computing_limiter: Limiter = anyio.lowlevel.RunVar("concurrent_kv computations")
        self._counter_lock = threading.Lock()
        self._inline_count = 0
        self._worker_count = 0

    def stats(self) -> OffloadStats:
        """How often each path was taken."""
        with self._counter_lock:
            return OffloadStats(self._inline_count, self._worker_count)

    async def run(
        self,
        operation: Callable[..., T],
        *args: Any,
        copied_bytes: int = 0,
        timeout: float | None = None,
        undo: Callable[[T], object] | None = None,
        **options: Any,
    ) -> T:
        """Run `operation(*args, timeout=..., **options)`.

        Args:
            copied_bytes: at most so many bytes are copied by it.
            timeout: seconds it may wait in all.
            undo: called with a result that nobody will take.
        """
        await anyio.lowlevel.checkpoint()
        limit = self.storage.wait_timeout if timeout is None else check_seconds("timeout", timeout)
        if self._is_small(copied_bytes):
            try:
                result = operation(*args, timeout=min(limit, self.inline_wait_seconds), **options)
            except WaitTimeoutError:
                # Nothing has happened: the same call can be made again, where it may wait.
                if limit <= self.inline_wait_seconds:
                    raise
            else:
                with self._counter_lock:
                    self._inline_count += 1
                return result
        return await self.in_worker(partial(operation, *args, timeout=limit, **options), undo)

    async def copy(self, operation: Callable[[], T], copied_bytes: int) -> T:
        """Run `operation()`, which copies so many bytes and waits for nothing."""
        return operation() if self._is_small(copied_bytes) else await self.in_worker(operation)

    async def compute(self, operation: Callable[[], T]) -> T:
        """Run a user's function in a worker thread."""
        return await self._in_worker(operation, None, self._computing_limiter)

    async def in_worker(self, operation: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run `operation()` in a worker thread, in the caller's device stream.

        A task that is cancelled through anyio's scopes waits for the worker, whose waits are bounded. asyncio's own
        `cancel()` does not wait; what the worker then makes is undone.
        """
        return await self._in_worker(operation, undo, self._limiter)

    async def in_worker_whole(self, operation: Callable[[], T]) -> T:
        """As `in_worker`, for what takes effect in several steps: cut off before it begins, or not at all."""
        return await self._in_worker(operation, None, self._limiter, revocable=False)

    async def to_the_end(self, operation: Callable[[], object]) -> None:
        """Run `operation()`, which can be called twice, in a worker thread to its end, however the task is cancelled.

        A cancellation of any kind is raised when it is over.
        """
        cancelled: BaseException | None = None
        finished = False

        def work() -> None:
            nonlocal finished
            operation()
            finished = True

        with anyio.CancelScope(shield=True):
            while True:
                try:
                    # Queues for nobody's worker: what closes gives room to those who have them.
                    await self._in_worker(work, None, anyio.CapacityLimiter(1), revocable=False)
                    break
                except anyio.get_cancelled_exc_class() as error:  # asyncio's own, which ignores the shield
                    cancelled = error
                    if finished:
                        break
                except Exception as error:
                    if cancelled is not None:
                        raise cancelled from error
                    raise
        if cancelled is not None:
            raise cancelled

    async def _in_worker(
        self,
        operation: Callable[[], T],
        undo: Callable[[T], object] | None,
        limiter: Limiter | anyio.CapacityLimiter,
        *,
        revocable: bool = True,
    ) -> T:
        with self._counter_lock:
            self._worker_count += 1
        cell: _Cell[T] = _Cell(undo)
        context = self._caller_stream()
        request = Cancellation()

        def work() -> None:
            if request.requested:
                return
            cancellation.set(request if revocable else None)  # in the copy of the context that a worker runs in
            with context:
                cell.deliver(operation())

        try:
            await anyio.to_thread.run_sync(work, limiter=self._limiter_here(limiter))
        except BaseException:
            request.requested = True
            cell.leave()
            raise
        return cell.take()

    def _is_small(self, copied_bytes: int) -> bool:
        return copied_bytes <= self.inline_bytes or self.storage.layout.device.type != "cpu"

    def _caller_stream(self) -> AbstractContextManager[Any]:
        """The stream is looked up here, in the caller's thread: a worker has a current stream of its own."""
        if self.storage.layout.device.type == "cpu":
            return nullcontext()
        return torch.cuda.stream(self.storage.clock.current())

    def _limiter_here(self, limiter: Limiter | anyio.CapacityLimiter) -> anyio.CapacityLimiter:
        """A limiter of the current event loop."""
        if isinstance(limiter, anyio.CapacityLimiter):
            return limiter
        try:
            return limiter.get()
        except LookupError:
            made = anyio.CapacityLimiter(self._max_workers)
            limiter.set(made)
            return made


async def wait_in_task(flight: Flight, deadline: Deadline, name: str) -> None:
    """Wait for a flight without holding the loop, nor a thread.

    Raises:
        WaitTimeoutError: it was not over in time.
    """
    over = anyio.Event()
    loop: Any = anyio.lowlevel.current_token().native_token
    # asyncio's loop, or trio's token: both may be called from any thread, and from finalisers.
    call_soon = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def wake() -> None:
        with suppress(RuntimeError):  # of a loop that has ended, and its tasks with it
            call_soon(over.set)

    try:
        if not flight.subscribe(wake):
            await anyio.lowlevel.checkpoint()
            return
        with anyio.move_on_after(deadline.left()):
            await over.wait()
            return
    finally:
        flight.unsubscribe(wake)
    raise timed_out(flight, deadline, name)
