"""Promises of the main job's parts: its tree, the model of its queue, and what compares."""

from __future__ import annotations

import random
from itertools import pairwise
from math import inf, log, sqrt

import pytest
import torch

from examples.cartpole.job import first_difference_of
from examples.cartpole.queueing import fitted, serial_share, throughput
from examples.cartpole.tree import EXPLORATION_BASE, EXPLORATION_INIT, Edge, Evaluation, Node, Tree, path_to
from examples.cartpole.verify import difference_of

EVEN = (0.5, 0.5)


def selected(tree: Tree) -> Edge:
    edge = tree.select()
    assert edge is not None
    return edge


def grown(values: dict[int, float], *, termination: dict[int, float] | None = None, simulations: int = 20) -> Tree:
    """A tree whose every node is worth what its last action says; one simulation is left."""
    tree = Tree(Evaluation(1.0, EVEN), simulations=simulations + 1, discount=0.9)
    for _ in range(simulations):
        edge = selected(tree)
        ends = (termination or {}).get(edge.action, 0.0)
        tree.expand(edge, Evaluation(values[edge.action], EVEN, reward=1.0, termination=ends))
    return tree


# The tree ------------------------------------------------------------------------------------------------------------


def test_the_better_action_is_visited_more() -> None:
    assert grown({0: 1.0, 1: 5.0}).best_action() == 1
    assert grown({0: 5.0, 1: 1.0}).best_action() == 0


def test_a_return_after_a_probable_end_counts_less() -> None:
    assert grown({0: 5.0, 1: 5.0}, termination={0: 0.9}).best_action() == 1
    tree = grown({0: 5.0, 1: 5.0}, termination={0: 0.9}, simulations=1)
    child = tree.root.children[0]
    assert child is not None
    assert child.q == pytest.approx(1.0 + 0.1 * 0.9 * 5.0)


def test_a_tie_goes_to_the_first_action() -> None:
    assert grown({0: 1.0, 1: 1.0}, simulations=2).best_action() == 0


def test_each_simulation_adds_one_node_and_one_visit_to_each_node_of_its_path() -> None:
    tree = grown({0: 1.0, 1: 2.0}, simulations=15)
    assert tree.root.visits == 16
    assert sum(child.visits for child in tree.root.children if child is not None) == 15


def test_every_node_has_a_number_and_a_path_of_its_own() -> None:
    found: dict[int, list[int]] = {}

    def walk(node: Node) -> None:
        assert node.number not in found
        found[node.number] = path_to(node)
        assert node.depth == len(found[node.number])
        for action, child in enumerate(node.children):
            assert child is None or (child.parent is node and child.action == action)
            if child is not None:
                walk(child)

    walk(grown({0: 1.0, 1: 1.5}, simulations=40).root)
    assert len(found) == 41


# Virtual loss --------------------------------------------------------------------------------------------------------


def test_another_step_is_selected_while_one_is_awaited_and_the_same_where_all_are() -> None:
    tree = Tree(Evaluation(1.0, EVEN), simulations=4, discount=0.9)
    edges = [selected(tree) for _ in range(4)]
    assert [(edge.parent, edge.action) for edge in edges] == [(tree.root, action) for action in (0, 1, 0, 1)]
    assert tree.root.awaited == [2, 2]
    for edge in edges:
        tree.expand(edge, Evaluation(1.0, EVEN))
    assert tree.root.awaited == [0, 0]
    assert tree.root.visits == 5
    assert [child.visits for child in tree.root.children if child is not None] == [2, 2]


def test_a_path_that_is_awaited_counts_as_having_found_the_lowest_value() -> None:
    even = (1 / 3, 1 / 3, 1 / 3)
    tree = Tree(Evaluation(1.0, even), simulations=6, discount=0.9)
    for edge, value in zip([selected(tree) for _ in even], (0.0, 3.0, -10.0), strict=True):
        tree.expand(edge, Evaluation(value, even))  # without that, the best of them would be chosen twice
    edges = [selected(tree), selected(tree)]
    assert [edge.parent.action for edge in edges] == [1, 0]
    for edge in edges:
        tree.expand(edge, Evaluation(3.0, even))
    assert tree.root.awaited == [0, 0, 0]
    assert selected(tree).parent is not tree.root


def test_nothing_is_selected_when_all_simulations_have_begun() -> None:
    tree = Tree(Evaluation(1.0, EVEN), simulations=2, discount=0.9)
    edges = [selected(tree), selected(tree)]
    assert tree.select() is None
    for edge in edges:
        tree.expand(edge, Evaluation(1.0, EVEN))
    assert tree.select() is None
    assert tree.root.visits == 3


class PlainTree(Tree):
    """Knows of no other workers: PUCT as it is written."""

    def _best_scored(self, node: Node) -> int:
        scale = EXPLORATION_INIT + log((node.visits + EXPLORATION_BASE + 1) / EXPLORATION_BASE)
        scores = []
        for prior, child in zip(node.priors, node.children, strict=True):
            visits = 0 if child is None else child.visits
            score = sqrt(node.visits) * scale * prior / (1 + visits)
            if child is not None and self._highest_q > self._lowest_q:
                score += (child.q - self._lowest_q) / (self._highest_q - self._lowest_q)
            scores.append(score)
        return scores.index(max(scores))


def test_a_worker_alone_searches_as_without_virtual_loss() -> None:
    for seed in range(20):
        paths = []
        for kind in (Tree, PlainTree):
            values = random.Random(seed)
            tree = kind(Evaluation(values.uniform(0, 9), (0.3, 0.7)), simulations=60, discount=0.97)
            edges = []
            while (edge := tree.select()) is not None:
                prior = values.random()
                ends = values.choice((0.0, 0.5))
                tree.expand(edge, Evaluation(values.uniform(0, 9), (prior, 1 - prior), 1.0, ends))
                edges.append((*path_to(edge.parent), edge.action))
            paths.append((edges, tree.best_action()))
        assert paths[0] == paths[1]


# The model of the queue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "serial"), [(3.0, 1.0), (0.0, 2.0), (2.0, 0.0), (0.1, 5.0)])
def test_the_throughput_is_that_of_a_closed_queue(own: float, serial: float) -> None:
    both = own + serial
    assert throughput(1, own, serial) == pytest.approx(1 / both)
    assert throughput(2, own, serial) == pytest.approx(2 / (both + serial**2 / both))
    rates = [throughput(workers, own, serial) for workers in range(1, 40)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(rates))
    for workers, rate in enumerate(rates, 1):
        assert rate <= workers / both * (1 + 1e-9)
        assert rate * serial <= 1 + 1e-9
    if serial:
        assert throughput(2000, own, serial) == pytest.approx(1 / serial, rel=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_in_the_queue_is_found_from_what_two_workers_get(share: float) -> None:
    for seconds in (0.01, 4.0):
        rate = throughput(2, seconds * (1 - share), seconds * share)
        assert serial_share(seconds, rate) == pytest.approx(share, abs=1e-6)


def test_a_share_is_between_none_and_all_whatever_was_measured() -> None:
    assert serial_share(1.0, 2.5) == 0.0  # more than twice as fast
    assert serial_share(1.0, 0.5) == 1.0  # slower than one


def test_a_line_is_fitted_by_relative_errors() -> None:
    line = fitted({rows: 0.5 + 0.25 * rows for rows in (1, 2, 4, 8)})
    assert [line.seconds, line.seconds_per_row] == pytest.approx([0.5, 0.25])
    assert line.of(10) == pytest.approx(3.0)

    measured = {1: 1.0, 2: 1.1, 8: 3.0, 32: 8.0}

    def error(seconds: float, per_row: float) -> float:
        return sum(((seconds + per_row * rows) / took - 1) ** 2 for rows, took in measured.items())

    line = fitted(measured)
    best = error(*line)
    for change in (-1e-3, 1e-3):
        assert error(line.seconds + change, line.seconds_per_row) > best
        assert error(line.seconds, line.seconds_per_row + change) > best


# What compares -------------------------------------------------------------------------------------------------------


def test_a_difference_is_found_in_tokens_in_padding_and_where_tokens_are_missing() -> None:
    expected = torch.ones(4, 2, 3, 8)
    padded = torch.cat((torch.zeros(4, 2, 2, 8), expected), dim=2)
    assert difference_of(padded, expected) == 0.0
    for column, wrong in ((0, 0.5), (4, 0.5), (4, float("nan")), (0, float("nan"))):
        row = padded.clone()
        row[3, 1, column, 7] += wrong
        assert difference_of(row, expected) == (0.5 if wrong == 0.5 else inf)
    assert difference_of(padded[:, :, :2], expected) == inf


def test_the_first_difference_of_two_games() -> None:
    assert first_difference_of([0, 1], [0, 1, 1]) is None
    assert first_difference_of([0, 1, 0], [0, 1, 1]) == 2
    assert first_difference_of([0, 1], [0]) == 1
