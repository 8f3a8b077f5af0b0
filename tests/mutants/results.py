"""What became of each place, kept in the repository: a line for each in result.json, and why some may live."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
RESULT = HERE / "result.json"
ACCEPTED = HERE / "accepted.json"


@dataclass(frozen=True)
class Entry:
    """What became of one place, of which commit and when."""

    place: str
    kind: str
    outcome: str
    by: str
    tests: int
    seconds: float
    commit: str
    date: str


def recorded(path: Path = RESULT) -> dict[str, Entry]:
    """The entries of the last recorded runs by their places."""
    if not path.is_file():
        return {}
    return {each["place"]: Entry(**each) for each in json.loads(path.read_text("utf-8"))["places"]}


def record(entries: dict[str, Entry], path: Path = RESULT) -> None:
    """Writes them, one a line, in the order of their names, after their figures."""
    figures = {
        "places": len(entries),
        **dict(sorted(Counter(entry.outcome for entry in entries.values()).items())),
        "minutes": round(sum(entry.seconds for entry in entries.values()) / 60, 1),
    }
    lines = ",\n".join(f"  {json.dumps(asdict(entries[name]))}" for name in sorted(entries))
    path.write_text(f'{{\n "figures": {json.dumps(figures)},\n "places": [\n{lines}\n ]\n}}\n', "utf-8")


def accepted(path: Path = ACCEPTED) -> dict[str, str]:
    """Places that may be taken out without a test noticing, and why."""
    kept: dict[str, str] = json.loads(path.read_text("utf-8"))
    return kept
