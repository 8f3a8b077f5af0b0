"""Promises of the main job: what it plays, its checks, what it writes and how it ends."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from concurrent_kv import IntegrityError, KVCacheManager
from concurrent_kv.device.tensors import SlotTensor
from examples.cartpole import __main__ as program
from examples.cartpole.__main__ import INTERRUPTED, main
from examples.cartpole.job import JobReport, JobSettings, run_job, usual_groups
from examples.cartpole.model import WorldModel, load_model
from examples.cartpole.report import live_figures
from examples.cartpole.scaling import plot
from examples.cartpole.steps import Steps
from examples.cartpole.tree import Tree
from tests.async_support import join_workers
from tests.cartpole_support import (
    ALONE,
    ROWS_OF_SHORT,
    SHORT,
    SHORT_ARGUMENTS,
    both_backends,
    one_torch_thread,
    threads_and_loop,
)

JSON_KEYS = {
    "mean_return",
    "episodes",
    "simulations_per_second",
    "no_cache_simulations_per_second",
    "rows_per_call",
    "seconds",
    "tree_seconds",
    "gather_seconds",
    "model_seconds",
    "commit_seconds",
    "hit_rate",
    "rows_verified",
    "max_difference",
    "threads",
    "workers_per_tree",
    "envs",
    "evictions_during_search",
    "integrity",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return load_model()


@pytest.fixture(scope="module")
def alone(model: WorldModel) -> JobReport:
    """`ALONE`, verified and compared with the search without a cache."""
    return run_job(model, JobSettings(ALONE, verify=True, steps_without_cache=7))


# The whole job -------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("threads", [1, 8, 0])
def test_with_leaves_evaluated_one_at_a_time_threads_and_tasks_choose_the_same_actions(
    model: WorldModel, alone: JobReport, threads: int, backend: Any
) -> None:
    settings = replace(ALONE, envs=8, threads=threads)
    report = run_job(model, JobSettings(settings, backend=backend, verify=True))
    assert set(report.main.tally.actions) == set(range(5))
    assert report.main.tally.actions == alone.main.tally.actions
    assert report.main.calls.rows_of_calls == {1: ROWS_OF_SHORT}
    assert report.failures() == []


def test_another_seed_plays_other_episodes(model: WorldModel, alone: JobReport) -> None:
    other = run_job(model, JobSettings(replace(ALONE, seed=1)))
    # Episode i of seed 1 is episode i + 1 of seed 0.
    assert [other.main.tally.actions[i] for i in range(4)] == [alone.main.tally.actions[i] for i in range(1, 5)]
    assert len({tuple(actions) for actions in alone.main.tally.actions.values()}) > 1


def test_without_a_cache_the_same_actions_are_chosen(alone: JobReport) -> None:
    comparison = alone.no_cache
    assert comparison is not None
    assert comparison.first_difference is None
    assert comparison.same_actions == comparison.tally.steps == 4 * 7
    assert comparison.tally.simulations_per_second > 0


def test_a_search_without_a_cache_gathers_nothing(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gathers: list[int] = []
    gather = SlotTensor.gather_together

    def counted(tensor: SlotTensor, *arguments: Any, **options: Any) -> Any:
        gathers[-1] += 1
        return gather(tensor, *arguments, **options)

    monkeypatch.setattr(SlotTensor, "gather_together", counted)
    for steps in (0, 7):
        gathers.append(0)
        report = run_job(model, JobSettings(replace(SHORT, threads=0, workers_per_tree=2), steps_without_cache=steps))
        assert (report.no_cache is not None) == bool(steps)
    assert gathers[0] == gathers[1] > 0


@threads_and_loop
@pytest.mark.parametrize("envs", [4, 5])
def test_every_row_that_was_gathered_is_verified_and_nothing_is_evicted_from_a_search(
    model: WorldModel, threads: int, envs: int
) -> None:
    report = run_job(model, JobSettings(replace(SHORT, envs=envs, threads=threads), verify=True))
    assert report.main.verification is not None
    assert report.main.verification.rows == ROWS_OF_SHORT == report.main.stats.total.request_count
    assert report.main.calls.rows == ROWS_OF_SHORT
    assert report.main.verification.mismatches == 0
    assert report.main.evictions_during_search == 0
    assert report.main.integrity == "ok"
    assert report.failures() == []


@threads_and_loop
@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_every_eviction_policy_plays_on_full_init_pools(model: WorldModel, policy: str, threads: int) -> None:
    longer = replace(SHORT, simulations=2, max_steps=25, threads=threads)
    report = run_job(model, JobSettings(longer, policy=policy, verify=True))
    assert report.main.roots_evicted > 0
    assert report.failures() == []


@both_backends
@threads_and_loop
def test_the_model_is_called_in_threads_or_on_the_loop_alone(
    model: WorldModel, backend: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def noted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            seen.add(threading.get_ident())
            return original(*arguments)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((WorldModel, "initial"), (Steps, "step"), (Steps, "recurrent")):
        noted(owner, name)
    run_job(model, JobSettings(SHORT if threads else replace(SHORT, threads=0), backend=backend))
    here = {threading.get_ident()}
    assert (not seen & here and len(seen) <= threads) if threads else seen == here


@both_backends
@threads_and_loop
@pytest.mark.parametrize("where", [(Steps, "recurrent"), (Tree, "select"), (Tree, "best_action")])
def test_an_error_in_the_model_or_in_a_search_ends_the_job(
    model: WorldModel, backend: Any, threads: int, where: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(*where, fail)
    with pytest.raises(Exception, match=r"TaskGroup|Trio nursery") as caught:
        run_job(model, JobSettings(replace(SHORT, threads=threads), backend=backend))
    assert "planted" in repr(caught.value)


# The program ---------------------------------------------------------------------------------------------------------


def test_the_json_has_exactly_the_promised_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*SHORT_ARGUMENTS, "--json", str(file), "--verify", "--no-cache-steps", "3"]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert set(figures) == JSON_KEYS
    assert figures["episodes"] == 5
    assert figures["mean_return"] == 7.0
    assert figures["hit_rate"] == 1.0
    assert figures["rows_verified"] == ROWS_OF_SHORT
    assert 0 <= figures["max_difference"] < 1e-4
    assert (figures["envs"], figures["threads"], figures["workers_per_tree"]) == (4, 2, 1)
    assert 1 <= figures["rows_per_call"] <= 4
    assert figures["evictions_during_search"] == 0
    assert figures["integrity"] == "ok"
    assert min(figures["simulations_per_second"], figures["no_cache_simulations_per_second"]) > 0
    assert min(figures[name] for name in JSON_KEYS if name.endswith("seconds")) > 0
    shown = capsys.readouterr().out
    assert "mean return" in shown
    assert "12 of 12: all" in shown


@both_backends
def test_what_was_not_asked_for_is_null_in_the_json(tmp_path: Path, backend: str) -> None:
    file = tmp_path / "figures.json"
    arguments = ["--loops-only", "--backend", backend, "--workers-per-tree", "2"]
    assert main([*SHORT_ARGUMENTS, *arguments, "--json", str(file)]) == 0
    figures = json.loads(file.read_text("utf-8"))
    assert set(figures) == JSON_KEYS
    assert figures["no_cache_simulations_per_second"] is None
    assert figures["max_difference"] is None
    assert figures["rows_verified"] == 0
    assert (figures["threads"], figures["workers_per_tree"]) == (0, 2)


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
    assert main([*arguments, "--no-cache-steps", "0", "--verify"]) == 1
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


@both_backends
@pytest.mark.parametrize("ways", ["--threads=2", "--loops-only", "--threads=2 --workers-per-tree=2"])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_cleanly(
    backend: str, ways: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recurrent = Steps.recurrent
    calls = iter(range(10**9))

    def interrupt(*arguments: Any) -> Any:
        if next(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return recurrent(*arguments)

    monkeypatch.setattr(Steps, "recurrent", interrupt)
    arguments = [*SHORT_ARGUMENTS, "--episodes", "1000", *ways.split(), "--backend", backend]
    assert main(arguments) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    join_workers()


@pytest.mark.parametrize(
    "wrong",
    [
        *("--envs 0", "--threads -1", "--seed -1", "--backend curio", "--policy none", "--groups 0", "--max-rows 0"),
        *("--workers-per-tree 0", "--no-cache-steps -1", "--turns 0", "--metrics 65536"),
        *("--json README.md/figures.json", "--json examples", "--plot README.md/scaling.svg"),
    ],
)
def test_impossible_options_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(wrong.split())
    assert caught.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--checkpoint folder", "--actors 3", "--plot scaling.svg"])
def test_options_of_another_job_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong.split()) == 2
    assert f"{wrong.split()[0]} goes with" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--threads 2 --groups 3", "--loops-only --groups 2", "--envs 1 --groups 2"])
def test_more_groups_than_can_share_out_what_there_is_are_refused(
    wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(wrong.split()) == 2
    assert "--groups" in capsys.readouterr().err


def test_what_is_going_on_is_shown_with_a_cache_and_without(model: WorldModel) -> None:
    shown = StringIO()
    watch = live_figures(Console(file=shown, force_terminal=True, width=100))
    run_job(model, JobSettings(SHORT, steps_without_cache=2), watch)
    for text in ("playing", "pool of searches", "rows a call", "playing without a cache", "4 of 4"):
        assert text in shown.getvalue()


def test_groups_that_nobody_asked_for_are_no_more_than_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "usual_groups", lambda threads: threads)  # as without a GIL
    assert main([*SHORT_ARGUMENTS, "--envs", "1", "--episodes", "1"]) == 0


def test_the_scaling_is_a_table_a_json_and_a_plot_that_is_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, drawn = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    arguments = ["--envs", "2", "--simulations", "2", "--max-steps", "2", "--turns", "2", "--no-progress"]
    assert main(["--scaling", *arguments, "--json", str(file), "--plot", str(drawn)]) == 0
    shown = capsys.readouterr().out
    for text in ("1 together", "2 together", "2 apart", "the loop alone", "32 rows", "medians of 2 turns"):
        assert text in shown
    result = json.loads(file.read_text("utf-8"))
    assert [way["name"] for way in result["ways"]] == ["1 together", "2 together", "2 apart", "the loop alone"]
    assert [way["envs"] for way in result["by_rows"]] == [1, 2, 4, 8, 16, 32]
    with_more = [*result["own_envs"], *result["more_envs"]]
    assert [way["envs"] for way in with_more] == [2 * way["threads"] for way in with_more]
    assert {(way["threads"], way["groups"]) for way in result["more_envs"]} >= {
        (4, usual_groups(4)),
        (8, usual_groups(8)),
    }
    assert {len(way["rates"]) for way in [*result["ways"], *result["by_rows"], *with_more]} == {2}
    assert result["planned"]["1"] == pytest.approx(result["own_envs"][0]["rate"])
    assert 0 <= result["share_in_queue"] <= 1
    again = tmp_path / "again.svg"
    plot([result], again)
    assert again.read_bytes() == drawn.read_bytes()
    assert b"dc:date" not in drawn.read_bytes()


def test_the_scaling_of_one_environment_has_threads_with_more(tmp_path: Path) -> None:
    arguments = ["--envs", "1", "--simulations", "1", "--max-steps", "1", "--turns", "1", "--no-progress"]
    file = tmp_path / "scaling.json"
    assert main(["--scaling", *arguments, "--json", str(file)]) == 0
    assert [way["envs"] for way in json.loads(file.read_text("utf-8"))["own_envs"]] == [1, 2, 4, 8]
