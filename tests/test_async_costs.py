"""The benchmark of what operations cost for tasks runs, and measures every operation on every surface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.async_cases import CASES
from benchmarks.async_costs import LOOPS, main


def test_a_quick_run_measures_every_operation_on_every_surface(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        assert main(["--quick", "--json", str(tmp_path / "costs.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / "costs.json").read_text("utf-8"))
    shown = capsys.readouterr().out
    for case in CASES:
        wanted = {"sync", *(f"{loop} worker" for loop in LOOPS)}
        if not case.always_in_worker:
            wanted |= {f"{loop} inline" for loop in LOOPS}
        assert set(report["operations"][case.name]) == wanted
        assert case.name in shown
    for measured in ("hops", "copies", "reads", "writes"):
        assert set(report[measured]) == set(LOOPS)
    assert report["shards"]["holds"]["1"]["held for writing"]["number"] > 0
