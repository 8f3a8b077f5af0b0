"""What a read of a key may return: values that some write stored, and that were not over before the read began.

Times are the caller's: a call took effect somewhere between its beginning and its end. So a value is impossible only
if its write had ended before another call that removed or replaced it began, and that one had ended before the read
began. Nothing here knows what the pool did; anything in doubt is possible.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic_ns
from typing import NamedTuple

from stress.content import BrokenPromiseError

__all__ = ["Barrier", "Before", "KeyLedger", "Write"]

KEPT = 256  # ended writes of a key that are remembered


class Barrier:
    """The latest beginning among the calls that remove: of all, and of those that have ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.ended_latest = 0  # nothing older than this is left
        self.begun_latest = 0  # something older than this may have gone
        self.begun_count = 0

    def begin(self) -> int:
        """Before a call that removes."""
        now = monotonic_ns()
        with self._lock:
            self.begun_latest = max(self.begun_latest, now)
            self.begun_count += 1
        return now

    def ended(self, began: int) -> None:
        """After it."""
        with self._lock:
            self.ended_latest = max(self.ended_latest, began)


class Before(NamedTuple):
    """What a read is held to, as known before it begins."""

    barrier: int  # what was over then is impossible
    stored_since: int | None  # beginning of the latest write that had ended and stored its value


@dataclass(frozen=True)
class Write:
    """A write under way."""

    version: int
    began: int


class KeyLedger:
    """The writes of one key of one scope.

    Args:
        name: what messages call it.
        above: barriers of what the key belongs to (its scope, its pool).
    """

    def __init__(self, name: str, above: Sequence[Barrier] = ()) -> None:
        self.name = name
        self._barrier = Barrier()
        self._barriers = (self._barrier, *above)
        self._lock = threading.Lock()
        self._issued = 0
        self._ended: dict[
            int, float
        ] = {}  # when each write ended: -inf if it stored nothing, inf while it is under way
        self._forgotten = -inf  # the latest end among those forgotten
        self._stored_since: int | None = None

    def begin(self) -> Write:
        """A version of its own for a write that is about to be made."""
        with self._lock:
            self._issued += 1
            self._ended[self._issued] = inf
            return Write(self._issued, monotonic_ns())

    def stored(self, write: Write) -> None:
        """The write has ended, and said that it stored its value."""
        self._end(write.version, monotonic_ns())
        self._barrier.ended(write.began)
        with self._lock:
            self._stored_since = max(self._stored_since or 0, write.began)

    def refused(self, write: Write) -> None:
        """The write has ended, and said (or raised) that it stored nothing."""
        self._end(write.version, -inf)

    def cut_off(self, write: Write) -> None:
        """The write was interrupted or cancelled: it has stored its value by now, or never will."""
        self._end(write.version, monotonic_ns())

    def begin_removal(self) -> int:
        """Before the key is removed."""
        return self._barrier.begin()

    def removed(self, began: int) -> None:
        """After it was."""
        self._barrier.ended(began)

    def before_read(self) -> Before:
        """To be asked before a read begins."""
        with self._lock:
            stored_since = self._stored_since
        return Before(max(barrier.ended_latest for barrier in self._barriers), stored_since)

    def check_miss(self, before: Before) -> None:
        """Raise `BrokenPromiseError` if a read cannot have missed, where nothing is ever evicted."""
        since = before.stored_since
        if since is not None and all(barrier.begun_latest < since for barrier in self._barriers):
            raise BrokenPromiseError(f"{self.name}: lost: stored before the read began, and nothing removed it since")

    def check(self, version: int, before: Before) -> None:
        """Raise `BrokenPromiseError` if a read cannot have returned `version`."""
        barrier = before.barrier
        with self._lock:
            ended = self._ended.get(version)
            if ended is None:
                if not 0 < version <= self._issued:
                    raise BrokenPromiseError(f"{self.name}: version {version} was never written")
                ended = self._forgotten if self._forgotten < barrier else inf
        if ended == -inf:
            raise BrokenPromiseError(f"{self.name}: version {version} was read, and its write stored nothing")
        if ended < barrier:
            raise BrokenPromiseError(
                f"{self.name}: version {version} was read, whose write ended {(barrier - ended) / 1e6:.3f} ms before "
                "something began that replaced or removed it and had ended when the read began"
            )

    def _end(self, version: int, when: float) -> None:
        with self._lock:
            self._ended[version] = when
            if len(self._ended) > KEPT:
                # Oldest first; those under way stay.
                oldest = next((number for number, end in self._ended.items() if end != inf and number != version), None)
                if oldest is not None:
                    self._forgotten = max(self._forgotten, self._ended.pop(oldest))
