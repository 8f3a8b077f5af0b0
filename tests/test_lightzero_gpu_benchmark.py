"""The GPU benchmark's part about LightZero: both sides are measured, and on a GPU each time by the device's clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lzero", reason="needs LightZero: make lightzero")

from benchmarks.benchmark_kv_cache import released_side
from benchmarks.gpu import main
from benchmarks.gpu_lightzero import COLUMNS, missing
from tests.lightzero_support import SHAPES


def test_the_whole_step_is_measured_old_against_new(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    small = ["--workloads", "cartpole", "memory", "--rows", "2", "--times", "1", "--searches", "1", "--device", "cpu"]
    assert main([*small, "--json", str(report)]) == 0
    (step,) = json.loads(report.read_text())["steps"]
    assert (step["workload"], step["rows"], step["differ"]) == ("cartpole", 2, 0)
    assert set(step) == set(COLUMNS)
    assert step["cache_calls"]["ours"] < step["cache_calls"]["released"]


def test_no_search_no_step() -> None:
    assert missing(["cartpole"], 0)
    assert missing(["cartpole"], 1) is None


def test_on_a_gpu_a_step_is_timed_whole_or_for_its_cache_path_and_the_device_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = released_side(SHAPES["cartpole"], seed=1)
    side._on_gpu = True
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(waits)))
    side.search()
    assert (len(side.step.micros), len(side.cache.micros)) == (13, 12)
    assert len(waits) >= 2 * 25 + 2 * 12
