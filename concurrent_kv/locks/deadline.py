"""`Deadline`: the bound on every wait of one operation, and `Caller`, the task that the operation runs for.

A task makes its operation in one attempt or in several. One that comes to a wait for room does not wait: it raises
`WaitElsewhere`, the task waits without a thread, and makes another attempt when something was released.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from ..errors import KVCacheError, WaitTimeoutError

__all__ = ["Caller", "Deadline", "NotOnLoopError", "TaskTime", "WaitElsewhere", "caller", "lend_place"]


class Caller:
    """The task that an operation runs for.

    Attributes:
        left: set when the task was cancelled: the operation may still fail, but no longer take effect.
        steps_on_loop: where the operation runs on the thread of the task's event loop, which others need too: how many
            steps it may take there, of work that may need any number of them; None in a worker.
        seconds_on_loop: and how long an attempt may wait there.
    """

    __slots__ = ("left", "seconds_on_loop", "steps_on_loop", "waits_on")

    def __init__(self, steps_on_loop: int | None = None, seconds_on_loop: float | None = None) -> None:
        self.left = False
        self.steps_on_loop = steps_on_loop
        self.seconds_on_loop = seconds_on_loop
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


class WaitElsewhere(KVCacheError):  # noqa: N818  # no error: its task catches it
    """An attempt came to a wait that is its task's; nothing has happened.

    Attributes:
        queued: what is left of the attempt in the pool: its turn, and what wakes it.
    """

    def __init__(self, message: str, queued: Any = None) -> None:
        super().__init__(message)
        self.queued = queued


class TaskTime(float):
    """The seconds that a task's operation may wait in all its attempts. Given to the operation as its `timeout`.

    That is how the one operation is known whose waits for room its task takes over: what else runs in the same thread
    for the same task, finalisers and keys, has seconds of its own, and nobody who would make it once more.

    Attributes:
        began: when the first attempt began that came to wait for room; the seconds count from there.
        queued: what the last attempt left in its pool, for the next one, or for the task to take away.
        short: entries and slots that an attempt found missing only when it was about to publish, if one did.
        generation: that the first attempt's write was for.
        loop_ended: says whether the task's event loop has ended, with the task in the air; None where none ever does.
    """

    began: float | None = None
    queued: Any = None
    short: tuple[int, int] | None = None
    generation: Any = None
    loop_ended: Callable[[], bool] | None = None

    def left(self) -> float:
        """Seconds left, never below 0."""
        return float(self) if self.began is None else max(0.0, self.began + self - time.monotonic())


class Deadline:
    """A point in time that bounds every wait of one operation; past at once when its caller has left.

    Attributes:
        seconds: how long it was to be.
        started: when it began, in seconds of the monotonic clock.
        caller: the task that the operation runs for, if it does for one.
        task_time: that task's, where it can take over a wait.
    """

    __slots__ = ("_at", "_steps", "caller", "seconds", "started", "task_time")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = time.monotonic()
        self._at = self.started + seconds
        self.caller = caller.get()
        self.task_time: TaskTime | None = None
        self._steps = 0
        if self.caller is not None and type(seconds) is TaskTime:
            self._begin_attempt(seconds, self.caller.seconds_on_loop)

    def _begin_attempt(self, task_time: TaskTime, at_most: float | None) -> None:
        self.task_time, now = task_time, self.started
        self.seconds = float(task_time)  # which messages keep, and a task's time keeps those
        if task_time.began is not None:
            self.started = task_time.began
            self._at = self.started + self.seconds
        if at_most is not None:
            self._at = min(self._at, now + at_most)

    @property
    def hands_over(self) -> bool:
        """Whether its task waits for room in its stead. Not where the time is over: this attempt then says so."""
        return self.task_time is not None and not self.cancelled and time.monotonic() < self.started + self.seconds

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

    def extend(self, seconds: float) -> None:
        """Allow for work of so many seconds that was no wait: a copy from a disk, say."""
        self._at += seconds

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
