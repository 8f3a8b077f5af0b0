"""`Numbers`: each number given once, to any thread, with a GIL or without one."""

from __future__ import annotations

import os
import threading
from typing import TypeVar

from .gate import gate

__all__ = ["Numbers"]

N = TypeVar("N", bound="Numbers")


class Numbers:
    """Ascending numbers. (`itertools.count` may give one to two threads where there is no GIL.)"""

    __slots__ = ("_lock", "_next")

    def __init__(self, first: int = 0) -> None:
        self._lock = threading.Lock()
        self._next = first

    @classmethod
    def of_process(cls: type[N], first: int = 0) -> N:
        """Numbers that a forked child goes on with: another thread may hold their lock when the process is forked."""
        made = cls(first)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=made._renew)
        return made

    def __next__(self) -> int:
        with gate.lock, self._lock:
            number = self._next
            self._next = number + 1
        return number

    def _renew(self) -> None:
        self._lock = threading.Lock()
