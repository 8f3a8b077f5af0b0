"""What a person sees: figures while a profile runs, a table of all at the end, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stress.monitor import Monitor
from stress.results import shown_latencies
from stress.runner import ProfileResult, Watch

__all__ = ["failure_texts", "live_watch", "outcome", "summary"]

REFRESHES_PER_SECOND = 2
KINDS_SHOWN = 6


@dataclass(frozen=True)
class LiveFigures:
    """Of a run under way; drawn anew at every refresh, in a thread of its own."""

    monitor: Monitor

    def __rich__(self) -> Table:
        monitor, settings = self.monitor, self.monitor.run.world.settings
        table = Table(
            show_header=False, title=f"{settings.profile.name}: {settings.profile.about}", title_justify="left"
        )
        table.add_row("time", f"{monitor.elapsed:.0f} of {settings.seconds:g} s")
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


def live_watch(console: Console) -> Watch:
    """Show a run's figures on a console while it lasts."""

    def watch(monitor: Monitor) -> AbstractContextManager[object]:
        return Live(LiveFigures(monitor), console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True)

    return watch


def outcome(result: ProfileResult) -> Text:
    """One line, when a profile is over."""
    text = Text(f"{result.settings.profile.name}: {result.seconds:.0f} s, {result.checks.total():,} checks, ")
    if result.failures:
        return text.append(f"{len(result.failures)} failures", style="bold red")
    return text.append("ok", style="green")


def summary(results: Sequence[ProfileResult]) -> RenderableType:
    """A line for each profile, then the waits of readers and writers."""
    return Group(_outcomes(results), _fairness(results))


def _outcomes(results: Sequence[ProfileResult]) -> Table:
    table = Table(title="stress", title_justify="left")
    for name in ("profile", "time", "operations", "a second", "checks passed", "faults made", "repaired", "outcome"):
        table.add_column(name, justify="left" if name in ("profile", "outcome") else "right")
    for result in results:
        operations = result.operations.total()
        table.add_row(
            result.settings.profile.name,
            f"{result.seconds:.0f} s",
            f"{operations:,}",
            f"{operations / result.seconds:,.0f}",
            f"{result.checks.total():,}",
            f"{result.faults.total():,}",
            f"{result.repaired.slots} slots",
            Text(f"{len(result.failures)} failures", style="bold red")
            if result.failures
            else Text("ok", style="green"),
        )
    return table


def _fairness(results: Sequence[ProfileResult]) -> Table:
    table = Table(title="how long calls take, and how late the event loop is", title_justify="left")
    table.add_column("profile")
    for name in ("calls", "50%", "99%", "99.9%", "longest"):
        table.add_column(name, justify="right")
    for result in results:
        kinds = shown_latencies(result)
        rows = {"reads": kinds["all reads"], "writes": kinds["all writes"], "loop lag": result.loop_lag}
        for label, latencies in rows.items():
            if latencies.count:
                times = [latencies.percentile(percent) for percent in (50, 99, 99.9)] + [latencies.longest_seconds]
                name = f"{result.settings.profile.name}, {label}"
                table.add_row(name, f"{latencies.count:,}", *(_time(seconds * 1e6) for seconds in times))
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
