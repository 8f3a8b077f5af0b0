"""Every contestant's step by ours, as a picture."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.contestants import CONTESTANTS, OURS
from benchmarks.peers.summary import Summary, times_ours

__all__ = ["plot"]

MARKERS = "osD^v<>pPX*hd"


def plot(summary: Summary, path: Path) -> bool:
    """Draw into a file (SVG, PNG or PDF by its ending); False where the run measured no steps.

    A row for each shape, a mark for each contestant with its quartiles, a line where ours is.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"  # text as text: small files
    mpl.rcParams["svg.hashsalt"] = "peers"
    from matplotlib import pyplot

    cases = [case for case in summary["cases"] if case["name"].startswith("step/") and case["measures"]]
    if not cases:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 0.9 * len(cases) + 1.6), layout="constrained")
    names = [who for who in CONTESTANTS if who != OURS]
    for number, who in enumerate(names):
        points = [(row, times_ours(case, "step", who)) for row, case in enumerate(cases)]
        shown = [(row, ratio) for row, ratio in points if ratio is not None]
        if not shown:
            continue
        at = [row + (number - len(names) / 2) * 0.05 for row, _ in shown]
        medians = [ratio.median for _, ratio in shown]
        spreads = [[r.median - r.first for _, r in shown], [r.third - r.median for _, r in shown]]
        axes.errorbar(
            medians,
            at,
            xerr=spreads,
            fmt=MARKERS[number % len(MARKERS)],
            markersize=5,
            linewidth=0.8,
            label=who,
            color=f"C{number % 10}",
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.03, 0.1, 0.3, 0.5, 1, 2, 3, 5, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(cases)), [case["name"].removeprefix("step/") for case in cases])
    axes.invert_yaxis()
    axes.set_xlabel("time of a step by ours (right of the line: ours is faster)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True
