"""Lowest priority first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import ClassVar

from .base import E, EvictionPolicy

COMPACTION_SLACK = 16  # empty buckets that are never worth a compaction


class Priority(EvictionPolicy[E]):
    """Evicts the entry of lowest priority, the one written first among equals; hits change nothing.

    Entries of one priority share a queue; a heap orders the priorities. With d distinct priorities among the entries,
    the first entry of a priority and the victim after its last one cost O(log d), amortised; all else is constant. With
    a bounded number of priorities, levels say, everything is.

    `give_back` places an entry first among those of its own priority: one of lower priority still goes before it.
    """

    observes_hits: ClassVar[bool] = False

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self._priorities: dict[E, float] = {}  # the priority under which an entry is filed
        self._buckets: dict[float, OrderedDict[E, None]] = {}  # victim end first; a bucket may be empty
        self._heap: list[float] = []  # the keys of _buckets, each once

    def add(self, entry: E) -> None:
        self._file(entry)

    def touch(self, entry: E) -> None:
        pass

    def remove(self, entry: E) -> None:
        if entry in self._priorities:
            self._compact()  # first: it needs memory
            self._drop(entry)

    def _drop(self, entry: E) -> None:
        del self._buckets[self._priorities[entry]][entry]
        del self._priorities[entry]

    def pop_victim(self) -> E | None:
        if not self._priorities:
            return None
        while not (bucket := self._buckets[self._heap[0]]):
            del self._buckets[heappop(self._heap)]
        entry = next(iter(bucket))  # no `popitem`, which loses the entry where there is no memory for a pair
        self._compact()  # first: it needs memory
        self._drop(entry)
        return entry

    def give_back(self, entry: E) -> None:
        self._file(entry).move_to_end(entry, last=False)

    def clear(self) -> None:
        self._priorities.clear()
        self._buckets.clear()
        self._heap.clear()

    def _file(self, entry: E) -> OrderedDict[E, None]:
        self.remove(entry)
        priority = entry.priority
        if priority not in self._buckets:
            self._buckets[priority] = OrderedDict()
            try:
                heappush(self._heap, priority)
            except MemoryError:
                del self._buckets[priority]
                raise
        bucket = self._buckets[priority]
        bucket[entry] = None
        try:
            self._priorities[entry] = priority
        except MemoryError:
            del bucket[entry]
            raise
        return bucket

    def _compact(self) -> None:
        # Empty buckets leave with a victim that comes after them. Where none does (priorities that only fall, entries
        # that are only removed) they would pile up for ever. Waiting until they outnumber the entries makes the cost
        # constant, amortised.
        if len(self._heap) > 2 * len(self._priorities) + COMPACTION_SLACK:
            buckets = {priority: bucket for priority, bucket in self._buckets.items() if bucket}
            heap = list(buckets)
            heapify(heap)
            self._buckets, self._heap = buckets, heap

    def in_order(self) -> list[E]:
        return [entry for priority in sorted(self._buckets) for entry in self._buckets[priority]]

    def __contains__(self, entry: object) -> bool:
        return entry in self._priorities

    def __iter__(self) -> Iterator[E]:
        return iter(self._priorities)

    def __len__(self) -> int:
        return len(self._priorities)
