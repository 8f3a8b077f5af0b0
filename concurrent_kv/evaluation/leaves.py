"""What an evaluator is given and what a model answers: `Leaf` and `Evaluated`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeAlias, TypeVar

from ..pool.joint import JointBatch
from ..pool.pool import KVPool
from ..search.search import Search

__all__ = ["NO_PARENT", "Evaluated", "Leaf", "Model", "NoParent", "Walk"]

Inputs = TypeVar("Inputs")
Output = TypeVar("Output")
Result = TypeVar("Result")


class NoParent(Enum):
    """Stands for "no parent", where None is a key like any other."""

    NO_PARENT = "no parent"


NO_PARENT = NoParent.NO_PARENT


@dataclass(frozen=True, eq=False)
class Leaf(Generic[Inputs]):
    """A node to be evaluated.

    Attributes:
        store: where its parent is and it will be: an open search, or a pool, in its default scope.
        parent: its parent's key; with `NO_PARENT`, what the model appends is all that it has.
        child: its own key, under which it is stored.
        inputs: what the model needs to know of it.
        env_id: in a search, the environment in whose init pool its parent may be.
    """

    store: Search | KVPool
    parent: Hashable
    child: Hashable
    inputs: Inputs
    env_id: Hashable = None


@dataclass(frozen=True, eq=False)
class Evaluated(Generic[Output]):
    """What a model says of the leaves of one call.

    Attributes:
        outputs: one for each leaf, in their order.
        sides: side data that is stored with each; none if left out.
        lengths: how many of the appended tokens each leaf has, where some ended early.
    """

    outputs: Sequence[Output]
    sides: Sequence[object] | None = None
    lengths: Sequence[int] | None = None


Walk: TypeAlias = Generator[Leaf[Inputs], Output, Result]
"""A search written as a generator: it yields leaves, is sent the output of each, and returns what it found."""

Model: TypeAlias = Callable[[JointBatch, Sequence[Inputs]], Evaluated[Output]]
