"""`ShardedRWLock`: fair reader-writer locks, one per shard, taken in ascending order under one deadline.

Lock order of the package, in one place: shards in ascending number, then the ledger's mutex, then the stream clock's
own lock. Nothing is locked inside the mutex but the clock, and no torch call and no user code runs inside any of them
(a key's `__hash__` and `__eq__` excepted, which run under its shard). The lists of free buffers and the contention
counters have locks of their own, under which nothing else is locked.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from readerwriterlock import rwlock

from .errors import WaitTimeoutError

__all__ = ["Caller", "Deadline", "NotOnLoopError", "ShardedRWLock", "caller"]

LOOK_SECONDS = 0.05  # who waits for a shard looks so often whether its lock was left stuck
_Acquired = tuple[int, rwlock.RWLockFair, Any]  # (shard, lock, the handle that holds it)


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
    """Shards locked for the length of a `with`.

    It is registered before its first lock and until after its last, so that what an asynchronous exception cuts loose
    is found: such a hold dies without having left.
    """

    __slots__ = ("_acquired", "_deadline", "_inside", "_owner", "_shards", "_write")

    def __init__(self, owner: ShardedRWLock, shards: Sequence[int], deadline: Deadline, write: bool) -> None:
        self._owner = owner
        self._shards = shards
        self._deadline = deadline
        self._write = write
        self._acquired: list[_Acquired] = []
        self._inside = False

    def __enter__(self) -> None:
        owner, acquired = self._owner, self._acquired
        self._inside = True
        owner._holders[id(self)] = acquired
        try:
            for shard in self._shards:
                owner._acquire(shard, self._write, self._deadline, acquired)
        except BaseException:
            self._leave()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        owner, acquired = self._owner, self._acquired
        while acquired:
            try:
                owner._release(acquired.pop())
            except BaseException:
                self._leave()  # the others
                raise
        del owner._holders[id(self)]
        self._inside = False

    def __del__(self) -> None:
        # Runs at any point of any thread: it must take no lock. Whoever waits for a shard looks at what is lost.
        if self._inside:
            self._owner._lost.append(self._shards)
            self._owner._holders.pop(id(self), None)


class ShardedRWLock:
    """Fair reader-writer locks by shard number. Not reentrant: a thread holds shards of one `with` at a time.

    An asynchronous exception inside `readerwriterlock` can leave a lock of it stuck. Such a lock is replaced: at once
    by the thread that was hit, or by who waits for the shard. Its successor lets nobody in before everybody who still
    holds the old one has left, so that writers exclude all others throughout.

    Args:
        count: number of shards.
        name: what error messages call the pool (or manager) it guards.
        lock_factory: makes the plain locks inside `readerwriterlock`; a scheduler may pass its own.
    """

    def __init__(self, count: int, *, name: str, lock_factory: Callable[[], Any] = threading.Lock) -> None:
        self.count = count
        self.name = name
        self._lock_factory = lock_factory
        self._locks = [rwlock.RWLockFair(lock_factory=lock_factory) for _ in range(count)]
        self._counter_lock = lock_factory()
        self._wait_count = 0
        self._wait_seconds = 0.0
        self._holders: dict[int, list[_Acquired]] = {}  # what every `_Held` has acquired, by its id
        self._lost: deque[Sequence[int]] = deque()  # shards of those that died without having left
        self._replacing = lock_factory()
        # Write locks on successors whose predecessors are still held, by shard. Under `_replacing`.
        self._barriers: dict[int, Any] = {}

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

    def _acquire(self, shard: int, write: bool, deadline: Deadline, acquired: list[_Acquired]) -> None:
        if self._try(shard, write, acquired, None):
            return
        started = time.monotonic()
        while not (entered := self._try(shard, write, acquired, min(deadline.left(), LOOK_SECONDS))):
            if not deadline.left():
                break
            self._look_after(shard)
        waited = time.monotonic() - started
        with self._counter_lock:
            self._wait_count += 1
            self._wait_seconds += waited
        if not entered:
            raise WaitTimeoutError(
                f"{self.name}: shard {shard} was not free for {'writing' if write else 'reading'} "
                f"within {deadline.seconds:g} s"
            )

    def _try(self, shard: int, write: bool, acquired: list[_Acquired], timeout: float | None) -> bool:
        """Acquire a shard within `timeout` seconds, at once if None; True if that lock is still the shard's then."""
        lock = self._locks[shard]
        try:
            handle = lock.gen_wlock() if write else lock.gen_rlock()
            if not (handle.acquire(blocking=False) if timeout is None else handle.acquire(timeout=timeout)):
                return False
            acquired.append((shard, lock, handle))
            # After the append: who replaces the lock looks at what is acquired after that, so that one sees the other.
            if self._locks[shard] is lock:
                return True
            acquired.pop()
        except RuntimeError:  # of a lock whose insides somebody was torn out of
            self._replace(shard, lock)
        except BaseException:
            self._replace(shard, lock)
            raise
        self._settle(shard)
        return False

    def _release(self, acquired: _Acquired) -> None:
        shard, lock, handle = acquired
        try:
            if self._locks[shard] is lock:
                handle.release()
                return
        except RuntimeError:
            self._replace(shard, lock)
        except BaseException:
            self._replace(shard, lock)
            raise
        self._settle(shard)

    # After asynchronous exceptions ---------------------------------------------------------------------------------

    def _look_after(self, shard: int) -> None:
        """Replace the locks of those that died without having left; let the next in where nobody is left inside."""
        while self._lost:
            try:
                shards = self._lost.popleft()
            except IndexError:  # another thread was faster
                break
            for lost in shards:
                self._replace(lost, self._locks[lost])
        self._settle(shard)

    def _replace(self, shard: int, lock: rwlock.RWLockFair) -> None:
        """Give a shard a new lock in place of `lock`, which nobody trusts any more."""
        with self._replacing:
            if self._locks[shard] is lock:
                self._succeed(shard)
        # A reader that lets go waits for this one without a bound, and would wait for good.
        if lock.c_lock_read_count.locked():
            with suppress(RuntimeError):
                lock.c_lock_read_count.release()
        self._settle(shard)

    def _succeed(self, shard: int) -> None:
        """Put a new lock in place, shut. `_replacing` held."""
        successor = rwlock.RWLockFair(lock_factory=self._lock_factory)
        barrier = successor.gen_wlock()
        barrier.acquire()
        self._barriers[shard] = barrier
        self._locks[shard] = successor

    def _settle(self, shard: int) -> None:
        """Open a shard's new lock if nobody holds an older one any more."""
        with self._replacing:
            barrier = self._barriers.get(shard)
            if barrier is None:
                return
            current = self._locks[shard]
            for acquired in self._holders.copy().values():
                if any(held == shard and lock is not current for held, lock, _ in tuple(acquired)):
                    return
            try:
                barrier.release()
                del self._barriers[shard]
            except BaseException as error:
                self._succeed(shard)
                if not isinstance(error, RuntimeError):
                    raise
