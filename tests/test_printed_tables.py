"""What programs print: nothing is wider than 80 columns or cut off, and beneath it stand date, commit and machine."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console, RenderableType

from benchmarks import async_costs, async_shards, cluster, compiled_model, core, gpu, metrics, readers, snapshots, tiers
from benchmarks.async_cases import CASES
from benchmarks.async_thresholds import Thresholds
from benchmarks.gpu_lightzero import COLUMNS
from benchmarks.peers import tables as peers
from benchmarks.peers.summary import read_records
from examples.cartpole.play import PlaySettings
from examples.cartpole.scaling import Scaling, Way, scaling_table
from reporting import progress
from reporting.machine import about, in_words
from reporting.progress import Work, duration, to_go, watched
from reporting.tables import WIDTH, Grid, console_of, origin, pairs
from stress.summary import summary
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
HUGE = 1_234_567_890.125
FROM = r" UTC, (commit [0-9a-f]{7,}\+?|concurrent_kv \d)"


def printed(*shown: RenderableType, width: int = WIDTH) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(*shown)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def fits(grid: Grid) -> None:
    """Each name, heading and figure is there whole, and no line is too long."""
    lines = printed(grid)
    assert max(map(len, lines)) <= WIDTH
    said = " ".join(lines)
    for row in grid.rows:
        for cell in row[grid.keys :]:
            pieces = [cell] if len(cell) <= 42 else cell.split()
            assert all(any(piece in line for line in lines) for piece in pieces), cell
        for name in row[: grid.keys]:
            assert all(word in said for word in name.split()), name
    if grid.rows:
        assert all(word in said for column in grid.columns[grid.keys :] for word in column.split())
    assert "…" not in said


class Numbers(dict[str, Any]):
    """Of any name: a huge one."""

    def __missing__(self, name: str) -> float:
        return HUGE


def spread() -> dict[str, Any]:
    return {"median": HUGE, "quartiles": [HUGE, HUGE], "p10": HUGE, "p90": HUGE}


def of_thresholds() -> Iterator[Grid]:
    loops = ("asyncio", "trio", "uvloop")
    cost = {"latency": HUGE, "holding": HUGE}
    by_size = {2**40: {"inline": cost, "worker": cost}}
    costs = dict.fromkeys(loops, by_size)
    yield from Thresholds(dict.fromkeys(loops, cost), costs, costs, costs).tables()


def of_shards() -> Iterator[Grid]:
    holds = {256: {"held for reading": Numbers(), "waited for": Numbers()}}
    tries = {loop: {microseconds: Numbers() for microseconds in async_shards.TRIES} for loop in ("asyncio", "uvloop")}
    yield from async_shards.shards_tables({"holds": holds, "tries": tries})


def of_operations() -> Iterator[Grid]:
    places = ["sync", *(f"{loop} {where}" for loop in async_costs.LOOPS for where in ("inline", "worker"))]
    yield async_costs.operations_table({case.name: {place: spread() for place in places} for case in CASES})


def of_cluster() -> Iterator[Grid]:
    ways = {name: spread() for name in (cluster.THREADS, cluster.TWO, cluster.ELSEWHERE)}
    result = {name: spread() for name in ("two_by_one", "two_by_one_of_quiet_turns")} | {
        "simulations_per_second": ways,
        "processors_of_hosts": ways,
        "quiet_turns": 10**6,
        "empty_call_seconds": {"in this process": spread()},
        "load_weights_seconds": {"100 host(s), 65536 MiB more": spread()},
    }
    yield from cluster.tables(result)


def of_snapshots() -> Iterator[Grid]:
    file = Numbers(case="qwen2.5-0.5b", what="1,000,000 tokens and 64,000 continuations of 3,000 tokens")
    file |= {name: {"torch.save": HUGE, "by hand": HUGE} for name in ("seconds", "mib_a_second", "peak_mib")}
    roots = Numbers(case="qwen2.5-0.5b", what="128 roots of 1,000,000 tokens", seconds=Numbers())
    yield from snapshots.tables({"files": [file], "roots": [roots]})


def of_tiers() -> Iterator[Grid]:
    operations = ("pool", "tier", "tier, moved up", "put, evicts", "put, moves down")
    costs = {shape: {name: Numbers() for name in operations} for shape in tiers.SHAPES}
    yield from tiers.tables(costs, [Numbers(policy="s3fifo")])


def of_scaling() -> Iterator[Grid]:
    ways = []
    for name in ("8 together", "the loop alone"):
        way = Way(name, PlaySettings(envs=1_000_000))
        way.rates, way.rows_per_call = [HUGE, HUGE / 2], [HUGE, HUGE]
        ways.append(way)
    yield scaling_table(Scaling({"gil": False}, 1_000_000, ways, ways, ways, ways))


def of_gpu() -> Iterator[Grid]:
    names = {"workload": "atari-multitask", "rows": 100_000, "operation": "commit", "how": "per entry"}
    yield gpu.table([Numbers(names)])
    yield gpu.streams_table([Numbers(workload="atari-multitask", rows=100_000)])
    both = {name: {"released": HUGE, "ours": HUGE} for name in COLUMNS}
    yield gpu.steps_table([{**both, "workload": "atari-multitask", "rows": 100_000}])


def of_peers() -> Iterator[Grid]:
    """Of the recorded states, whose names and figures are what they are."""
    records = read_records()
    newest = dict([list(records.items())[-1]])
    for case in next(iter(newest.values()))["cases"]:
        if case["measures"]:
            yield peers.case_grid(case)
            yield peers.by_contestant(case)
        if case["facts"]:
            yield peers.facts(case)
    yield from (peers.calls(records), peers.headline(newest), peers.history(records), peers.states(newest))
    yield peers.steps_by_ours(next(iter(newest.values())))


def of_others() -> Iterator[Grid]:
    figures = Numbers(dict.fromkeys(("median_us", "first_quartile_us", "third_quartile_us"), HUGE))
    operations = dict.fromkeys(core.OPERATIONS, figures)
    yield core.table([{"workload": "atari-multitask", "rows": 100_000, "operations": operations, "floor": operations}])
    yield readers.table({1: [HUGE, HUGE / 3], 1024: [HUGE, HUGE / 3]})
    yield compiled_model.table({100_000: {"eager, as long as the rows are": Numbers()}})
    scrapes = {f"{envs} environments, each": {"get_stats_summary().as_dict()_us": HUGE} for envs in (1, 10**6, 10**7)}
    yield from metrics.tables({"scrapes": scrapes, "operations_us": {"recording commit": HUGE}})


@pytest.mark.parametrize(
    "grids",
    [
        of_thresholds,
        of_shards,
        of_operations,
        of_cluster,
        of_snapshots,
        of_tiers,
        of_scaling,
        of_gpu,
        of_peers,
        of_others,
    ],
)
def test_tables_of_benchmarks_fit_whatever_was_measured(grids: Any) -> None:
    found = list(grids())
    assert found
    for grid in found:
        fits(grid)


def test_the_tables_of_a_stress_run_fit() -> None:
    latencies = SimpleNamespace(count=10**12, percentile=lambda percent: HUGE, longest_seconds=HUGE)
    names = ("a profile of a very long name", "scopes")
    total = SimpleNamespace(total=lambda: 10**15)
    for grid in summary([]):
        fits(grid)
    results: Any = [
        SimpleNamespace(
            settings=SimpleNamespace(profile=SimpleNamespace(name=name)),
            seconds=1e6,
            operations=total,
            checks=total,
            faults=total,
            repaired=SimpleNamespace(slots=10**12),
            failures=[None] * 1000,
            latencies=dict.fromkeys(("read", "gather", "write", "commit"), latencies),
            loop_lag=latencies,
        )
        for name in names
    ]
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr("stress.summary.shown_latencies", lambda result: dict.fromkeys(LABELS, latencies))
        for grid in summary(results):
            fits(grid)


LABELS = ("all reads", "all writes")


def test_a_table_of_pairs_goes_on_in_the_next_line() -> None:
    table = pairs("a job")
    table.add_row("a long sentence", "word " * 100)
    assert max(map(len, printed(table))) <= WIDTH


def test_columns_that_do_not_fit_stand_in_parts_that_have_the_names_again() -> None:
    grid = Grid("title", ("name", *(f"column {number}" for number in range(9))), [("row", *["1,234,567,890"] * 9)])
    lines = printed(grid)
    assert sum(line.startswith("row") for line in lines) == sum(line.startswith("name") for line in lines) == 2
    fits(grid)


# Where figures are from ----------------------------------------------------------------------------------------------


def test_date_commit_and_machine_are_said_in_lines_that_fit() -> None:
    found = about()
    words = in_words(found)
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d" + FROM, words)
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
        assert head.stdout.startswith(found["commit"].rstrip("+"))
        assert found["commit"]
    for each in (found["processor"], f"{found['cores']} cores", found["python"], torch.__version__):
        assert each in words
    assert max(map(len, printed(origin()))) <= WIDTH


def test_outside_a_checkout_the_version_stands_for_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    somebody = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "-q"], [*somebody, "commit", "-q", "--allow-empty", "-m", "a commit of theirs"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], timeout=HANG_SECONDS, check=True)
    monkeypatch.setattr("reporting.machine.ROOT", tmp_path)  # a repository of somebody's
    found = about()
    assert found["commit"] == ""
    assert f"UTC, concurrent_kv {found['concurrent_kv']}" in in_words(found)


@pytest.mark.parametrize(
    "program", [lambda: readers.main(["--rounds", "1", "--seconds", "0.01"]), lambda: tiers.main(["--quick"])]
)
def test_a_program_ends_with_them(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        program()
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert re.search(FROM, " ".join(lines[-4:]))


def test_every_program_here_that_prints_a_table_says_where_it_is_from() -> None:
    """Whatever prints a `Grid` or `pairs` has an `origin`, and no other console than one of 80 columns."""
    sources = [path for folder in ("benchmarks", "examples", "stress") for path in (ROOT / folder).rglob("*.py")]
    for path in [*sources, *(ROOT / "tests").glob("compare_*.py")]:
        source = path.read_text("utf-8")
        assert not re.search(r"\bConsole\(|from rich\.(progress|live) import|\bTable\((?!show_header)", source) or (
            path.name == "report.py" and "cartpole" in str(path)
        ), path
        if "console_of()" in source and ".print(" in source:
            assert "origin(" in source, path


# How far work is -----------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_durations_and_estimates_are_in_words() -> None:
    assert [duration(seconds) for seconds in (4.4, 99, 600, 12_000)] == ["4 s", "99 s", "10 min", "3 h 20 min"]
    assert to_go(0.25, 30.0) == "about 90 s to go"
    assert to_go(0.0, 30.0) == "no telling yet how long"


def test_in_a_log_long_work_says_now_and_then_how_far_it_is() -> None:
    clock = Clock()
    console = Console(file=StringIO(), width=WIDTH)
    with Work("rounds", 6, console=console, clock=clock) as work:
        for number in range(6):
            clock.now += 20.0
            work.part(f"round {number}")
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().splitlines() == [
        "rounds: 2 of 6 in 40 s, about 80 s to go; last round 1",
        "rounds: 4 of 6 in 80 s, about 40 s to go; last round 3",
    ]


def test_short_work_says_nothing_in_a_log() -> None:
    console = Console(file=StringIO(), width=WIDTH)
    with Work("rounds", 3, console=console) as work:
        for _ in range(3):
            work.part()
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == ""


def test_in_a_terminal_a_bar_says_how_far_it_is_and_when_it_is_over() -> None:
    clock = Clock()
    console = Console(file=StringIO(), width=WIDTH, force_terminal=True)
    with Work("rounds", 4, console=console, clock=clock) as work:
        for _ in range(3):
            clock.now += 40.0
            work.part()
    assert isinstance(console.file, StringIO)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert "3/4 0:02:00 0:00:40" in drawn


def test_what_is_watched_in_a_log_is_a_line_and_the_next_work_keeps_the_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = threading.Event()

    class Counted:
        def __rich__(self) -> str:
            raise AssertionError("drawn in a log")

        def line(self) -> str:
            asked.set()
            return "so far"

    monkeypatch.setattr(progress, "LINE_SECONDS", HANG_SECONDS)
    monkeypatch.setattr(progress._log, "said", progress._log.said - 2 * HANG_SECONDS)
    console = Console(file=StringIO(), width=WIDTH)
    with watched(Counted(), console):
        assert asked.wait(HANG_SECONDS)
    for _ in range(3):
        with watched(Counted(), console):
            pass
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue() == "so far\n"


def test_a_console_is_80_columns_wide_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert console_of().width == WIDTH


def test_a_page_of_a_stress_run_says_where_it_is_from(tmp_path: Path) -> None:
    from stress.report import write_report

    found = about()
    document = {"command": "python -m stress", "about": found, "packages": {}, "passed": True, "profiles": {}}
    page = tmp_path / "page.html"
    write_report(json.loads(json.dumps(document)), page)
    said = page.read_text("utf-8")
    for each in (found["date"], found["commit"], found["processor"]):
        assert each in said
