"""What a person sees of a contest."""

from __future__ import annotations

from rich.table import Table

from examples.text_tree.contest import Contest

REFRESHES_PER_SECOND = 4


class LiveFigures:
    """What is going on; drawn anew, in a thread of its own, at every refresh."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def __rich__(self) -> Table:
        contest, settings = self._contest, self._contest.settings
        table = _two_columns("countdown puzzles, searched")
        for method in settings.methods:
            solved, of = contest.solved(method, settings.nodes)
            table.add_row(method, f"{of} of {len(settings.puzzles)} puzzles, {solved} solved")
        _add_calls(table, contest)
        return table


def closing_table(contest: Contest) -> Table:
    """Solved share against nodes; nodes spent on a puzzle, and how many tokens of all texts were stored and shared."""
    settings = contest.settings
    table = Table(title=f"{len(settings.puzzles)} puzzles: solved with so many nodes", title_justify="left")
    table.add_column("", no_wrap=True)
    for budget in settings.budgets:
        table.add_column(f"{budget}", justify="right")
    for heading in ("spent", "stored", "named", "shared"):
        table.add_column(heading, justify="right")
    for method in settings.methods:
        shares = [_share(*contest.solved(method, budget)) for budget in settings.budgets]
        results = contest.of(method, settings.nodes)
        stored, named = sum(each.stored for each in results), sum(each.named for each in results)
        spent = sum(each.spent for each in results)
        table.add_row(
            "sampling alone" if method == "sampling" else method,
            *shares,
            f"{spent / len(results):.1f}",
            f"{stored:,}",
            f"{named:,}",
            _share(named - stored, named),
        )
    return table


def closing_figures(contest: Contest) -> Table:
    """The other figures."""
    table = _two_columns(f"{contest.settings.threads} threads, {len(contest.results):,} searches")
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


def _two_columns(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
