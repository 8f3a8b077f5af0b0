"""First in, first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import ClassVar

from .base import E, EvictionPolicy


class FIFO(EvictionPolicy[E]):
    """Evicts the entry written longest ago; hits change nothing. Every operation is constant.

    Age is the age of the last write: replacing a key makes it the youngest.
    """

    observes_hits: ClassVar[bool] = False

    def __init__(self, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        # Victim end first. Not a plain dict: finding its first key skips every key deleted before it, so a queue in one
        # costs as much per victim as there were victims.
        self._queue: OrderedDict[E, None] = OrderedDict()

    def add(self, entry: E) -> None:
        self._queue[entry] = None
        self._queue.move_to_end(entry)

    def touch(self, entry: E) -> None:
        pass

    def remove(self, entry: E) -> None:
        self._queue.pop(entry, None)

    def pop_victim(self) -> E | None:
        return self._queue.popitem(last=False)[0] if self._queue else None

    def give_back(self, entry: E) -> None:
        self._queue[entry] = None
        self._queue.move_to_end(entry, last=False)

    def clear(self) -> None:
        self._queue.clear()

    def __contains__(self, entry: object) -> bool:
        return entry in self._queue

    def __iter__(self) -> Iterator[E]:
        return iter(self._queue)

    def __len__(self) -> int:
        return len(self._queue)
