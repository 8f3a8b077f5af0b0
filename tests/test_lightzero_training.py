"""LightZero's own training entry ends normally with each cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import DEFECTS

SECONDS = 3600
PROJECT = Path(__file__).resolve().parents[1]


RUNS = {"off": ["off"], "on": ["--reanalyze", "on"], "validate": ["--reanalyze", "validate"]}

Results = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def result_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """What a training run says at its end. The runs are beside each other: each is one thread in a process."""
    folder = tmp_path_factory.mktemp("training")
    running: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as ending:
        for name, options in RUNS.items():
            streams = {kind: ending.enter_context((folder / f"{name}.{kind}").open("wb")) for kind in ("out", "err")}
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "tests.lightzero_training", *options, str(folder / name)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg"},
                stdout=streams["out"],
                stderr=streams["err"],
            )
            ending.callback(running[name].wait)
            ending.callback(running[name].kill)  # the last callback comes first

        def result(name: str) -> dict[str, Any]:
            code = running[name].wait(SECONDS)
            printed, complained = ((folder / f"{name}.{kind}").read_text("utf-8") for kind in ("out", "err"))
            assert code == 0, printed[-2000:] + complained[-4000:]
            said: dict[str, Any] = json.loads(printed.splitlines()[-1])
            return said

        yield result


@pytest.mark.timeout(SECONDS + 20)
def test_training_ends_normally_on_the_released_cache(result_of: Results) -> None:
    result = result_of("off")
    assert result["model"]["queries"] > 1000
    assert "requests" not in result["model"]


@pytest.mark.timeout(SECONDS + 20)
def test_training_with_reanalysis_ends_normally_on_our_cache(result_of: Results) -> None:
    result = result_of("on")
    assert result["model"]["queries"] == result["model"]["hits"] > 1000
    assert result["model"]["requests"] > result["model"]["queries"]
    assert result["target"]["queries"] > 1000  # the reanalyze phase looks nothing up
    assert result["target"]["requests"] == 0


@pytest.mark.timeout(SECONDS + 20)
def test_training_with_reanalysis_in_validation_differs_by_the_released_codes_defects_only(result_of: Results) -> None:
    result = result_of("validate")
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
