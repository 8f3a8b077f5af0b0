"""Where all actors are brought to a halt together, so that the books can be looked at while nothing is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
import anyio.from_thread
import anyio.lowlevel

__all__ = ["Gate"]


class Gate:
    """Threads and tasks come here between two operations; while it is `shut`, they stay."""

    def __init__(self) -> None:
        self.shut = False
        self._condition = threading.Condition()
        self._inside = 0  # actors that have come and not left for good
        self._parked = 0
        self._wakers: list[Callable[[], object]] = []

    def enter(self) -> None:
        """One more actor."""
        with self._condition:
            self._inside += 1

    def leave(self) -> None:
        """An actor that comes no more."""
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self, seconds: float) -> bool:
        """Shut, and wait until all actors stand still; False if one did not within so many seconds."""
        with self._condition:
            self.shut = True
            return self._condition.wait_for(lambda: self._parked >= self._inside, seconds)

    def open(self) -> None:
        """Let all actors go on."""
        with self._condition:
            self.shut = False
            wakers, self._wakers = self._wakers, []
            self._condition.notify_all()
        for wake in wakers:
            wake()

    def park(self) -> None:
        """A thread's stay."""
        with self._condition:
            self._parked += 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self.shut)
            self._parked -= 1

    async def park_task(self) -> None:
        """A task's."""
        opened = anyio.Event()
        token = anyio.lowlevel.current_token()
        with self._condition:
            if not self.shut:
                return
            self._wakers.append(lambda: anyio.from_thread.run_sync(opened.set, token=token))
            self._parked += 1
            self._condition.notify_all()
        try:
            await opened.wait()
        finally:
            with self._condition:
                self._parked -= 1
