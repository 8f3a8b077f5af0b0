"""LightZero's own training entry ends normally with each cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import DEFECTS

SECONDS = 400
PROJECT = Path(__file__).resolve().parents[1]


def train(folder: Path, *options: str) -> dict[str, Any]:
    """What a training run says at its end."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.lightzero_training", *options, str(folder / "experiment")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


@pytest.mark.timeout(SECONDS + 20)
def test_training_ends_normally_on_the_released_cache(tmp_path: Path) -> None:
    result = train(tmp_path, "off")
    assert result["model"]["queries"] > 1000
    assert "requests" not in result["model"]


@pytest.mark.timeout(SECONDS + 20)
def test_training_with_reanalysis_ends_normally_on_our_cache(tmp_path: Path) -> None:
    result = train(tmp_path, "--reanalyze", "on")
    assert result["model"]["queries"] == result["model"]["hits"] > 1000
    assert result["model"]["requests"] > result["model"]["queries"]
    assert result["target"]["queries"] > 1000  # the reanalyze phase looks nothing up
    assert result["target"]["requests"] == 0


@pytest.mark.timeout(SECONDS + 20)
def test_training_with_reanalysis_in_validation_differs_by_the_released_codes_defects_only(tmp_path: Path) -> None:
    result = train(tmp_path, "--reanalyze", "validate")
    for name in ("model", "target"):
        compared = result[name]
        assert compared["unexplained"] == 0, compared["first_unexplained"]
        assert compared["calls"] > 20
        assert compared["contexts"] > 1000
        assert set(compared["defects"]) <= set(DEFECTS)
    # Training begins with heads of zeros, and so with equal latent states.
    assert result["model"]["defects"]["environments collide"] > 0
    assert result["model"]["entries"] > 1000
    assert result["target"]["defects"] == {}
