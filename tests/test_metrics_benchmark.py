"""The benchmark of what metrics cost runs, and its recorded figures are those of its parts."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.metrics import calls, operations, scrapes

RECORDED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "metrics" / "two_cores.json"


def test_its_parts_run_and_are_what_was_recorded() -> None:
    recorded = json.loads(RECORDED.read_text("utf-8"))
    found = scrapes(1)
    assert found.keys() == recorded["scrapes"].keys()
    for name, figures in found.items():
        assert figures.keys() == recorded["scrapes"][name].keys()
        assert figures["numbers"] == recorded["scrapes"][name]["numbers"]
    assert found["1 environments"]["numbers"] == found["100 environments"]["numbers"]
    assert {*operations(1), *calls(2)} == recorded["operations_us"].keys()
