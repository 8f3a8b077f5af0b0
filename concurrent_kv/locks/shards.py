"""The locks of a storage's shards: `new_locks` makes compiled ones, or a `ShardedRWLock` where there are none.

No asynchronous exception comes between the steps of a compiled one, which are taken in C.

Lock order of the package, in one place: shards in ascending number, then a search's shard, then its mutex, then the
storage's mutex, then the stream clock's own lock. Nothing is locked inside the storage's mutex but the clock, and no
torch call and no user code runs inside any of them (a key's `__hash__` and `__eq__` excepted, which run under its
shard). The shapes of free buffers and the contention counters have locks of their own, under which nothing else is
locked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..native import native
from .contention import Contention
from .deadline import Deadline
from .sharded import ShardedRWLock

__all__ = ["ShardLocks", "new_locks"]


class ShardLocks(Protocol):
    """Fair reader-writer locks by shard number. Not reentrant: a thread holds shards of one `with` at a time."""

    @property
    def count(self) -> int:
        """Number of shards."""

    @property
    def contention(self) -> Contention:
        """How often one had to be waited for."""

    @property
    def held(self) -> int:
        """How many threads hold shards, or wait for some, just now."""

    def read(self, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        """Hold `shards` for reading; they must be in ascending order without repeats.

        Raises:
            WaitTimeoutError: a shard was not free before the deadline; none is held then.
        """

    def write(self, shards: Sequence[int], deadline: Deadline) -> AbstractContextManager[None]:
        """Hold `shards` for writing; otherwise as `read`."""


def new_locks(
    count: int,
    *,
    name: str,
    lock_factory: Callable[[], Any] = threading.Lock,
    contention: Contention | None = None,
) -> ShardLocks:
    """Locks of so many shards.

    Args:
        name: what error messages call the pool (or manager) they guard.
        lock_factory: makes the plain locks inside; a scheduler may pass its own.
        contention: what counts their waits, with those of others; one of their own if left out.
    """
    if native is None or lock_factory is not threading.Lock:
        return ShardedRWLock(count, name=name, lock_factory=lock_factory, contention=contention)
    locks: ShardLocks = native.ShardLocks(count, contention or Contention(name))
    return locks
