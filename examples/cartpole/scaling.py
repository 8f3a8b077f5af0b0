"""How many simulations a second: by threads, with their leaves evaluated together or not, and on the loop alone.

All ways are played in turns, so that whatever else the machine does meets them alike. One thread with fewer and with
more environments says what a call costs by its rows; threads with environments of their own say how much of a round
only one can do at a time, and so, by a model of the queue (`queueing`), what more workers would get.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from examples.cartpole.job import CachedPlay, JobSettings, Watch, play_cached, unwatched, usual_groups
from examples.cartpole.model import WorldModel
from examples.cartpole.play import PlaySettings
from examples.cartpole.queueing import fitted, serial_share, throughput
from examples.cartpole.report import time_split
from reporting.machine import about
from reporting.progress import to_go
from reporting.tables import Grid

THREADS = (1, 2, 4, 8)
ROWS = (1, 2, 4, 8, 16, 32)
PLANNED = (1, 2, 4, 8, 16, 64)  # workers that the model is asked about


@dataclass
class Way:
    """One way to play, and what came out at each turn."""

    name: str
    settings: PlaySettings
    rates: list[float] = field(default_factory=list)  # simulations a second
    rows_per_call: list[float] = field(default_factory=list)
    split: dict[str, float] = field(default_factory=dict)  # shares of all seconds, of all turns
    seconds: float = 0.0

    def add(self, played: CachedPlay) -> None:
        """One turn more."""
        self.rates.append(played.tally.simulations_per_second)
        self.rows_per_call.append(played.calls.rows_per_call)
        before, self.seconds = self.seconds, self.seconds + played.tally.seconds
        for part, seconds in time_split(played.calls).items():
            self.split[part] = (self.split.get(part, 0.0) * before + seconds) / self.seconds

    @property
    def rate(self) -> float:
        """Median of the turns."""
        return median(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        if len(self.rates) < 2:
            return self.rate, self.rate
        first, _, third = quantiles(self.rates, n=4, method="inclusive")
        return first, third

    def as_json(self) -> dict[str, Any]:
        """What came out, as plain data."""
        settings = self.settings
        return {
            "name": self.name,
            "envs": settings.envs,
            "threads": settings.threads,
            "groups": settings.groups,
            "rate": self.rate,
            "quartiles": list(self.spread),
            "rates": self.rates,
            "rows_per_call": median(self.rows_per_call),
            "split": self.split,
        }


@dataclass
class Scaling:
    """A whole run."""

    about: dict[str, Any]
    envs: int
    ways: list[Way]  # with so many environments; the first is one thread
    by_rows: list[Way]  # one thread, with as many environments as rows
    own_envs: list[Way]  # threads by themselves, with so many environments each
    more_envs: list[Way]  # as many threads and environments, in as many groups as is best

    @property
    def share_in_queue(self) -> float:
        """Of a worker's round, by what two threads get that have environments of their own."""
        return serial_share(self.envs / self.own_envs[0].rate, self.own_envs[1].rate / self.envs)

    def planned(self) -> dict[int, float]:
        """Simulations a second by the model, for workers with a processor and environments of their own."""
        seconds, share = self.envs / self.own_envs[0].rate, self.share_in_queue
        return {workers: self.envs * throughput(workers, seconds * (1 - share), seconds * share) for workers in PLANNED}

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        line = fitted({way.settings.envs: way.settings.envs / way.rate for way in self.by_rows})
        return {
            "about": self.about,
            "envs": self.envs,
            "ways": [way.as_json() for way in self.ways],
            "by_rows": [way.as_json() for way in self.by_rows],
            "own_envs": [way.as_json() for way in self.own_envs],
            "more_envs": [way.as_json() for way in self.more_envs],
            "call": {"seconds": line.seconds, "seconds_per_row": line.seconds_per_row},
            "share_in_queue": self.share_in_queue,
            "planned": {str(workers): rate for workers, rate in self.planned().items()},
        }


def measure(model: WorldModel, settings: JobSettings, *, turns: int, steps: int, watch: Watch | None = None) -> Scaling:
    """Play every way in every turn, so many steps of each environment."""
    base = settings.play

    def way(name: str, *, envs: int, threads: int, groups: int = 1) -> Way:
        play = replace(base, envs=envs, episodes=envs, threads=threads, groups=groups, max_steps=steps)
        return Way(name, play)

    envs, numbers = base.envs, [threads for threads in THREADS if threads <= base.envs]
    scaling = Scaling(
        about() | {"load_at_start": os.getloadavg()[0]},
        envs,
        [
            *(
                way(f"{threads} together", envs=envs, threads=threads, groups=usual_groups(threads))
                for threads in numbers
            ),
            *(
                way(f"{threads} apart", envs=envs, threads=threads, groups=threads)
                for threads in numbers
                if threads > 1
            ),
            way("the loop alone", envs=envs, threads=0),
        ],
        [way(f"{rows} rows", envs=rows, threads=1) for rows in ROWS],
        [way(f"{threads} apart", envs=envs * threads, threads=threads, groups=threads) for threads in THREADS],
        [
            way(f"{threads} together", envs=envs * threads, threads=threads, groups=usual_groups(threads))
            for threads in THREADS
            if usual_groups(threads) < threads
        ],
    )
    ways = [*scaling.ways, *scaling.by_rows, *scaling.own_envs, *scaling.more_envs]
    play_cached(model, replace(settings, play=replace(ways[0].settings, max_steps=2)), unwatched)  # warms up
    began, parts = perf_counter(), turns * len(ways)
    for turn in range(turns):
        for number, each in enumerate(ways, turn * len(ways)):
            left = to_go(number / parts, perf_counter() - began)
            title = f"turn {turn + 1} of {turns}: {each.name}; {left} in all"
            each.add(play_cached(model, replace(settings, play=each.settings), watch or unwatched, title))
    scaling.about["load_at_end"] = os.getloadavg()[0]
    return scaling


def scaling_table(scaling: Scaling) -> Grid:
    """All ways, by the first."""
    gil = "with" if scaling.about["gil"] else "without"
    planned = ", ".join(f"{workers}: {rate:,.0f}" for workers, rate in scaling.planned().items())
    table = Grid(
        f"CartPole-v1 {gil} a GIL, simulations a second, medians of {len(scaling.ways[0].rates)} turns",
        ("", "threads", "a second", "quartiles", "by 1", "rows a call"),
        keys=2,
        legend=f"by the model of the queue ({scaling.share_in_queue:.0%} of a round in it), workers: {planned}",
    )
    _add(table, f"{scaling.envs} environments", scaling.ways, scaling.ways[0])
    own = [*scaling.own_envs, *scaling.more_envs]
    _add(table, f"{scaling.envs} environments a thread", own, own[0])
    _add(table, "1 thread", scaling.by_rows, scaling.ways[0])
    return table


def _add(table: Grid, title: str, ways: Sequence[Way], first: Way) -> None:
    for way in ways:
        low, high = way.spread
        figures = f"{way.rate:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{way.rate / first.rate:.2f}"
        table.rows.append((title, way.name, *figures, f"{median(way.rows_per_call):.1f}"))


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw runs, as `Scaling.as_json` gives them, into a file: SVG or PNG by its ending."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # text as text: small files
    mpl.rcParams["svg.hashsalt"] = "scaling"
    from matplotlib import pyplot

    figure, (fixed, grown) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, result in enumerate(results):
        gil = "with a GIL" if result["about"]["gil"] else "without a GIL"
        ways = [way for way in result["ways"] if way["threads"]]
        apart = [way for way in ways if way["threads"] == 1 or way["name"].endswith("apart")]
        together = [way for way in ways if way not in apart or way["threads"] == 1]
        loop = [way for way in result["ways"] if not way["threads"]]
        _line(fixed, together, f"together, {gil}", f"C{2 * number}", "o-")
        _line(fixed, apart, f"apart, {gil}", f"C{2 * number + 1}", "s--")
        for way in loop:
            fixed.axhline(way["rate"], color=f"C{2 * number}", linestyle=":", label=f"the loop alone, {gil}")
        _line(grown, result["own_envs"], f"apart, {gil}", f"C{2 * number}", "o")
        _line(grown, result["more_envs"], f"together, {gil}", f"C{2 * number + 1}", "s")
        planned = {int(workers): rate for workers, rate in result["planned"].items()}
        grown.plot(list(planned), list(planned.values()), color=f"C{2 * number}", linestyle="-", label=f"model, {gil}")
    envs = results[0]["envs"]
    fixed.set(title=f"{envs} environments", xlabel="threads", ylabel="simulations a second", ylim=0)
    grown.set(title=f"{envs} environments a thread; model: and a processor", xlabel="threads")
    grown.set(xscale="log", yscale="log")
    for axes in (fixed, grown):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _line(axes: Any, ways: Sequence[dict[str, Any]], label: str, color: str, style: str) -> None:
    threads, rates = [way["threads"] for way in ways], [way["rate"] for way in ways]
    low = [way["rate"] - way["quartiles"][0] for way in ways]
    high = [way["quartiles"][1] - way["rate"] for way in ways]
    axes.errorbar(threads, rates, [low, high], fmt=style, color=color, label=label, capsize=2, markersize=4)
