"""CLOCK with two reference bits.

F. J. Corbató: "A paging experiment with the MULTICS system", MIT Project MAC, 1968, describes it with one; with more
bits it is also known as generalized CLOCK.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from .base import E, EvictionPolicy

MAX_COUNT = 3  # two reference bits


class Clock(EvictionPolicy[E]):
    """Evicts the first entry under the hand with no hit left to its credit; a hit credits one, up to three.

    Close to LRU, but a hit only counts and moves nothing. Every operation is constant, `pop_victim` amortised: each
    entry the hand passes gives up one credit, which one hit had put there. A single call makes three rounds at most.
    """

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self._ring: OrderedDict[E, int] = OrderedDict()  # entry -> credit; the hand is at the first

    def add(self, entry: E) -> None:
        self._ring[entry] = 0
        self._ring.move_to_end(entry)

    def touch(self, entry: E) -> None:
        credit = self._ring.get(entry, MAX_COUNT)
        if credit < MAX_COUNT:
            self._ring[entry] = credit + 1

    def remove(self, entry: E) -> None:
        self._ring.pop(entry, None)

    def pop_victim(self) -> E | None:
        while self._ring:
            entry = next(iter(self._ring))
            try:
                _, credit = self._ring.popitem(last=False)
                if credit == 0:
                    return entry
                self._ring[entry] = credit - 1
            except MemoryError:  # for the pair, say: it is taken out nevertheless
                self.give_back(entry)
                raise
        return None

    def give_back(self, entry: E) -> None:
        self._ring[entry] = 0
        self._ring.move_to_end(entry, last=False)

    def clear(self) -> None:
        self._ring.clear()

    def __contains__(self, entry: object) -> bool:
        return entry in self._ring

    def __iter__(self) -> Iterator[E]:
        return iter(self._ring)

    def __len__(self) -> int:
        return len(self._ring)
