"""The stress runs themselves: what they check, what they report, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from concurrent_kv import KVPool
from stress.__main__ import main
from stress.content import BrokenPromiseError, Content, Token
from stress.faults.plan import FAULTS, Faults, parse_faults
from stress.gate import Gate
from stress.measures import Latencies
from stress.monitor import Monitor
from stress.possible import Barrier, KeyLedger
from stress.profiles import PROFILES, parse_mix
from stress.runner import run_profile
from stress.workloads import WORKLOADS
from stress.world import Settings, World
from tests.threading_support import JOIN_SECONDS, Background

LAYOUT = WORKLOADS["cartpole"].layout
ROW = [Token(7, 1, 70_000, 3, place) for place in range(3)]


def settings(name: str, **changes: Any) -> Settings:
    return Settings(PROFILES[name], WORKLOADS["cartpole"], **{"seconds": 1.5, **changes})


# Contents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
def test_an_entry_says_of_every_token_whose_it_is(workload: str) -> None:
    content = Content(WORKLOADS[workload].layout)
    assert content.read(content.row(ROW)) == ROW


def test_a_single_number_that_is_another_entrys_is_torn() -> None:
    content = Content(LAYOUT)
    kv = content.row(ROW)
    for where in [(0, 0, 0, 0, 0), (1, 0, 1, 2, 31), (1, 0, 0, 1, 5)]:
        torn = content.row(ROW)
        torn.values[where] += 1
        with pytest.raises(BrokenPromiseError, match="torn"):
            content.read(torn)
    assert content.read(kv) == ROW


def test_layers_that_changed_places_are_torn() -> None:
    content = Content(LAYOUT)
    packed = content.packed([ROW])
    kv = type(content.row(ROW)).from_packed(packed.flip(0))
    with pytest.raises(BrokenPromiseError, match="torn"):
        content.read(kv)


def test_a_batch_is_compared_row_by_row_with_its_padding() -> None:
    content, short = Content(LAYOUT), ROW[:1]
    with KVPool(LAYOUT, 4) as pool:
        pool.put_many(["long", "short"], content.rows([ROW, short]))
        with pool.gather(["long", "missing", "short"]) as batch:
            content.check(batch, [ROW, [], short])
            assert content.read_row(batch, 2) == short
            with pytest.raises(BrokenPromiseError, match="row 2"):
                content.check(batch, [ROW, [], [short[0]._replace(key=8)]])
            batch.data[0, 2, 0, 0, 0] = 1.0
            with pytest.raises(BrokenPromiseError, match="padding"):
                content.check(batch, [ROW, [], short])
            with pytest.raises(BrokenPromiseError, match="padding"):
                content.read_row(batch, 2)


@pytest.mark.parametrize("positions", ["rotary", "absolute", "lazy"])
def test_rows_at_the_windows_end_are_what_the_search_expects(positions: str) -> None:
    world = World(settings("search", positions=positions))
    parent = world.plain(0, 1, world.longest_written - 1, 2)
    new = [Token(5, 0, 1, 2, len(parent) + place) for place in range(2)]
    world.manager.set_init_cache(0, "root", world.content.row(parent))
    with world.manager.search([0], overflow=world.overflow) as search:
        with search.gather(["root"], [0]) as batch:
            world.content.append(batch, [new])
            search.commit(["child"], batch)
        with search.gather(["child"], [0]) as batch:
            world.content.check(batch, [world.grown(parent, new)])
    world.close()


# What a read may return ----------------------------------------------------------------------------------------------


def test_a_value_is_possible_until_something_later_replaced_it() -> None:
    ledger = KeyLedger("key")
    first = ledger.begin()
    ledger.check(first.version, ledger.before_read())  # it may be there already
    ledger.stored(first)
    before = ledger.before_read()
    second = ledger.begin()
    ledger.stored(second)
    ledger.check(first.version, before)  # the read began before the second
    ledger.check(second.version, ledger.before_read())
    with pytest.raises(BrokenPromiseError, match="version 1 was read"):
        ledger.check(first.version, ledger.before_read())


def test_writes_at_once_may_have_come_in_either_order() -> None:
    ledger = KeyLedger("key")
    first, second = ledger.begin(), ledger.begin()
    ledger.stored(second)
    ledger.stored(first)
    before = ledger.before_read()
    ledger.check(first.version, before)
    ledger.check(second.version, before)


def test_nothing_older_than_a_clear_is_possible() -> None:
    scope = Barrier()
    ledger = KeyLedger("key", [scope])
    write = ledger.begin()
    ledger.stored(write)
    began = scope.begin()
    ledger.check(write.version, ledger.before_read())
    scope.ended(began)
    with pytest.raises(BrokenPromiseError):
        ledger.check(write.version, ledger.before_read())


def test_a_refused_write_and_one_that_nobody_made_are_impossible() -> None:
    ledger = KeyLedger("key")
    write = ledger.begin()
    ledger.refused(write)
    with pytest.raises(BrokenPromiseError, match="stored nothing"):
        ledger.check(write.version, ledger.before_read())
    with pytest.raises(BrokenPromiseError, match="never written"):
        ledger.check(2, ledger.before_read())


def test_a_write_that_was_cut_off_may_have_been_made() -> None:
    ledger = KeyLedger("key")
    write = ledger.begin()
    ledger.cut_off(write)
    ledger.check(write.version, ledger.before_read())
    later = ledger.begin()
    ledger.stored(later)
    with pytest.raises(BrokenPromiseError):
        ledger.check(write.version, ledger.before_read())


def test_old_writes_are_forgotten_and_still_impossible() -> None:
    ledger = KeyLedger("key")
    writes = [ledger.begin() for _ in range(2000)]
    for write in writes:
        ledger.stored(write)
    for _ in range(2):
        ledger.stored(ledger.begin())
    with pytest.raises(BrokenPromiseError):
        ledger.check(writes[0].version, ledger.before_read())


def test_a_miss_is_a_loss_unless_something_may_have_removed_it() -> None:
    scope = Barrier()
    ledger = KeyLedger("key", [scope])
    ledger.check_miss(ledger.before_read())
    ledger.stored(ledger.begin())
    with pytest.raises(BrokenPromiseError, match="lost"):
        ledger.check_miss(ledger.before_read())
    scope.begin()
    ledger.check_miss(ledger.before_read())


# Measures, gate, arguments -------------------------------------------------------------------------------------------


def test_percentiles_are_within_three_percent_and_never_above_the_longest() -> None:
    latencies = Latencies()
    latencies.add(range(1000, 1_001_000, 1000))  # 1 to 1000 us
    for percent in (50, 90, 99, 99.9):
        assert latencies.percentile(percent) == pytest.approx(percent / 100 * 1e-3, rel=0.03)
    assert latencies.percentile(100) == latencies.longest_seconds == pytest.approx(1e-3)
    assert Latencies().percentile(99) == 0.0


def test_a_shut_gate_holds_everybody_until_it_opens() -> None:
    gate = Gate()
    gate.enter()
    passed = threading.Event()

    def come() -> None:
        gate.park()
        passed.set()

    assert not gate.close(0.0)
    comer = Background(come)
    assert gate.close(JOIN_SECONDS)
    assert not passed.is_set()
    gate.open()
    comer.result()
    gate.leave()
    assert gate.close(0.0)


def test_mixes_and_faults_are_read_by_name() -> None:
    assert parse_mix("reads=60, writes=2.5,pops") == {"reads": 60, "writes": 2.5, "pops": 1}
    assert parse_faults("copies,cancel") == {"copies", "cancel"}
    assert parse_faults("none") == frozenset()
    assert parse_faults("all") <= set(FAULTS)
    for parse, text in [
        (parse_mix, "reeds=1"),
        (parse_mix, "reads=-1"),
        (parse_mix, "reads=0"),
        (parse_mix, "reads=nan"),
        (parse_faults, "copy"),
    ]:
        with pytest.raises(ValueError, match=r"none of|number|weight"):
            parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--profile", "nothing"],
        ["--mix", "reads=x"],
        ["--seconds", "0"],
        ["--threads", "0", "--tasks", "0"],
        ["--threads", "many"],
        ["--shards", "100000"],
        ["--capacity", "1"],
        ["--json", "."],
        ["--summary", "."],
        ["--report", "README.md/run.html"],
        ["--metrics", "65536"],
        ["--metrics", "many"],
    ],
)
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_a_short_run_of_every_profile_finds_nothing(profile: str) -> None:
    backend = ("asyncio", "trio")[list(PROFILES).index(profile) % 2]
    result = run_profile(settings(profile, backend=backend, seconds=0.8))
    assert not result.failures
    assert result.checks["whole"] + result.checks["search"] > 0
    assert result.quiet_moments >= 1
    assert result.loop_lag.count > 0


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_short_run_with_every_fault_finds_nothing(backend: str) -> None:
    result = run_profile(settings("mixed", backend=backend, seconds=3.0, faults=parse_faults("all")))
    assert not result.failures
    assert result.faults["interrupt"] > 0
    assert result.faults["slow copy"] > 0


def test_a_short_run_that_is_interrupted_finds_nothing_where_nothing_is_compiled() -> None:
    """In a process of its own, as the package chooses when it is imported."""
    program = "import sys; from stress.__main__ import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--profile", "hot-key", "--faults", "interrupts", "--seconds", "3", "--no-progress"]
    environment = os.environ | {"CONCURRENT_KV_NATIVE": "0"}
    command = [sys.executable, "-c", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=JOIN_SECONDS, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "could not be removed" not in ended.stderr


def test_a_run_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, page = tmp_path / "run.json", tmp_path / "run.html"
    summary = tmp_path / "summary.json"
    arguments = ["--profile", "mixed,envs", "--seconds", "1", "--no-progress", "--threads", "2", "--tasks", "2"]
    assert main([*arguments, "--json", str(figures), "--summary", str(summary), "--report", str(page)]) == 0
    document = json.loads(figures.read_text("utf-8"))
    short = json.loads(summary.read_text("utf-8"))
    for name, profile in document["profiles"].items():
        kept = {key: value for key, value in profile.items() if key not in ("samples", "latency_curves")}
        assert short["profiles"][name] == kept
    assert document["passed"]
    assert list(document["profiles"]) == ["mixed", "envs"]
    mixed = document["profiles"]["mixed"]
    for kind in ("all reads", "all writes"):
        assert mixed["latencies"][kind]["p99.9_us"] >= mixed["latencies"][kind]["p99_us"] > 0
    assert mixed["loop_lag"]["count"] > 0
    assert mixed["samples"]
    html = page.read_text("utf-8")
    assert html.count("<svg") == 2
    for outside in ("<script", 'src="', "<link", "@import"):
        assert outside not in html  # the page needs nothing beside itself
    assert "envs" in capsys.readouterr().out


def test_a_failed_run_says_so_and_returns_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def torn(self: Content, packed: torch.Tensor) -> list[Token]:
        raise BrokenPromiseError("torn, says the test")

    monkeypatch.setattr(Content, "_read", torn)
    page = tmp_path / "run.html"
    assert main(["--seconds", "2", "--no-progress", "--report", str(page)]) == 1
    assert "FAILED: mixed" in capsys.readouterr().err
    assert "torn, says the test" in page.read_text("utf-8")


@pytest.mark.parametrize("faults", ["none", "interrupts"])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_run_and_shows_what_it_found(
    faults: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(self: Monitor) -> None:
        sample(self)
        if len(self.samples) == 2:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    sample = Monitor._sample
    monkeypatch.setattr(Monitor, "_sample", press)
    figures = tmp_path / "run.json"
    arguments = ["--profile", "mixed,envs", "--seconds", "600", "--no-progress", "--faults", faults]
    assert main([*arguments, "--json", str(figures)]) == 130
    document = json.loads(figures.read_text("utf-8"))
    assert document["interrupted"]
    assert document["passed"]
    assert list(document["profiles"]) == ["mixed"]
    assert document["profiles"]["mixed"]["seconds"] < 600
    assert "interrupted" in capsys.readouterr().err


def test_a_mutex_that_nobody_gives_back_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Monitor._look_for_stuck
    mutexes: list[Any] = []

    def take(self: Monitor) -> None:
        mutex = self.run.world.manager.storage.ledger.mutex
        # At the first look, while everybody is at work.
        if not mutexes and mutex.acquire(timeout=JOIN_SECONDS):
            mutexes.append(mutex)
        look(self)

    monkeypatch.setattr(Monitor, "_look_for_stuck", take)
    try:
        result = run_profile(settings("hot-key", bound_seconds=1.0))
    finally:
        for mutex in mutexes:
            mutex.release()  # or its waiters would wait for ever
    stuck = [failure for failure in result.failures if failure.kind == "stuck"]
    assert stuck
    assert "mutex:" in stuck[0].details


def test_a_main_thread_that_is_stuck_for_good_ends_the_run_with_every_stack() -> None:
    """In a process of its own, which is what ends. What the main thread waits for hears of no run that is over."""
    program = """
import sys, threading
from stress import runner
from stress.__main__ import main

runner._Runner._stay = lambda self: threading.Event().wait()
sys.exit(main("--profile hot-key --seconds 0.2 --bound 0.2 --no-progress".split()))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=JOIN_SECONDS)
    assert ended.returncode == 1
    assert "Timeout (0:00:03.400000)" in ended.stderr
    assert "in execute" in ended.stderr


def test_a_finaliser_may_count_a_fault_while_its_thread_counts_one() -> None:
    """The collector runs it wherever an object is made, within `count` too."""
    with closing(World(settings("hot-key"))) as world:
        faults = Faults(world, Gate())

        def within(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code is Faults.count.__code__ and event == "line":
                sys.settrace(None)
                faults.count("inner")
                sys.settrace(within)
            return within

        def count() -> None:
            sys.settrace(within)
            try:
                faults.count("outer")
            finally:
                sys.settrace(None)

        Background(count).result()
        assert faults.made()["outer"] == 1
        assert faults.made()["inner"] >= 1
