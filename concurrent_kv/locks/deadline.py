"""`Deadline`: the bound on every wait of one operation, and `Caller`, the task that the operation runs for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from ..errors import WaitTimeoutError

__all__ = ["Caller", "Deadline", "NotOnLoopError", "caller", "lend_place"]


class Caller:
    """The task that an operation runs for.

    Attributes:
        left: set when the task was cancelled: the operation may still fail, but no longer take effect.
        steps_on_loop: where the operation runs on the thread of the task's event loop, which others need too: how many
            steps it may take there, of work that may need any number of them; None in a worker.
    """

    __slots__ = ("left", "steps_on_loop", "waits_on")

    def __init__(self, steps_on_loop: int | None = None) -> None:
        self.left = False
        self.steps_on_loop = steps_on_loop
        self.waits_on: Any = None  # the event that the operation waits for just now

    def leave(self) -> None:
        """Note that the task was cancelled, and end the operation's wait. Takes no lock: finalisers come here."""
        self.left = True
        waits_on = self.waits_on
        if waits_on is not None:
            waits_on.set()


# Entered by a thread that waits while it holds a worker's place, of which there are a bounded number.
lend_place: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar(
    "concurrent_kv_lend_place", default=nullcontext
)
# Of the operation that the current thread runs for a task, if it does.
caller: ContextVar[Caller | None] = ContextVar("concurrent_kv_caller", default=None)


class NotOnLoopError(WaitTimeoutError):
    """An operation on an event loop's own thread came to work that is a worker's; nothing has happened."""


class Deadline:
    """A point in time that bounds every wait of one operation; past at once when its caller has left.

    Attributes:
        seconds: how long it was to be.
        started: when it began, in seconds of the monotonic clock.
        caller: the task that the operation runs for, if it does for one.
    """

    __slots__ = ("_at", "_steps", "caller", "seconds", "started")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self._at = self.started + seconds
        self.caller = caller.get()
        self._steps = 0

    @property
    def cancelled(self) -> bool:
        """Whether the caller has left."""
        return self.caller is not None and self.caller.left

    @property
    def on_loop(self) -> bool:
        """Whether an event loop's own thread is at work."""
        return self.caller is not None and self.caller.steps_on_loop is not None

    def left(self) -> float:
        """Seconds left, never below 0."""
        return 0.0 if self.cancelled else max(0.0, self._at - time.monotonic())

    def check(self, name: str) -> None:
        """Raise `WaitTimeoutError` if the caller has left; called under the shards, before anything takes effect."""
        if self.cancelled:
            raise WaitTimeoutError(f"{name}: the operation was cancelled before it took effect")

    def part(self, seconds: float) -> Deadline:
        """A deadline in `seconds`, if that is sooner: for something that this operation only does on its way."""
        return Deadline(min(seconds, self.left()))

    def wait_on(self, event: Any, at_most: float | None = None) -> bool:
        """Wait for an event, or for the caller to leave; False when the time, or `at_most` seconds, are over.

        Lends the worker's place.
        """
        before = None
        if self.caller is not None:
            # A finaliser's own operation may run in the middle of this one, for the same task.
            before, self.caller.waits_on = self.caller.waits_on, event
        try:
            with lend_place.get()():
                # Looked at after the event was named, so that who leaves from here on sets it.
                left = self.left()
                return bool(event.wait(left if at_most is None else min(left, at_most)))
        finally:
            if self.caller is not None:
                self.caller.waits_on = before

    def leave_loop(self, name: str) -> None:
        """Raise `NotOnLoopError` on an event loop's own thread; called before work that may be long."""
        if self.on_loop:
            raise NotOnLoopError(f"{name}: what has to be done first would hold the event loop")

    def step(self, name: str, number: int = 1) -> None:
        """Note steps of work that may need any number of them; on a loop's thread, too many raise `NotOnLoopError`."""
        self._steps += number
        limit = None if self.caller is None else self.caller.steps_on_loop
        if limit is not None and self._steps > limit:
            self.leave_loop(name)
