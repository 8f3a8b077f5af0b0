"""The dashboard's queries, evaluated by a real Prometheus that scrapes a running job; and its linter on the names."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import concurrent_kv.metrics
from concurrent_kv.metrics import METRICS, Kind
from tests.prometheus_server import PROMETHEUS, WHY_NOT, Server, prometheus_of, until
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = Path(concurrent_kv.metrics.__file__).parent / "grafana.json"
JOB = [
    "--envs",
    "4",
    "--threads",
    "2",
    "--episodes",
    "100000",
    "--no-cache-steps",
    "0",
    "--no-progress",
    "--metrics",
    "0",
]
# What the job has none of, or not in every pool: nothing is then divided by nothing. (Its gathers are its evaluator's.)
NOT_IN_EVERY_POOL = ("Hit rate", "Commit", "Wait for a lock", "Gather")
PERHAPS_IN_NONE = ("Wait for a lock", "Gather")

needs_prometheus = pytest.mark.skipif(PROMETHEUS is None, reason=WHY_NOT)


def panels() -> list[dict[str, Any]]:
    document = json.loads(DASHBOARD.read_text("utf-8"))
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str]]:
    """Each panel's title, and its queries as Grafana sends them."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "5s").replace("$manager", ".*"))
        for panel in panels()
        for target in panel["targets"]
    ]


def series_of_the_table() -> set[str]:
    names = set[str]()
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        names |= {metric.prometheus + ending for ending in endings}
    return names


def test_the_dashboard_asks_for_what_there_is_and_shows_every_counter() -> None:
    asked = {name for _, query in queries() for name in re.findall(r"concurrent_kv_\w+", query)}
    assert asked <= series_of_the_table()
    left_out = {name for name in series_of_the_table() - asked if name.endswith(("_total", "_bucket"))}
    # Of these the dashboard has what they are part of.
    assert left_out == {"concurrent_kv_removals_total", "concurrent_kv_clears_total"}


def test_its_panels_do_not_overlap_and_have_numbers_of_their_own() -> None:
    document = json.loads(DASHBOARD.read_text("utf-8"))
    taken = set[tuple[int, int]]()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in document["panels"]]
    assert len(set(numbers)) == len(numbers)


@pytest.fixture(scope="module")
def job() -> Iterator[str]:
    """Where the main job serves its numbers while it plays."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "examples.cartpole", *JOB],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix("metrics: ").strip()
    finally:
        process.kill()
        process.wait(HANG_SECONDS)


@pytest.fixture(scope="module")
def server(job: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with prometheus_of(job, tmp_path_factory.mktemp("prometheus")) as server:
        until(
            lambda: server.query("rate(concurrent_kv_evaluator_calls_total[5s]) > 0") or None,
            lambda: "the job evaluates nothing",
        )
        yield server


@needs_prometheus
@pytest.mark.parametrize(("title", "query"), queries())
def test_a_real_prometheus_answers_every_query_with_numbers(server: Server, title: str, query: str) -> None:
    found = until(lambda: server.query(query) or None, lambda: f"{query} gives nothing")
    values = [float(series["value"][1]) for series in found]
    assert all(value >= 0 for value in values if not math.isnan(value))
    if title not in NOT_IN_EVERY_POOL:
        assert not any(map(math.isnan, values)), values
    elif title not in PERHAPS_IN_NONE:
        assert not all(map(math.isnan, values)), values
    if "ratio" in query or title == "Hit rate":
        assert all(value <= 1 for value in values if not math.isnan(value))


def rules() -> str:
    """The rules for alarms, as the page of operations has them."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    (block,) = [token for token in MarkdownIt().parse(page) if token.type == "fence" and token.info == "yaml"]
    return block.content


def test_rules_and_queries_of_the_page_of_operations_ask_for_what_there_is() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert set(re.findall(r"concurrent_kv_\w+", page)) <= series_of_the_table()
    endings = {name.removeprefix("concurrent_kv_") for name in series_of_the_table()}
    (table,) = re.findall(r"^\| what \| healthy .*?\n\n", page, re.MULTILINE | re.DOTALL)
    named = {name for row in table.split("\n") if row for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
    assert named - {"init", "recur"} <= endings


@needs_prometheus
def test_prometheus_accepts_the_rules_and_answers_their_queries(server: Server, tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    file = tmp_path / "rules.yml"
    file.write_text(rules(), "utf-8")
    promtool = str(Path(PROMETHEUS).with_name("promtool"))
    checked = subprocess.run(
        [promtool, "check", "rules", "--lint-fatal", str(file)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"SUCCESS: {rules().count('alert: ')} rules found" in checked.stdout
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    (peaks,) = re.findall(r"```text\n(max_over_time.*?)```", page, re.DOTALL)
    for query in peaks.splitlines():
        assert server.query(query), query


@needs_prometheus
def test_prometheus_knows_every_series_its_kind_and_what_it_says(server: Server) -> None:
    names = set(server.get("label/__name__/values"))
    assert series_of_the_table() <= names
    about = server.get("metadata")
    for metric in METRICS:
        # As a scrape of OpenMetrics has them, which Prometheus asks for: without the ending of a counter.
        (said,) = about.get(metric.family) or about[metric.prometheus]
        assert said["type"] == metric.kind.value
        assert said["help"] == metric.about


@needs_prometheus
def test_its_linter_has_nothing_to_say_of_the_names(job: str) -> None:
    assert PROMETHEUS is not None
    promtool = Path(PROMETHEUS).with_name("promtool")
    with urllib.request.urlopen(job, timeout=HANG_SECONDS) as answer:  # the classic text
        text = answer.read()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, timeout=HANG_SECONDS)
    if b"python_" in text or b"process_" in text:
        pytest.fail("the job serves what is not the cache's")
    assert (done.returncode, done.stderr.decode()) == (0, "")
