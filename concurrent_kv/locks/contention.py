"""`Contention`: how often the shards of one storage had to be waited for, and what is raised where that was in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import WaitTimeoutError
from .deadline import Deadline
from .gate import gate

__all__ = ["LOOK_SECONDS", "Contention"]

# A thread that waits for a shard looks so often whether its caller has left, or, with `readerwriterlock`, whether the
# shard's lock was left stuck.
LOOK_SECONDS = 0.05


class Contention:
    """Counts waits.

    Args:
        name: what error messages call the pool (or manager) whose shards they are.
    """

    def __init__(self, name: str, lock_factory: Callable[[], Any] = threading.Lock) -> None:
        self.name = name
        self._lock = lock_factory()
        self._count = 0
        self._seconds = 0.0
        self._before = 0, 0.0  # by the last reset

    def read(self) -> tuple[int, float]:
        """How often a shard had to be waited for, and for how many seconds in all."""
        if gate.is_inside:
            return self._count, self._seconds
        with gate.lock, self._lock:
            return self._count, self._seconds

    def read_lifetime(self) -> tuple[int, float]:
        """As `read`, whatever was reset."""
        if gate.is_inside:
            return self._since_made()
        with gate.lock, self._lock:
            return self._since_made()

    def _since_made(self) -> tuple[int, float]:
        count, seconds = self._before
        return count + self._count, seconds + self._seconds

    def reset(self) -> None:
        """Start both counters from zero."""
        with gate.lock, self._lock:
            self._before = self._since_made()
            self._count, self._seconds = 0, 0.0

    def wait_until(self, is_free: Callable[[float], bool], shard: int, write: bool, deadline: Deadline) -> None:
        """Wait for a shard; `is_free` waits for some seconds and says whether it was handed over.

        Raises:
            WaitTimeoutError: it was not, before the deadline.
        """
        started = time.monotonic()
        while not (free := is_free(min(deadline.left(), LOOK_SECONDS))):
            if not deadline.left():
                break
        waited = time.monotonic() - started
        with gate.lock, self._lock:
            self._count += 1
            self._seconds += waited
        if not free:
            raise WaitTimeoutError(
                f"{self.name}: shard {shard} was not free for {'writing' if write else 'reading'} "
                f"within {deadline.seconds:g} s"
            )
