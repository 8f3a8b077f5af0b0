"""Promises of the main job: its searches, its checks, what it writes and how it ends."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import IntegrityError, KVCacheManager, Search
from concurrent_kv.aio import AsyncKVCacheManager
from concurrent_kv.device.tensors import SlotTensor
from examples.cartpole.__main__ import INTERRUPTED, main
from examples.cartpole.cached import CachedEvaluator
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.job import JobReport, JobSettings, first_difference_of, run_job
from examples.cartpole.model import WorldModel, load_model
from examples.cartpole.nodes import Nodes
from examples.cartpole.planner import Planner
from examples.cartpole.play import PlaySettings
from examples.cartpole.replayed import ReplayingEvaluator
from examples.cartpole.roots import CachedRoots, Roots
from examples.cartpole.running import on_the_loop
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.tree import Leaf, Tree
from examples.cartpole.verify import Verifier, difference_of

SHORT = PlaySettings(envs=4, threads=2, simulations=8, episodes=5, max_steps=7)
ALONE = replace(SHORT, leaf_batch=1)
SHORT_ARGUMENTS = [
    *("--envs", "4", "--threads", "2", "--simulations", "8", "--episodes", "5", "--max-steps", "7"),
    "--no-progress",
]
ROWS_OF_SHORT = 5 * (7 * 8 + 6)  # of each episode: the parents of all leaves, and the last roots
JSON_KEYS = {
    "mean_return",
    "episodes",
    "simulations_per_second",
    "loops_only_simulations_per_second",
    "no_cache_simulations_per_second",
    "hit_rate",
    "rows_verified",
    "max_difference",
    "threads",
    "envs",
    "evictions_during_search",
    "integrity",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_model()


@pytest.fixture(scope="module")
def alone(model: WorldModel) -> JobReport:
    """`ALONE`, verified and compared with the search without a cache."""
    return run_job(model, JobSettings(ALONE, verify=True, no_cache=True))


def manager_for(model: WorldModel, *, envs: int, simulations: int) -> KVCacheManager:
    sizes = {"num_simulations": simulations, "max_cache_size": envs * (simulations + 1), "device": "cpu"}
    return KVCacheManager(config=asdict(model.config) | sizes, env_num=envs)


def new_episodes(count: int) -> list[Episode]:
    tilts = torch.linspace(-0.1, 0.1, count)
    return [Episode(i, i, [torch.tensor([0.0, 0.0, float(tilts[i]), 0.0])]) for i in range(count)]


def evaluated(roots: Roots, episodes: Sequence[Episode]) -> list[Evaluation]:
    async def evaluate() -> list[Evaluation]:
        return [await roots.evaluate(episode, on_the_loop) for episode in episodes]

    return anyio.run(evaluate)


class Player:
    """Roots stored through the facade, then a search in the calling thread."""

    def __init__(
        self, nodes: Nodes, manager: KVCacheManager, *, simulations: int, leaf_batch: int | None = None
    ) -> None:
        self.roots = CachedRoots(nodes, AsyncKVCacheManager(manager))
        evaluator = CachedEvaluator(nodes, manager)
        self.planner = Planner(evaluator, simulations=simulations, discount=0.99, leaf_batch=leaf_batch)

    def act(self, episodes: Sequence[Episode]) -> list[int]:
        """One step of all episodes; what is observed depends on the actions only."""
        actions = self.planner.plan(episodes, evaluated(self.roots, episodes))
        for episode, action in zip(episodes, actions, strict=True):
            episode.actions.append(action)
            episode.observations.append(episode.observations[-1] + 0.01 * (2 * action - 1))
        return actions


# The whole job -------------------------------------------------------------------------------------------------------


def test_with_leaves_evaluated_one_at_a_time_1_and_8_threads_choose_the_same_actions(model: WorldModel) -> None:
    settings = replace(ALONE, envs=8, episodes=9, max_steps=6)
    one, eight = (run_job(model, JobSettings(replace(settings, threads=threads))) for threads in (1, 8))
    assert set(one.main.tally.actions) == set(range(9))
    assert one.main.tally.actions == eight.main.tally.actions


def test_another_seed_plays_other_episodes(model: WorldModel, alone: JobReport) -> None:
    other = run_job(model, JobSettings(replace(ALONE, seed=1)))
    # Episode i of seed 1 is episode i + 1 of seed 0.
    assert [other.main.tally.actions[i] for i in range(4)] == [alone.main.tally.actions[i] for i in range(1, 5)]
    assert len({tuple(actions) for actions in alone.main.tally.actions.values()}) > 1


def test_trio_plays_what_asyncio_plays(model: WorldModel, alone: JobReport) -> None:
    trio = run_job(model, JobSettings(ALONE, backend="trio"))
    assert trio.main.tally.actions == alone.main.tally.actions
    assert not trio.failures()


def test_without_a_cache_the_same_actions_are_chosen(alone: JobReport) -> None:
    comparison = alone.no_cache
    assert comparison is not None
    assert comparison.first_difference is None
    assert comparison.same_actions == comparison.tally.steps == 4 * 7
    assert comparison.tally.simulations_per_second > 0


def test_every_row_that_was_gathered_is_verified_and_nothing_is_evicted_from_a_search(alone: JobReport) -> None:
    assert alone.main.verification is not None
    assert alone.main.verification.rows == ROWS_OF_SHORT == alone.main.stats.total.request_count
    assert alone.main.verification.mismatches == 0
    assert alone.main.evictions_during_search == 0
    assert alone.main.integrity == "ok"
    assert alone.failures() == []


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_every_eviction_policy_plays_on_full_init_pools(model: WorldModel, policy: str) -> None:
    longer = replace(SHORT, simulations=2, max_steps=30)
    report = run_job(model, JobSettings(longer, policy=policy, verify=True))
    assert report.main.roots_evicted > 0
    assert report.failures() == []


def test_leaves_of_all_trees_are_verified_together_too(model: WorldModel) -> None:
    report = run_job(model, JobSettings(replace(SHORT, envs=5, threads=1), verify=True))
    assert report.main.verification is not None
    assert report.main.verification.rows == ROWS_OF_SHORT
    assert report.failures() == []


def test_an_error_in_a_search_ends_the_job(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(planner: Planner, episodes: Sequence[Episode], roots: Sequence[Evaluation]) -> list[int]:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Planner, "plan", fail)
    with pytest.raises(Exception, match="TaskGroup") as caught:
        run_job(model, JobSettings(SHORT))
    assert "planted" in repr(caught.value)


# The program ---------------------------------------------------------------------------------------------------------


def test_the_json_has_exactly_the_promised_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*SHORT_ARGUMENTS, "--json", str(file), "--verify", "--no-cache"]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert set(figures) == JSON_KEYS
    assert figures["episodes"] == 5
    assert figures["mean_return"] == 7.0
    assert figures["hit_rate"] == 1.0
    assert figures["rows_verified"] == ROWS_OF_SHORT
    assert 0 <= figures["max_difference"] < 1e-4
    assert (figures["envs"], figures["threads"]) == (4, 2)
    assert figures["evictions_during_search"] == 0
    assert figures["integrity"] == "ok"
    assert min(figures["simulations_per_second"], figures["no_cache_simulations_per_second"]) > 0
    assert "mean return" in capsys.readouterr().out


def test_what_was_not_asked_for_is_null_in_the_json(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    assert main([*SHORT_ARGUMENTS, "--json", str(file)]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert set(figures) == JSON_KEYS
    assert figures["no_cache_simulations_per_second"] is None
    assert figures["loops_only_simulations_per_second"] is None
    assert figures["max_difference"] is None
    assert figures["rows_verified"] == 0


@pytest.mark.parametrize("wrong", [1e-2, float("nan")])
def test_one_wrong_slot_is_found_and_ends_with_a_non_zero_exit(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scatter = SlotTensor.scatter
    writes = iter(range(10**9))

    def corrupt(tensor: SlotTensor, source: Any, rows: Any, columns: Any, slots: Any, *more: Any) -> Any:
        written = scatter(tensor, source, rows, columns, slots, *more)
        # One of a simulated node's two tokens; the nodes below it share the slot.
        if next(writes) == 20:
            tensor.data[1, slots[0], 0, 0] += wrong
        return written

    monkeypatch.setattr(SlotTensor, "scatter", corrupt)
    arguments = ["--envs", "1", "--threads", "1", "--episodes", "1", "--max-steps", "3", "--no-progress"]
    assert main([*arguments, "--verify"]) == 1
    assert "gathered rows are wrong; first" in " ".join(capsys.readouterr().err.split())


def test_books_that_do_not_balance_end_with_a_non_zero_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(manager: KVCacheManager) -> None:
        raise IntegrityError(("planted contradiction",))

    monkeypatch.setattr(KVCacheManager, "check_integrity", fail)
    file = tmp_path / "figures.json"
    assert main([*SHORT_ARGUMENTS, "--json", str(file)]) == 1
    assert "planted contradiction" in json.loads(file.read_text("utf-8"))["integrity"]
    assert "planted contradiction" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_cleanly(backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Planner.plan
    calls = iter(range(10**9))

    def interrupt(planner: Planner, episodes: Sequence[Episode], roots: Sequence[Evaluation]) -> list[int]:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return plan(planner, episodes, roots)

    monkeypatch.setattr(Planner, "plan", interrupt)
    assert main([*SHORT_ARGUMENTS, "--episodes", "1000", "--backend", backend]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", ["--envs 0", "--threads -1", "--seed -1", "--backend curio", "--policy none"])
def test_impossible_options_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


def test_progress_is_shown_while_playing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument for argument in SHORT_ARGUMENTS if argument != "--no-progress"]) == 0
    assert "simulations a second" in capsys.readouterr().out


# Searches over the cache ---------------------------------------------------------------------------------------------


def test_a_simulation_is_one_gather_one_call_of_the_model_and_one_commit(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in ((Search, "gather"), (WorldModel, "recurrent"), (Search, "commit")):
        count(owner, name)
    with manager_for(model, envs=3, simulations=5) as manager:
        Player(Nodes(SharedModel(model)), manager, simulations=5).act(new_episodes(3))
    assert calls == ["gather", "recurrent", "commit"] * 5


def test_roots_that_were_cleared_are_rebuilt_from_their_history(model: WorldModel) -> None:
    chosen = []
    for clearing in (False, True):
        with manager_for(model, envs=3, simulations=6) as manager:
            shared = SharedModel(model)
            verifier = Verifier(shared)
            player = Player(Nodes(shared, verifier), manager, simulations=6, leaf_batch=1)
            episodes = new_episodes(3)
            actions = []
            for step in range(8):
                actions.append(player.act(episodes))
                if clearing and step in (0, 4, 5):
                    manager.clear_init_caches()
            chosen.append(actions)
            assert manager.get_stats_summary().total.miss_count == (9 if clearing else 0)
            assert verifier.verification.mismatches == 0
            manager.check_integrity()
    assert chosen[0] == chosen[1]


def test_roots_share_the_slots_of_the_history_they_have_in_common(model: WorldModel) -> None:
    with manager_for(model, envs=1, simulations=2) as manager:
        player = Player(Nodes(SharedModel(model)), manager, simulations=2)
        episodes = new_episodes(1)
        for _ in range(10):
            player.act(episodes)
        stats = manager.get_stats_summary()
        assert stats.pools["init[0]"].entries == 10
        assert stats.pools["init[0]"].slots_in_use == 1 + 2 * 9
        assert stats.pools["recur"].entries == 0


def test_replayed_and_cached_leaves_of_trees_together_agree(model: WorldModel) -> None:
    """Trees of different ages: paths of different lengths, at and before the window's end."""
    shared = SharedModel(model)
    nodes = Nodes(shared)
    replaying = ReplayingEvaluator(shared)
    with manager_for(model, envs=3, simulations=40) as manager, torch.inference_mode():
        episodes = new_episodes(3)
        for count in (1, 2, 3):
            Player(nodes, manager, simulations=4).act(episodes[:count])
        roots = evaluated(CachedRoots(nodes, AsyncKVCacheManager(manager)), episodes)
        with CachedEvaluator(nodes, manager).open_round(episodes) as cached:
            trees = [Tree(root, 0.99) for root in roots]
            assert_close(roots, evaluated(replaying, episodes))
            for _ in range(30):
                leaves = [(episode, tree.select()) for episode, tree in zip(episodes, trees, strict=True)]
                evaluations = cached.leaves(leaves)
                assert_close(evaluations, replaying.leaves(leaves))
                for tree, (_, leaf), evaluation in zip(trees, leaves, evaluations, strict=True):
                    tree.expand(leaf, evaluation)
        manager.check_integrity()


def assert_close(left: Sequence[Evaluation], right: Sequence[Evaluation]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-3)
        assert one.priors == pytest.approx(other.priors, rel=1e-3, abs=1e-5)
        assert one.reward == pytest.approx(other.reward, abs=1e-4)
        assert one.termination == pytest.approx(other.termination, rel=1e-3, abs=1e-5)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_a_difference_is_found_in_tokens_in_padding_and_where_tokens_are_missing() -> None:
    expected = torch.ones(4, 2, 3, 8)
    padded = torch.cat((torch.zeros(4, 2, 2, 8), expected), dim=2)
    assert difference_of(padded, expected) == 0.0
    for column, wrong in ((0, 0.5), (4, 0.5), (4, float("nan")), (0, float("nan"))):
        row = padded.clone()
        row[3, 1, column, 7] += wrong
        assert difference_of(row, expected) == (0.5 if wrong == 0.5 else float("inf"))
    assert difference_of(padded[:, :, :2], expected) == float("inf")


def test_the_first_difference_of_two_games() -> None:
    assert first_difference_of([0, 1], [0, 1, 1]) is None
    assert first_difference_of([0, 1, 0], [0, 1, 1]) == 2
    assert first_difference_of([0, 1], [0]) == 1


def grown(values: dict[int, float], *, termination: dict[int, float] | None = None, simulations: int = 20) -> Tree:
    """A tree whose every node is worth what its last action says."""
    tree = Tree(Evaluation(1.0, (0.5, 0.5)), discount=0.9)
    for _ in range(simulations):
        leaf: Leaf = tree.select()
        ends = (termination or {}).get(leaf.action, 0.0)
        tree.expand(leaf, Evaluation(values[leaf.action], (0.5, 0.5), reward=1.0, termination=ends))
    return tree


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
    assert tree.select().number == 16
