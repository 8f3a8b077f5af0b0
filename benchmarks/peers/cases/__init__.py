"""The cases by name: what each measures, in its full and in its quick form, and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.peers.cases.base import Run
from benchmarks.peers.cases.calls import CallsRun
from benchmarks.peers.cases.entries import EntriesRun
from benchmarks.peers.cases.nodes import NodesRun
from benchmarks.peers.cases.steps import StepRun
from benchmarks.peers.cases.threads import ThreadsRun
from benchmarks.peers.cases.windows import WindowsRun

__all__ = ["CASES", "KINDS", "Case"]

KINDS: Mapping[str, Callable[..., Run]] = {
    "calls": CallsRun,
    "entries": EntriesRun,
    "nodes": NodesRun,
    "step": StepRun,
    "threads": ThreadsRun,
    "windows": WindowsRun,
}


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        kind: of KINDS.
        title: of its table.
        full, quick: what the kind is given.
        headline: the measures that the first table shows.
        clock: which clock its ratios are of. Threads that wait for each other take no processor.
        rounds: at most, of its full form.
        seconds: no round begins later than this, but for the first five.
        without: contestants that sit it out, with the reason.
        ours_only: whether it asks something of this library that others have no answer to.
        in_quick: whether the quick form has it, unless it is named.
        fresh: whether it needs processes of its own, whose allocators work as they do by default.
    """

    kind: str
    title: str
    full: Mapping[str, Any]
    quick: Mapping[str, Any]
    headline: tuple[str, ...] = ()
    clock: Literal["processor", "wall"] = "processor"
    rounds: int = 15
    seconds: float = 40.0
    without: Mapping[str, str] = field(default_factory=dict)
    ours_only: bool = False
    in_quick: bool = True
    fresh: bool = False


def _steps() -> dict[str, Case]:
    """The search step of WORKLOADS: roots as long as nearly every node of a window of 8, half a window for `memory`."""
    found: dict[str, Case] = {}
    for workload, simulations, root in (
        ("cartpole", 25, 5),
        ("lunarlander", 25, 5),
        ("atari", 50, 5),
        ("memory", 25, 81),
    ):
        for rows in (8, 32):
            sizes = {"shape": {"workload": workload}, "rows": rows, "simulations": simulations, "root_tokens": root}
            found[f"step/{workload}/{rows}"] = Case(
                "step",
                f"A step of a search, {workload}, {rows} rows",
                sizes,
                {**sizes, "turn_ms": 2.0},
                headline=("step", "open", "first gather", "close", "search"),
                in_quick=rows == 8,
            )
    return found


KIB = 1024
SINGLE = {
    "8 KiB": {"shape": {"workload": "cartpole"}, "tokens": 8, "entries": 64},
    "96 KiB": {"shape": {"workload": "atari"}, "tokens": 8, "entries": 64},
    "1.25 MiB": {"shape": {"workload": "memory"}, "tokens": 160, "entries": 16},
    "8 MiB": {
        "shape": {"layers": 4, "heads": 4, "head_dim": 64, "window": 1024, "limit": 1024},
        "tokens": 1024,
        "entries": 8,
    },
}
TINY = {"layers": 1, "heads": 1, "head_dim": 4, "window": 1, "limit": 1, "dropped": 0}
MANY = {f"10^{power}": {"shape": TINY, "tokens": 1, "entries": 10**power} for power in (3, 4, 5, 6)}
PLACES = {
    "window 8 at 4": {"window": 8, "depth": 4, "new": 2},
    "window 64 at 32": {"window": 64, "depth": 32, "new": 8},
    "window 512 at 256": {"window": 512, "depth": 256, "new": 64},
    "window 4,096 at 256": {"window": 4096, "depth": 256, "new": 64},
    "window 4,096 at 2,048": {"window": 4096, "depth": 2048, "new": 64},
    "window 32,768 at 256": {"window": 32768, "depth": 256, "new": 64},
    "window 32,768 at 4,096": {"window": 32768, "depth": 4096, "new": 64},
    "window 32,768 at 16,384": {"window": 32768, "depth": 16384, "new": 64},
}
NODES: Mapping[str, Mapping[str, Any]] = {
    "cartpole": {"shape": {"workload": "cartpole"}, "rows": 8, "nodes": 10_000, "root": 5, "new": 2},
    "atari": {"shape": {"workload": "atari"}, "rows": 8, "nodes": 2_000, "root": 5, "new": 2},
    "window 512, 64 new tokens": {
        "shape": {"layers": 1, "heads": 1, "head_dim": 8, "window": 512, "limit": 448, "dropped": 64},
        "rows": 8,
        "nodes": 10_000,
        "root": 64,
        "new": 64,
    },
    "window 32,768, 64 new tokens": {"window": 32768, "rows": 8, "nodes": 10_000, "root": 64, "new": 64},
    "window 32,768, 2 new tokens at 8,192": {"window": 32768, "rows": 8, "nodes": 10_000, "root": 8192, "new": 2},
}


def _few(items: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: items[name] for name in names}


CASES: Mapping[str, Case] = {
    **_steps(),
    "single": Case(
        "entries",
        "Single entries by size: get and put (of a key that is there)",
        {"stores": SINGLE},
        {"stores": _few(SINGLE, ("8 KiB", "96 KiB")), "turn_ms": 1.0},
        headline=tuple(f"{operation}, {size}" for size in SINGLE for operation in ("get", "put")),
    ),
    "entries": Case(
        "entries",
        "Single entries of 32 bytes by number: get, put (of a key that is there), insert (the oldest goes)",
        {"stores": MANY, "turn_ms": 3.0, "inserting": True},
        {"stores": _few(MANY, ("10^3", "10^4")), "turn_ms": 1.0, "inserting": True},
        headline=tuple(f"{operation}, {size}" for operation in ("get", "insert") for size in MANY),
        without={"dict-clone": "is dict with a clone that costs the same at every number"},
    ),
    "windows": Case(
        "windows",
        "Long windows and deep trees: gather and commit of 8 rows (a place: the window, and the parents' tokens)",
        {"places": PLACES, "rows": 8, "turns": 16},
        {"places": _few(PLACES, ("window 8 at 4", "window 512 at 256")), "rows": 8, "turns": 16},
        headline=tuple(f"commit, {place}" for place in PLACES),
        without=dict.fromkeys(
            ("dict-clone", "cachetools", "moka", "theine"), "copies whole rows as dict does, whatever its lookups cost"
        ),
    ),
    "nodes": Case(
        "nodes",
        "Bytes a node",
        {"searches": NODES, "copied_bytes": 400 * KIB * KIB},
        {
            "searches": {
                "cartpole": {**NODES["cartpole"], "nodes": 1000},
                "window 4,096, 64 new tokens": {"window": 4096, "rows": 8, "nodes": 200, "root": 64, "new": 64},
            },
            "copied_bytes": 40 * KIB * KIB,
        },
        without={"floor": "stores nothing"},
        fresh=True,
    ),
    "threads/cartpole": Case(
        "threads",
        "Threads, each on its own search: a step of any of them, cartpole, 8 rows, no model between",
        {"shape": {"workload": "cartpole"}, "rows": 8, "simulations": 25, "threads": [1, 2, 4, 8], "searches": 2},
        {"shape": {"workload": "cartpole"}, "rows": 8, "simulations": 25, "threads": [1, 2], "searches": 1},
        headline=("1 thread", "2 threads", "2 threads, a cache each", "4 threads", "8 threads"),
        clock="wall",
        without={"floor": "is for one thread"},
    ),
    "threads/atari-model": Case(
        "threads",
        "Threads, each on its own search: a step of any of them, atari, 8 rows, a transformer of its size between",
        {
            "shape": {"workload": "atari"},
            "rows": 8,
            "simulations": 25,
            "threads": [1, 2],
            "searches": 1,
            "with_model": True,
        },
        {
            "shape": {"workload": "atari"},
            "rows": 8,
            "simulations": 5,
            "threads": [1, 2],
            "searches": 1,
            "with_model": True,
        },
        headline=("1 thread", "2 threads", "2 threads, a cache each"),
        clock="wall",
        rounds=9,
        without={
            "floor": "is for one thread",
            **dict.fromkeys(("cachetools", "moka", "theine"), "the model's share is the same as for cachebox"),
        },
    ),
    "calls/cartpole": Case(
        "calls",
        "Functions of the package called, cartpole, 8 rows",
        {"shape": {"workload": "cartpole"}, "rows": 8, "simulations": 25},
        {"shape": {"workload": "cartpole"}, "rows": 8, "simulations": 25},
        ours_only=True,
    ),
    "calls/atari": Case(
        "calls",
        "Functions of the package called, atari (absolute positions), 8 rows",
        {"shape": {"workload": "atari"}, "rows": 8, "simulations": 50},
        {"shape": {"workload": "atari"}, "rows": 8, "simulations": 50},
        ours_only=True,
    ),
}
