"""A run's compact form, which is recorded: medians and quartiles, and ratios paired by rounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contestants import CONTESTANTS, FLOOR, OURS, PEERS
from benchmarks.peers.measuring import Quartiles, paired_ratios, quartiles
from benchmarks.peers.rounds import Result

__all__ = ["RECORDS", "best_peer", "figure", "read_records", "summary_of", "times_ours", "with_samples"]

RECORDS = Path(__file__).resolve().parents[1] / "results" / "peers"
DIGITS = 4  # that say something

Summary = dict[str, Any]  # of a run: about, contestants, cases
CaseSummary = dict[str, Any]


def summary_of(results: Iterable[Result], about: dict[str, Any]) -> Summary:
    """A run's results as they are recorded."""
    return {
        "about": about,
        "contestants": {name: contestant.about for name, contestant in CONTESTANTS.items()},
        "cases": [_case(result) for result in results],
    }


def _case(result: Result) -> CaseSummary:
    measures: dict[str, dict[str, Any]] = {}
    for measure, by_contestant in result.samples.items():
        measures[measure] = {}
        ours = by_contestant.get(OURS)
        for who, samples in by_contestant.items():
            found: dict[str, Any] = {
                clock: _rounded(quartiles(times)) for clock, times in zip(("processor", "wall"), samples, strict=True)
            }
            clock = 0 if result.case.clock == "processor" else 1
            if ours is not None and who != OURS and len(ours[clock]) == len(samples[clock]):
                ratios = paired_ratios(ours[clock], samples[clock])
                if ratios:
                    found["times_ours"] = _rounded(quartiles(ratios))
            measures[measure][who] = found
    return {
        "name": result.name,
        "title": result.case.title,
        "clock": result.case.clock,
        "headline": list(result.case.headline),
        "rounds": result.rounds,
        "seconds": round(result.seconds, 1),
        "measures": measures,
        "facts": {
            who: {name: float(f"{value:.{DIGITS}g}") for name, value in facts.items()}
            for who, facts in result.facts.items()
        },
        "unfit": result.unfit,
        "failed": {who: reason.splitlines()[-1] for who, reason in result.failed.items()},
    }


def _rounded(numbers: Quartiles) -> list[float]:
    return [float(f"{number:.{DIGITS}g}") for number in numbers]


def with_samples(summary: Summary, results: Iterable[Result]) -> Summary:
    """The same with every round's times, microseconds: processor, then wall."""
    samples = {result.name: result.samples for result in results}
    return {**summary, "cases": [{**case, "samples": samples[case["name"]]} for case in summary["cases"]]}


# Reading -------------------------------------------------------------------------------------------------------------


def figure(case: CaseSummary, measure: str, who: str) -> Quartiles | None:
    """Microseconds of a contestant, of the case's clock."""
    found = case["measures"].get(measure, {}).get(who)
    return None if found is None else Quartiles(*found[case["clock"]])


def times_ours(case: CaseSummary, measure: str, who: str) -> Quartiles | None:
    """A contestant's time by ours: above 1 where we are faster."""
    found = case["measures"].get(measure, {}).get(who, {}).get("times_ours")
    return None if found is None else Quartiles(*found)


def best_peer(case: CaseSummary, measure: str) -> str | None:
    """The fastest of what a user would write or take instead, by medians."""
    found = {who: figure(case, measure, who) for who in PEERS}
    medians = {who: numbers.median for who, numbers in found.items() if numbers is not None}
    return min(medians, key=lambda who: medians[who]) if medians else None


def floor_of(case: CaseSummary, measure: str) -> Quartiles | None:
    """Our time by the floor's."""
    found = times_ours(case, measure, FLOOR)
    return None if found is None or not found.first else found.map(lambda ratio: 1.0 / ratio)


def read_records(names: Sequence[str] | None = None, folder: Path = RECORDS) -> dict[str, Summary]:
    """Recorded states by name, oldest first."""
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    return {
        name: summary
        for name, summary in sorted(found.items(), key=lambda item: str(item[1]["about"]["date"]))
        if names is None or name in names
    }
