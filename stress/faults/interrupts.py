"""Asynchronous exceptions: raised at any point of an operation of a worker thread, and by Ctrl-C in the main one."""

from __future__ import annotations

import ctypes

# What a warning imports when it is shown: an import that is cut off leaves CPython's import lock taken.
import linecache  # noqa: F401
import signal
import threading
import tracemalloc  # noqa: F401
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

from stress.faults.errors import Interrupt

__all__ = ["Exposure", "Interrupter", "control_c_interrupts"]

LONGEST_PAUSE_SECONDS = 0.01


class Exposure:
    """The parts of a thread's life in which it may be interrupted, at most once in each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._exposed = False
        self.sent = False  # a SIGINT that has not arrived yet

    def interrupt(self) -> bool:
        """Raise `Interrupt` in the thread, at whatever point it is; False if it may not be interrupted just now."""
        with self._lock:
            if not self._exposed:
                return False
            self._exposed = False
            if self._is_main:
                self.sent = True
                signal.pthread_kill(self._thread, signal.SIGINT)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(Interrupt))
            return True

    def arrived(self) -> bool:
        """Whether one was on its way. In a signal handler: takes no lock."""
        sent, self.sent = self.sent, False
        return sent

    async def expose(self, work: Coroutine[Any, Any, object]) -> None:
        """Run `work`, which may be interrupted."""
        try:
            with self._lock:
                self._exposed = True
            await work
        finally:
            self._cover()

    def _cover(self) -> None:
        try:
            with self._lock:
                self._exposed = False
            for _ in range(200):  # what is on its way arrives at the next jump
                pass
        except Interrupt:
            pass


class Interrupter:
    """Interrupts one exposed thread after the other, until the run is over."""

    def __init__(self, seed: int, count: Callable[[str], None]) -> None:
        self._rng = Random(f"{seed} interrupts")
        self._count = count
        self._exposures: list[Exposure] = []

    def exposure(self) -> Exposure:
        """Of the calling thread."""
        exposure = Exposure()
        self._exposures.append(exposure)
        return exposure

    def sent_to_main(self) -> bool:
        """Whether a SIGINT that has just arrived in the main thread is one of these, and not the user's."""
        return any(exposure.arrived() for exposure in self._exposures)

    def work(self, over: threading.Event) -> None:
        """Until `over`."""
        while not over.wait(self._rng.random() * LONGEST_PAUSE_SECONDS):
            if self._exposures and self._rng.choice(self._exposures).interrupt():
                self._count("interrupt")


@contextmanager
def control_c_interrupts(interrupter: Interrupter, of_user: Callable[[], None]) -> Iterator[None]:
    """In the main thread: a SIGINT that `interrupter` sends is an `Interrupt`; any other calls `of_user`."""

    def handler(number: int, frame: FrameType | None) -> None:
        if interrupter.sent_to_main():
            raise Interrupt
        of_user()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
