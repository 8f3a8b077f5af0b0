"""What a person sees of the job, and its JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console
from rich.table import Table

from concurrent_kv.cluster import Cluster
from concurrent_kv.evaluation import EvaluatorStats
from examples.cartpole.hosts import ClusterReport
from examples.cartpole.job import Comparison, JobReport, Watch, Watched
from examples.cartpole.play import PlaySettings, Tally
from reporting.progress import duration, to_go
from reporting.progress import watched as show
from reporting.tables import pairs

LONGEST_EPISODE = 500  # steps of CartPole-v1
SHOWN_RETURNS = 10  # the newest


class LiveFigures:
    """What is going on; drawn anew, in a thread of its own, at every refresh."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def __rich__(self) -> Table:
        watched, tally = self._watched, self._watched.tally
        table = pairs(watched.title)
        # A copy: the event loop's thread adds to it meanwhile.
        returns = list(tally.returns.copy().values())
        newest = " ".join(f"{earned:.0f}" for earned in returns[-SHOWN_RETURNS:])
        table.add_row("returns", newest or "-")
        table.add_row("time", self._time())
        table.add_row("episodes", f"{len(returns)} of {watched.settings.episodes}, {tally.steps:,} steps")
        table.add_row("simulations", f"{tally.simulations:,}, {tally.simulations_per_second:,.0f} a second")
        if watched.manager is not None and watched.stats is not None:
            _add_calls(table, watched.stats(), tally)
            stats = watched.manager.get_stats_summary()
            recur, total = stats.pools["recur"], stats.total
            rate = f"{total.hit_rate:.4f} of {total.request_count:,} rows" if total.request_count else "no requests"
            table.add_row("hit rate", rate)
            table.add_row("pool of searches", _fill(recur.entries, recur.max_entries, recur.slots_in_use))
            roots, most = total.entries - recur.entries, total.max_entries - recur.max_entries
            table.add_row("other pools", _fill(roots, most, total.slots_in_use - recur.slots_in_use))
        return table

    def line(self) -> str:
        watched, tally = self._watched, self._watched.tally
        episodes = f"{len(tally.returns)} of {watched.settings.episodes} episodes"
        return f"{watched.title}: {self._time()}; {episodes}, {tally.simulations_per_second:,.0f} simulations a second"

    def _time(self) -> str:
        """So far, and what is left if episodes last as long as they can."""
        settings, tally = self._watched.settings, self._watched.tally
        longest = settings.max_steps or LONGEST_EPISODE
        finished = tally.returns.copy().values()  # a return of CartPole's is the episode's steps
        played = longest * len(finished) + max(0, tally.steps - int(sum(finished)))
        return f"{duration(tally.seconds)}, {to_go(played / (longest * settings.episodes), tally.seconds)}"


def live_figures(console: Console) -> Watch:
    """Show `LiveFigures` on a console while something is played."""

    def watch(watched: Watched) -> AbstractContextManager[object]:
        return show(LiveFigures(watched), console)

    return watch


def closing_table(report: JobReport) -> Table:
    """The figures of the whole job."""
    settings, main = report.settings.play, report.main
    tally, total = main.tally, main.stats.total
    returns = tally.returns.values()
    table = pairs("CartPole-v1, searched through the shared cache")
    table.add_row("mean return", f"{main.mean_return:.1f} (lowest {min(returns):.0f})")
    table.add_row("episodes", f"{len(returns)}, {tally.steps:,} steps, {tally.seconds:.1f} s")
    table.add_row("environments", f"{settings.envs}, tasks ({report.settings.backend}); {_searching(settings)}")
    table.add_row("simulations", f"{tally.simulations:,}, {settings.simulations} a search")
    verifying = ", verifying" if report.settings.verify else ""
    table.add_row("simulations a second", f"{tally.simulations_per_second:,.0f} with the cache{verifying}")
    if report.no_cache is not None:
        _add_no_cache(table, report.no_cache, tally)
    _add_calls(table, main.calls, tally)
    table.add_row("hit rate", f"{total.hit_rate:.4f} of {total.request_count:,} rows asked for")
    table.add_row("evictions during a search", f"{main.evictions_during_search:,}")
    table.add_row("old roots evicted", f"{main.roots_evicted:,}")
    table.add_row("storage", f"{main.allocated_bytes / 2**20:.1f} MiB")
    if main.verification is not None:
        table.add_row("rows verified", f"{main.verification.rows:,}")
        table.add_row("largest difference", f"{main.verification.max_difference:.2e}")
    table.add_row("integrity", main.integrity)
    return table


class LiveHosts:
    """What the hosts of a cluster do; asked anew at every refresh."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __rich__(self) -> Table:
        table = Table(title="playing on a cluster", title_justify="left")
        for column in ("host", "environments", "searches", "waiting", "rows a call", "hit rate"):
            table.add_column(column)
        for name, stats in self._cluster.stats(timeout=1.0).hosts.items():
            if stats is None:
                table.add_row(name, "no answer")
                continue
            rows = "-" if stats.evaluator is None else f"{stats.evaluator.rows_per_call:.1f}"
            numbers = (stats.environments, stats.searches, stats.waiting)
            table.add_row(name, *(f"{number:,}" for number in numbers), rows, f"{stats.cache.hit_rate:.4f}")
        return table

    def line(self) -> str:
        hosts = self._cluster.stats(timeout=1.0).hosts.values()
        searches = sum(stats.searches for stats in hosts if stats is not None)
        return f"playing on a cluster: {searches:,} searches at {len(hosts)} hosts"


def live_hosts(console: Console) -> Callable[[Cluster], AbstractContextManager[object]]:
    """Show `LiveHosts` on a console while a cluster plays."""
    return lambda cluster: show(LiveHosts(cluster), console, a_second=1.0)


def cluster_table(report: ClusterReport) -> Table:
    """The figures of the whole job on a cluster."""
    settings, tally, total = report.settings.play, report.tally, report.stats.total
    returns = tally.returns.values()
    table = pairs("CartPole-v1, searched on a cluster")
    table.add_row("mean return", f"{tally.mean_return:.1f} (lowest {min(returns):.0f})")
    table.add_row("episodes", f"{len(returns)}, {tally.steps:,} steps, {tally.seconds:.1f} s")
    hosts = ", ".join(f"{name} {stats.environments if stats else '?'}" for name, stats in report.stats.hosts.items())
    table.add_row("environments", f"{settings.envs}, in actors of their own")
    table.add_row("hosts", f"{hosts} of them; {settings.threads} threads search at each")
    table.add_row("simulations", f"{tally.simulations:,}, {settings.simulations} a search")
    verifying = ", verifying" if report.settings.verify else ""
    table.add_row("simulations a second", f"{tally.simulations_per_second:,.0f}{verifying}")
    if total.evaluator is not None:
        _add_calls(table, total.evaluator, tally, len(report.stats.hosts))
    table.add_row("hit rate", f"{total.cache.hit_rate:.4f} of {total.cache.request_count:,} rows asked for")
    table.add_row("evictions during a search", f"{report.evictions_during_search:,}")
    if report.restored_roots:
        table.add_row("roots restored", f"{report.restored_roots:,}")
    table.add_row("hosts made again", f"{sum(report.stats.made_again.values())}")
    if report.verification is not None:
        table.add_row("rows verified", f"{report.verification.rows:,}")
        table.add_row("largest difference", f"{report.verification.max_difference:.2e}")
    table.add_row("integrity", report.integrity)
    return table


def cluster_json(report: ClusterReport) -> dict[str, float | int | str | None]:
    """The figures of the whole job on a cluster, by name."""
    total, verification = report.stats.total, report.verification
    return {
        "mean_return": report.tally.mean_return,
        "episodes": len(report.tally.returns),
        "hosts": len(report.stats.hosts),
        "simulations_per_second": report.tally.simulations_per_second,
        "restored_roots": report.restored_roots,
        "searches": total.searches,
        "hit_rate": total.cache.hit_rate,
        "evictions_during_search": report.evictions_during_search,
        "verified_rows": None if verification is None else verification.rows,
        "mismatches": None if verification is None else verification.mismatches,
        "integrity": report.integrity,
    }


def time_split(calls: EvaluatorStats) -> dict[str, float]:
    """Seconds of processing by part; where calls overlap, their sum."""
    return {
        "tree": calls.walk_seconds,
        "gather": calls.gather_seconds,
        "model": calls.model_seconds,
        "commit": calls.commit_seconds,
    }


def _add_calls(table: Table, calls: EvaluatorStats, tally: Tally, hosts: int = 1) -> None:
    table.add_row("rows a call", f"{calls.rows_per_call:.1f} in {calls.calls:,} calls of the model")
    parts = {part: 100 * seconds / tally.seconds / hosts for part, seconds in time_split(calls).items()}
    table.add_row("share of the time", ", ".join(f"{part} {share:.0f}%" for part, share in parts.items()))


def _add_no_cache(table: Table, comparison: Comparison, cached: Tally) -> None:
    settings, tally = comparison.settings, comparison.tally
    speedup = cached.simulations_per_second / tally.simulations_per_second
    part = f"first {settings.episodes} episodes, up to {settings.max_steps} steps each"
    table.add_row("", f"{tally.simulations_per_second:,.0f} without a cache ({part})")
    table.add_row("", f"{speedup:.1f} times as many with the cache")
    same = f"{comparison.same_actions:,} of {comparison.tally.steps:,}"
    if comparison.first_difference is None:
        table.add_row("the same actions", f"{same}: all")
    else:
        episode, step = comparison.first_difference
        table.add_row("the same actions", f"{same} until a first difference; episode {episode}, step {step}")


def as_json(report: JobReport) -> dict[str, float | int | str | None]:
    """The figures of the whole job, by name."""
    main, no_cache, settings = report.main, report.no_cache, report.settings.play
    verification = main.verification
    return {
        "mean_return": main.mean_return,
        "episodes": len(main.tally.returns),
        "simulations_per_second": main.tally.simulations_per_second,
        "no_cache_simulations_per_second": None if no_cache is None else no_cache.tally.simulations_per_second,
        "rows_per_call": main.calls.rows_per_call,
        "seconds": main.tally.seconds,
        **{f"{part}_seconds": seconds for part, seconds in time_split(main.calls).items()},
        "hit_rate": main.stats.total.hit_rate,
        "rows_verified": 0 if verification is None else verification.rows,
        # JSON has no infinity.
        "max_difference": None if verification is None else min(verification.max_difference, sys.float_info.max),
        "threads": settings.threads,
        "workers_per_tree": settings.workers_per_tree,
        "envs": settings.envs,
        "evictions_during_search": main.evictions_during_search,
        "integrity": main.integrity,
    }


def _searching(settings: PlaySettings) -> str:
    threads = "searched on their loop" if not settings.threads else f"{settings.threads} threads search"
    together = "" if settings.groups == 1 else f", in {settings.groups} groups"
    workers = "" if settings.workers_per_tree == 1 else f", {settings.workers_per_tree} workers a tree"
    return threads + together + workers


def _fill(entries: int, max_entries: int, slots: int) -> str:
    return f"{entries:,} of {max_entries:,} entries, {slots:,} slots"
