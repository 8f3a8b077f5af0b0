"""`Turns`: operations that wait for room in a pool, in the order of arrival. What is freed meanwhile is for the first.

Every method is called with the ledger's mutex held. No operation in the queue holds any of the pool's room: what is
free while one waits can only be taken by the first, so that it adds up to what the first needs, however much that is.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from weakref import ref

__all__ = ["Turn", "Turns"]

EVICTIONS_BEFORE_QUEUE = 8  # in vain, as others took the room: the next victims' room is kept


class Turn:
    """One operation that needs room; it joins the queue when it has to wait, or to evict many.

    Attributes:
        since: when it came, in seconds of the monotonic clock; a commit came with its gather.
        reserves: whether it sets room aside, as a search does, for as long as that is open.
        joined: whether it has joined the queue and not left it.
        evicted: victims that it took without getting its room.
        stalled: whether it cannot fit before others give back what they reserved. Writes need not wait for that: what
            they store can be evicted.
        loop_ended: of an operation that needs its task's event loop to go on, what says whether that has ended.
    """

    __slots__ = ("__weakref__", "evicted", "joined", "loop_ended", "reserves", "since", "stalled")

    def __init__(self, since: float, *, reserves: bool = False) -> None:
        self.since = since
        self.reserves = reserves
        self.joined = False
        self.evicted = 0
        self.stalled = False
        self.loop_ended: Callable[[], bool] | None = None

    @property
    def is_orphan(self) -> bool:
        """Whether nobody will go on with it, though something keeps its task alive."""
        return self.loop_ended is not None and self.loop_ended()


class Turns:
    """The queue of one pool. A turn whose operation was cut off and is gone counts no more, nor does an orphan."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, int, ref[Turn]]] = []
        self._joined = 0

    def is_first(self, turn: Turn) -> bool:
        """Whether no earlier turn waits for the room that `turn` wants."""
        if not self._queue:
            return True
        for since, _, waiting in self._queue:
            other = waiting()
            if other is turn or since > turn.since:
                return True
            if other is not None and (turn.reserves or not other.stalled) and not other.is_orphan:
                return False
        return True

    def join(self, turn: Turn, when_gone: Callable[[], None]) -> None:
        """Wait from now on; nothing happens the second time.

        `when_gone` is called if its operation is cut off and never leaves: at any point of any thread.
        """
        if not turn.joined:
            self._joined += 1  # orders those of one moment, as turns cannot be compared
            insort(self._queue, (turn.since, self._joined, ref(turn, lambda _: when_gone())))
            turn.joined = True

    def leave(self, turn: Turn) -> None:
        """Wait no longer: the next is the first."""
        turn.joined = False
        self._queue = [place for place in self._queue if place[2]() not in (None, turn)]

    def clear(self) -> None:
        """Forget all turns; for `repair`, which runs while no operation waits."""
        self._queue.clear()

    def __len__(self) -> int:
        turns = [waiting() for _, _, waiting in self._queue]
        return sum(turn is not None and not turn.is_orphan for turn in turns)
