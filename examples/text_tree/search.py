"""Sampling, beam search, best-first search and MCTS over a tree of text, whose nodes are steps of a solution.

A node's score is the model's log-probability of its steps, and what the puzzle's rules say of them: `RIGHT_STEP` for
each that is right; a text with a wrong one is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from concurrent_kv.compat.transformers import TextNode, TextTree
from examples.text_tree.puzzle import STEPS, Left, Puzzle, after

WRONG = -math.inf
RIGHT_STEP = 3.0  # about minus the log-probability of one of several good steps, or deep nodes would be the last
SAMPLES = 3  # continuations of a node that best-first search asks for at once
EXPLORATION = 2.0
ALL_SEEN = 0.02  # of a node's probability: when less is left for other continuations, there are none


@dataclass
class State:
    """What a search knows of a node, as its `data`.

    Attributes:
        left: the numbers left; None after a wrong step.
        visits: simulations that went through it.
        value: the sum of what they came to.
        growths, right: how often it was continued, and how often rightly.
    """

    left: Left | None
    visits: int = 0
    value: float = 0.0
    growths: int = 0
    right: int = 0


class Attempt:
    """A tree for one puzzle, and how many of its nodes a search has spent.

    Attributes:
        solved: the node that solves it, once there is one.
        solved_at: how many nodes were spent then.
    """

    def __init__(self, tree: TextTree, puzzle: Puzzle, nodes: int) -> None:
        self.tree, self.puzzle, self.nodes = tree, puzzle, nodes
        self.spent = 0
        self.solved: TextNode | None = None
        self.solved_at: int | None = None
        tree.root.data = State(puzzle.numbers)

    @property
    def is_over(self) -> bool:
        return self.solved is not None or self.spent >= self.nodes

    def step(self, parents: Sequence[TextNode]) -> list[TextNode]:
        """Continue each by a step, as long as nodes are left to spend; every new node is judged."""
        parents = parents[: self.nodes - self.spent]
        if not parents:
            return []
        grown = self.tree.expand(parents)
        for parent, node in zip(parents, grown, strict=True):
            self.spent += 1
            before = parent.data
            before.growths += 1
            left = None if before.left is None else after(before.left, node.text)
            node.data, node.score = State(left), WRONG
            if left == (self.puzzle.target,):
                if self.solved is None:
                    self.solved, self.solved_at = node, self.spent
            elif left is not None and len(left) > 1:
                before.right += 1
                node.score = node.total_logprob + RIGHT_STEP * node.depth
        return grown

    def grow(self, parents: Sequence[TextNode]) -> list[TextNode]:
        """As `step`, but what a parent has among its children already is released; returns those to go on from."""
        fresh, again = list[TextNode](), list[TextNode]()
        for parent, node in zip(parents, self.step(parents), strict=False):
            twins = [child for child in parent.children if child.ids == node.ids]
            (fresh if twins[0] is node else again).append(node)
        if again:
            self.tree.release(again)
        return [node for node in fresh if is_open(node)]


def is_open(node: TextNode) -> bool:
    """Whether a solution may be below it."""
    return node.score > WRONG


def unseen(node: TextNode) -> float:
    """How likely a continuation is that is not among its children."""
    return max(0.0, 1.0 - sum([math.exp(child.logprob) for child in node.children]))


def sampling(attempt: Attempt) -> None:
    """No search: one whole text after the other, each by itself."""
    while not attempt.is_over:
        nodes = attempt.step([attempt.tree.root])
        while nodes and nodes[0].depth < STEPS:
            nodes = attempt.step(nodes)


def beam(attempt: Attempt) -> None:
    """Level by level, each with its share of the nodes; the best ones of a level are continued."""
    nodes = [attempt.tree.root]
    for levels in range(STEPS, 0, -1):
        share = math.ceil((attempt.nodes - attempt.spent) / levels)
        best = sorted(nodes, key=lambda node: node.score, reverse=True)[: math.ceil(share / SAMPLES)]
        if not best or attempt.is_over:
            return
        nodes = attempt.grow([best[number % len(best)] for number in range(share)])


def best_first(attempt: Attempt) -> None:
    """Continue the node of the highest score; what of it was seen already lowers that, and so does what was wrong."""

    def promise(node: TextNode) -> float:
        return node.score + math.log(unseen(node) * (1 + node.data.right) / (1 + node.data.growths))

    frontier = [attempt.tree.root]
    while frontier and not attempt.is_over:
        node = max(frontier, key=promise)
        frontier += attempt.grow([node] * SAMPLES)
        if unseen(node) < ALL_SEEN:
            frontier.remove(node)


def mcts(attempt: Attempt) -> None:
    """PUCT with the model's own probabilities: down to a node that is worth a new child, and from that on to an end."""
    root = attempt.tree.root
    while not attempt.is_over and is_open(root):
        node: TextNode | None = root
        while node is not None:
            last, node = node, _chosen(node)
        if not is_open(last):
            continue
        nodes, depth = [last], last.depth
        while nodes and not attempt.is_over:
            last, nodes = nodes[0], attempt.grow(nodes)
        value = (last.depth - depth) / STEPS  # how far the model came; 1 would be a solution
        for node in last.path:
            node.data.visits += 1
            node.data.value += value


def _chosen(node: TextNode) -> TextNode | None:
    """The child that a simulation goes on to; None if the node shall have a new one, or has no other to offer."""
    state, best = node.data, None
    others = unseen(node)
    open_children = [child for child in node.children if is_open(child)]
    if others < ALL_SEEN and not open_children:
        node.score = WRONG  # all that is below it was tried
        return None
    scale = EXPLORATION * math.sqrt(state.visits + 1)
    most = scale * others / (1 + state.growths) if others >= ALL_SEEN else WRONG
    for child in open_children:
        seen = child.data
        bound = seen.value / max(1, seen.visits) + scale * math.exp(child.logprob) / (1 + seen.visits)
        if bound > most:
            best, most = child, bound
    return best


METHODS: dict[str, Callable[[Attempt], None]] = {
    "sampling": sampling,
    "beam": beam,
    "best-first": best_first,
    "mcts": mcts,
}
