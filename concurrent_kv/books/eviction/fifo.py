"""First in, first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain
from typing import ClassVar

from .base import E, EvictionPolicy


class FIFO(EvictionPolicy[E]):
    """Evicts the entry written longest ago; hits change nothing.

    Age is the age of the last write: replacing a key makes it the youngest, and a victim that is given back has the age
    that it had. Every operation is constant, but for what is given back: O(log n) of n such entries.
    """

    observes_hits: ClassVar[bool] = False

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        # Victim end first. Not a plain dict: finding its first key skips every key deleted before it, so a queue in one
        # costs as much per victim as there were victims.
        self._queue: OrderedDict[E, int] = OrderedDict()  # entry -> its number, ascending
        self._number = 0
        self._out: dict[E, int] = {}  # victims given out, until they are given back or removed
        # Those given back: all are older than what is in the queue, as what is given out is always the oldest.
        self._back: dict[E, int] = {}
        self._numbered: dict[int, E] = {}
        self._oldest: list[int] = []  # a heap of their numbers, and of those of some that have left since
        self._first = 0

    def add(self, entry: E) -> None:
        number = self._number + 1
        self._queue[entry] = number  # first: it needs memory
        self._queue.move_to_end(entry)
        self._number = number
        self._out.pop(entry, None)
        self._numbered.pop(self._back.pop(entry, 0), None)

    def touch(self, entry: E) -> None:
        pass

    def remove(self, entry: E) -> None:
        if self._queue.pop(entry, None) is None:
            self._out.pop(entry, None)
            self._numbered.pop(self._back.pop(entry, 0), None)

    def pop_victim(self) -> E | None:
        while self._oldest:
            number = self._oldest[0]
            if number in self._numbered:
                entry = self._numbered[number]
                self._out[entry] = number  # first: it needs memory
                heappop(self._oldest)
                del self._numbered[number], self._back[entry]
                return entry
            heappop(self._oldest)
        if not self._queue:
            return None
        entry = next(iter(self._queue))  # no `popitem`, which loses the entry where there is no memory for a pair
        self._out[entry] = self._queue[entry]
        del self._queue[entry]
        return entry

    def give_back(self, entry: E) -> None:
        number = self._out.pop(entry, None)
        if number is None:  # it was never given out: older than all
            self.remove(entry)
            self._first -= 1
            number = self._first
        heappush(self._oldest, number)  # first: one that is not numbered is passed over
        self._back[entry] = number
        self._numbered[number] = entry

    def clear(self) -> None:
        self._queue.clear()
        self._out.clear()
        self._back.clear()
        self._numbered.clear()
        self._oldest.clear()

    def in_order(self) -> list[E]:
        numbers = {**self._out, **self._back, **self._queue}
        return sorted(numbers, key=numbers.__getitem__)

    def __contains__(self, entry: object) -> bool:
        return entry in self._queue or entry in self._back

    def __iter__(self) -> Iterator[E]:
        return chain(self._back, self._queue)

    def __len__(self) -> int:
        return len(self._back) + len(self._queue)
