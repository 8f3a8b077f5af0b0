"""`benchmarks/RESULTS.md`, made from the recorded states.

python -m benchmarks.peers --markdown
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.summary import RECORDS, Summary
from benchmarks.peers.tables import (
    by_contestant,
    calls,
    case_grid,
    facts,
    headline,
    history,
    states,
    steps_by_ours,
)
from reporting.tables import Grid

__all__ = ["RESULTS", "markdown_of"]

RESULTS = Path(__file__).resolve().parents[1] / "RESULTS.md"
WIDE = 8  # measures, from which on they are rows

HEAD = """\
# What the library costs, beside what would be written instead

Made by `python -m benchmarks.peers --markdown` from `results/peers/*.json`; do not edit. `make bench` with
`ARGS="--record NAME"` records a state, with `ARGS="--help"` it says what else there is; the code: `benchmarks/peers/`.

**How to read it.** Each contestant runs in a process of its own. In every round each of them has one turn, in an order
drawn for that round, so that a slow moment of the machine meets all; a figure is the median over rounds, with the first
and third quartile. Ratios are taken round by round and then summarised, so they bear other work on the machine better
than microseconds do. Times are processor time of the contestant's process (all its threads), for threads wall time.
Before anything is timed, every batch and entry that a contestant returns is compared, bit for bit, with what this
library returns.

What a search frees stays with its process (glibc is told to give nothing back), so that stores which allocate for every
node meet no page faults after their first search: whether they do is chance otherwise, and can cost ten times the step.

**Other work ran beside** where the load average says so: compare ratios, not microseconds, and processor time
before wall time.
"""

NODES = """\
A search that stores many nodes in a process of its own, whose allocator works by default: K and V of what is stored,
all else that the process grew by (books, what is set aside, the batch), and a commit's processor time, growth included
(mean). Contestants that copy whole nodes store fewer where many would not fit.
"""


EARLIER = """\
How the library came here; all figures of these states are in `results/peers/*.json`. Other work beside them differed
from run to run: compare ratios.
"""
DATES = ("date", "commit", "load average at the start, at the end", "processor time that other work took", "command")


def markdown_of(records: Mapping[str, Summary], folder: Path = RECORDS) -> str:
    """The whole page.

    Args:
        records: states by name, oldest first; one at least.
        folder: where their plots may be.
    """
    newest = list(records)[-1]
    last = {newest: records[newest]}
    summary = records[newest]
    ours = headline({"": summary})
    steps = steps_by_ours(summary)
    parts = [HEAD, f"## The newest state: {newest}\n", states(last).as_markdown()]
    parts += ["## Ours against the others\n", _sentence(ours), ours.as_markdown()]
    plot = folder / f"{newest}.svg"
    if plot.exists():
        parts.append(f"![every contestant's step by ours, {newest}](results/peers/{plot.name})\n")
    parts += ["## Every contestant's step\n", _sentence(steps), steps.as_markdown()]
    counted = calls({"": summary})
    if counted.rows:
        parts += ["## Functions called\n", _sentence(counted), _turned(counted).as_markdown()]
    nodes = next((case for case in summary["cases"] if case["name"] == "nodes"), None)
    if nodes is not None and nodes["facts"]:
        parts += ["## Many nodes\n", NODES, facts(nodes).as_markdown()]
    parts.append("## Contestants\n")
    about = summary["contestants"]
    parts.append(Grid("", ["name", "what"], [[who, text] for who, text in about.items()]).as_markdown())
    if len(records) > 1:
        earlier = history(records)
        parts += ["## The states before it\n", EARLIER, _sentence(earlier), earlier.as_markdown()]
        parts.append(_turned(states(records), DATES).as_markdown())
    parts += ["## All figures\n", _all_figures(summary)]
    return "\n".join(parts)


def _turned(grid: Grid, wanted: Sequence[str] = ()) -> Grid:
    """The table with its columns as rows: many states or contestants are long rather than wide."""
    rows = [row for row in grid.rows if not wanted or row[0] in wanted]
    columns = [grid.columns[0], *(row[0] for row in rows)]
    cells = zip(grid.columns[1:], *[row[1:] for row in rows], strict=True)
    return Grid(grid.title, columns, [list(row) for row in cells])


def _all_figures(summary: Summary) -> str:
    parts = []
    for case in summary["cases"]:
        parts.append(f"<details><summary>{case['name']}: {case['title']}</summary>\n")
        if case["measures"]:
            grid = by_contestant(case) if len(case["measures"]) > WIDE else case_grid(case)
            parts += [_sentence(grid), grid.as_markdown()]
        if case["facts"] and not case["name"].startswith(("calls/", "nodes")):
            parts.append(facts(case).as_markdown())
        for what, reasons in (("Not there", case["unfit"]), ("Failed", case["failed"])):
            if reasons:
                parts.append(f"{what}: " + "; ".join(f"`{who}` ({reason})" for who, reason in reasons.items()) + ".\n")
        parts.append("</details>\n")
    return "\n".join(parts)


def _sentence(grid: Grid) -> str:
    return f"{grid.title[:1].upper()}{grid.title[1:]}.\n"
