"""Who takes the next step: hosts and streams of very different speeds, drawn anew for every execution."""

from __future__ import annotations

import random
from itertools import accumulate, cycle, islice

from tests.explorer.scheduler import Task

__all__ = ["DrawnLag", "RandomLag"]

SPEEDS = (0.01, 0.1, 1.0, 10.0)
GOES_ON = 4.0  # times as likely as its speed says, for the one that runs now


class RandomLag:
    """At random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._speeds: dict[str, float] = {}

    def choose(self, options: list[Task], running_on: bool) -> Task:
        weights = [self._speed(task) for task in options]
        if running_on:
            weights[0] *= GOES_ON
        return self._pick(options, weights)

    def _speed(self, task: Task) -> float:
        if task.letter not in self._speeds:
            self._speeds[task.letter] = self._draw_speed()
        return self._speeds[task.letter]

    def _draw_speed(self) -> float:
        return self._random.choice(SPEEDS)

    def _pick(self, options: list[Task], weights: list[float]) -> Task:
        return self._random.choices(options, weights)[0]


class DrawnLag(RandomLag):
    """As drawn by hypothesis: `choices` are used up one by one, and then used again."""

    def __init__(self, choices: bytes) -> None:
        super().__init__(0)
        self._choices = cycle(choices or b"\\x00")

    def _draw_speed(self) -> float:
        return SPEEDS[next(self._choices) % len(SPEEDS)]

    def _pick(self, options: list[Task], weights: list[float]) -> Task:
        bounds = list(accumulate(weights))
        drawn = next(self._choices) / 256 * bounds[-1]
        return next(islice((task for task, bound in zip(options, bounds, strict=True) if drawn < bound), 1))
