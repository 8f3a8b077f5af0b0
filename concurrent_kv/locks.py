"""`ShardedRWLock`: fair reader-writer locks, one per shard, taken in ascending order under one deadline.

Lock order of the package, in one place: shards in ascending number, then the ledger's mutex, then the stream clock's
own lock. Nothing is locked inside the mutex but the clock, and no torch call and no user code runs inside any of them
(a key's `__hash__` and `__eq__` excepted, which run under its shard). The lists of free buffers and the contention
counters have locks of their own, under which nothing else is locked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from readerwriterlock import rwlock

from .errors import WaitTimeoutError

__all__ = ["Caller", "Deadline", "NotOnLoopError", "ShardedRWLock", "caller"]


class Caller:
    """The task that an operation runs for.

    Attributes:
        left: set when the task was cancelled: the operation may still fail, but no longer take effect.
        steps_on_loop: where the operation runs on the thread of the task's event loop, which others need too: how many
            steps it may take there, of work that may need any number of them; None in a worker.
    """

    __slots__ = ("left", "steps_on_loop")

    def __init__(self, steps_on_loop: int | None = None) -> None:
        self.left = False
        self.steps_on_loop = steps_on_loop


# Of the operation that the current thread runs for a task, if it does.
caller: ContextVar[Caller | None] = ContextVar("concurrent_kv_caller", default=None)


class NotOnLoopError(WaitTimeoutError):
    """An operation on an event loop's own thread came to work that is a worker's; nothing has happened."""


class Deadline:
    """A point in time that bounds every wait of one operation; past at once when its caller has left."""

    __slots__ = ("_at", "_caller", "_steps", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._at = time.monotonic() + seconds
        self._caller = caller.get()
        self._steps = 0

    @property
    def cancelled(self) -> bool:
        """Whether the caller has left."""
        return self._caller is not None and self._caller.left

    @property
    def on_loop(self) -> bool:
        """Whether an event loop's own thread is at work."""
        return self._caller is not None and self._caller.steps_on_loop is not None

    def left(self) -> float:
        """Seconds left, never below 0."""
        return 0.0 if self.cancelled else max(0.0, self._at - time.monotonic())

    def check(self, name: str) -> None:
        """Raise `WaitTimeoutError` if the caller has left; called under the shards, before anything takes effect."""
        if self.cancelled:
            raise WaitTimeoutError(f"{name}: the operation was cancelled before it took effect")

    def leave_loop(self, name: str) -> None:
        """Raise `NotOnLoopError` on an event loop's own thread; called before work that may be long."""
        if self.on_loop:
            raise NotOnLoopError(f"{name}: what has to be done first would hold the event loop")

    def step(self, name: str) -> None:
        """Note a step of work that may need any number of them; on a loop's thread, too many raise `NotOnLoopError`."""
        self._steps += 1
        limit = None if self._caller is None else self._caller.steps_on_loop
        if limit is not None and self._steps > limit:
            self.leave_loop(name)


class _Held:
    """Shards locked for the length of a `with`."""

    __slots__ = ("_deadline", "_held", "_owner", "_shards", "_write")

    def __init__(self, owner: ShardedRWLock, shards: Sequence[int], deadline: Deadline, write: bool) -> None:
        self._owner = owner
        self._shards = shards
        self._deadline = deadline
        self._write = write
        self._held: list[Any] = []

    def __enter__(self) -> None:
        try:
            for shard in self._shards:
                self._owner._acquire(shard, self._write, self._deadline, self._held)
        except BaseException:
            self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        while self._held:
            self._held.pop().release()


class ShardedRWLock:
    """Fair reader-writer locks by shard number. Not reentrant: a thread holds shards of one `with` at a time.

    Args:
        count: number of shards.
        name: what error messages call the pool (or manager) it guards.
        lock_factory: makes the plain locks inside `readerwriterlock`; a scheduler may pass its own.
    """

    def __init__(self, count: int, *, name: str, lock_factory: Callable[[], Any] = threading.Lock) -> None:
        self.count = count
        self.name = name
        self._locks = [rwlock.RWLockFair(lock_factory=lock_factory) for _ in range(count)]
        self._counter_lock = lock_factory()
        self._wait_count = 0
        self._wait_seconds = 0.0

    def read(self, shards: Sequence[int], deadline: Deadline) -> _Held:
        """Hold `shards` for reading; they must be in ascending order without repeats.

        Raises:
            WaitTimeoutError: a shard was not free before the deadline; none is held then.
        """
        return _Held(self, shards, deadline, write=False)

    def write(self, shards: Sequence[int], deadline: Deadline) -> _Held:
        """Hold `shards` for writing; otherwise as `read`."""
        return _Held(self, shards, deadline, write=True)

    def contention(self) -> tuple[int, float]:
        """How often a shard had to be waited for, and for how many seconds in all."""
        with self._counter_lock:
            return self._wait_count, self._wait_seconds

    def reset_contention(self) -> None:
        """Start both counters from zero."""
        with self._counter_lock:
            self._wait_count, self._wait_seconds = 0, 0.0

    def _acquire(self, shard: int, write: bool, deadline: Deadline, held: list[Any]) -> None:
        lock = self._locks[shard].gen_wlock() if write else self._locks[shard].gen_rlock()
        if lock.acquire(blocking=False):
            held.append(lock)
            return
        started = time.monotonic()
        acquired = lock.acquire(blocking=True, timeout=deadline.left())
        if acquired:
            held.append(lock)
        waited = time.monotonic() - started
        with self._counter_lock:
            self._wait_count += 1
            self._wait_seconds += waited
        if not acquired:
            raise WaitTimeoutError(
                f"{self.name}: shard {shard} was not free for {'writing' if write else 'reading'} "
                f"within {deadline.seconds:g} s"
            )
