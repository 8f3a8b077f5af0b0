"""Which executions to look at: all up to a number of preemptions, random ones, or one again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .scheduler import BrokenPromiseError, Chooser, Scheduler, Task

__all__ = ["Explored", "Failure", "Run", "execute", "explore", "replay", "sample"]

Run = Callable[[Scheduler], None]
"""Sets a program up on a scheduler, runs it, and raises if a promise was broken."""


@dataclass(frozen=True)
class Failure:
    """An execution that broke a promise; `schedule` runs it again."""

    schedule: str
    trace: tuple[str, ...]
    error: BaseException

    def __str__(self) -> str:
        steps = "\n".join(f"    {step}" for step in self.trace)
        return f"{type(self.error).__name__}: {self.error}\n  schedule {self.schedule!r}:\n{steps}"


@dataclass(frozen=True)
class Explored:
    """How many executions were looked at, and the first that failed."""

    schedules: int
    failure: Failure | None = None


class _DepthFirst:
    """Every sequence of choices with at most `bound` preemptions (all of them without a bound), one after another."""

    def __init__(self, bound: int | None) -> None:
        self._bound = bound
        self._path: list[tuple[int, int]] = []  # (taken, options) at each point that had a choice
        self._depth = 0
        self._preemptions = 0

    def begin(self) -> None:
        self._depth = self._preemptions = 0

    def choose(self, options: list[Task], running_on: bool) -> Task:
        if running_on and self._preemptions == self._bound:
            return options[0]
        if self._depth == len(self._path):
            self._path.append((0, len(options)))
        taken, known = self._path[self._depth]
        assert known == len(options), "the program is not deterministic: the same choices led elsewhere"
        self._depth += 1
        self._preemptions += running_on and taken > 0
        return options[taken]

    def advance(self) -> bool:
        """On to the next sequence; False when there is none."""
        del self._path[self._depth :]
        while self._path:
            taken, options = self._path.pop()
            if taken + 1 < options:
                self._path.append((taken + 1, options))
                return True
        return False


class _Random:
    """Goes on with the running task mostly, and elsewhere at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, options: list[Task], running_on: bool) -> Task:
        if running_on and self._random.random() < 0.6:
            return options[0]
        return self._random.choice(options)


class _Replayed:
    """The choices of a schedule; after its end, whoever comes first."""

    def __init__(self, schedule: str, scheduler: Callable[[], Scheduler]) -> None:
        self._schedule = schedule
        self._scheduler = scheduler

    def choose(self, options: list[Task], running_on: bool) -> Task:
        now = self._scheduler().now
        letter = self._schedule[now] if now < len(self._schedule) else options[0].letter
        return next((task for task in options if task.letter == letter), options[0])


def execute(run: Run, chooser: Chooser) -> Failure | None:
    """Run one schedule; the promise that it broke, if it did."""
    scheduler = Scheduler(chooser)
    try:
        run(scheduler)
    except Exception as error:
        error.__traceback__ = None  # it would keep the execution's frames alive
        return Failure("".join(scheduler.schedule), tuple(scheduler.trace), error)
    return None


def explore(run: Run, *, preemptions: int | None, limit: int = 1_000_000) -> Explored:
    """Look at every schedule with at most `preemptions` preemptions (None: every schedule there is).

    A failure is looked for again with fewer preemptions, so that the one returned has as few as possible.

    Raises:
        BrokenPromiseError: there are more than `limit` schedules; the promise was not checked for all of them.
    """
    order = _DepthFirst(preemptions)
    schedules = 0
    more = True
    while more:
        if schedules == limit:
            raise BrokenPromiseError(f"more than {limit} schedules")
        order.begin()
        failure = execute(run, order)
        schedules += 1
        if failure is not None:
            return Explored(schedules, _with_fewer_preemptions(run, failure, preemptions))
        more = order.advance()
    return Explored(schedules)


def _with_fewer_preemptions(run: Run, failure: Failure, preemptions: int | None) -> Failure:
    for bound in range(2 if preemptions is None else preemptions):
        simpler = explore(run, preemptions=bound).failure
        if simpler is not None:
            return simpler
    return failure


def sample(run: Run, *, schedules: int, seed: int, chooser: Callable[[int], Chooser] = _Random) -> Explored:
    """Look at `schedules` random schedules, the same ones for the same seed, as `chooser(seed)` chooses."""
    for number in range(schedules):
        failure = execute(run, chooser(seed * 1_000_003 + number))
        if failure is not None:
            return Explored(number + 1, failure)
    return Explored(schedules)


def replay(run: Run, schedule: str) -> Failure | None:
    """Run one schedule again, as a failure printed it."""
    scheduler: list[Scheduler] = []

    def remember(made: Scheduler) -> None:
        scheduler.append(made)
        run(made)

    return execute(remember, _Replayed(schedule, lambda: scheduler[0]))
