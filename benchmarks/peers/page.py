"""The figures of `docs/why.md`: tables between two comments of the page, and a picture beside it.

python -m benchmarks.peers --markdown
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log10
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.peers.contestants import OURS
from benchmarks.peers.summary import CaseSummary, Summary, figure, times_ours
from benchmarks.peers.tables import number
from reporting.tables import Grid

__all__ = ["PAGE", "PICTURE", "RUN", "page_with", "picture_of"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, PICTURE = DOCS / "why.md", DOCS / "why-step.svg"
RUN = "copies"  # the recorded state that the page shows
SHOWN = ("dict", "dict-stack", "cachetools", "cachebox", "moka", "theine", "rows", "lightzero")
IN_TABLE = ("dict", "dict-stack", "rows", "lightzero")  # as many as a page is wide
COPYING = ("dict", "dict-clone", "cachebox")
NONE = "-"


def page_with(page: str, summary: Summary) -> str:
    """The page with its tables as this run makes them.

    Raises:
        KeyError: the page lacks the place of a table.
    """
    for name, grid in _tables(summary).items():
        place = re.search(f"<!-- {name}: [^\n]*-->\n(.*?)<!-- end -->", page, re.DOTALL)
        if place is None:
            raise KeyError(f"docs/why.md has no place for the table {name!r}")
        page = f"{page[: place.start(1)]}\n{grid.as_markdown()}\n{page[place.end(1) :]}"
    return page


def _tables(summary: Summary) -> Mapping[str, Grid]:
    return {"steps": _steps(summary), "entries": _entries(summary), "bytes": _bytes(summary)}


def _case(summary: Summary, name: str) -> CaseSummary:
    return next(case for case in summary["cases"] if case["name"] == name)


def _step_cases(summary: Summary) -> list[CaseSummary]:
    return [case for case in summary["cases"] if case["name"].startswith("step/")]


def _steps(summary: Summary) -> Grid:
    """A step's time by ours, medians."""
    grid = Grid("", ["shape/trees", "ours, us", *IN_TABLE])
    for case in _step_cases(summary):
        ours = figure(case, "step", OURS)
        ratios = [times_ours(case, "step", who) for who in IN_TABLE]
        cells = [NONE if ratio is None else number(ratio.median) for ratio in ratios]
        grid.rows.append([case["name"].removeprefix("step/"), NONE if ours is None else number(ours.median), *cells])
    return grid


def _entries(summary: Summary) -> Grid:
    """Single entries: microseconds, and how many times as fast the others are."""
    case = _case(summary, "single")
    grid = Grid("", ["one entry, one thread", "ours, us", *(f"{who}, us" for who in COPYING)])
    for measure in case["measures"]:
        times = [figure(case, measure, who) for who in (OURS, *COPYING)]
        grid.rows.append([measure, *(NONE if time is None else number(time.median) for time in times)])
    return grid


def _bytes(summary: Summary) -> Grid:
    """Keys and values stored for each node of a search."""
    facts = _case(summary, "nodes")["facts"]
    who = (OURS, "dict", "rows", "lightzero")
    grid = Grid("", ["bytes stored a node", *who])
    for fact in facts[OURS]:
        if fact.startswith("K/V bytes a node, "):
            cells = [f"{facts[one][fact]:,.0f}" if fact in facts.get(one, {}) else NONE for one in who]
            grid.rows.append([fact.removeprefix("K/V bytes a node, "), *cells])
    return grid


# The picture ---------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT, TOP, EACH = 760, 120, 640, 62, 34
LEAST, MOST = 0.5, 25.0
MARKS = {
    "dict": ("#24507a", "M-5 -5 h10 v10 h-10 z"),
    "dict-stack": ("#6b4fa0", "M0 -6 l6 6 l-6 6 l-6 -6 z"),
    "cachetools": ("#8a6d00", "M-5 0 h10 M0 -5 v10"),
    "cachebox": ("#2b6b2b", "M0 -6 l6 11 h-12 z"),
    "moka": ("#00707a", "M-4 -4 l8 8 M-4 4 l8 -8"),
    "theine": ("#a0522d", "M0 6 l6 -11 h-12 z"),
    "rows": ("#b3261e", "M-6 -2 h12 v4 h-12 z"),
    "lightzero": ("#333", "M-2 -6 h4 v12 h-4 z"),
}


def picture_of(summary: Summary) -> str:
    """A row for each shape, a mark for each contestant's step by ours (medians), on a scale of logarithms: SVG."""
    cases = _step_cases(summary)
    bottom = TOP + EACH * len(cases)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 48}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="The time of a search step by that of this library">',
        f'<rect width="{WIDTH}" height="{bottom + 48}" rx="10" fill="white"/>',
        '<text x="20" y="30" font-size="14" font-weight="bold">The time of a search step by ours</text>',
        '<text x="310" y="30" fill="#444">right of the line: this library is faster</text>',
    ]
    for tick in (0.5, 1, 2, 5, 10, 20):
        x = _across(tick)
        line = 'stroke="#222" stroke-width="1.6"' if tick == 1 else 'stroke="#ddd"'
        parts.append(f'<path d="M{x} {TOP - 14} V{bottom}" {line}/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle" fill="#444">{tick:g}</text>')
    for row, case in enumerate(cases):
        y = TOP + EACH * row + 8
        name = escape(case["name"].removeprefix("step/"))
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
        parts.append(f'<path d="M{LEFT} {y} H{RIGHT}" stroke="#eee"/>')
        for who in SHOWN:
            ratio = times_ours(case, "step", who)
            if ratio is not None:
                parts.append(_mark(who, _across(ratio.median), y))
    for place, who in enumerate(SHOWN):
        y = TOP + 26 * place + 8
        parts += [_mark(who, RIGHT + 20, y), f'<text x="{RIGHT + 34}" y="{y + 4}">{who}</text>']
    parts.append(f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{bottom + 38}" text-anchor="middle" fill="#444">times</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _across(ratio: float) -> float:
    share = (log10(ratio) - log10(LEAST)) / (log10(MOST) - log10(LEAST))
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _mark(who: str, x: float, y: float) -> str:
    color, path = MARKS[who]
    return (
        f'<path transform="translate({x} {y})" d="{path}" fill="{color}" fill-opacity="0.55" stroke="{color}" '
        f'stroke-width="1.6"><title>{who}</title></path>'
    )
