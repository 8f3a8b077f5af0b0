"""Promises of the searches over the cache: leaves of all trees together, roots, several workers of a tree, groups."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest

from concurrent_kv import KVPool, Search
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.evaluation import Evaluated, JointBatch
from examples.cartpole.episode import Asked
from examples.cartpole.job import JobSettings, run_job
from examples.cartpole.model import WorldModel, load_model
from examples.cartpole.replay import ReplayingEvaluator
from examples.cartpole.search import TreeSearch
from examples.cartpole.steps import Steps
from examples.cartpole.tree import Evaluation, Node, Tree
from examples.cartpole.verify import Verifier
from examples.cartpole.workers import in_threads
from tests.cartpole_support import (
    ROWS_OF_SHORT,
    SHORT,
    Player,
    assert_close,
    both_backends,
    one_torch_thread,
    threads_and_loop,
)
from tests.support import HANG_SECONDS


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_model()


# Leaves together -----------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("threads", [1, 0])
def test_a_simulation_of_all_trees_is_one_gather_one_call_of_the_model_and_one_commit(
    model: WorldModel, threads: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def count(owner: type, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            calls.append(what)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(SlotTensor, "gather_together", "gather")
    count(Steps, "recurrent", "model")
    count(Steps, "step", "model of roots")
    count(Search, "commit", "commit")
    count(KVPool, "commit", "commit of a root")
    settings = replace(SHORT, episodes=4, max_steps=2, threads=threads)
    report = run_job(model, JobSettings(settings, backend=backend))
    simulation = ["gather", "model", "commit"]
    roots = ["gather", "model of roots", *["commit of a root"] * 4]
    assert calls == [*simulation * 8, *roots, *simulation * 8]
    assert report.main.calls.rows_of_calls == {4: 2 * 8 + 1}


@threads_and_loop
@pytest.mark.parametrize("most", [1, 3])
def test_a_call_has_no_more_rows_than_allowed(model: WorldModel, threads: int, most: int) -> None:
    calls = run_job(model, JobSettings(replace(SHORT, threads=threads, max_rows=most))).main.calls
    assert max(calls.rows_of_calls) == most
    assert calls.rows == ROWS_OF_SHORT


# Roots ---------------------------------------------------------------------------------------------------------------


def test_roots_that_were_cleared_are_rebuilt_from_their_history(model: WorldModel) -> None:
    chosen = []
    for clearing in (False, True):
        verifier = Verifier(model)
        player = Player(model, envs=3, simulations=6, max_rows=1, check=verifier.check)
        actions = []
        for step in range(8):
            actions.append(player.act())
            if clearing and step in (0, 4, 5):
                player.manager.clear_init_caches()
        chosen.append(actions)
        assert player.manager.get_stats_summary().total.miss_count == (9 if clearing else 0)
        assert verifier.verification.rows == player.evaluator.stats().rows
        assert verifier.verification.mismatches == 0
        player.end()
    assert chosen[0] == chosen[1]


def test_roots_share_the_slots_of_the_history_they_have_in_common(model: WorldModel) -> None:
    player = Player(model, envs=1, simulations=2)
    for _ in range(10):
        player.act()
    stats = player.manager.get_stats_summary()
    assert stats.pools["init[0]"].entries == 10
    assert stats.pools["init[0]"].slots_in_use == 1 + 2 * 9
    player.end()


def test_replayed_and_cached_leaves_of_trees_together_agree(model: WorldModel) -> None:
    """Trees of different ages: paths of different lengths, at and before the window's end."""
    replaying = ReplayingEvaluator(model)
    kinds: set[tuple[bool, ...]] = set()

    class Compared(TreeSearch):
        def _evaluate(self, batch: JointBatch, asked: Sequence[Asked]) -> Evaluated[Evaluation]:
            evaluated = super()._evaluate(batch, asked)
            roots = [each.edge is None for each in asked]
            kinds.add(tuple(roots))
            assert_close(evaluated.outputs, replaying.evaluate(asked), roots=roots)
            return evaluated

    player = Player(model, envs=3, simulations=25, kind=Compared)
    for count in (1, 2, 3, 3):
        player.act(count)
    assert {(False, False, False), (True, False), (True, True, False), (True, True, True)} & kinds
    assert any(len(set(kind)) == 2 for kind in kinds), "no call had leaves of both kinds"
    assert player.evaluator.stats().rows == (1 + 2 + 3 + 3) * 25 + 6
    player.end()


# Several workers of a tree, groups ------------------------------------------------------------------------------------


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> list[Tree]:
    """Every tree whose search has ended."""
    found: list[Tree] = []
    best_action = Tree.best_action

    def noted(tree: Tree) -> int:
        found.append(tree)
        return best_action(tree)

    monkeypatch.setattr(Tree, "best_action", noted)
    return found


def nodes_below(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        if child is not None:
            yield from nodes_below(child)


@threads_and_loop
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_of_a_tree_do_all_its_simulations_on_rows_that_are_right(
    model: WorldModel, workers: int, threads: int, trees: list[Tree]
) -> None:
    settings = replace(SHORT, workers_per_tree=workers, threads=threads)
    report = run_job(model, JobSettings(settings, verify=True))
    assert report.failures() == []
    assert report.main.verification is not None
    assert report.main.verification.rows == ROWS_OF_SHORT == report.main.calls.rows
    assert report.main.calls.failed_rows == 0
    assert [tree.root.visits for tree in trees] == [8 + 1] * 35
    assert not any(sum(node.awaited) for tree in trees for node in nodes_below(tree.root))


@threads_and_loop
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_search_lets_go_of_its_tree_when_it_has_chosen(model: WorldModel, workers: int, threads: int) -> None:
    verifier = Verifier(model)
    player = Player(model, envs=3, simulations=9, workers=workers, threads=threads, check=verifier.check)
    for _ in range(4):
        player.act()
        assert player.search._search.held == 0
        assert player.manager.get_stats_summary().pools["recur"].entries == 0
    assert verifier.verification.mismatches == 0
    assert verifier.verification.rows == 3 * (4 * 9 + 3)
    player.end()


def test_workers_of_a_tree_have_their_leaves_evaluated_together(model: WorldModel) -> None:
    settings = replace(SHORT, envs=1, episodes=1, max_steps=1, threads=0, workers_per_tree=4)
    report = run_job(model, JobSettings(settings))
    assert report.main.calls.rows_of_calls == {4: 2}


def test_a_tree_stays_while_threads_search_it_whose_task_was_cancelled(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    player = Player(model, envs=1, simulations=25, workers=2)
    entered, go_on = threading.Event(), threading.Event()
    recurrent, calls = Steps.recurrent, iter(range(10**9))

    def held(*arguments: Any) -> Any:
        if next(calls) == 6:  # some nodes are there
            entered.set()
            assert go_on.wait(HANG_SECONDS)
        return recurrent(*arguments)

    async def cancel() -> None:
        # The thread's walks end after this, without an error, which would be raised here.
        async with in_threads([player.evaluator.worker], walks_per_thread=2) as run:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(player.search.decide, player.episodes[0], run)
                await anyio.to_thread.run_sync(entered.wait, HANG_SECONDS)
                before = player.search._search.keys()
                tasks.cancel_scope.cancel()
            after = player.search._search.keys()
            go_on.set()
            assert before == after != []

    monkeypatch.setattr(Steps, "recurrent", held)
    anyio.run(cancel)
    assert player.evaluator.stats().rows == 25
    assert player.evaluator.stats().failed_rows == 0
    player.search.close()
    player.end()


@pytest.mark.parametrize("threads", [2, 3])
def test_groups_play_and_every_row_of_theirs_is_right(model: WorldModel, threads: int, trees: list[Tree]) -> None:
    settings = replace(SHORT, groups=2, threads=threads, max_rows=2, workers_per_tree=2)
    report = run_job(model, JobSettings(settings, verify=True))
    assert report.failures() == []
    assert report.main.verification is not None
    assert report.main.verification.rows == ROWS_OF_SHORT == report.main.calls.rows
    assert set(report.main.tally.actions) == set(range(5))
    assert [tree.root.visits for tree in trees] == [8 + 1] * 35


def test_the_leaves_of_a_group_share_no_call_with_those_of_another(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[frozenset[int]] = set()

    def noted(self: Verifier, batch: JointBatch, asked: Sequence[Asked]) -> None:
        seen.add(frozenset(each.episode.env_id % 2 for each in asked))

    monkeypatch.setattr(Verifier, "check", noted)
    run_job(model, JobSettings(replace(SHORT, groups=2), verify=True))
    assert seen == {frozenset({0}), frozenset({1})}
