"""`ShardedRWLock`: fair reader-writer locks, one per shard, taken in ascending order under one deadline.

Over `readerwriterlock`; for where the package was built without `shards.py`'s compiled locks, or a scheduler makes the
locks.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import CodeType, TracebackType
from typing import Any, ClassVar, NamedTuple

from readerwriterlock import rwlock

from .contention import Contention
from .deadline import Deadline
from .gate import gate

__all__ = ["ShardedRWLock"]


class _Held:
    """Shards locked for the length of a `with`.

    It is registered before its first lock and until after its last, so that what an asynchronous exception cuts loose
    is found: such a hold dies without having left.
    """

    __slots__ = ("_deadline", "_entering", "_held", "_inside", "_owner", "_shards", "_write")

    def __init__(self, owner: ShardedRWLock, shards: Sequence[int], deadline: Deadline, write: bool) -> None:
        self._owner = owner
        self._shards = shards
        self._deadline = deadline
        self._write = write
        self._held: list[Any] = []  # handles of the first of `shards`
        self._inside = self._entering = False

    def __enter__(self) -> None:
        if self._inside:
            raise RuntimeError("these shards are held already")
        owner, held = self._owner, self._held
        self._inside = self._entering = True
        owner._holders[id(self)] = held
        try:
            owner._acquire(self._shards, self._write, self._deadline, held)
            self._entering = False
        except BaseException:
            self._entering = False
            self.__exit__()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        if self._entering:  # another thread waits with it
            raise RuntimeError("these shards are still waited for")
        if not self._inside:
            return
        owner, held = self._owner, self._held
        while held:
            handle = held.pop()
            try:
                handle.release()
            except BaseException as torn:
                owner._replace(self._shards[len(held)], handle.c_rw_lock)
                if not isinstance(torn, RuntimeError):  # that is of a lock that a thread was torn out of
                    self.__exit__()  # the others
                    raise
        del owner._holders[id(self)]
        self._inside = False
        if owner._shut:
            owner._open_empty()

    def give_up(self, owner: ShardedRWLock) -> None:
        """Leave it to a thread that waits for a shard of `owner`, its owner, unless it has left. Takes no lock."""
        if getattr(self, "_inside", False) and self._owner is owner:
            self._inside = False
            owner._lost.append(self._shards)
            owner._holders.pop(id(self), None)

    def __del__(self) -> None:
        # Runs at any point of any thread: it must take no lock.
        if getattr(self, "_inside", False):
            self.give_up(self._owner)

    CODE: ClassVar[frozenset[CodeType]] = frozenset(each.__code__ for each in (__enter__, __exit__))


class _Shut(NamedTuple):
    """A shard's new lock that no thread may take yet."""

    barrier: Any  # a write lock on it
    older: list[rwlock.RWLockFair]  # its predecessors, which a thread may still hold


class ShardedRWLock:
    """Fair reader-writer locks by shard number. Not reentrant: a thread holds shards of one `with` at a time.

    An asynchronous exception inside `readerwriterlock` can leave a lock of it stuck. Such a lock is replaced: at once
    by the thread that was hit, or by one that waits for the shard. Its successor lets no thread in before the last that
    holds the old one has left, so that writers exclude all others throughout.

    Args:
        count: number of shards.
        name: what error messages call the pool (or manager) it guards.
        lock_factory: makes the plain locks inside `readerwriterlock`; a scheduler may pass its own.
        contention: see `new_locks`.
    """

    def __init__(
        self,
        count: int,
        *,
        name: str,
        lock_factory: Callable[[], Any] = threading.Lock,
        contention: Contention | None = None,
    ) -> None:
        self.count = count
        self.contention = contention or Contention(name, lock_factory)
        self._lock_factory = lock_factory
        self._locks = [rwlock.RWLockFair(lock_factory=lock_factory) for _ in range(count)]
        self._holders: dict[int, list[Any]] = {}  # the handles of every `_Held`, by its id
        self._lost: deque[Sequence[int]] = deque()  # shards of those that died without having left
        self._replacing = lock_factory()
        self._shut: dict[int, _Shut] = {}  # by shard; under `_replacing`

    def read(self, shards: Sequence[int], deadline: Deadline) -> _Held:
        """Hold `shards` for reading; they must be in ascending order without repeats.

        Raises:
            WaitTimeoutError: a shard was not free before the deadline; none is held then.
        """
        return _Held(self, shards, deadline, write=False)

    def write(self, shards: Sequence[int], deadline: Deadline) -> _Held:
        """Hold `shards` for writing; otherwise as `read`."""
        return _Held(self, shards, deadline, write=True)

    @property
    def held(self) -> int:
        """How many threads hold shards, or wait for some, just now."""
        return len(self._holders)

    def _acquire(
        self, shards: Sequence[int], write: bool, deadline: Deadline, held: list[Any], at_most: float | None = None
    ) -> bool:
        """Acquire all of `shards`; their handles join `held`.

        With `at_most`, False where one is not free within as many seconds, or its lock was replaced.
        """
        locks = self._locks
        for shard in shards:
            lock = locks[shard]
            try:
                handle = lock.gen_wlock() if write else lock.gen_rlock()
                if handle.acquire(False) if at_most is None else handle.acquire(True, at_most):
                    held.append(handle)
                    # After the append: who opens a new lock looks at what is held after putting it there; one sees the
                    # other.
                    if locks[shard] is lock:
                        continue
                    held.pop()
            except RuntimeError:  # of a lock that a thread was torn out of
                self._replace(shard, lock)
            except BaseException:
                self._replace(shard, lock)
                raise
            if at_most is not None:
                return False
            self._wait(shard, write, deadline, held)
        return True

    def _wait(self, shard: int, write: bool, deadline: Deadline, held: list[Any]) -> None:
        """Acquire a shard that was not free at once."""
        self._look_for_cut(sys.exc_info()[1])

        def is_free(seconds: float) -> bool:
            self._look_for_lost()
            return self._acquire((shard,), write, deadline, held, seconds)

        self.contention.wait_until(is_free, shard, write, deadline)

    # After asynchronous exceptions ---------------------------------------------------------------------------------

    def _look_for_cut(self, error: BaseException | None) -> None:
        """Give up holds of this thread that the exception it handles just now was raised in.

        They live as long as the traceback, and who closes something while the exception passes would wait for them.
        """
        seen: set[int] = set()
        while error is not None and id(error) not in seen:  # users can chain errors in a circle
            seen.add(id(error))
            trace = error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code in _Held.CODE:
                    trace.tb_frame.f_locals["self"].give_up(self)
                trace = trace.tb_next
            error = error.__context__

    def _look_for_lost(self) -> None:
        """Replace the locks of those that died without having left; open those that no holder stands in the way of."""
        while self._lost:
            try:
                shards = self._lost.popleft()
            except IndexError:  # another thread was faster
                break
            for shard in shards:
                self._replace(shard, self._locks[shard])
        if self._shut:
            self._open_empty()

    def _replace(self, shard: int, lock: rwlock.RWLockFair) -> None:
        """Give a shard a new lock in place of `lock`, which is not trusted any more."""
        with gate.lock, self._replacing:
            if self._locks[shard] is lock:
                self._put_new(shard)
        # A reader that lets go waits for this one without a bound, and would wait for good.
        if lock.c_lock_read_count.locked():
            with suppress(RuntimeError):
                lock.c_lock_read_count.release()
        self._open_empty()

    def _put_new(self, shard: int) -> None:
        """Put a new lock in a shard's place, shut. `_replacing` held."""
        older = [*self._shut[shard].older] if shard in self._shut else []
        new = rwlock.RWLockFair(lock_factory=self._lock_factory)
        barrier = new.gen_wlock()
        barrier.acquire()
        self._shut[shard] = _Shut(barrier, [*older, self._locks[shard]])
        self._locks[shard] = new

    def _open_empty(self) -> None:
        """Open every new lock whose predecessors no thread holds any more."""
        with gate.lock, self._replacing:
            self._open_those_empty()

    def _open_those_empty(self) -> None:
        """`_replacing` held."""
        still_held = {id(handle.c_rw_lock) for held in self._holders.copy().values() for handle in held.copy()}
        for shard, (barrier, older) in list(self._shut.items()):
            if not still_held.isdisjoint(map(id, older)):
                continue
            try:
                barrier.release()
                del self._shut[shard]
            except BaseException as error:
                self._put_new(shard)
                if not isinstance(error, RuntimeError):
                    raise
