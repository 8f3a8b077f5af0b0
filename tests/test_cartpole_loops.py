"""Promises of the main job's tasks: roots awaited on their own loop, searches as tasks, leaves evaluated together."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import KVCacheManager, Search
from concurrent_kv.aio import AsyncKVCacheManager
from examples.cartpole.__main__ import INTERRUPTED, main
from examples.cartpole.cached import CachedEvaluator
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.job import JobSettings, run_job
from examples.cartpole.leaf_batches import LeafBatches, open_leaf_batches
from examples.cartpole.model import WorldModel, load_model
from examples.cartpole.nodes import Nodes
from examples.cartpole.planner import Planner
from examples.cartpole.play import PlaySettings
from examples.cartpole.roots import CachedRoots
from examples.cartpole.running import on_the_loop
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.tree import Tree
from tests.support import HANG_SECONDS

SHORT = PlaySettings(envs=4, threads=2, simulations=8, episodes=5, max_steps=7)
SHORT_ARGUMENTS = [
    *("--envs", "4", "--threads", "2", "--simulations", "8", "--episodes", "5", "--max-steps", "7"),
    "--no-progress",
]
ROWS_OF_SHORT = 5 * (7 * 8 + 6)  # of each episode: the parents of all leaves, and the last roots

both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_model()


@pytest.fixture
def row_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the model for leaves."""
    counts: list[int] = []
    recurrent = WorldModel.recurrent

    def counted(model: WorldModel, action: torch.Tensor, *args: Any) -> Any:
        counts.append(len(action))
        return recurrent(model, action, *args)

    monkeypatch.setattr(WorldModel, "recurrent", counted)
    return counts


def manager_for(model: WorldModel, *, envs: int, simulations: int) -> KVCacheManager:
    sizes = {"num_simulations": simulations, "max_cache_size": envs * (simulations + 1), "device": "cpu"}
    return KVCacheManager(config=asdict(model.config) | sizes, env_num=envs)


def new_episodes(count: int) -> list[Episode]:
    return [Episode(i, i, [torch.tensor([0.0, 0.0, 0.02 * i, 0.0])]) for i in range(count)]


# Both modes ----------------------------------------------------------------------------------------------------------


@both_backends
def test_with_leaves_evaluated_one_at_a_time_threads_and_tasks_choose_the_same_actions(
    model: WorldModel, backend: Any
) -> None:
    play = replace(SHORT, leaf_batch=1, batch_size=1)
    report = run_job(model, JobSettings(play, backend=backend, compare_modes=True))
    assert report.loops_only is not None
    assert set(report.main.tally.actions) == set(range(5))
    assert report.main.tally.actions == report.loops_only.tally.actions
    assert report.modes is not None
    assert report.modes.first_difference is None
    assert report.modes.same_actions == 5 * 7
    assert report.failures() == []


@both_backends
def test_every_row_that_tasks_gathered_is_verified(model: WorldModel, backend: Any) -> None:
    played = run_job(model, JobSettings(SHORT, backend=backend, loops_only=True, verify=True)).main
    assert played.verification is not None
    assert played.verification.rows == ROWS_OF_SHORT == played.stats.total.request_count
    assert played.failures() == []


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_a_search_that_stays_open_lets_the_roots_of_ended_trees_be_evicted(model: WorldModel, policy: str) -> None:
    longer = replace(SHORT, simulations=2, max_steps=30)
    report = run_job(model, JobSettings(longer, policy=policy, loops_only=True, verify=True))
    assert report.main.roots_evicted > 0
    assert report.failures() == []


@both_backends
@pytest.mark.parametrize("loops_only", [False, True])
def test_roots_are_awaited_on_the_loop_and_only_threads_search_apart_from_it(
    model: WorldModel, backend: Any, loops_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[int]] = {"root": set(), "call": set()}
    observe, recurrent = WorldModel.observe, WorldModel.recurrent

    def observed(model: WorldModel, *args: Any) -> Any:
        threads["root"].add(threading.get_ident())
        return observe(model, *args)

    def called(model: WorldModel, *args: Any) -> Any:
        threads["call"].add(threading.get_ident())
        return recurrent(model, *args)

    monkeypatch.setattr(WorldModel, "observe", observed)
    monkeypatch.setattr(WorldModel, "recurrent", called)
    run_job(model, JobSettings(SHORT, backend=backend, loops_only=loops_only))
    here = {threading.get_ident()}
    assert threads["root"] == here
    assert threads["call"] == here if loops_only else not threads["call"] & here


@both_backends
@pytest.mark.parametrize("loops_only", [False, True])
def test_an_error_in_the_model_ends_the_job(
    model: WorldModel, backend: Any, loops_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(nodes: Nodes, *args: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Nodes, "leaves", fail)
    with pytest.raises(Exception, match=r"TaskGroup|Trio nursery") as caught:
        run_job(model, JobSettings(SHORT, backend=backend, loops_only=loops_only))
    assert "planted" in repr(caught.value)


# The program ---------------------------------------------------------------------------------------------------------


def test_both_modes_are_compared_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    arguments = [*SHORT_ARGUMENTS, "--json", str(file), "--compare-modes", "--leaf-batch", "1", "--batch-size", "1"]
    assert main(arguments) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert min(figures["simulations_per_second"], figures["loops_only_simulations_per_second"]) > 0
    shown = capsys.readouterr().out
    assert "in loops only" in shown
    assert "35 of 35: all" in shown


@both_backends
def test_loops_only_is_played_and_verified(backend: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = [*SHORT_ARGUMENTS, "--json", str(file), "--loops-only", "--verify", "--batch-wait", "0.001"]
    assert main([*arguments, "--backend", backend]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert figures["loops_only_simulations_per_second"] == figures["simulations_per_second"] > 0
    assert figures["rows_verified"] == ROWS_OF_SHORT
    assert figures["threads"] == 0
    assert figures["integrity"] == "ok"


@both_backends
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_searches_in_tasks_cleanly(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leaves = Nodes.leaves
    calls = iter(range(10**9))

    def interrupt(nodes: Nodes, *args: Any) -> Any:
        if next(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return leaves(nodes, *args)

    monkeypatch.setattr(Nodes, "leaves", interrupt)
    arguments = [*SHORT_ARGUMENTS, "--episodes", "1000", "--loops-only", "--backend", backend]
    assert main(arguments) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("wrong", ["--batch-size 0", "--batch-wait -1", "--batch-wait nan", "--compare-modes"])
def test_impossible_options_of_loops_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--loops-only", *wrong.split()])
    assert caught.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


# Leaves together -----------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("size", [1, 3, 4])
def test_leaves_of_all_tasks_are_evaluated_together_up_to_the_batch_size(
    model: WorldModel, backend: Any, size: int, row_counts: list[int]
) -> None:
    play = replace(SHORT, episodes=4, batch_size=size)
    run_job(model, JobSettings(play, backend=backend, loops_only=True))
    assert sum(row_counts) == 4 * 7 * 8
    assert max(row_counts) == size
    assert len(row_counts) >= ceil(4 * 7 * 8 / size)


def evaluated(
    model: WorldModel, *, backend: str, envs: int, size: int, wait_seconds: float, together: bool
) -> list[Evaluation]:
    """The first leaf of each environment's tree; each is asked for when the one before it waits, or is there."""
    results: dict[int, Evaluation] = {}

    async def ask(nodes: Nodes, manager: AsyncKVCacheManager) -> None:
        roots = CachedRoots(nodes, manager)
        async with (
            open_leaf_batches(nodes, manager, on_the_loop, envs=envs, size=size, wait_seconds=wait_seconds) as batches,
            anyio.create_task_group() as tasks,
        ):
            for episode in new_episodes(envs):
                root = await roots.evaluate(episode, on_the_loop)
                if together:
                    tasks.start_soon(one, batches, episode, root)
                    await anyio.wait_all_tasks_blocked()
                else:
                    await one(batches, episode, root)

    async def one(batches: LeafBatches, episode: Episode, root: Evaluation) -> None:
        with batches.tree(episode):
            results[episode.index] = await batches.evaluate(episode, Tree(root, 0.99).select())

    with manager_for(model, envs=envs, simulations=2) as manager:
        anyio.run(ask, Nodes(SharedModel(model)), AsyncKVCacheManager(manager), backend=backend)
        manager.check_integrity()
    return [results[index] for index in range(envs)]


@both_backends
def test_a_leaf_waits_for_others_until_the_batch_is_full(
    model: WorldModel, backend: str, row_counts: list[int]
) -> None:
    evaluated(model, backend=backend, envs=3, size=3, wait_seconds=HANG_SECONDS, together=True)
    assert row_counts == [3]


@both_backends
@pytest.mark.parametrize("wait_seconds", [0.0, 1e-4])
def test_a_leaf_that_nobody_joins_is_evaluated_alone(
    model: WorldModel, backend: str, wait_seconds: float, row_counts: list[int]
) -> None:
    evaluated(model, backend=backend, envs=3, size=3, wait_seconds=wait_seconds, together=False)
    assert row_counts == [1, 1, 1]


@both_backends
def test_threads_wait_for_environments_whose_roots_are_being_evaluated(
    model: WorldModel, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    plan = Planner.plan

    def counted(planner: Planner, episodes: Sequence[Episode], roots: Sequence[Evaluation]) -> list[int]:
        groups.append(len(episodes))
        return plan(planner, episodes, roots)

    monkeypatch.setattr(Planner, "plan", counted)
    run_job(model, JobSettings(replace(SHORT, threads=1), backend=backend))
    assert groups == [4] * 7 + [1] * 7


def test_a_root_that_was_cleared_before_its_search_looked_is_rebuilt(model: WorldModel) -> None:
    chosen = []
    for clearing in (False, True):
        with manager_for(model, envs=2, simulations=6) as manager:
            nodes = Nodes(SharedModel(model))
            roots = CachedRoots(nodes, AsyncKVCacheManager(manager))
            planner = Planner(CachedEvaluator(nodes, manager), simulations=6, discount=0.99, leaf_batch=1)
            episodes = new_episodes(2)
            evaluations = [anyio.run(roots.evaluate, episode, on_the_loop) for episode in episodes]
            if clearing:
                manager.clear_init_caches()
            chosen.append(planner.plan(episodes, evaluations))
            assert (manager.get_stats_summary().total.miss_count > 0) == clearing
            manager.check_integrity()
    assert chosen[0] == chosen[1]


def test_a_simulation_of_all_tasks_is_one_gather_one_call_of_the_model_and_one_commit(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    gather, commit = Search.gather, Search.commit

    def gathered(search: Search, *args: Any, **kwargs: Any) -> Any:
        calls.append("gather")
        return gather(search, *args, **kwargs)

    def committed(search: Search, *args: Any, **kwargs: Any) -> None:
        calls.append("commit")
        commit(search, *args, **kwargs)

    monkeypatch.setattr(Search, "gather", gathered)
    monkeypatch.setattr(Search, "commit", committed)
    run_job(model, JobSettings(replace(SHORT, episodes=4, max_steps=2), loops_only=True))
    assert calls == ["gather", "commit"] * (2 * 8)
