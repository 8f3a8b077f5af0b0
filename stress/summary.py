"""What a person sees: figures while a profile runs, a table of all at the end, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reporting.progress import duration, watched
from reporting.tables import Grid, pairs
from stress.monitor import Monitor
from stress.results import shown_latencies
from stress.runner import ProfileResult, Watch
from stress.world import Settings

__all__ = ["failure_texts", "live_watch", "outcome", "summary"]

REFRESHES_PER_SECOND = 2
KINDS_SHOWN = 6


@dataclass(frozen=True)
class LiveFigures:
    """Of a run under way; drawn anew at every refresh, in a thread of its own."""

    monitor: Monitor
    profiles: Sequence[Settings]  # of the whole attack, in their order

    def __rich__(self) -> Table:
        monitor, settings = self.monitor, self.monitor.run.world.settings
        table = pairs(f"{settings.profile.name}: {settings.profile.about}")
        table.add_row("time", self._time())
        if monitor.samples:
            sample = monitor.samples[-1]
            busiest = sorted(sample.calls_per_second.items(), key=lambda item: -item[1])[:KINDS_SHOWN]
            total = sum(sample.calls_per_second.values())
            table.add_row(
                "calls a second", f"{total:,.0f}: " + ", ".join(f"{rate:,.0f} {kind}" for kind, rate in busiest)
            )
            table.add_row("99% within", f"reads {_time(sample.read_p99_us)}, writes {_time(sample.write_p99_us)}")
            table.add_row("hit rate", "no requests" if sample.hit_rate is None else f"{sample.hit_rate:.3f}")
            waits = f"{sample.lock_waits_per_second:,.0f} a second, {sample.lock_wait_share:.2f} s of every second"
            table.add_row("waits for locks", waits)
            table.add_row("loop lag", f"at most {_time(sample.loop_lag_us)}")
            table.add_row("fill", f"{sample.entries:,} entries, {sample.slots_in_use:,} slots")
            table.add_row("checks passed", f"{sample.checks:,}")
        faults = ", ".join(f"{count:,} {name}" for name, count in sorted(monitor.run.faults.made().items()))
        if faults:
            table.add_row("faults", faults)
        failures = monitor.run.failures.all()
        table.add_row("failures", Text(str(len(failures)), style="bold red" if failures else "green"))
        return table

    def line(self) -> str:
        monitor = self.monitor
        calls = sum(monitor.samples[-1].calls_per_second.values()) if monitor.samples else 0.0
        failures = len(monitor.run.failures.all())
        name = monitor.run.world.settings.profile.name
        return f"{name}: {self._time()}; {calls:,.0f} calls a second, {failures} failures"

    def _time(self) -> str:
        """Of this profile, and what is left of all."""
        settings = self.monitor.run.world.settings
        number = next((at for at, each in enumerate(self.profiles, 1) if each == settings), len(self.profiles))
        left = max(0.0, settings.seconds - self.monitor.elapsed)
        left += sum(each.seconds for each in self.profiles[number:])
        so_far = f"{self.monitor.elapsed:.0f} of {settings.seconds:g} s"
        return f"{so_far}, profile {number} of {len(self.profiles)}, about {duration(left)} to go"


def live_watch(console: Console, profiles: Sequence[Settings]) -> Watch:
    """Show a run's figures on a console while it lasts; of an attack with so many profiles."""

    def watch(monitor: Monitor) -> AbstractContextManager[object]:
        return watched(LiveFigures(monitor, profiles), console, a_second=REFRESHES_PER_SECOND)

    return watch


def outcome(result: ProfileResult) -> Text:
    """One line, when a profile is over."""
    text = Text(f"{result.settings.profile.name}: {result.seconds:.0f} s, {result.checks.total():,} checks, ")
    if result.failures:
        return text.append(f"{len(result.failures)} failures", style="bold red")
    return text.append("ok", style="green")


def summary(results: Sequence[ProfileResult]) -> tuple[Grid, Grid]:
    """A line for each profile, then the waits of readers and writers."""
    return _outcomes(results), _fairness(results)


def _outcomes(results: Sequence[ProfileResult]) -> Grid:
    columns = ("outcome", "time", "operations", "a second", "checks passed", "faults made", "slots repaired")
    table = Grid("stress", ("profile", *columns))
    for result in results:
        operations = result.operations.total()
        row = (
            result.settings.profile.name,
            f"{len(result.failures)} failures" if result.failures else "ok",
            f"{result.seconds:.0f} s",
            f"{operations:,}",
            f"{operations / result.seconds:,.0f}",
            f"{result.checks.total():,}",
            f"{result.faults.total():,}",
            f"{result.repaired.slots:,}",
        )
        table.rows.append(row)
    return table


def _fairness(results: Sequence[ProfileResult]) -> Grid:
    columns = ("calls", "50%", "99%", "99.9%", "longest")
    table = Grid("how long calls take, and how late the event loop is", ("profile", "", *columns), keys=2)
    for result in results:
        kinds = shown_latencies(result)
        rows = {"reads": kinds["all reads"], "writes": kinds["all writes"], "loop lag": result.loop_lag}
        for label, latencies in rows.items():
            if latencies.count:
                times = [latencies.percentile(percent) for percent in (50, 99, 99.9)] + [latencies.longest_seconds]
                shown = f"{latencies.count:,}", *(_time(seconds * 1e6) for seconds in times)
                table.rows.append((result.settings.profile.name, label, *shown))
    return table


def failure_texts(results: Iterable[ProfileResult]) -> list[str]:
    """Every failure, with its details."""
    return [
        f"{result.settings.profile.name}, {failure.where}, {failure.kind}: {failure.message}\n{failure.details}".strip()
        for result in results
        for failure in result.failures
    ]


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"
