"""One execution: tasks as greenlets, and whose turn it is at every step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import greenlet  # type: ignore[import-untyped]

from concurrent_kv.locks.gate import gate

__all__ = ["BrokenPromiseError", "Chooser", "DeadlockError", "LivelockError", "Scheduler", "Task"]

MAX_STEPS = 2000  # of one execution: beyond it somebody spins


class BrokenPromiseError(AssertionError):
    """A promise was broken in one execution."""


class DeadlockError(BrokenPromiseError):
    """Nobody can take a step."""


class LivelockError(BrokenPromiseError):
    """An execution does not end."""


class Chooser(Protocol):
    """Decides who takes the next step."""

    def choose(self, options: list[Task], running_on: bool) -> Task:
        """One of `options`; the first is the task that runs now if it can go on (`running_on`)."""


def _always() -> bool:
    return True


class Task:
    """An operation under way: where it stands, and what it needs for its next step.

    Nobody waits for the end of an `endless` one.
    """

    def __init__(self, letter: str, body: Callable[[], object], *, endless: bool = False) -> None:
        self.letter = letter
        self.body = body
        self.endless = endless
        self.what = "starts"
        self.ready: Callable[[], bool] = _always
        self.expires = False
        self.expired = False
        self.done = False
        self.error: BaseException | None = None
        self.greenlet: Any = None
        self.gate_lock: Any = threading.RLock()  # tasks stand for threads, each of which has a gate of its own

    def __repr__(self) -> str:
        return f"{self.letter} ({self.what})"


class Scheduler:
    """Runs tasks one step at a time.

    Outside of tasks (while a program is set up, and when it is checked) steps pass without a choice.

    Attributes:
        running: the task whose step it is; None outside of tasks.
        schedule: the letters of the tasks, one for each step taken.
        trace: what each step did.
        watch: called before every step; raises a `BrokenPromiseError` if something that must always hold does not.
    """

    def __init__(self, chooser: Chooser) -> None:
        self.running: Task | None = None
        self.schedule: list[str] = []
        self.trace: list[str] = []
        self.watch: Callable[[], None] = lambda: None
        self._chooser = chooser
        self._tasks: list[Task] = []
        self._hub: Any = None
        self._failure: BaseException | None = None
        self._over = False

    @property
    def now(self) -> int:
        """Steps taken so far."""
        return len(self.schedule)

    def spawn(self, body: Callable[[], object]) -> None:
        """Add a task; it starts at a step of its own."""
        number = sum(not task.endless for task in self._tasks)
        self._add(Task("ABCDEFGH"[number], body))

    def spawn_endless(self, letter: str, body: Callable[[], object]) -> None:
        """Add a task that may go on when all the others have ended: it is then left where it stands."""
        self._add(Task(letter, body, endless=True))

    def _add(self, task: Task) -> None:
        task.greenlet = greenlet.greenlet(lambda: self._run_task(task))
        self._tasks.append(task)

    def run(self) -> None:
        """Run every task to its end.

        Raises:
            BrokenPromiseError: a deadlock, a livelock, or what `watch` found.
            Exception: what a task raised.
        """
        self._hub = greenlet.getcurrent()
        outside = gate.lock
        try:
            while self._failure is None and (task := self._next(None)) is not None:
                self._switch_to(task)
        finally:
            self.running = None
            gate.lock = outside
            self._unwind()
        if self._failure is not None:
            raise self._failure

    def step(self, what: str, ready: Callable[[], bool] = _always, *, expires: bool = False) -> bool:
        """Let others go first, as chosen; returns when `ready()` and chosen, or False when the wait expired.

        Args:
            what: the step, as a failing schedule will show it.
            ready: whether it can be taken now; without side effects.
            expires: whether it is a wait with a deadline.
        """
        task = self.running
        if task is None or self._over:
            if not self._over and not ready():
                raise DeadlockError(f"outside of tasks: {what} would wait for ever")
            return True
        task.what, task.ready, task.expires, task.expired = what, ready, expires, False
        chosen: Task | None = None
        try:
            self.watch()
            chosen = self._next(task)
        except BaseException as failure:
            self._failure = failure
        if chosen is not task:
            if chosen is None:
                self._hub.switch()
            else:
                self._switch_to(chosen)
        return not task.expired

    def _switch_to(self, task: Task) -> None:
        self.running = task
        gate.lock = task.gate_lock
        task.greenlet.switch()

    def _run_task(self, task: Task) -> None:
        try:
            task.body()
        except greenlet.GreenletExit:
            pass
        except BaseException as error:
            if not self._over:
                self._failure = error
        finally:
            task.done = True

    def _next(self, current: Task | None) -> Task | None:
        """Whose step is next; None when all are done."""
        if len(self.schedule) >= MAX_STEPS:
            raise LivelockError(f"not over after {MAX_STEPS} steps: {self._tasks}")
        waiting = [task for task in self._tasks if not task.done]
        if all(task.endless for task in waiting):
            return None
        running_on = current is not None and current.ready()
        options = [task for task in waiting if task is not current and task.ready()]
        if current is not None and running_on:
            options.insert(0, current)
        if not options:
            options = [task for task in waiting if task.expires]
            if not options:
                raise DeadlockError(f"nobody can take a step: {waiting}")
            chosen = self._chooser.choose(options, False)
            chosen.expired = True
            chosen.what += ", in vain"
        else:
            chosen = options[0] if len(options) == 1 else self._chooser.choose(options, running_on)
        self.schedule.append(chosen.letter)
        self.trace.append(f"{chosen.letter}: {chosen.what}")
        return chosen

    def _unwind(self) -> None:
        """End what did not finish, without further choices."""
        self._over = True
        for task in self._tasks:
            if not task.done and task.greenlet:
                task.greenlet.throw(greenlet.GreenletExit)
            task.greenlet = None
