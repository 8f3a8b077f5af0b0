"""One thread's search of several trees together: select a leaf in each, evaluate the leaves at once, back up."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.tree import Leaf, Tree


class Round(Protocol):
    """Evaluates the leaves of the trees of one planning round. One thread uses it."""

    def leaves(self, leaves: Sequence[tuple[Episode, Leaf]]) -> list[Evaluation]:
        """Evaluate leaves of different trees, in one call of the model."""
        ...


class Evaluator(Protocol):
    """Opens rounds; several threads may at the same time, for different episodes."""

    def open_round(self, episodes: Sequence[Episode]) -> AbstractContextManager[Round]:
        """A round over these episodes; what it holds is released when it is left."""
        ...


class Planner:
    """Chooses actions. Holds no state between calls, so that threads may share it.

    Args:
        evaluator: where values and priors come from.
        simulations: of each tree.
        discount: per step.
        leaf_batch: leaves evaluated together, at most; all trees' if None. With 1, an action depends on nothing but
            its own episode: the model rounds differently in batches of different sizes.
    """

    def __init__(self, evaluator: Evaluator, *, simulations: int, discount: float, leaf_batch: int | None) -> None:
        self._evaluator = evaluator
        self._simulations = simulations
        self._discount = discount
        self._leaf_batch = leaf_batch

    def plan(self, episodes: Sequence[Episode], roots: Sequence[Evaluation]) -> list[int]:
        """The next action of each episode; `roots` are the evaluations of their newest observations."""
        size = self._leaf_batch or len(episodes)
        groups = [range(start, min(start + size, len(episodes))) for start in range(0, len(episodes), size)]
        with torch.inference_mode(), self._evaluator.open_round(episodes) as evaluate:
            trees = [Tree(root, self._discount) for root in roots]
            for _ in range(self._simulations):
                for group in groups:
                    leaves = [(episodes[i], trees[i].select()) for i in group]
                    evaluations = evaluate.leaves(leaves)
                    for i, (_, leaf), evaluation in zip(group, leaves, evaluations, strict=True):
                        trees[i].expand(leaf, evaluation)
        return [tree.best_action() for tree in trees]
