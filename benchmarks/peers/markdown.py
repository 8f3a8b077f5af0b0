"""`benchmarks/RESULTS.md`, made from the recorded states.

python -m benchmarks.peers --markdown
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.summary import RECORDS, Summary
from benchmarks.peers.tables import Grid, by_contestant, calls, case_grid, facts, headline, states, steps_by_ours

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

**Other work ran beside** where the load average below says so: compare ratios, not microseconds, and processor time
before wall time.
"""

NODES = """\
A search that stores many nodes in a process of its own, whose allocator works by default: K and V of what is stored,
all else that the process grew by (books, what is set aside, the batch), and a commit's processor time, growth included
(mean). Contestants that copy whole nodes store fewer where many would not fit.
"""


def markdown_of(records: Mapping[str, Summary], folder: Path = RECORDS) -> str:
    """The whole page.

    Args:
        records: states by name, oldest first.
        folder: where their plots may be.
    """
    parts = [HEAD, "## States\n", states(records).as_markdown()]
    parts += ["## Ours against the others\n", _sentence(headline(records)), headline(records).as_markdown()]
    for name, summary in records.items():
        plot = folder / f"{name}.svg"
        if plot.exists():
            parts.append(f"![every contestant's step by ours, {name}](results/peers/{plot.name})\n")
        steps = steps_by_ours(summary)
        parts += [f"### Every contestant's step: {name}\n", _sentence(steps), steps.as_markdown()]
    counted = calls(records)
    if counted.rows:
        parts += ["## Functions called\n", _sentence(counted), counted.as_markdown()]
    for name, summary in records.items():
        nodes = next((case for case in summary["cases"] if case["name"] == "nodes"), None)
        if nodes is not None and nodes["facts"]:
            parts += [f"## Many nodes: {name}\n", NODES, facts(nodes).as_markdown()]
    parts.append("## Contestants\n")
    about = {who: text for summary in records.values() for who, text in summary["contestants"].items()}
    parts.append(Grid("", ["name", "what"], [[who, text] for who, text in about.items()]).as_markdown())
    for name, summary in records.items():
        parts += [f"## All figures: {name}\n", _all_figures(summary)]
    return "\n".join(parts)


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
