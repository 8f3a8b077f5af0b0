"""A tree searched with PUCT, values normalised to the range seen (Schrittwieser et al. 2020, "MuZero")."""

from __future__ import annotations

from math import inf, log, sqrt
from typing import NamedTuple

from examples.cartpole.evaluation import Evaluation

EXPLORATION_INIT = 1.25  # c1
EXPLORATION_BASE = 19_652  # c2, visits


class Node:
    """A state of the tree and the step that led to it. Counts as visited once when it is made."""

    __slots__ = (
        "action",
        "children",
        "continuation",
        "depth",
        "number",
        "parent",
        "priors",
        "q",
        "reward",
        "value_sum",
        "visits",
    )

    def __init__(self, number: int, parent: Node | None, action: int, evaluation: Evaluation, discount: float) -> None:
        self.number = number  # in order of expansion; 0 is the root
        self.parent = parent
        self.action = action  # that led here from the parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.priors = evaluation.priors
        self.children: list[Node | None] = [None] * len(evaluation.priors)
        self.reward = evaluation.reward
        self.continuation = discount * (1.0 - evaluation.termination)  # what a return after the step counts
        self.visits = 0
        self.value_sum = 0.0
        self.q = 0.0  # mean return of the step and what follows it


class Leaf(NamedTuple):
    """A step from a node that has not been tried yet."""

    parent: Node
    action: int
    number: int  # of the node that it makes


def path_to(node: Node) -> list[int]:
    """The actions that lead from the root to `node`."""
    actions = []
    while node.parent is not None:
        actions.append(node.action)
        node = node.parent
    return actions[::-1]


class Tree:
    """A search tree over one root. Alternates `select` and `expand`; deterministic."""

    def __init__(self, root: Evaluation, discount: float) -> None:
        self._discount = discount
        self._size = 1  # nodes
        self._lowest_q = inf
        self._highest_q = -inf
        self.root = Node(0, None, -1, root, discount)
        self._back_up(self.root, root.value)

    def select(self) -> Leaf:
        """Follow the best scores down to a step that has not been tried."""
        node = self.root
        while True:
            action = self._best_scored(node)
            child = node.children[action]
            if child is None:
                return Leaf(node, action, self._size)
            node = child

    def expand(self, leaf: Leaf, evaluation: Evaluation) -> None:
        """Make the leaf a node, and tell the nodes above it what it is worth."""
        node = Node(leaf.number, leaf.parent, leaf.action, evaluation, self._discount)
        leaf.parent.children[leaf.action] = node
        self._size += 1
        self._back_up(node, evaluation.value)

    def best_action(self) -> int:
        """The most visited action of the root; of several the one of highest value, then the first."""

        def rank(action: int) -> tuple[int, float]:
            child = self.root.children[action]
            return (0, -inf) if child is None else (child.visits, child.q)

        return max(range(len(self.root.children)), key=rank)

    def _best_scored(self, node: Node) -> int:
        visits = node.visits
        exploration = sqrt(visits) * (EXPLORATION_INIT + log((visits + EXPLORATION_BASE + 1) / EXPLORATION_BASE))
        best_action, best_score = 0, -inf
        lowest, value_range = self._lowest_q, self._highest_q - self._lowest_q
        for action, child in enumerate(node.children):
            score = exploration * node.priors[action]
            if child is not None:
                score /= 1 + child.visits
                if value_range > 0:
                    score += (child.q - lowest) / value_range
            if score > best_score:
                best_action, best_score = action, score
        return best_action

    def _back_up(self, node: Node, value: float) -> None:
        while True:
            node.visits += 1
            node.value_sum += value
            if node.parent is None:
                return
            node.q = node.reward + node.continuation * node.value_sum / node.visits
            self._lowest_q = min(self._lowest_q, node.q)
            self._highest_q = max(self._highest_q, node.q)
            value = node.reward + node.continuation * value
            node = node.parent
