"""The view in a terminal: what it shows of a real endpoint, at 80 columns, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from concurrent_kv import KVCacheManager
from concurrent_kv.evaluation import Evaluator
from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.prometheus import serve
from concurrent_kv.top import FAILED, Snapshot, main, snapshot_at, snapshot_of, top, view
from tests import evaluating
from tests.metrics_support import evaluate_leaves, new_evaluator
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def job() -> Iterator[tuple[KVCacheManager, Evaluator[int, int], KVMetrics]]:
    manager = evaluating.new_manager()
    with new_evaluator(manager) as evaluator:
        yield manager, evaluator, KVMetrics(manager, evaluator, durations=True)
    manager.check_integrity()
    manager.close()


Job = tuple[KVCacheManager, Evaluator[int, int], KVMetrics]


def drawn(what: object, width: int = 80) -> list[str]:
    console = Console(file=StringIO(), width=width)
    console.print(what)
    file = console.file
    assert isinstance(file, StringIO)
    return file.getvalue().splitlines()


def row_of(lines: list[str], name: str) -> list[str]:
    (found,) = [line.split() for line in lines if line.startswith(f"{name} ")]
    return found


def test_a_scrape_and_the_process_itself_give_the_same_numbers(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    with serve(metrics, 0) as url:
        here, there = snapshot_of(metrics), snapshot_at(url)
    assert here.numbers.keys() <= there.numbers.keys()
    for name, numbers in here.numbers.items():
        assert there.numbers[name] == numbers, name


def test_it_shows_fill_hits_searches_waits_and_rows_a_call(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    before = snapshot_of(metrics)
    evaluate_leaves(manager, evaluator, 5)
    manager.wm_pool.get("none")
    with manager.search([1]):
        now = snapshot_of(metrics)
    now = Snapshot(before.when + 2.0, now.numbers)  # two seconds later
    lines = drawn(view(now, before))
    assert lines[0].startswith("cache")
    assert "slots shared 0" in lines[0]
    # of init: 4 of 64 entries; 5 rows asked for and found in two seconds
    assert row_of(lines, "init")[2:] == ["6%", "░░░░░░░░", "0%", "100%", "2.5", "0", "0", "0"]
    assert row_of(lines, "wm")[-5:] == ["0%", "0.5", "0", "0", "0"]
    assert row_of(lines, "recur")[-2:] == ["1", "0"]
    assert row_of(lines, "0")[:4] == ["0", "5", "0.5", "0"]


def test_without_a_look_before_totals_are_shown_and_no_rates(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    lines = drawn(view(snapshot_of(metrics)))
    assert row_of(lines, "init")[-5:] == ["100%", "-", "-", "0", "0"]
    assert row_of(lines, "0")[:3] == ["0", "3", "-"]


def test_a_job_that_was_started_again_shows_no_negative_rates(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    early = snapshot_of(metrics)
    evaluate_leaves(manager, evaluator, 3)
    late = snapshot_of(metrics)
    lines = drawn(view(Snapshot(late.when + 1.0, early.numbers), late))
    assert not [line for line in lines if "-0" in line or "-1" in line or "-3" in line]
    assert row_of(lines, "0")[1] == "3"


def test_large_numbers_and_full_pools_fit_80_columns(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 2)
    before = snapshot_of(metrics)
    huge = {
        name: {labels: value * 123456.7 + 98765.4 if "max" not in name else 1.0 for labels, value in numbers.items()}
        for name, numbers in before.numbers.items()
    }
    lines = drawn(view(Snapshot(before.when + 1.0, huge), before), width=80)
    headers = [line for line in lines if line.startswith(("pool", "evaluator"))]
    assert [line.split()[-1] for line in headers] == ["waiting", "failed"]
    assert all(len(line) <= 80 and "…" not in line for line in lines)


def test_once_prints_one_table_of_a_real_endpoint_and_ends(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    with serve(metrics, 0) as url:
        done = run("--once", "--seconds", "0.05", url.removesuffix("/metrics").removeprefix("http://"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert row_of(lines, "init")[-5] == "100%"
    assert row_of(lines, "0")[1] == "3"
    assert max(map(len, lines)) <= 80


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "concurrent_kv.top", *arguments],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)},
    )


def test_what_is_no_endpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>\n")

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert main([f"127.0.0.1:{server.server_port}", "--once"]) == FAILED
    finally:
        server.shutdown()
        server.server_close()
        thread.join(HANG_SECONDS)
    assert f"127.0.0.1:{server.server_port}: " in capsys.readouterr().err
    assert main([f"127.0.0.1:{server.server_port}", "--once"]) == FAILED  # no more
    assert main(["ftp://127.0.0.1/", "--once"]) == FAILED
    assert "must begin with http:// or https://" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["127.0.0.1:1", "--seconds", "0"])


def test_it_goes_on_while_the_job_is_away(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    console, looks = Console(file=StringIO(), width=80, force_terminal=True), []
    serving = serve(metrics, 0)
    url = serving.__enter__()

    def ended(seconds: float) -> bool:
        looks.append(seconds)
        if len(looks) == 2:
            serving.__exit__(None, None, None)
        return len(looks) == 4

    assert top(url, seconds=0.5, console=console, ended=ended) == 0
    assert looks == [0.5] * 4
    assert isinstance(console.file, StringIO)
    assert console.file.getvalue().count("no answer") == 2


def test_in_process_it_needs_no_endpoint(job: Job) -> None:
    manager, evaluator, metrics = job
    evaluate_leaves(manager, evaluator, 3)
    console = Console(file=StringIO(), width=80)
    assert top(metrics, once=True, seconds=0.01, console=console) == 0
    assert isinstance(console.file, StringIO)
    assert row_of(console.file.getvalue().splitlines(), "0")[1] == "3"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no such terminals")
@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(("how", "code"), [("q", 0), ("ctrl-c", 130)])
def test_a_key_and_ctrl_c_end_it_and_leave_the_terminal_as_it_was(job: Job, how: str, code: int) -> None:
    import termios

    ours, theirs = os.openpty()
    before = termios.tcgetattr(theirs)
    with serve(job[2], 0) as url:
        process = subprocess.Popen(
            [sys.executable, "-m", "concurrent_kv.top", "--seconds", "0.05", url],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)},
        )
        said = b""
        while said.count(b"init") < 2:  # it is drawn, and once more
            said += os.read(ours, 65536)
        assert not termios.tcgetattr(theirs)[3] & termios.ICANON
        reader = threading.Thread(target=_drain, args=(ours,), daemon=True)  # what it writes until it ends
        reader.start()
        if how == "q":
            os.write(ours, b"q")
        else:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == code, errors
    assert errors == b""
    assert termios.tcgetattr(theirs) == before
    os.close(theirs)
    reader.join(HANG_SECONDS)
    os.close(ours)


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:  # the other side is closed
        pass
