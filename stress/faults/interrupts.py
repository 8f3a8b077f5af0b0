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

__all__ = ["SIGNAL", "Exposure", "Interrupter", "control_c_interrupts"]

LONGEST_PAUSE_SECONDS = 0.01
SIGNAL = signal.SIGUSR1  # arrives as SIGINT does, which is left to the person who wants the run to end


class Exposure:
    """The parts of a thread's life in which it may be interrupted, at most once in each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._exposed = False

    def interrupt(self) -> bool:
        """Raise `Interrupt` in the thread, at whatever point it is; False if it may not be interrupted just now."""
        with self._lock:
            if not self._exposed:
                return False
            self._exposed = False
            if self._is_main:
                signal.pthread_kill(self._thread, SIGNAL)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(Interrupt))
            return True

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

    def work(self, over: threading.Event) -> None:
        """Until `over`."""
        while not over.wait(self._rng.random() * LONGEST_PAUSE_SECONDS):
            if self._exposures and self._rng.choice(self._exposures).interrupt():
                self._count("interrupt")


@contextmanager
def control_c_interrupts(pressed: Callable[[], None]) -> Iterator[None]:
    """In the main thread: `SIGNAL` raises `Interrupt`, and a person's Ctrl-C calls `pressed`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    before = signal.signal(SIGNAL, interrupt), signal.signal(signal.SIGINT, lambda number, frame: pressed())
    try:
        yield
    finally:
        signal.signal(SIGNAL, before[0])
        signal.signal(signal.SIGINT, before[1])
