"""A run's results as JSON: everything a page or a comparison needs, in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from reporting.machine import about
from stress.measures import EDGES_SECONDS, Latencies
from stress.monitor import READS, WRITES, merged
from stress.runner import ProfileResult

__all__ = ["as_json", "shown_latencies", "summary_of"]

PACKAGES = ("anyio", "readerwriterlock", "numpy")
CURVE_POINTS = 60


def as_json(results: Sequence[ProfileResult], command: str) -> dict[str, Any]:
    """Everything. Durations in microseconds where a name ends so, in seconds otherwise."""
    return {
        "command": command,
        "about": about(),
        "packages": {name: version(name) for name in PACKAGES},
        "passed": not any(result.failures for result in results),
        "interrupted": any(result.interrupted for result in results),
        "profiles": {result.settings.profile.name: _profile(result) for result in results},
    }


def shown_latencies(result: ProfileResult) -> dict[str, Latencies]:
    """Readers and writers together first, then every kind of call."""
    kinds = result.latencies
    return {
        "all reads": merged(kinds, READS),
        "all writes": merged(kinds, WRITES),
        **{kind: kinds[kind] for kind in sorted(kinds)},
    }


def summary_of(document: dict[str, Any]) -> dict[str, Any]:
    """What `as_json` gave, without what fills plots: the samples over time and the curves of latencies."""
    profiles = {
        name: {key: value for key, value in profile.items() if key not in ("samples", "latency_curves")}
        for name, profile in document["profiles"].items()
    }
    return {**document, "profiles": profiles}


def _profile(result: ProfileResult) -> dict[str, Any]:
    settings, profile, stats = result.settings, result.settings.profile, result.stats
    return {
        "about": profile.about,
        "settings": {
            "workload": settings.workload.name,
            "positions": settings.positions or settings.workload.positions,
            "seconds": settings.seconds,
            "threads": profile.threads,
            "tasks": profile.tasks,
            "backend": settings.backend,
            "policy": settings.policy,
            "shards": settings.shards,
            "seed": settings.seed,
            "capacity": profile.capacity,
            "keys": profile.keys,
            "mix": dict(profile.mix),
            "faults": sorted(settings.faults),
        },
        "seconds": round(result.seconds, 3),
        "operations": dict(result.operations),
        "checks_passed": dict(result.checks),
        "notes": dict(result.notes),
        "faults_made": dict(result.faults),
        "repaired": result.repaired._asdict(),
        "quiet_moments": result.quiet_moments,
        "latencies": {kind: latencies.as_dict() for kind, latencies in shown_latencies(result).items()},
        "latency_curves": {kind: _curve(latencies) for kind, latencies in shown_latencies(result).items()},
        "loop_lag": result.loop_lag.as_dict(),
        "statistics": stats.as_dict(),
        "offload": None if result.offload is None else asdict(result.offload),
        "slots": result.slots,
        "growth_bytes": result.growth_bytes,
        "samples": [_sample(asdict(sample)) for sample in result.samples],
        "failures": [asdict(failure) for failure in result.failures],
    }


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in sample.items()
        if name != "calls_per_second"
    } | {"calls_per_second": {kind: round(rate, 1) for kind, rate in sample["calls_per_second"].items()}}


def _curve(latencies: Latencies) -> list[tuple[float, float]]:
    """(microseconds, share of the calls that took longer) from the shortest to the longest."""
    if not latencies.count:
        return []
    longer = 1 - latencies.counts.cumsum() / latencies.count
    used = latencies.counts.nonzero()[0]
    step = max(1, len(used) // CURVE_POINTS)
    edges = EDGES_SECONDS.tolist()
    return [
        (round(edges[min(index, len(edges) - 1)] * 1e6, 2), round(float(longer[index]), 7))
        for index in used[::step].tolist()
    ]
