"""What a program is: a few operations at once, on a world of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .scheduler import BrokenPromiseError, Scheduler
from .world import World

__all__ = ["A", "B", "C", "D", "Operation", "Program", "must"]

A, B, C, D = range(4)  # keys
Operation = Callable[[Any], object]


@dataclass(frozen=True)
class Program:
    """Operations at once, on a world of their own.

    Attributes:
        setting: of the world.
        before: what happens first, alone.
        tasks: what happens at once.
        after: further checks of this program, before the world's own.
        preemptions: the bound of the search; None: all schedules.
    """

    name: str
    tasks: tuple[Operation, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    before: Operation = lambda world: None
    after: Operation = lambda world: None
    preemptions: int | None = 2
    make: Callable[..., Any] = World

    def __call__(self, scheduler: Scheduler) -> None:
        world = self.make(scheduler, **self.setting)
        self.before(world)
        for task in self.tasks:
            scheduler.spawn(partial(task, world))
        scheduler.run()
        self.after(world)
        world.check()


def must(condition: bool, promise: str) -> None:
    """Raise unless a program's own promise was kept."""
    if not condition:
        raise BrokenPromiseError(promise)
