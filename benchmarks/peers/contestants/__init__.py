"""The contestants by name, and how each one's process is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.contestants.base import Contestant
from benchmarks.peers.contestants.floor import Floor
from benchmarks.peers.contestants.lightzero import LightZero
from benchmarks.peers.contestants.mappings import MAPPINGS
from benchmarks.peers.contestants.ours import Ours
from benchmarks.peers.contestants.rows import Rows

__all__ = ["CONTESTANTS", "FLOOR", "OURS", "PEERS", "Start", "start_of"]

OURS, FLOOR = "ours", "floor"
LIGHTZERO_PYTHON = Path(__file__).resolve().parents[3] / ".venv-lightzero" / "bin" / "python"
OUR_FORMS: Sequence[Contestant] = (
    Ours(OURS, "this library with its compiled module"),
    Ours("ours-python", "this library without its compiled module"),
    Ours("ours-lazy", "this library where drops correct on reading (DropLazily, PositionSteps)", "lazily"),
)

CONTESTANTS: Mapping[str, Contestant] = {
    contestant.name: contestant for contestant in (*OUR_FORMS, *MAPPINGS, Rows(), LightZero(), Floor())
}
# What a user would write or take instead.
PEERS = tuple(name for name in CONTESTANTS if name != FLOOR and not name.startswith(OURS))


@dataclass(frozen=True)
class Start:
    """How a contestant's process is started: its interpreter (this one if None) and what its environment adds."""

    python: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def start_of(name: str) -> Start:
    """How the process of a contestant is started."""
    if name == "ours-python":
        return Start(environment={"CONCURRENT_KV_NATIVE": "0"})
    if name == "lightzero" and LIGHTZERO_PYTHON.exists():
        return Start(LIGHTZERO_PYTHON)
    return Start()
