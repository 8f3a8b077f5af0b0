"""The GPU benchmark's own logic, on a CPU: it runs through, its pool is sound, and calls are counted rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import COLUMNS, count_calls, main
from benchmarks.gpu_cases import Pooled
from benchmarks.workloads import WORKLOADS


def test_it_measures_every_operation_both_ways_and_writes_what_it_is_about(tmp_path: Path) -> None:
    report = tmp_path / "results" / "gpu.json"
    small = [
        "--workloads",
        "cartpole",
        "lunarlander",
        "--rows",
        "2",
        "--times",
        "3",
        "--device",
        "cpu",
        "--searches",
        "0",
    ]
    assert main([*small, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert {(one["workload"], one["operation"], one["how"]) for one in found["operations"]} == {
        (workload, operation, how)
        for workload in ("cartpole", "lunarlander")
        for operation in ("gather", "commit")
        for how in ("pooled", "per entry")
    }
    assert all(set(COLUMNS) <= set(one) for one in found["operations"])
    assert [one["threads"] for one in found["streams"]] == [1, 4, 1, 4]
    assert found["steps"] == []
    assert found["about"]["command"].startswith("python -m benchmarks.gpu --workloads cartpole")


def test_without_a_gpu_it_says_that_nothing_was_measured() -> None:
    assert torch.cuda.is_available() or main([]) == 1


def test_where_lightzero_is_not_installed_it_says_that_its_step_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu_lightzero.find_spec", lambda name: None)
    assert main(["--workloads", "cartpole", "--rows", "1", "--times", "1", "--device", "cpu"]) == 0
    assert "step was not measured: LightZero is not installed here" in capsys.readouterr().out


def test_calls_of_the_runtime_are_counted_by_what_they_do() -> None:
    names = ["cudaLaunchKernel", "aten::copy_", "cudaMemcpyAsync", "cudaEventQuery", "cudaStreamSynchronize"]
    assert count_calls(names) == (2, 1)


def test_a_step_stores_children_as_long_as_their_parents() -> None:
    case = Pooled(WORKLOADS["lunarlander"], 2, torch.device("cpu"))
    case.step()
    found = case.pool.get((0, "child", 1))
    assert found is not None
    assert found.lengths == (case.steady,)
    case.close()
