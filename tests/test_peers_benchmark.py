"""`make bench`: contestants return what the library returns, figures say what samples say, a quick run ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import __main__ as command
from benchmarks.peers import measuring
from benchmarks.peers.cases import CASES, KINDS, Case
from benchmarks.peers.cases.base import Run
from benchmarks.peers.cases.calls import count_calls
from benchmarks.peers.contestants import CONTESTANTS, FLOOR, OURS, PEERS
from benchmarks.peers.contestants.base import UnfitError
from benchmarks.peers.crew import Crew, FailedError, Member, UnfitHereError
from benchmarks.peers.markdown import RESULTS, markdown_of
from benchmarks.peers.measuring import Quartiles, Reading, Stopwatch, paired_ratios, quartiles
from benchmarks.peers.page import PAGE, PICTURE, RUN, page_with, picture_of
from benchmarks.peers.rounds import Result, run_case
from benchmarks.peers.shapes import Shape, Trees
from benchmarks.peers.summary import RECORDS, best_peer, figure, floor_of, read_records, summary_of, times_ours

TINY: dict[str, Any] = {"layers": 2, "heads": 2, "head_dim": 4, "window": 8, "limit": 7}
ABSOLUTE = {**TINY, "absolute": True}
OTHERS = [name for name in CONTESTANTS if name not in (OURS, FLOOR)]
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    # Roots of one token: rows are of several lengths, and some of them drop tokens while others do not.
    "steps, rotary positions": ("step", {"shape": TINY, "rows": 3, "simulations": 12, "turn_ms": 0.1}),
    "steps, absolute positions": ("step", {"shape": ABSOLUTE, "rows": 3, "simulations": 12, "turn_ms": 0.1}),
    "steps, equal rows": ("step", {"shape": ABSOLUTE, "rows": 3, "simulations": 6, "root_tokens": 5, "turn_ms": 0.1}),
    "entries": (
        "entries",
        {"stores": {"few": {"shape": TINY, "tokens": 8, "entries": 5}}, "turn_ms": 0.1, "inserting": True},
    ),
    "windows": (
        "windows",
        {
            "places": {
                "short": {"window": 16, "depth": 8, "new": 2},
                "long": {"window": 128, "depth": 64, "new": 16},
            },
            "rows": 2,
            "turns": 2,
        },
    ),
    "threads": ("threads", {"shape": TINY, "rows": 2, "simulations": 4, "threads": [1, 3], "searches": 1}),
    "threads and a model": (
        "threads",
        {"shape": TINY, "rows": 2, "simulations": 3, "threads": [2], "searches": 1, "with_model": True},
    ),
}


def run_of(contestant: str, kind: str, arguments: dict[str, Any]) -> Run:
    """A contestant in a case, in this process."""
    return KINDS[kind](CONTESTANTS[contestant], **arguments)


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Contestants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("contestant", OTHERS)
def test_a_contestant_returns_the_same_bytes_as_the_library(contestant: str, name: str) -> None:
    kind, arguments = SMALL[name]
    try:
        run = run_of(contestant, kind, arguments)
    except UnfitError as error:
        pytest.skip(f"{contestant} takes no part in {name}: {error}")
    ours = run_of(OURS, kind, arguments)
    found, expected = run.verify(), ours.verify()
    assert found
    assert expected
    assert {what: expected[what] for what in found} == found
    assert all(hashes for hashes in found.values())
    for part in (run, ours):
        part.close()


def test_hashes_tell_one_batch_from_another() -> None:
    found = run_of(OURS, "step", {"shape": TINY, "rows": 3, "simulations": 12}).verify()
    assert found is not None
    assert len(set(found["search"])) == 12


def test_every_contestant_takes_part_in_the_search_step_where_what_it_needs_is_installed() -> None:
    refused = {}
    for contestant in CONTESTANTS:
        try:
            run_of(contestant, "step", {"shape": ABSOLUTE, "rows": 2, "simulations": 2}).close()
        except UnfitError as error:
            refused[contestant] = str(error)
    assert all("not installed" in reason for reason in refused.values()), refused


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("contestant", [OURS, "dict", "rows", FLOOR])
def test_a_turn_measures_both_clocks_of_the_same_measures_each_time(contestant: str, name: str) -> None:
    kind, arguments = SMALL[name]
    try:
        run = run_of(contestant, kind, arguments)
    except UnfitError as error:
        pytest.skip(f"{contestant} takes no part in {name}: {error}")
    run.verify()
    first, second = run.turn(), run.turn()
    assert first
    assert set(first) == set(second)
    assert all(min(times) >= 0 for times in first.values())
    run.close()


def test_a_search_of_the_library_shares_and_a_dict_copies() -> None:
    searches = {"many": {"shape": TINY, "rows": 2, "nodes": 40, "root": 1, "new": 2}}
    found = {
        name: run_of(name, "nodes", {"searches": searches, "copied_bytes": 1 << 20}).facts()
        for name in (OURS, "dict", "rows")
    }
    token = Shape.from_dict(TINY).token_bytes
    assert found[OURS]["K/V bytes a node, many"] == found["rows"]["K/V bytes a node, many"] == 2 * token
    assert found["dict"]["K/V bytes a node, many"] > 3 * token


def test_trees_of_the_same_sizes_are_the_same_and_stay_in_their_window() -> None:
    shape = Shape.from_dict(ABSOLUTE)
    first, second = (Trees(shape, 4, 20, 1, 2) for _ in range(2))
    assert first.parents == second.parents
    assert max(max(lengths) for lengths in first.gathered) + 2 <= shape.window
    assert {5} < set(chain.from_iterable(first.gathered)) <= {1, 3, 5}
    assert first.stored_tokens(shape)[0] == 4 * 2  # roots grow from 1 to 3


def test_a_deep_tree_is_a_chain_and_then_a_fan() -> None:
    trees = Trees(Shape.from_dict(TINY | {"window": 64, "limit": 64}), 2, 5, 2, 2, deep=3)
    assert trees.parents == [[0, 1], [2, 3], [4, 5], [6, 7], [6, 7]]
    assert trees.gathered[-1] == [8, 8]


# Functions called ----------------------------------------------------------------------------------------------------


def _called() -> int:
    return 1


def test_calls_of_a_package_are_counted_one_by_one_and_comprehensions_are_none() -> None:
    def operation() -> None:
        _called()
        [_called() for _ in range(3)]
        sorted([2, 1])

    assert count_calls(operation, __file__) == 5  # operation, and four of its own
    assert count_calls(operation, "/nowhere") == 0


def test_functions_called_are_the_same_number_each_time() -> None:
    arguments = {"shape": TINY, "rows": 2, "simulations": 6}
    first, second = (run_of(OURS, "calls", arguments) for _ in range(2))
    assert first.facts() == second.facts()
    assert all(calls > 0 for calls in first.facts().values())
    for run in (first, second):
        run.close()


# Statistics ----------------------------------------------------------------------------------------------------------


def test_quartiles_are_those_of_numpy_and_one_sample_is_all_three() -> None:
    assert quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        quartiles([])


def test_a_ratio_turned_round_keeps_its_quartiles_in_order() -> None:
    assert Quartiles(1.0, 2.0, 4.0).map(lambda ratio: 1 / ratio) == (0.25, 0.5, 1.0)


def test_ratios_are_of_the_same_round() -> None:
    assert paired_ratios([1.0, 2.0, 0.0], [3.0, 4.0, 5.0]) == [3.0, 2.0]


def test_a_stopwatch_takes_off_what_reading_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_lap", (100.0, 10.0))
    watch = Stopwatch()
    watch.add("get", Reading(0, 0), 2, Reading(2100, 5010))
    watch.add("get", Reading(0, 0), 2, Reading(4100, 3010))
    watch.add("nothing", Reading(0, 0), 1, Reading(50, 0))
    assert watch.per_call() == {"get": (1.5, 2.0), "nothing": (0.0, 0.0)}


def _result(clock: Any = "processor") -> Result:
    case = Case("step", "a title", {}, {}, headline=("step",), clock=clock)
    result = Result("step/some/8", case, rounds=3, unfit={"moka": "is away"})
    result.samples["step"] = {
        OURS: ([10.0, 20.0, 10.0], [11.0, 21.0, 11.0]),
        "dict": ([15.0, 30.0, 25.0], [15.0, 30.0, 25.0]),
        "cachebox": ([20.0, 40.0, 20.0], [5.0, 5.0, 5.0]),
        FLOOR: ([1.0, 2.0, 2.0], [1.0, 2.0, 2.0]),
    }
    return result


def test_a_summary_has_medians_ratios_by_rounds_and_the_best_peer_of_its_clock() -> None:
    case = summary_of([_result()], {})["cases"][0]
    assert figure(case, "step", OURS) == (10, 10, 15)
    assert times_ours(case, "step", "dict") == (1.5, 1.5, 2.0)  # of 1.5, 1.5 and 2.5
    assert best_peer(case, "step") == "cachebox"
    assert floor_of(case, "step") == pytest.approx((20 / 3, 10.0, 10.0), rel=1e-3)
    assert best_peer(summary_of([_result("wall")], {})["cases"][0], "step") == "cachebox"
    assert FLOOR not in PEERS
    assert OURS not in PEERS


# Turns ---------------------------------------------------------------------------------------------------------------


class Scripted:
    """A member whose answers are given."""

    def __init__(self, name: str, **answers: Any) -> None:
        self.name, self.answers, self.asked = name, answers, ""
        self.calls: list[str] = []

    def ask(self, do: str, **arguments: Any) -> None:
        self.asked = do
        self.calls.append(do)

    def answer(self) -> Any:
        found = self.answers.get(self.asked, {})
        if isinstance(found, Exception):
            raise found
        return found

    def call(self, do: str) -> Any:
        self.ask(do)
        return self.answer()

    def end(self) -> None:
        self.calls.append("end")


class ScriptedCrew(Crew):
    def __init__(self, *members: Scripted) -> None:
        super().__init__()
        self._members = {member.name: member for member in members}  # type: ignore[misc]


def run_scripted(*members: Scripted) -> Result:
    case = Case("step", "a title", {}, {}, rounds=2)
    return run_case("case", case, ScriptedCrew(*members), [member.name for member in members])


def test_who_returns_other_bytes_is_not_timed_and_named() -> None:
    ours = Scripted(OURS, prepare={"search": ["a", "b"]}, turn={"step": [1.0, 2.0]})
    other = Scripted("dict", prepare={"search": ["a", "c"]}, turn={"step": [1.0, 2.0]})
    result = run_scripted(ours, other)
    assert "returned other bytes than ours: search" in result.failed["dict"]
    assert other.calls == ["prepare", "end"]
    assert result.samples == {"step": {OURS: ([1.0, 1.0], [2.0, 2.0])}}
    assert ours.calls == ["prepare", "turn", "turn", "facts", "finish"]


def test_who_cannot_take_part_is_named_and_who_fails_on_the_way_has_no_figures() -> None:
    ours = Scripted(OURS, turn={"step": [1.0, 2.0]}, facts={"bytes": 3.0})
    away = Scripted("moka", prepare=UnfitHereError("is away"))
    broken = Scripted("theine", turn=FailedError("theine: it panicked"))
    result = run_scripted(ours, away, broken)
    assert result.unfit == {"moka": "is away"}
    assert result.failed == {"theine": "theine: it panicked"}
    assert set(result.samples["step"]) == {OURS}
    assert result.facts == {OURS: {"bytes": 3.0}}


@pytest.mark.timeout(300)
def test_a_process_that_ends_is_a_failure_that_says_so() -> None:
    member = Member("dict")
    try:
        with pytest.raises(FailedError, match="KeyError: 'nothing'"):
            member.call("prepare", kind="nothing", arguments={})
        member._process.kill()
        with pytest.raises(FailedError, match="dict's process ended"):
            member.call("turn")
    finally:
        member.end()


# The command ---------------------------------------------------------------------------------------------------------


def run_command(*arguments: str) -> int:
    return command.main(arguments)


@pytest.mark.timeout(300)  # four processes that import torch
def test_a_quick_run_measures_draws_and_makes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture = tmp_path / "peers.json", tmp_path / "steps.svg"
    chosen = ["--only", "step/cartpole/8", "calls/cartpole", "--contestants", "dict", "rows", FLOOR]
    assert run_command("--quick", "--rounds", "2", *chosen, "--json", str(report), "--plot", str(picture)) == 0
    summary = json.loads(report.read_text("utf-8"))
    step, calls = summary["cases"]
    assert set(step["measures"]["step"]) == {OURS, "dict", "rows", FLOOR}
    assert [len(times) for times in step["samples"]["step"][OURS]] == [2, 2]
    assert calls["facts"][OURS]["functions called, gather"] > 0
    assert {"commit", "date", "processor", "python", "versions", "load_at_end"} <= set(summary["about"])
    page = markdown_of({"before": summary, "after": summary})
    for part in (
        "| step/cartpole/8 | step |",
        "## The newest state: after",
        "| cartpole, ours |",
        "## Every contestant's step",
        "| before |",
    ):
        assert part in page
    assert picture.read_text("utf-8").startswith("<?xml")
    assert "by the best peer" in capsys.readouterr().out


def test_a_case_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="--only must name some of step/cartpole/8"):
        run_command("--only", "nothing")


@pytest.mark.parametrize("place", ["nothing", "dict=.", "other=/nowhere"])
def test_another_checkout_needs_a_name_of_its_own_and_the_package(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command("--beside", place)
    assert "must" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_the_library_of_another_checkout_takes_its_turns_beside() -> None:
    root = Path(command.__file__).resolve().parents[2]
    with Crew({"other": root}) as crew:
        result = run_case("case", CASES["step/cartpole/8"], crew, [OURS, "other"], quick=True, rounds=1)
    assert not result.failed
    assert set(result.samples["step"]) == {OURS, "other"}


# What is recorded ----------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_records_make() -> None:
    assert RESULTS.read_text("utf-8") == markdown_of(read_records())


def test_the_figures_of_the_page_for_users_are_what_the_record_makes() -> None:
    record = read_records()[RUN]
    page = PAGE.read_text("utf-8")
    assert page == page_with(page, record)
    assert PICTURE.read_text("utf-8") == picture_of(record)


def test_a_page_without_a_place_for_a_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="'steps'"):
        page_with("nothing", read_records()[RUN])


def test_records_stay_small() -> None:
    found: Sequence[Path] = sorted(RECORDS.glob("*"))
    assert found
    assert all(path.stat().st_size < 200 * 1024 for path in found)
