"""A tree searched with PUCT, values normalised to the range seen (Schrittwieser et al. 2020, "MuZero").

Several workers may search one tree: a step that a worker has chosen, and whose evaluation it waits for, counts as a
visit that found the worst (virtual loss: Chaslot et al. 2008, "Parallel Monte-Carlo Tree Search"), so that the next
worker rather chooses another.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import inf, log, sqrt
from typing import NamedTuple

EXPLORATION_INIT = 1.25  # c1
EXPLORATION_BASE = 19_652  # c2, visits


class Evaluation(NamedTuple):
    """What the model says about a node. Of a root, reward and termination mean nothing: no simulated step led there."""

    value: float  # expected discounted return from the node on
    priors: tuple[float, ...]  # of each action
    reward: float = 0.0  # of the step that led to the node
    termination: float = 0.0  # probability that this step ended the episode


class Node:
    """A state of the tree and the step that led to it. Counts as visited once when it is made."""

    __slots__ = (
        "action",
        "awaited",
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
        self.number = number  # 0 is the root; the children of n follow n * actions
        self.parent = parent
        self.action = action  # that led here from the parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.priors = evaluation.priors
        self.children: list[Node | None] = [None] * len(evaluation.priors)
        self.awaited = [0] * len(evaluation.priors)  # by action: simulations that went this way, and are not back
        self.reward = evaluation.reward
        self.continuation = discount * (1.0 - evaluation.termination)  # what a return after the step counts
        self.visits = 0
        self.value_sum = 0.0
        self.q = 0.0  # mean return of the step and what follows it


class Edge(NamedTuple):
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


@lru_cache
def explorations(most: int) -> list[float]:
    """What a step's prior counts at a node, by the node's visits, from none to `most`."""
    return [
        sqrt(visits) * (EXPLORATION_INIT + log((visits + EXPLORATION_BASE + 1) / EXPLORATION_BASE))
        for visits in range(most + 1)
    ]


class Tree:
    """A search tree over one root. Each worker alternates `select` and `expand`; with one, it is deterministic.

    Args:
        root: the evaluation of its root.
        simulations: how many there are in all.
        discount: per step.
    """

    def __init__(self, root: Evaluation, *, simulations: int, discount: float) -> None:
        self._left = simulations
        self._exploration = explorations(simulations + 1)
        self._discount = discount
        self._lowest_q = inf
        self._highest_q = -inf
        self._lock = threading.Lock()  # whoever leads workers on may do so in several threads
        self.root = Node(0, None, -1, root, discount)
        self._back_up(self.root, root.value)

    def select(self) -> Edge | None:
        """Follow the best scores down to a step that has not been tried; None when all simulations have begun.

        Where all that is left waits for another worker's evaluation, that worker's step is chosen once more.
        """
        with self._lock:
            if not self._left:
                return None
            self._left -= 1
            node = self.root
            while True:
                action = self._best_scored(node)
                node.awaited[action] += 1
                child = node.children[action]
                if child is None:
                    return Edge(node, action, node.number * len(node.children) + action + 1)
                node = child

    def expand(self, edge: Edge, evaluation: Evaluation) -> None:
        """Make the step's node, and tell the nodes above it what it is worth."""
        with self._lock:
            node = edge.parent.children[edge.action]
            if node is None:
                node = Node(edge.number, edge.parent, edge.action, evaluation, self._discount)
                edge.parent.children[edge.action] = node
            self._back_up(node, evaluation.value)

    def best_action(self) -> int:
        """The most visited action of the root; of several the one of highest value, then the first."""

        def rank(action: int) -> tuple[int, float]:
            child = self.root.children[action]
            return (0, -inf) if child is None else (child.visits, child.q)

        return max(range(len(self.root.children)), key=rank)

    def _best_scored(self, node: Node) -> int:
        awaited = node.awaited
        exploration = self._exploration[node.visits + sum(awaited)]
        best_action, best_score = 0, -inf
        lowest, value_range = self._lowest_q, self._highest_q - self._lowest_q
        for action, child in enumerate(node.children):
            score, begun = exploration * node.priors[action], awaited[action]
            if child is not None:
                begun += child.visits
                score /= 1 + begun
                if value_range > 0:  # those awaited have found the lowest value of all, which counts 0
                    score += (child.q - lowest) / value_range * (child.visits / begun)
            elif begun:
                score /= 1 + begun
            if score > best_score:
                best_action, best_score = action, score
        return best_action

    def _back_up(self, node: Node, value: float) -> None:
        while True:
            node.visits += 1
            node.value_sum += value
            parent = node.parent
            if parent is None:
                return
            parent.awaited[node.action] -= 1
            node.q = node.reward + node.continuation * node.value_sum / node.visits
            if node.q < self._lowest_q:
                self._lowest_q = node.q
            if node.q > self._highest_q:
                self._highest_q = node.q
            value = node.reward + node.continuation * value
            node = parent
