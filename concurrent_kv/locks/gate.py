"""`gate`: says whether the calling thread is inside one of the library's own critical sections.

Python runs other code at almost any point of a thread: the garbage collector and dying objects run finalisers, the main
thread runs signal handlers, a dict looks at keys. Such code may call a pool while its own thread holds a lock of that
pool, or of another pool that a third thread waits for with this one's lock in hand. Nothing keeps it from coming; so it
has to be noticed. Every critical section of the package enters the gate first:

    with gate.lock, ledger.mutex: ...
    with gate.lock, locks.write(shards, deadline): ...

and every public call looks at it before its first lock. Inside, a call does without a lock (`len`, `stats`, `repr`), is
noted for the next operation (`discard`, closing a handle), or raises `ReentrantCallError` (`gate.check`).

No thread ever waits at the gate, as each has its own: a depth in compiled code, or one reentrant lock for each thread.
It is left like any lock in a `with`, whatever an asynchronous exception cuts off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from ..errors import ReentrantCallError
from ..native import native

__all__ = ["gate"]


class _Gate:
    """The calling thread's mark.

    Attributes:
        lock: held for the length of every critical section of this thread; reentrant, as sections nest.
        holds: whether it is held, a function.
    """

    lock: Any
    holds: Callable[[], bool]

    @property
    def is_inside(self) -> bool:
        """Whether the calling thread is inside a critical section of any pool of this process."""
        return self.holds()

    def check(self, name: str) -> None:
        """Raise `ReentrantCallError` inside a critical section; `name` is that of the pool that was called."""
        if self.holds():
            raise ReentrantCallError(
                f"{name} was called from inside a pool's own critical section, by a finaliser, a signal handler, a "
                "key's __eq__ or __hash__, or an eviction policy that ran there; it could wait for its own thread. "
                "There, discard(key) and closing a handle only leave a note, len() and stats() need no lock; leave "
                "everything else to a thread or to a later call"
            )


class _CompiledGate(_Gate):
    """One object for all threads, which knows of each how deep it is inside."""

    def __init__(self) -> None:
        self.lock = native.Gate()
        self.holds = self.lock.holds
        for shared in (self, self.lock, self.holds):
            native.keep_for_ever(shared)


class _LockOfThread(_Gate, threading.local):
    """A lock for each thread."""

    def __getattr__(self, name: str) -> Any:
        # Made here and not in an `__init__`: a finaliser that the collector runs there would find the gate half made.
        if name == "lock":
            return self.__dict__.setdefault("lock", threading.RLock())
        if name == "holds":
            return self.__dict__.setdefault("holds", self.lock._is_owned)
        raise AttributeError(name)


gate: _Gate = _LockOfThread() if native is None else _CompiledGate()
