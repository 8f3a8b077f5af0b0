"""`Signal`: an event for a bounded wait, which a finaliser may set."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["Signal"]


class Signal:
    """An event that may be set at any point of any thread, inside its own `set` too, and whose waits are bounded.

    Neither holds for what the standard library has: an `Event` takes a lock in `set()`, and `SimpleQueue.get(timeout=)`
    of CPython 3.10 to 3.12 can block for ever where the time is over before the wait begins.
    """

    __slots__ = ("_is_set", "_lock", "_waker")

    def __init__(self) -> None:
        self._is_set = False
        self._waker: Callable[[], object] | None = None
        self._lock = threading.Lock()  # free once the signal is set
        self._lock.acquire()

    def set(self) -> None:
        """Wake every thread that waits, and let later waits end at once."""
        self._is_set = True  # first: a thread that has the lock for a moment, on its way out of `wait`, hides it
        with suppress(RuntimeError):  # it was set before, or is by another thread at the same time
            self._lock.release()
        waker = self._waker
        if waker is not None:
            waker()

    def subscribe(self, waker: Callable[[], object]) -> None:
        """Have `waker` called at each `set`, and at once if it is set already; in place of one that was here before.

        It is called at any point of any thread, perhaps twice: it must take no lock, and not raise.
        """
        self._waker = waker
        # After it is there: the thread that sets notes that first and looks for the waker then, so that one of the two
        # sees the other.
        if self._is_set:
            waker()

    def wait(self, timeout: float) -> bool:
        """Wait for `set`; False when `timeout` seconds are over. Blocks for no longer than that."""
        if self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            self.set()  # for the next thread that waits
        return self._is_set
