"""What a person sees of a contest."""

from __future__ import annotations

from rich.table import Table

from examples.text_tree.contest import Contest
from reporting.progress import duration, to_go
from reporting.tables import Grid, pairs


class LiveFigures:
    """What is going on; drawn anew, in a thread of its own, at every refresh."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def __rich__(self) -> Table:
        contest, settings = self._contest, self._contest.settings
        table = pairs("countdown puzzles, searched")
        table.add_row("time", self._time())
        for method in settings.methods:
            solved, of = contest.solved(method, settings.nodes)
            table.add_row(method, f"{of} of {len(settings.puzzles)} puzzles, {solved} solved")
        _add_calls(table, contest)
        return table

    def line(self) -> str:
        return f"{len(self._contest.results):,} searches: {self._time()}"

    def _time(self) -> str:
        contest, settings = self._contest, self._contest.settings
        searches = len(settings.puzzles) * len(settings.searches)
        return f"{duration(contest.seconds)}, {to_go(len(contest.results) / searches, contest.seconds)}"


def closing_table(contest: Contest) -> Grid:
    """Solved share against nodes; nodes spent on a puzzle, and how many tokens of all texts were stored and shared."""
    settings = contest.settings
    table = Grid(
        f"{len(settings.puzzles)} puzzles: solved with so many nodes",
        ("", *map(str, settings.budgets), "spent", "stored", "named", "shared"),
    )
    for method in settings.methods:
        shares = [_share(*contest.solved(method, budget)) for budget in settings.budgets]
        results = contest.of(method, settings.nodes)
        stored, named = sum(each.stored for each in results), sum(each.named for each in results)
        spent = sum(each.spent for each in results)
        row = (
            "sampling alone" if method == "sampling" else method,
            *shares,
            f"{spent / len(results):.1f}",
            f"{stored:,}",
            f"{named:,}",
            _share(named - stored, named),
        )
        table.rows.append(row)
    return table


def closing_figures(contest: Contest) -> Table:
    """The other figures."""
    table = pairs(f"{contest.settings.threads} threads, {len(contest.results):,} searches")
    _add_calls(table, contest)
    if contest.settings.verify:
        table.add_row("nodes verified", f"{sum(each.verified for each in contest.results):,}")
        table.add_row("largest difference", f"{largest_difference(contest):.2e}")
    table.add_row("integrity", str(contest.integrity))
    return table


def largest_difference(contest: Contest) -> float:
    """Between the log-probability of a node and what it is from scratch."""
    return max((each.difference for each in contest.results), default=0.0)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}"


def _add_calls(table: Table, contest: Contest) -> None:
    stats, spent = contest.stats(), sum(each.spent for each in contest.results.copy())
    rate = spent / contest.seconds if contest.seconds else 0.0
    table.add_row("nodes", f"{spent:,}, {rate:,.0f} a second, {contest.seconds:.1f} s")
    table.add_row("rows a call", f"{stats.rows_per_call:.1f} in {stats.calls:,} calls of the model")
