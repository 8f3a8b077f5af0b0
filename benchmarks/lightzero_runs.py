"""Whole training runs of LightZero 0.2.0, its cache against this one, in turns.

    python -m benchmarks.lightzero_runs [--rounds N] [--of NAME] [OPTION ...]

Needs LightZero (make lightzero). A run is LightZero's own configuration and entry (`tests/lightzero_training.py`) in a
process of its own. The two play on as they find, so one may search more than the other: what counts is the time for a
thousand states searched from.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from reporting.arguments import file_to_write
from reporting.progress import Work
from reporting.tables import Grid, console_of, origin

PROJECT = Path(__file__).resolve().parents[1]
MODES = ("off", "on")


def run(mode: str, options: Sequence[str]) -> dict[str, Any]:
    """One run; what it says at its end."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.lightzero_training", mode, str(Path(folder, "run")), *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def table(runs: Sequence[dict[str, Any]]) -> Grid:
    """Medians of each mode's runs: milliseconds for a thousand states searched from, by what they were spent in."""
    parts = list(runs[0]["seconds"])
    title = "seconds for 1,000 states searched from: median (least to most)"
    shown = Grid(title, ("", *(f"cache {mode}" for mode in MODES), "times faster"))
    for part in parts:
        spent = {
            mode: [1e3 * run["seconds"][part] / run["model"]["queries"] for run in runs if run["mode"] == mode]
            for mode in MODES
        }
        cells = [f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in spent.values()]
        shown.rows.append((part, *cells, f"{median(spent['off']) / median(spent['on']):.2f}"))
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run in turns, show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightzero_runs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--of", default="cartpole", help="as in tests.lightzero_training")
    parser.add_argument("--collectors", type=int, default=8, help="environments to collect from (default: 8)")
    parser.add_argument("--steps", type=int, default=200, help="of the environments, at most (default: 200)")
    parser.add_argument("--updates", type=int, default=8, help="of the model, at most (default: 8)")
    parser.add_argument("--json", type=file_to_write, help="write every run to this file")
    options = parser.parse_args(arguments)
    passed = ["--of", options.of]
    for name in ("collectors", "steps", "updates"):
        passed += [f"--{name}", str(getattr(options, name))]
    runs = []
    with Work("runs", options.rounds * len(MODES)) as work:
        for number in range(options.rounds):
            for mode in MODES if number % 2 else reversed(MODES):
                runs.append(run(mode, passed))
                print(json.dumps(runs[-1]), file=sys.stderr)
                work.part(f"cache {mode}")
    console_of().print(table(runs), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
