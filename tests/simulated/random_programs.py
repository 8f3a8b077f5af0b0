"""Programs that hypothesis makes up: a few operations of each of a few host threads, over one to four streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from concurrent_kv import KeyNotFoundError
from concurrent_kv.errors import ClosedError, WaitTimeoutError
from tests.explorer.programs import A, B, C
from tests.explorer.world import value

from .world import WINDOW, GpuProgram, GpuWorld

__all__ = ["Step", "gpu_programs"]

KEYS = (A, B, C)
MOSTLY = (A, A, B, B, C)
TASKS = 3
STEPS = 3  # of one task
POLICIES = ("fifo", "lru", "clock", "s3fifo", "priority")


@dataclass(frozen=True)
class Step:
    """One operation on a world, by name."""

    operation: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, world: GpuWorld) -> None:
        try:
            getattr(world, self.operation)(*self.arguments, **self.options)
        except KeyNotFoundError:  # nothing to pin
            pass
        except ClosedError:  # by another task
            assert world.closing
        except WaitTimeoutError:  # others held all the room, and waited for some themselves
            pass


@st.composite
def steps(draw: st.DrawFn, streams: int, number: int) -> Step:
    """A step whose values no other has: they begin at `number`."""
    on = st.integers(1, streams)
    key = draw(st.sampled_from(MOSTLY))
    kind = draw(
        st.sampled_from(
            (
                "put",
                "put",
                "elsewhere",
                "host",
                "get",
                "pop",
                "pin",
                "take",
                "gather",
                "gather",
                "drop",
                "extend",
                "extend",
            )
        )
    )
    new = value(number, draw(st.integers(1, WINDOW)))
    if kind == "put":
        return Step("put", (key, new), {"on": draw(on)})
    if kind == "elsewhere":
        return Step("put_from_elsewhere", (key, new), {"made_on": draw(on), "on": draw(on)})
    if kind == "host":
        return Step("put_from_host", (key, new), {"on": draw(on), "pinned": draw(st.booleans())})
    if kind == "take":
        return Step("take", (key, new), {"on": draw(on)})
    if kind in ("get", "pop"):
        return Step("get", (key,), {"on": draw(on), "pop": kind == "pop"})
    if kind == "pin":
        return Step("get_pinned", (key,), {"on": draw(on)})
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True))
    if kind == "drop":
        return Step("gather", (keys,), {"on": draw(on), "drop": True})
    if kind == "gather":
        return Step("gather", (keys,), {"on": draw(on), "close_on": draw(st.none() | on)})
    children = {
        child: (parent, 10 * number + 5) for child, parent in zip(keys, draw(st.permutations(keys)), strict=True)
    }
    lengths = draw(st.none() | st.lists(st.integers(0, 1), min_size=len(keys), max_size=len(keys)))
    return Step("extend", (children,), {name: draw(on) for name in ("on", "model", "commit")} | {"lengths": lengths})


@st.composite
def gpu_programs(draw: st.DrawFn) -> GpuProgram:
    """Puts, gets, pops, pins, gathers, commits, computations, clears and a close, on a pool too small for them."""
    streams = draw(st.integers(1, 4))
    tasks = []
    for task in range(draw(st.integers(1, TASKS))):
        count = draw(st.integers(1, STEPS))
        tasks.append([draw(steps(streams, 20 + 10 * task + step)) for step in range(count)])
    end = draw(st.sampled_from(("", "", "clear", "close")))
    if end:
        tasks[-1].append(Step(end))
    entries = draw(st.integers(1, 3))
    setting = {
        "entries": entries,
        "headroom": draw(st.sampled_from((1, 2, TASKS))) * WINDOW,
        "shards": draw(st.sampled_from((1, 2))),
        "policy": draw(st.sampled_from(POLICIES)),
        "evicting": True,
        "home": draw(st.integers(0, streams)),
    }
    stored = {key: value(key + 1, draw(st.integers(1, WINDOW))) for key in KEYS[:entries]}
    return GpuProgram(
        f"{setting} {stored} {tasks}",
        tuple(lambda world, task=task: [step(world) for step in task] for task in tasks),  # type: ignore[misc]
        setting,
        before=lambda world: world.store(stored),
    )
