"""Plots of one profile's JSON as SVG text."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["curves_svg"]

STYLE: Any = {  # matplotlib types every single key
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "stress",  # the same figures give the same file
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
MOST_POINTS = 240  # of a line
MIB = 2**20


def curves_svg(profile: dict[str, Any]) -> str:
    """Throughput, latencies, waits and fill, two by two."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        throughput, latencies, waits, fill = figure.subplots(2, 2).flat
        samples = _thinned(profile["samples"])
        _throughput(throughput, samples)
        _latencies(latencies, profile["latency_curves"])
        _waits(waits, samples)
        _fill(fill, samples)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration, which HTML has no use for


def _thinned(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples[:: max(1, len(samples) // MOST_POINTS)]


def _seconds(samples: list[dict[str, Any]]) -> list[float]:
    return [sample["seconds"] for sample in samples]


def _throughput(axes: Axes, samples: list[dict[str, Any]]) -> None:
    kinds = sorted({kind for sample in samples for kind in sample["calls_per_second"]})
    axes.set(title="throughput", xlabel="seconds", ylabel="calls a second")
    if kinds:
        rates = [[sample["calls_per_second"].get(kind, 0) for sample in samples] for kind in kinds]
        axes.stackplot(_seconds(samples), rates, labels=kinds, alpha=0.8)
        axes.set_ylim(0, 1.35 * max(map(sum, zip(*rates, strict=True))) or 1)  # the legend stands above
        axes.legend(fontsize=7, ncols=5, loc="upper left")


def _latencies(axes: Axes, curves: dict[str, list[tuple[float, float]]]) -> None:
    axes.set(title="latency", xlabel="microseconds", ylabel="share of the calls that took longer")
    for kind, points in curves.items():
        shown = [(micros, share) for micros, share in points if share > 0]
        if shown:
            axes.plot(*zip(*shown, strict=True), label=kind, linewidth=2 if kind.startswith("all") else 0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=7)


def _waits(axes: Axes, samples: list[dict[str, Any]]) -> None:
    axes.set(title="waits for locks, and the event loop's lag", xlabel="seconds", ylabel="waits a second")
    waits = axes.plot(
        _seconds(samples), [sample["lock_waits_per_second"] for sample in samples], label="waits a second"
    )
    other = axes.twinx()
    other.set_ylabel("milliseconds")
    lag = other.plot(
        _seconds(samples), [sample["loop_lag_us"] / 1e3 for sample in samples], "C1", label="longest lag", linewidth=0.8
    )
    axes.legend(handles=[*waits, *lag], fontsize=7)


def _fill(axes: Axes, samples: list[dict[str, Any]]) -> None:
    axes.set(title="what the pools hold, and the process", xlabel="seconds", ylabel="number")
    slots = axes.plot(_seconds(samples), [sample["slots_in_use"] for sample in samples], label="slots in use")
    entries = axes.plot(_seconds(samples), [sample["entries"] for sample in samples], label="entries")
    other = axes.twinx()
    other.set_ylabel("MiB")
    size = other.plot(
        _seconds(samples), [sample["rss_bytes"] / MIB for sample in samples], "C3", label="resident size", linewidth=0.8
    )
    axes.legend(handles=[*slots, *entries, *size], fontsize=7)
