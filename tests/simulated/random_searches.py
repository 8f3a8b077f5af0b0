"""Programs of searches that hypothesis makes up: each host thread has one of its own, and all of them one more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from concurrent_kv import CapacityError, KeyNotFoundError
from concurrent_kv.errors import ClosedError, WaitTimeoutError
from tests.explorer.programs import A, B, C
from tests.explorer.world import value

from .search_world import OVERFLOWS, OWN_KEYS, GpuSearchWorld
from .world import WINDOW, GpuProgram

__all__ = ["search_programs"]

ROOTS = (A, B, C)
OWN = (OWN_KEYS, OWN_KEYS + 1, OWN_KEYS + 2)
TASKS = 3
STEPS = 4  # of one task
SHARED = "shared"
SHARED_ENTRIES, SHARED_SLOTS = 2, WINDOW
KINDS = ("grow", "grow", "grow", "look_up", "promote", "keep", "release", "end", "put", "get", "recur")
BETWEEN = ("put", "keep", "release", "promote", "get", "clear")


@dataclass(frozen=True)
class SearchStep:
    """One operation on a world, by name."""

    operation: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, world: GpuSearchWorld) -> None:
        try:
            getattr(world, self.operation)(*self.arguments, **self.options)
        except (KeyNotFoundError, CapacityError, WaitTimeoutError):  # all the room is others', or they wait for some
            pass
        except ClosedError:
            assert world.may_end


class _Steps:
    """Draws the steps of one task.

    Args:
        number: of the task; its values and its keys in the shared search have numbers that no other has.
    """

    def __init__(self, draw: st.DrawFn, streams: int, number: int) -> None:
        self.draw = draw
        self.on = st.integers(1, streams)
        self.entries, self.slots = draw(st.sampled_from((1, 2, 2, 3))), draw(st.sampled_from((2, WINDOW, 2 * WINDOW)))
        self.mine = f"search {number}"
        self.labels = iter(range(100 * number, 100 * number + 100, 4))
        # Of the first steps of every task: what it grows in the shared search has its label, and so a key of its own.
        self.shared_keys = [1000 + 100 * task + label for task in range(1, TASKS + 1) for label in (0, 4, 8)]

    def begin(self) -> list[SearchStep]:
        """Open the task's own search, and grow it from a root."""
        overflow = self.draw(st.sampled_from(sorted(OVERFLOWS)))
        opened = SearchStep("open", (self.mine, self.entries, self.slots, overflow))
        return [opened, self._grow(self.mine, OWN, next(self.labels))]

    def step(self, kinds: tuple[str, ...] = KINDS) -> SearchStep:
        draw, on = self.draw, self.on
        kind = draw(st.sampled_from(kinds))
        name = draw(st.sampled_from((self.mine, self.mine, SHARED)))
        own = OWN if name == self.mine else tuple(self.shared_keys)
        label = next(self.labels)
        if kind == "put":
            new = value(label, draw(st.integers(1, 3)))
            return SearchStep("put", (draw(st.sampled_from(ROOTS)), new), {"on": draw(on)})
        if kind == "get":
            return SearchStep("get", (draw(st.sampled_from(ROOTS)),), {"on": draw(on), "pop": draw(st.booleans())})
        if kind == "recur":
            if draw(st.booleans()):
                return SearchStep("put_in_recur", (5, value(label, draw(st.integers(1, WINDOW)))), {"on": draw(on)})
            return SearchStep("get_from_recur", (5,), {"on": draw(on)})
        if kind == "clear":
            return SearchStep("clear")
        if kind == "end":
            return SearchStep("end", (name,), {"drop": draw(st.booleans())})
        if kind == "keep":
            return SearchStep("keep", (name, draw(st.lists(st.sampled_from((*own, A)), max_size=2))))
        if kind == "release":
            return SearchStep("release", (name, draw(st.integers(0, 3))))
        if kind == "promote":
            return SearchStep("promote", (name, draw(st.integers(0, 3)), draw(st.sampled_from(ROOTS))))
        if kind == "look_up":
            keys = draw(st.lists(st.sampled_from((*own, *ROOTS)), min_size=1, max_size=3, unique=True))
            return SearchStep("look_up", (name, keys), {"on": draw(on), "close_on": draw(st.none() | st.just(-1) | on)})
        return self._grow(name, own, label)

    def _grow(self, name: str, own: tuple[int, ...], label: int) -> SearchStep:
        draw, on = self.draw, self.on
        if name == SHARED:
            children = [1000 + label]
        else:
            children = draw(st.lists(st.sampled_from(own), min_size=1, max_size=2, unique=True))
        parents = [draw(st.sampled_from((A, A, B, *own, *children))) for _ in children]
        labels = [label, next(self.labels)]
        between = draw(st.booleans() if name == self.mine else st.just(False))
        lengths = draw(st.none() | st.lists(st.integers(0, 1), min_size=2, max_size=2))
        options = {
            "lengths": lengths,
            "from_nothing": lengths is not None and draw(st.booleans()),
            **{stream: draw(on) for stream in ("on", "model", "commit", "fill_on")},
            "one_by_one": draw(st.booleans()),
            **({"between": self.step(BETWEEN)} if between else {}),
        }
        return SearchStep("grow", (name, dict(zip(children, zip(parents, labels, strict=False), strict=True))), options)


@st.composite
def search_programs(draw: st.DrawFn) -> GpuProgram:
    """Searches opened, grown, pruned, promoted from, ended by their users or by others, in pools too small for them."""
    streams = draw(st.integers(1, 4))
    searches = [_Steps(draw, streams, number) for number in range(1, draw(st.integers(1, TASKS)) + 1)]
    tasks = [[*search.begin(), *(search.step() for _ in range(draw(st.integers(1, STEPS))))] for search in searches]
    end = draw(st.sampled_from(("", "", "clear", "bump", "close")))
    if end:
        tasks[-1].append(SearchStep(end))
    entries = draw(st.integers(1, 3))
    # Room for what every search reserves and hardly more; now and then for less, and somebody waits or is refused.
    less = draw(st.sampled_from((0, 0, 1)))
    recur_entries = SHARED_ENTRIES - less + sum(search.entries for search in searches)
    recur_slots = SHARED_SLOTS - less + sum(search.slots for search in searches)
    setting = {
        "entries": entries,
        "headroom": draw(st.sampled_from((0, 0, 0, 2, WINDOW, 2 * WINDOW))),
        "shards": draw(st.sampled_from((1, 2))),
        "recur_entries": recur_entries,
        "recur_slots": max(recur_slots, WINDOW),
        "evicting": True,
        "home": draw(st.integers(0, streams)),
    }
    stored = {key: value(key + 1, draw(st.integers(1, 3))) for key in ROOTS[:entries]}

    def before(world: GpuSearchWorld) -> None:
        world.store(stored)
        world.open(SHARED, SHARED_ENTRIES, SHARED_SLOTS, "drop", shared=True)

    return GpuProgram(
        f"{setting} {stored} {tasks}",
        tuple(lambda world, task=task: [step(world) for step in task] for task in tasks),  # type: ignore[misc]
        setting,
        before=before,
        make=GpuSearchWorld,
    )
