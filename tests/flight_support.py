"""What the tests of flights share: computations that can be held up, and a count of who waits for one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from concurrent_kv import KeysValues
from concurrent_kv.flights.table import Flight, Waker
from tests.support import tokens
from tests.threading_support import JOIN_SECONDS, Gate


class Waiters:
    """How many callers have begun to wait for a flight."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)

    def arrived(self) -> None:
        self._arrived.release()

    def wait_for(self, number: int) -> None:
        for _ in range(number):
            assert self._arrived.acquire(timeout=JOIN_SECONDS), "too few callers came to wait"

    def arrived_now(self) -> bool:
        """As `wait_for(1)`, without waiting; False if there was none."""
        return self._arrived.acquire(blocking=False)


@contextmanager
def counted_waiters() -> Iterator[Waiters]:
    waiters = Waiters()
    subscribe = Flight.subscribe

    def counted(self: Flight, waker: Waker) -> bool:
        computing = subscribe(self, waker)
        waiters.arrived()
        return computing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "subscribe", counted)
        yield waiters


class Computation:
    """A computation that counts its runs and stands at a gate; what it makes says which run it was.

    Its first run makes `tokens(value, 3)`, the next `tokens(value + 1, 3)`; with an `error`, the first raises it.
    """

    def __init__(self, *, opened: bool = False, error: BaseException | None = None, value: int = 1) -> None:
        self.gate = Gate()
        self.runs = 0
        self.error = error
        self.value = value
        self.result: KeysValues | None = None  # what the first run makes instead
        self._lock = threading.Lock()
        if opened:
            self.gate.opened.set()

    def __call__(self) -> KeysValues:
        with self._lock:
            self.runs += 1
            run = self.runs
        self.gate.pass_through()
        if self.error is not None and run == 1:
            raise self.error
        if self.result is not None and run == 1:
            return self.result
        return tokens(self.value + run - 1, 3)
