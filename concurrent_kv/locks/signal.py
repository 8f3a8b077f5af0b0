"""`Signal`: an event for a bounded wait, which a finaliser may set."""

from __future__ import annotations

import threading
from contextlib import suppress

__all__ = ["Signal"]


class Signal:
    """An event that may be set at any point of any thread, inside its own `set` too, and whose waits are bounded.

    Neither holds for what the standard library has: an `Event` takes a lock in `set()`, and `SimpleQueue.get(timeout=)`
    of CPython 3.10 to 3.12 can block for ever where the time is over before the wait begins.
    """

    __slots__ = ("_is_set", "_lock")

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()  # free once the signal is set
        self._lock.acquire()

    def set(self) -> None:
        """Wake every thread that waits, and let later waits end at once."""
        self._is_set = True  # first: a thread that has the lock for a moment, on its way out of `wait`, hides it
        with suppress(RuntimeError):  # it was set before, or is by another thread at the same time
            self._lock.release()

    def wait(self, timeout: float) -> bool:
        """Wait for `set`; False when `timeout` seconds are over. Blocks for no longer than that."""
        if self._lock.acquire(timeout=min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            self.set()  # for the next thread that waits
        return self._is_set
