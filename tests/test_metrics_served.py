"""What the main job and the stress runs serve with `--metrics PORT`."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from examples.cartpole.__main__ import main as play
from examples.cartpole.job import JobSettings, Watched, run_job
from examples.cartpole.model import load_model
from examples.cartpole.serving import serving
from stress.__main__ import main as attack
from stress.monitor import Monitor
from stress.profiles import PROFILES
from stress.runner import run_profile
from stress.serving import serving as serving_stress
from stress.workloads import WORKLOADS
from stress.world import Settings
from tests.cartpole_support import SHORT, SHORT_ARGUMENTS, one_torch_thread
from tests.metrics_support import Found, scraped
from tests.support import HANG_SECONDS


def test_the_main_job_serves_its_pools_and_every_evaluator() -> None:
    seen: list[Found] = []

    @contextmanager
    def looking(watched: Watched) -> Iterator[None]:
        yield
        if watched.manager is not None:
            seen.append(scraped(url))

    with one_torch_thread(), serving(0, looking) as (url, watch):
        settings = JobSettings(play=SHORT)
        report = run_job(load_model(), settings, watch)
        run_job(load_model(), settings, watch)  # its manager takes the first one's place
    found, again = seen
    total = report.main.stats.total
    for role in ("init", "recur", "wm"):
        stats = [each for name, each in report.main.stats.pools.items() if name.startswith(role)]
        hits = found["concurrent_kv_hits_total", ("cache", role, role)]
        assert hits == sum(each.hit_count for each in stats)
        assert found["concurrent_kv_queries_total", ("cache", role, role)] == sum(each.request_count for each in stats)
    assert total.hit_count > 0
    assert found["concurrent_kv_evaluator_rows_total", ("cache", "0")] == report.main.calls.rows
    assert found["concurrent_kv_evaluator_call_duration_seconds_count", ("cache", "0", "model")] > 0
    assert again["concurrent_kv_evaluator_rows_total", ("cache", "0")] > 0


def test_the_program_says_where_it_serves_and_stops_with_the_game(capsys: pytest.CaptureFixture[str]) -> None:
    with one_torch_thread():
        assert play([*SHORT_ARGUMENTS, "--metrics", "0"]) == 0
    _nothing_is_served(capsys.readouterr().out)


def test_a_stress_run_serves_its_pools(capsys: pytest.CaptureFixture[str]) -> None:
    assert attack(["--seconds", "0.5", "--no-progress", "--metrics", "0"]) == 0
    _nothing_is_served(capsys.readouterr().out)


def test_each_profile_of_a_stress_run_is_served_in_its_turn() -> None:
    seen: list[Found] = []

    def looking(monitor: Monitor) -> AbstractContextManager[object]:
        @contextmanager
        def look() -> Iterator[None]:
            yield
            seen.append(scraped(url))

        return look()

    with serving_stress(0, looking) as (url, watch):
        for name in ("hot-key", "scopes"):
            result = run_profile(Settings(PROFILES[name], WORKLOADS["cartpole"], seconds=0.5), watch)
            assert not result.failures
    assert all(
        sum(value for (name, _), value in found.items() if name == "concurrent_kv_queries_total") for found in seen
    )
    assert len(seen) == 2


def test_a_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert play([*SHORT_ARGUMENTS, "--metrics", port]) == 2
        assert f"--metrics {port}: " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            attack(["--seconds", "0.5", "--no-progress", "--metrics", port])
        assert "argument --metrics: " in capsys.readouterr().err


def test_playing_without_it_needs_no_client() -> None:
    sources = [path.read_text("utf-8") for folder in ("examples/cartpole", "stress") for path in _files(folder)]
    assert sum("concurrent_kv.metrics" in source for source in sources) == 2  # the two `serving.py`


def _files(folder: str) -> list[Path]:
    return sorted((Path(__file__).parent.parent / folder).rglob("*.py"))


def _nothing_is_served(said: str) -> None:
    (url,) = [line.removeprefix("metrics: ") for line in said.splitlines() if line.startswith("metrics: ")]
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=HANG_SECONDS)
