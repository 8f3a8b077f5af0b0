"""S3-FIFO: three static FIFO queues.

Juncheng Yang, Yazhuo Zhang, Ziyue Qiu, Yao Yue, K. V. Rashmi: "FIFO queues are all you need for cache eviction",
SOSP 2023, https://doi.org/10.1145/3600006.3613147.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from .base import E, EvictionPolicy

MAX_HITS = 3  # two bits, as in the paper
SMALL_SHARE = 10  # the small queue's part of all entries: one tenth


class S3FIFO(EvictionPolicy[E]):
    """Evicts early what is hit less than twice soon after its write, and keeps the rest in a CLOCK of its own.

    New entries queue in *small*. Those hit at least twice by the time they reach its end move to *main*; the others are
    evicted, and their fingerprints remembered in *ghost*, which holds nine tenths of `capacity`. A key written again
    while it is remembered goes to main at once. Main gives an entry one more round for each of its hits.

    Small is the source of victims while it holds a tenth of the entries or more: of those held, not of the capacity as
    in the paper, because a pool can run out of slots with fewer entries, and some may be parked.

    Every operation is constant, `pop_victim` amortised: each entry that it passes gives up a hit, or makes its one move
    from small to main.
    """

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self.ghost_capacity = capacity - capacity // SMALL_SHARE
        # Victim end first; entry -> hits, kept up to MAX_HITS.
        self._small: OrderedDict[E, int] = OrderedDict()
        self._main: OrderedDict[E, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()  # fingerprints, oldest first

    def add(self, entry: E) -> None:
        self.remove(entry)
        if entry.fingerprint in self._ghost:
            del self._ghost[entry.fingerprint]
            self._main[entry] = 0
        else:
            self._small[entry] = 0

    def touch(self, entry: E) -> None:
        queue = self._small if entry in self._small else self._main
        hits = queue.get(entry, MAX_HITS)
        if hits < MAX_HITS:
            queue[entry] = hits + 1

    def remove(self, entry: E) -> None:
        if entry in self._small:
            del self._small[entry]
        else:
            self._main.pop(entry, None)

    def pop_victim(self) -> E | None:
        while queue := self._source():
            entry = next(iter(queue))
            try:
                _, hits = queue.popitem(last=False)
                if queue is self._main and hits > 0:
                    self._main[entry] = hits - 1
                elif queue is self._small and hits > 1:
                    self._main[entry] = 0
                else:
                    if queue is self._small:
                        self._remember(entry.fingerprint)
                    return entry
            except MemoryError:  # for the pair, say: it is taken out nevertheless
                self.give_back(entry)
                raise
        return None

    def give_back(self, entry: E) -> None:
        self.remove(entry)
        # It was not evicted after all: a ghost of it would take its next write for a return.
        self._ghost.pop(entry.fingerprint, None)
        queue = self._source()
        queue[entry] = 0
        queue.move_to_end(entry, last=False)

    def clear(self) -> None:
        self._small.clear()
        self._main.clear()
        self._ghost.clear()

    def _source(self) -> OrderedDict[E, int]:
        # Empty only if both queues are; and one entry more in the queue it returns does not change the choice, which is
        # what makes an entry given back the next victim.
        return self._small if len(self._small) * SMALL_SHARE >= len(self) else self._main

    def _remember(self, fingerprint: int) -> None:
        self._ghost[fingerprint] = None
        if len(self._ghost) > self.ghost_capacity:
            self._ghost.popitem(last=False)

    def __contains__(self, entry: object) -> bool:
        return entry in self._small or entry in self._main

    def __iter__(self) -> Iterator[E]:
        return chain(self._small, self._main)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
