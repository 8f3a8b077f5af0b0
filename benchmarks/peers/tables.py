"""What the summaries say, as tables: for the terminal, and for RESULTS.md as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.peers.contestants import CONTESTANTS, OURS
from benchmarks.peers.measuring import Quartiles
from benchmarks.peers.summary import CaseSummary, Summary, best_peer, figure, floor_of, times_ours
from reporting.tables import Grid

__all__ = [
    "by_contestant",
    "calls",
    "case_grid",
    "facts",
    "headline",
    "history",
    "states",
    "steps_by_ours",
]

DICT, NONE = "dict", "-"


def number(value: float) -> str:
    """With as many digits as say something."""
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    for least, form in ((100, ".0f"), (10, ".1f"), (0.1, ".2f")):
        if abs(value) >= least:
            return f"{value:{form}}"
    return f"{value:.2g}"


def spread(numbers: Quartiles | None) -> str:
    """Median, and the quartiles beside it."""
    if numbers is None:
        return NONE
    return f"{number(numbers.median)} ({number(numbers.first)} to {number(numbers.third)})"


def cases_of(records: Mapping[str, Summary]) -> dict[str, CaseSummary]:
    """One summary of each case that any record has, the last record's."""
    found: dict[str, CaseSummary] = {}
    for summary in records.values():
        found.update({case["name"]: case for case in summary["cases"]})
    return found


def case_of(summary: Summary, name: str) -> CaseSummary | None:
    return next((case for case in summary["cases"] if case["name"] == name), None)


# Ours against the others ---------------------------------------------------------------------------------------------


def headline(records: Mapping[str, Summary]) -> Grid:
    """Our time; the times of the dict with one lock and of the best peer by it; and it by the floor's."""
    several = len(records) > 1
    columns = ["case", "measure"]
    for name in records:
        before = f"{name}: " if several else ""
        columns += [f"{before}ours, us", f"{before}by {DICT}", f"{before}by the best peer", f"{before}floors"]
    grid = Grid(
        "ours, microseconds: median (quartiles); then the other's time by ours (above 1: ours is faster), paired by "
        "rounds; then our time by that of a bare copy",
        columns,
        keys=2,
    )
    for name, any_case in cases_of(records).items():
        for measure in any_case["headline"]:
            cells = []
            for summary in records.values():
                case = case_of(summary, name)
                cells += _against_others(case, measure) if case else [NONE] * 4
            if any(cell != NONE for cell in cells):
                grid.rows.append([name, measure, *cells])
    return grid


def _against_others(case: CaseSummary, measure: str) -> list[str]:
    best = best_peer(case, measure)
    return [
        spread(figure(case, measure, OURS)),
        spread(times_ours(case, measure, DICT)),
        NONE if best is None else f"{spread(times_ours(case, measure, best))} {best}",
        spread(floor_of(case, measure)),
    ]


def history(records: Mapping[str, Summary], measure: str = "step") -> Grid:
    """The step of each state: our time, and the dict's by it."""
    grid = Grid(
        f"ours, microseconds (median); in brackets the time of the {DICT} with one lock by it; a row for each state",
        ["state"],
    )
    cases = [name for name in cases_of(records) if name.startswith("step/")]
    grid.columns = ["state", *(name.removeprefix("step/") for name in cases)]
    for state, summary in records.items():
        cells = []
        for name in cases:
            case = case_of(summary, name)
            ours = figure(case, measure, OURS) if case else None
            by_dict = times_ours(case, measure, DICT) if case else None
            cells.append(
                NONE if ours is None or by_dict is None else f"{number(ours.median)} ({number(by_dict.median)})"
            )
        grid.rows.append([state, *cells])
    return grid


def steps_by_ours(summary: Summary, measure: str = "step") -> Grid:
    """Every contestant's step by ours, one column for each workload."""
    cases = [case for case in summary["cases"] if case["name"].startswith("step/")]
    grid = Grid("a step's time by ours: median (quartiles); above 1, ours is faster", ["contestant"])
    grid.columns = ["contestant", *(case["name"].removeprefix("step/") for case in cases)]
    for who in summary["contestants"]:
        cells = [
            "1" if who == OURS and figure(case, measure, who) else spread(times_ours(case, measure, who))
            for case in cases
        ]
        if any(cell != NONE for cell in cells):
            grid.rows.append([who, *cells])
    for who in _others(cases):
        grid.rows.append([who, *(spread(times_ours(case, measure, who)) for case in cases)])
    return grid


def _others(cases: Sequence[CaseSummary]) -> list[str]:
    """Contestants that only this run had: this library from other checkouts."""
    measured = {who for case in cases for by_who in case["measures"].values() for who in by_who}
    return sorted(measured - set(CONTESTANTS))


# Of one case ---------------------------------------------------------------------------------------------------------


def case_grid(case: CaseSummary) -> Grid:
    """Microseconds of every contestant and measure; who is not there, and why."""
    measures = list(case["measures"])
    title = f"{case['title']}; microseconds of the {case['clock']}, {case['rounds']} rounds: median (quartiles)"
    grid = Grid(title, ["contestant", *measures])
    measured = {who for by_who in case["measures"].values() for who in by_who}
    for who in [*(name for name in CONTESTANTS if name in measured), *_others([case])]:
        grid.rows.append([who, *(spread(figure(case, measure, who)) for measure in measures)])
    return grid


def by_contestant(case: CaseSummary) -> Grid:
    """The same with a row for each measure, for cases with many of them."""
    wide = case_grid(case)
    names = [row[0] for row in wide.rows]
    grid = Grid(wide.title, ["measure", *names])
    for at, measure in enumerate(wide.columns[1:], 1):
        grid.rows.append([measure, *(row[at] for row in wide.rows)])
    return grid


# Facts ---------------------------------------------------------------------------------------------------------------


def calls(records: Mapping[str, Summary]) -> Grid:
    """Functions of the package called, of every recorded state."""
    places = [
        (name, summary, case, who)
        for name, summary in records.items()
        for case in summary["cases"]
        if case["name"].startswith("calls/")
        for who in case["facts"]
    ]
    several = len(records) > 1
    grid = Grid("functions of the package called, steady state", ["operation"])
    grid.columns = [
        "operation",
        *(
            f"{f'{name}: ' if several else ''}{case['name'].removeprefix('calls/')}, {who}"
            for name, _, case, who in places
        ),
    ]
    operations = list(dict.fromkeys(fact for _, _, case, who in places for fact in case["facts"][who]))
    for operation in operations:
        cells = [case["facts"][who].get(operation) for _, _, case, who in places]
        grid.rows.append(
            [operation.removeprefix("functions called, "), *(NONE if cell is None else f"{cell:.0f}" for cell in cells)]
        )
    return grid


def facts(case: CaseSummary) -> Grid:
    """Numbers without rounds: a row for each, a column for each contestant."""
    grid = Grid(f"{case['title']}: facts", ["", *case["facts"]])
    for fact in dict.fromkeys(fact for found in case["facts"].values() for fact in found):
        cells = [found.get(fact) for found in case["facts"].values()]
        grid.rows.append(
            [fact, *(NONE if cell is None else f"{cell:,.4g}" if cell < 100 else f"{cell:,.0f}" for cell in cells)]
        )
    return grid


def states(records: Mapping[str, Summary]) -> Grid:
    """When, where and of what each state was recorded."""
    grid = Grid("recorded states", ["state", *records])
    about = [summary["about"] for summary in records.values()]

    def row(title: str, *names: str, form: str = "{}") -> None:
        cells = [form.format(*(one.get(name) for name in names)) for one in about]
        grid.rows.append([title, *cells])

    row("date", "date")
    row("commit", "commit")
    grid.rows.append(
        [
            "the library last changed in",
            *(f"{one['library']}{' and changed since' if one['library_changed'] else ''}" for one in about),
        ]
    )
    row("machine", "processor", "cores", "memory_gib", "system", form="{}, {} cores, {} GiB, {}")
    row("Python", "python")
    grid.rows.append(["GIL", *("on" if one["gil"] else "off" for one in about)])
    row("torch threads of an operator", "torch_threads")
    grid.rows.append(
        ["versions", *(", ".join(f"{name} {version}" for name, version in one["versions"].items()) for one in about)]
    )
    row("load average at the start, at the end", "load_at_start", "load_at_end", form="{}, {}")
    row("processor time that other work took", "other_work_percent", form="{}%")
    row("seconds", "seconds")
    row("command", "command", form="`{}`")
    return grid
