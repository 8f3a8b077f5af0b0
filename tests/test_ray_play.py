"""The main job with its searches in Ray actors, as a person starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray: make ray")

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
