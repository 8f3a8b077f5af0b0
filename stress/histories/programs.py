"""Random programs of a few short operations on a few keys, for the processes of one history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

__all__ = ["IN_POOLS", "IN_SEARCHES", "Operation", "Shape", "random_programs"]

IN_POOLS = (("put", 5), ("get", 5), ("gather", 4), ("put_many", 3), ("pop", 2), ("clear", 1))
IN_SEARCHES = (("put", 5), ("get", 5), ("gather", 4), ("put_many", 3), ("release", 3), ("clear", 0.5))

ROOMY = 32  # entries: more than all programs of a history could write at once


@dataclass(frozen=True)
class Shape:
    """How large a history is, and whether its pool is too small for its keys.

    (Writes under way count as new entries, also where they will replace one: only a roomy pool never evicts.)
    """

    keys: int = 3
    operations: int = 4  # of each process
    capacity: int = ROOMY
    slow: bool = True  # copies let others go first now and then
    weights: tuple[tuple[str, float], ...] = IN_POOLS  # of each action

    @property
    def evicting(self) -> bool:
        return self.capacity < self.keys


@dataclass(frozen=True)
class Operation:
    """One step of a program; `value` is what a write stores."""

    action: str
    keys: tuple[int, ...]
    value: int = 0


def random_programs(rng: Random, processes: int, shape: Shape) -> list[list[Operation]]:
    """A program for each process; every value is written once."""
    values = iter(range(1, 1 + processes * shape.operations))
    return [[_operation(rng, shape, next(values)) for _ in range(shape.operations)] for _ in range(processes)]


def _operation(rng: Random, shape: Shape, value: int) -> Operation:
    action = rng.choices(*zip(*shape.weights, strict=True))[0]
    keys: Sequence[int] = range(shape.keys)
    if action in ("gather", "put_many"):
        # No more than fit: what never fits is an error, not a history.
        keys = rng.sample(keys, rng.randint(2, min(shape.keys, shape.capacity)))
    elif action != "clear":
        keys = [rng.choice(keys)]
    return Operation(action, tuple(keys), value if action in ("put", "put_many") else 0)
