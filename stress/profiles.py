"""What is done how often: the profiles by name, and the mix of operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = ["OPERATIONS", "PROFILES", "Mix", "Profile", "parse_mix"]

Mix = Mapping[str, float]

OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "reads": "one entry: get, peek or hierarchical_get",
        "gathers": "several entries as one batch",
        "writes": "one entry: put",
        "groups": "several entries at once: put_many, and a gather of them",
        "commits": "a gather, new tokens, a commit",
        "computes": "get_or_compute or try_claim",
        "pins": "a pin, held over another operation",
        "pops": "one entry taken out",
        "clears": "a scope cleared, or everything",
        "bumps": "a new weights version",
        "searches": "a search opened, grown, checked and closed",
    }
)


def _mix(**weights: float) -> Mix:
    return MappingProxyType(weights)


@dataclass(frozen=True)
class Profile:
    """One kind of trouble.

    Attributes:
        threads, tasks: actors of each kind.
        keys: keys of each scope of the shared pool.
        capacity: entries that the shared pool holds.
        room: searches that the recurrent pool has room for at once.
        envs: trees of one search, at most.
        simulations: steps of one search, at most; the workload's own if None.
        mix: how often each operation is chosen, relative to the others.
    """

    name: str
    about: str
    threads: int
    tasks: int
    keys: int
    capacity: int
    room: int
    envs: int
    simulations: int | None
    mix: Mix

    @property
    def actors(self) -> int:
        """Threads and tasks together."""
        return self.threads + self.tasks

    def changed(self, **changes: object) -> Profile:
        """With what is not None changed."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                "search",
                "what a tree search does: long searches of several trees, their roots written and moved on",
                4, 4, 32, 256, 6, 8, None,
                _mix(searches=10, reads=5, writes=2, computes=1),
            ),
            Profile(
                "envs",
                "many small loops: each task searches one environment, a few steps at a time",
                2, 24, 32, 256, 12, 1, 6,
                _mix(searches=10, reads=10, writes=5, computes=2),
            ),
            Profile(
                "mixed",
                "everything at once",
                6, 8, 48, 128, 4, 4, 8,
                _mix(reads=30, gathers=10, writes=15, groups=5, commits=10, computes=5, pins=3, pops=3, clears=1,
                     bumps=0.05, searches=3),
            ),
            Profile(
                "hot-key",
                "everybody wants the same two keys",
                8, 8, 2, 16, 2, 1, 4,
                _mix(reads=40, gathers=5, writes=20, groups=5, commits=5, computes=10, pins=5, pops=5, clears=1),
            ),
            Profile(
                "churn",
                "a capacity far too small: nearly every write evicts",
                6, 8, 256, 12, 2, 2, 6,
                _mix(reads=20, gathers=10, writes=30, groups=10, commits=10, computes=10, pins=3, pops=2, searches=2),
            ),
            Profile(
                "scopes",
                "searches open and close, scopes are cleared, versions bumped",
                6, 8, 24, 64, 4, 4, 3,
                _mix(searches=20, clears=6, bumps=0.5, reads=15, writes=10, groups=3, commits=4),
            ),
            Profile(
                "soak",
                "everything, for long, by few: what grows shows",
                2, 4, 64, 96, 4, 4, 10,
                _mix(reads=20, gathers=10, writes=15, groups=5, commits=10, computes=5, pins=3, pops=3, clears=1,
                     bumps=0.05, searches=5),
            ),
        )
    }
)  # fmt: skip


def parse_mix(text: str) -> Mix:
    """`reads=60,writes=20` as weights.

    Raises:
        ValueError: an unknown operation, a weight that is no number of at least 0, or nothing left to do.
    """
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        name = name.strip()
        if name not in OPERATIONS:
            raise ValueError(f"{name!r} is none of {', '.join(OPERATIONS)}")
        weight = float(number or "1")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name} must be a number of at least 0, not {number}")
        weights[name] = weight
    if not sum(weights.values()):
        raise ValueError("every weight is 0")
    return MappingProxyType(weights)
