"""Running one pool operation for a task: inline where nothing has to wait, in a worker thread otherwise.

A cancelled call leaves the pool as if it had been made, or not at all. The worker delivers its result through a cell,
which worker and task each close once; whoever comes second undoes what was made: a batch, a pin, a claim, a search.
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
from ..flights import Flight
from ..layout import positive_int
from ..locks import Cancellation, cancellation
from ..storage import check_seconds

if TYPE_CHECKING:
    from ..storage import KVStorage

__all__ = [
    "CLOSE_SECONDS",
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
CLOSE_SECONDS = 10.0  # a shielded close waits at most so long

T = TypeVar("T")


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
        # One limiter for each event loop: a limiter does not survive being shared.
        self._limiter: anyio.lowlevel.RunVar[anyio.CapacityLimiter] = anyio.lowlevel.RunVar(
            f"concurrent_kv limiter {id(self)}"
        )
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
        if copied_bytes <= self.inline_bytes or self.storage.layout.device.type != "cpu":
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

    async def in_worker(self, operation: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
        """Run `operation()` in a worker thread, in the caller's device stream.

        A task that is cancelled through anyio's scopes waits for the worker, whose waits are bounded. asyncio's own
        `cancel()` does not wait; what the worker then makes is undone.
        """
        with self._counter_lock:
            self._worker_count += 1
        cell: _Cell[T] = _Cell(undo)
        context = self._caller_stream()
        request = Cancellation()

        def work() -> None:
            cancellation.set(request)  # in the copy of the context that a worker runs in
            with context:
                cell.deliver(operation())

        try:
            await anyio.to_thread.run_sync(work, limiter=self._limiter_here())
        except BaseException:
            request.requested = True
            cell.leave()
            raise
        return cell.take()

    def _caller_stream(self) -> AbstractContextManager[Any]:
        """The stream is looked up here, in the caller's thread: a worker has a current stream of its own."""
        if self.storage.layout.device.type == "cpu":
            return nullcontext()
        return torch.cuda.stream(self.storage.clock.current())

    def _limiter_here(self) -> anyio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            limiter = anyio.CapacityLimiter(self._max_workers)
            self._limiter.set(limiter)
            return limiter


async def wait_in_task(flight: Flight, seconds: float, name: str) -> None:
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

    if not flight.subscribe(wake):
        await anyio.lowlevel.checkpoint()
        return
    try:
        with anyio.move_on_after(seconds):
            await over.wait()
            return
    finally:
        flight.unsubscribe(wake)
    raise WaitTimeoutError(
        f"{name}: the computation of {flight.key[1]!r} by another caller was not over within {seconds:g} s"
    )
