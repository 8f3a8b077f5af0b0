"""The main job with its searches in Ray actors, as a person starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray: make ray")

from prometheus_client.parser import text_string_to_metric_families

from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent


def test_the_main_job_on_two_actors_is_right_in_every_row(tmp_path: Path) -> None:
    arguments = ["--ray", "--actors", "2", "--envs", "4", "--episodes", "4", "--max-steps", "8", "--verify"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.cartpole", *arguments, "--json", str(tmp_path / "figures.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * HANG_SECONDS,
        check=True,
    )
    assert "CartPole-v1, searched on a cluster" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    assert figures["mean_return"] == 8
    assert figures["verified_rows"] == 4 * (8 * 25 + 7)
    assert (figures["hosts"], figures["mismatches"], figures["integrity"]) == (2, 0, "ok")


def test_a_job_with_metrics_that_is_killed_goes_on_from_its_snapshot(tmp_path: Path) -> None:
    """Two actors that serve their numbers; the job is killed in its middle, and started again."""
    kept, figures = tmp_path / "kept", tmp_path / "figures.json"
    command = [sys.executable, "-m", "examples.cartpole", "--ray", "--actors", "2", "--envs", "4", "--episodes", "4"]
    command += ["--max-steps", "30", "--no-progress", "--verify", "--metrics", "19100", "--checkpoint", str(kept)]
    command += ["--checkpoint-steps", "3", "--json", str(figures)]
    scraped = set[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as job:
        assert job.stdout is not None
        urls = next(line for line in job.stdout if line.startswith("metrics: ")).split()[1:]
        for url in urls:
            with urllib.request.urlopen(url, timeout=HANG_SECONDS) as answer:
                families = text_string_to_metric_families(answer.read().decode())
                scraped.update(family.name for family in families)
        give_up = time.monotonic() + HANG_SECONDS
        while len(list(kept.glob("*.json"))) < 4 and job.poll() is None:
            assert time.monotonic() < give_up
            threading.Event().wait(0.05)  # a process of its own, which tells nobody
        before = {path.name: path.read_bytes() for path in kept.glob("*.safetensors")}
        assert job.poll() is None, "it was over before it could be killed"
        os.killpg(job.pid, signal.SIGKILL)
    assert len(urls) == 2
    assert {"concurrent_kv_queries", "concurrent_kv_evaluator_calls"} <= scraped
    assert len(before) == 4
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * HANG_SECONDS, check=True)
    assert "roots restored" in done.stdout
    found = json.loads(figures.read_text("utf-8"))
    assert found["restored_roots"] >= 4
    assert (found["episodes"], found["mean_return"], found["mismatches"], found["integrity"]) == (4, 30, 0, "ok")
