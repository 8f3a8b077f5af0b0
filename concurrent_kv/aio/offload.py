"""Running one pool operation for a task: inline where nothing has to wait, in a worker thread otherwise.

A cancelled call leaves the pool as if it had been made, or not at all. The worker delivers its result through a cell,
which worker and task each close once; the second of them undoes what was made: a batch, a pin, a search. What cannot
be undone and takes effect in several steps (clears, version bumps, the end of something) runs to its end once begun.
What users compute is theirs: it is never cut off, and what it does to a pool is done.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from .._checks import check_seconds, positive_int
from ..device.cuda import AS_THEY_ARE, current_streams
from ..errors import WaitTimeoutError
from ..flights.table import Flight
from ..flights.waiting import timed_out, waiting_for
from ..locks.deadline import Caller, Deadline, NotOnLoopError, TaskTime, WaitElsewhere, caller, lend_place
from ..locks.gate import gate
from ..pool.room import Queued
from ..pool.storage import KVStorage
from .cell import Cell
from .places import Place, call_soon_here, has_ended_here

__all__ = [
    "INLINE_BYTES",
    "INLINE_ENTRIES",
    "INLINE_WAIT_SECONDS",
    "MAX_WORKERS",
    "Offload",
    "OffloadStats",
    "wait_in_task",
]

INLINE_WAIT_SECONDS = 50e-6
INLINE_BYTES = 256 * 1024
INLINE_ENTRIES = 64
MAX_WORKERS = 8

T = TypeVar("T")
Limiter = anyio.lowlevel.RunVar[anyio.CapacityLimiter]


@dataclass(frozen=True)
class OffloadStats:
    """Operations that ran on their loop's own thread, and in worker threads."""

    inline_count: int
    worker_count: int


class Offload:
    """Decides where an operation runs, and runs it.

    Args:
        storage: what the operations work on.
        inline_wait_seconds: how long an operation may wait for a lock on the loop's own thread.
        inline_bytes: the largest copy that is made on the loop's own thread. (On a GPU copies are only issued there.)
        inline_entries: the most entries that an operation on the loop's own thread looks up, stores or removes.
        max_workers: worker threads of each event loop for operations, as many for what users compute, and for closes.
    """

    def __init__(
        self,
        storage: KVStorage,
        *,
        inline_wait_seconds: float,
        inline_bytes: int,
        inline_entries: int,
        max_workers: int,
    ) -> None:
        self.storage = storage
        self.inline_wait_seconds = check_seconds("inline_wait_seconds", inline_wait_seconds)
        self.inline_bytes = positive_int("inline_bytes", inline_bytes, minimum=0)
        self.inline_entries = positive_int("inline_entries", inline_entries, minimum=0)
        self._on_loop = Caller(steps_on_loop=self.inline_entries, seconds_on_loop=self.inline_wait_seconds)
        self._max_workers = positive_int("max_workers", max_workers)
        # Of each event loop its own: a limiter does not survive being shared. And another for what users compute,
        # which may wait for what other tasks do: those must find a worker for their reads and writes meanwhile.
        self._limiter: Limiter = anyio.lowlevel.RunVar("concurrent_kv operations")
        self._computing_limiter: Limiter = anyio.lowlevel.RunVar("concurrent_kv computations")
        # And one for what closes, which gives room to the operations in the others' workers: it queues behind its own
        # kind only, whose waits are bounded.
        self._closing_limiter: Limiter = anyio.lowlevel.RunVar("concurrent_kv closes")
        # By thread: each counts its own, without a lock.
        self._inline_counts: defaultdict[int, int] = defaultdict(int)
        self._worker_counts: defaultdict[int, int] = defaultdict(int)

    def stats(self) -> OffloadStats:
        """How often each path was taken."""
        return OffloadStats(sum(list(self._inline_counts.values())), sum(list(self._worker_counts.values())))

    async def run(
        self,
        operation: Callable[[float], T],
        copied_bytes: int = 0,
        entries: int = 1,
        *,
        timeout: float | None = None,
        undo: Callable[[T], object] | None = None,
        waits_for_device: bool = False,
        streams: AbstractContextManager[object] | None = None,
    ) -> T:
        """Run `operation(seconds)`, perhaps several times: it must bear that.

        Where it waits for room, its task waits instead, without a thread, and then runs it again.

        Args:
            operation: given how long it may wait, as its `timeout`.
            copied_bytes: at most so many bytes are copied by it.
            entries: about so many entries are looked up, stored or removed by it.
            timeout: seconds it may wait in all.
            undo: called with a result that the task will not take; it must take no lock.
            waits_for_device: whether it returns only when the device has done its work.
            streams: the current streams it runs in; those of its caller if left out.
        """
        # Looked up before any hop: which stream is current belongs to the thread, and other tasks change it.
        streams = streams or current_streams()
        if anyio.get_cancelled_exc_class() is asyncio.CancelledError:
            await asyncio.sleep(0)  # as anyio's own checkpoint comes to by a longer way
        else:
            await anyio.lowlevel.checkpoint()
        limit = self.storage.wait_timeout if timeout is None else check_seconds("timeout", timeout)
        small = self._is_small(copied_bytes, entries) and not waits_for_device
        return await self._attempts(operation, TaskTime(limit), undo, streams, small=small)

    async def _attempts(
        self,
        operation: Callable[[float], T],
        task_time: TaskTime,
        undo: Callable[[T], object] | None,
        streams: AbstractContextManager[object],
        *,
        small: bool,
    ) -> T:
        """Run `operation(task_time)` until it neither waits for room nor needs a worker that it has not got."""
        limit = left = float(task_time)
        try:
            while True:
                if task_time.queued is not None:
                    task_time.loop_ended = has_ended_here()
                    await _wait_for_room(task_time)
                    left = task_time.left()
                try:
                    # What a caller dropped unclosed is released by the next operation, for which a loop has no time.
                    if small and not self.storage.ledger.abandoned:
                        # It ends before its task can be cancelled: the one caller serves all.
                        before = caller.set(self._on_loop)
                        try:
                            if streams is AS_THEY_ARE:  # nothing to enter
                                result = operation(task_time)
                            else:
                                with streams:
                                    result = operation(task_time)
                        except WaitTimeoutError as error:
                            # Nothing has happened: the same call can be made again, where it may wait.
                            if left <= self.inline_wait_seconds and not isinstance(error, NotOnLoopError):
                                raise
                        else:
                            self._inline_counts[get_ident()] += 1
                            return result
                        finally:
                            caller.reset(before)
                    task_time.loop_ended = has_ended_here()
                    if task_time.queued is not None:
                        task_time.queued.needs_loop(task_time.loop_ended)
                    return await self._in_worker(partial(operation, task_time), undo, streams, seconds=limit)
                except WaitElsewhere:
                    pass  # and the frames that it came through are gone before the task waits
        finally:
            if task_time.queued is not None:
                task_time.queued.leave()

    async def copy(
        self, operation: Callable[[], T], copied_bytes: int, streams: AbstractContextManager[object] | None = None
    ) -> T:
        """Run `operation()`, which copies so many bytes and waits for nothing."""
        streams = streams or current_streams()
        if self._is_small(copied_bytes):
            self._inline_counts[get_ident()] += 1
            with streams:
                return operation()
        return await self.in_worker(operation, streams)

    async def compute(
        self,
        operation: Callable[[], Any],
        deliver: Callable[[Any, float], T],
        around: Callable[[], AbstractContextManager[None]],
        deadline: Deadline,
        streams: AbstractContextManager[object] | None = None,
    ) -> T:
        """Run a user's function, and `deliver(result, seconds)`, in a worker thread and in `around()`.

        If its task is cancelled by asyncio, the function runs on to its end, and `deliver` takes no effect any more.
        Where `deliver` waits for room it is run again, as by `run`, but the function is not.

        Raises:
            WaitTimeoutError: no worker became free in time; the function has not begun.
        """
        limiter = self._limiter_here(self._computing_limiter)

        task_time = TaskTime(self.storage.wait_timeout)
        streams = streams or current_streams()

        def work() -> tuple[T | None, Any]:
            with around():
                for_task = caller.get()
                caller.set(None)
                made = operation()
                caller.set(for_task)
                try:
                    return deliver(made, task_time), None
                except WaitElsewhere:
                    return None, made

        def undo(_: object) -> None:
            if task_time.queued is not None:
                task_time.queued.drop()

        with lend_place.get()():  # by a computation that came here for another one
            delivered, made = await self._in_worker(work, undo, streams, seconds=deadline.left(), limiter=limiter)
            if task_time.queued is not None:
                # A scope that is cancelled waits for this as for the worker.
                with around(), anyio.CancelScope(shield=True):
                    delivered = await self._attempts(partial(deliver, made), task_time, None, streams, small=False)
        return delivered  # type: ignore[return-value]

    async def in_worker(self, operation: Callable[[], T], streams: AbstractContextManager[object] | None = None) -> T:
        """Run `operation()` in a worker thread, in the caller's device streams unless `streams` says otherwise.

        A task that is cancelled through anyio's scopes waits for the worker, whose waits are bounded. asyncio's own
        `cancel()` does not wait; what the worker then makes is undone.
        """
        return await self._in_worker(operation, None, streams)

    async def in_worker_whole(self, operation: Callable[[], T], timeout: float | None = None) -> T:
        """As `in_worker`, for what takes effect in several steps: cut off before it begins, or not at all."""
        seconds = None if timeout is None else check_seconds("timeout", timeout)
        return await self._in_worker(operation, None, seconds=seconds, revocable=False)

    async def to_the_end(
        self,
        operation: Callable[[], object],
        on_loop: Callable[[float], object] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Run `operation()`, which can be called twice, in a worker thread to its end, however the task is cancelled.

        A cancellation of any kind is raised when it is over.

        Args:
            on_loop: the same, for the loop's own thread, given how long it may wait for a lock there. Where that, or
                the work, is more than a loop has time for, it raises `WaitTimeoutError`, and has done nothing.
            timeout: seconds that the operation may wait in all.
        """
        if on_loop is not None and self._ends_on_loop(on_loop, timeout):
            await anyio.lowlevel.cancel_shielded_checkpoint()
            return
        cancelled: list[BaseException] = []
        failed: list[Exception] = []
        ended = anyio.Event()
        begun = False
        call_soon = call_soon_here()
        limiter = self._limiter_here(self._closing_limiter)

        def work() -> None:
            nonlocal begun
            begun = True
            try:
                operation()
            except Exception as error:
                failed.append(error)  # not raised here: a task that was cancelled would not hear it
            finally:
                with suppress(RuntimeError):  # of a loop that has ended
                    call_soon(ended.set)

        with anyio.CancelScope(shield=True):
            while not ended.is_set():
                try:
                    if begun:
                        await ended.wait()
                    else:
                        await self._in_worker(work, None, limiter=limiter, revocable=False)
                        break
                except WaitTimeoutError:  # `work` raises nothing: no worker was free
                    limiter = anyio.CapacityLimiter(1)  # a close is never given up for want of one
                except anyio.get_cancelled_exc_class() as error:  # asyncio's own, which ignores the shield
                    cancelled.append(error)
        # Popped: the frame that an error comes through must not name it.
        if cancelled:
            raise cancelled.pop() from (failed.pop() if failed else None)
        if failed:
            raise failed.pop()

    def _ends_on_loop(self, on_loop: Callable[[float], object], timeout: float | None) -> bool:
        """Whether `on_loop(seconds)`, called here and now, has ended what it is to end."""
        # As in `_attempts`: for what a caller dropped unclosed a loop has no time.
        if not self._is_small(0) or self.storage.ledger.abandoned:
            return False
        seconds = self.inline_wait_seconds if timeout is None else min(timeout, self.inline_wait_seconds)
        before = caller.set(self._on_loop)
        try:
            on_loop(seconds)
        except WaitTimeoutError:
            return False
        finally:
            caller.reset(before)
        self._inline_counts[get_ident()] += 1
        return True

    async def _in_worker(
        self,
        operation: Callable[[], T],
        undo: Callable[[T], object] | None,
        streams: AbstractContextManager[object] | None = None,
        *,
        seconds: float | None = None,
        limiter: anyio.CapacityLimiter | None = None,
        revocable: bool = True,
    ) -> T:
        """Run `operation()` in a worker, once one of `limiter` is free, which is waited for `seconds` at most."""
        # Here, and not in the worker: it is this thread that may hold what the worker would wait for.
        gate.check(self.storage.name)
        if seconds is None:
            seconds = self.storage.wait_timeout
        if limiter is None:
            limiter = self._limiter_here(self._limiter)
        self._worker_counts[get_ident()] += 1
        cell: Cell[T] = Cell(undo)
        streams = streams or current_streams()
        task = Caller()
        place = Place(limiter)

        def work() -> None:
            if not place.begin():
                return
            caller.set(task if revocable else None)  # in the copy of the context that a worker runs in
            try:
                with streams:
                    cell.deliver(operation())
            except Exception as error:
                if not cell.fail(error) and isinstance(error, WaitElsewhere):
                    error.queued.leave()  # which its task may have looked for before it was there
            finally:
                place.end()

        await anyio.lowlevel.checkpoint_if_cancelled()  # the shield below would let it begin all the same
        await place.take(seconds, self.storage.name)
        try:
            # A scope of our own: what the worker asks of its loop runs in it, and would turn for ever in one that was
            # cancelled while it waits for the worker.
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
        except BaseException:
            task.leave()
            cell.leave()
            raise
        finally:
            place.leave()
        return cell.take()

    def _is_small(self, copied_bytes: int, entries: int = 1) -> bool:
        return entries <= self.inline_entries and (
            copied_bytes <= self.inline_bytes or self.storage.layout.device.type != "cpu"
        )

    def _limiter_here(self, limiter: Limiter) -> anyio.CapacityLimiter:
        """A limiter of the current event loop."""
        try:
            return limiter.get()
        except LookupError:
            made = anyio.CapacityLimiter(self._max_workers)
            limiter.set(made)
            return made


async def _wait_for_room(task_time: TaskTime) -> None:
    """Wait until another attempt may get further, without holding the loop, nor a thread.

    Raises:
        WaitTimeoutError, CapacityError: none may, and the time is over; what an attempt would have said.
    """
    queued: Queued = task_time.queued
    queued.needs_loop(task_time.loop_ended)
    call_soon = call_soon_here()
    while queued.waiter is not None:
        released = anyio.Event()

        def wake(released: anyio.Event = released) -> None:
            try:
                call_soon(released.set)
            except RuntimeError:  # of a loop that has ended, with the task in the air
                queued.drop()

        queued.waiter.subscribe(wake)
        left, at_most = task_time.left(), queued.at_most
        with anyio.move_on_after(left if at_most is None else min(left, at_most)):
            await released.wait()
        if not released.is_set() and not task_time.left():
            assert queued.in_vain is not None
            raise queued.in_vain()
        queued.look()


async def wait_in_task(flight: Flight, deadline: Deadline, name: str) -> None:
    """Wait for a flight without holding the loop, nor a thread.

    Raises:
        WaitTimeoutError: it was not over in time.
        RecursiveComputationError: see `waiting_for`.
    """
    over = anyio.Event()
    call_soon = call_soon_here()

    def wake() -> None:
        with suppress(RuntimeError):  # of a loop that has ended, and its tasks with it
            call_soon(over.set)

    try:
        if not flight.subscribe(wake):
            await anyio.lowlevel.checkpoint()
            return
        with waiting_for(flight, name), anyio.move_on_after(deadline.left()):
            await over.wait()
            return
    finally:
        flight.unsubscribe(wake)
    # The thread that ended it may have been cut off between two wakers, or its loop may have ended.
    if not flight.over_unheard():
        raise timed_out(flight, deadline, name)
