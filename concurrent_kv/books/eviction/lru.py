"""Least recently used."""

from __future__ import annotations

from typing import ClassVar

from .base import E
from .fifo import FIFO


class LRU(FIFO[E]):
    """Evicts the entry written or hit longest ago: FIFO with the age renewed by hits. Every operation is constant."""

    observes_hits: ClassVar[bool] = True

    def touch(self, entry: E) -> None:
        if entry in self._queue or entry in self._back:
            self.add(entry)
