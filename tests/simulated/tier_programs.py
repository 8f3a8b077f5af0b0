"""What host threads do at once on a simulated device with a tier: each order of the copies down and up, one by one."""

from __future__ import annotations

from typing import Any

from tests.explorer.programs import A, B, C, D, Operation, must
from tests.explorer.world import value

from .acts import WHOLE, several
from .world import WINDOW, GpuProgram, GpuWorld

__all__ = ["TIER_GPU_PROGRAMS"]

# One entry, two windows of slots: what is freed is used again at once; a put of another key moves what is there down.
TWO = {"entries": 2, "headroom": 2 * WINDOW, "tier": 4}
FULL = {"entries": 1, "headroom": WINDOW, "tier": 4}


def tier_program(name: str, *tasks: Operation, **options: Any) -> GpuProgram:
    fields = {key: options.pop(key) for key in ("before", "after") if key in options}
    return GpuProgram(f"tier: {name}", tasks, {**FULL, **options}, **fields)


def disk_program(name: str, *tasks: Operation, **options: Any) -> GpuProgram:
    return tier_program(f"disk: {name}", *tasks, **{"disk": True, **options})


def put(key: int, number: int, on: int) -> Operation:
    return lambda world: world.put(key, value(number, WHOLE), on=on)


def get(key: int, on: int, *, pop: bool = False) -> Operation:
    return lambda world: world.get(key, on=on, pop=pop)


def stored(*keys: int) -> Operation:
    return lambda world: world.store({key: value(key + 1, WHOLE) for key in keys})


def below(*keys: int) -> Operation:
    """These are in the tier, and nothing in the pool."""

    def before(world: GpuWorld) -> None:
        stored(*keys, D)(world)
        with world.on(0):
            world.pool.pop(D)
        del world.before[D]
        world.settle()

    return before


def family(world: GpuWorld) -> None:
    """A, and a child of it: two entries that share tokens."""
    world.store({A: value(1, 2)})
    world.extend({B: (A, 91)}, on=0)
    world.settle()


def put_short(key: int, number: int, on: int) -> Operation:
    return lambda world: world.put(key, value(number, 2), on=on)


def family_below(world: GpuWorld) -> None:
    """Both have moved down, and the pool is empty."""
    world.store({C: value(3, 2), D: value(4, 2)})
    for key in (C, D):
        world.pool.pop(key)
        del world.before[key]
    world.settle()


def gathered_and_waited_for(world: GpuWorld) -> None:
    """The host waits for a batch whose only row is in the tier, and then looks at it without a stream."""
    with world.on(2):
        batch = world.pool.gather([A])
        batch.synchronize()
        seen = world.gpu.read(batch.data)[0, 0, 0, :WHOLE, 0].tolist()
        must(seen == list(map(float, value(1, WHOLE))), f"the host waited, and read {seen}")
        batch.close()


TIER_GPU_PROGRAMS = [
    tier_program("down after the write", several(put(A, 20, 1), put(B, 30, 2), get(A, 2))),
    tier_program("read after the move down", several(put(B, 30, 1), get(A, 2)), before=stored(A)),
    tier_program(
        "gathered after the move down",
        several(put(B, 30, 1), lambda w: w.gather([A, B], on=2, close_on=3)),
        before=stored(A),
    ),
    tier_program("down, its slots reused", several(put(B, 30, 1), put(C, 40, 2), get(A, 1)), before=stored(A)),
    tier_program(
        "read below, popped, its room reused",
        several(get(A, 1), get(A, 3, pop=True), put(B, 30, 2), put(C, 40, 2), get(B, 2)),
        before=several(stored(A), put(D, 50, 0), GpuWorld.settle),
        tier=1,
        evicting=True,
    ),
    tier_program("up, read on another", several(get(A, 1), get(A, 2)), before=below(A)),
    tier_program(
        "put, popped, up into its slots",
        several(put(B, 30, 1), get(B, 1, pop=True), get(A, 2)),
        before=below(A),
        headroom=0,
    ),
    tier_program(
        "up, its room below reused",
        several(get(A, 1), put(B, 30, 2), get(A, 2, pop=True), put(C, 40, 3), get(B, 3)),
        before=below(A),
        tier=1,
        evicting=True,
    ),
    tier_program(
        "shared tokens down on one, the rest on another",
        several(put_short(C, 30, 1), put_short(D, 40, 2), get(B, 3), get(A, 3)),
        before=family,
        **TWO,
    ),
    tier_program(
        "shared tokens up on one, the rest on another",
        several(get(A, 1), get(B, 2), get(B, 3)),
        before=several(family, family_below),
        **TWO,
    ),
    tier_program("gathered from below, waited for by the host", gathered_and_waited_for, before=stored(A, B)),
    tier_program(
        "up on a stream of its own, first use of the slots", get(A, 1), before=below(A), home=2, headroom=WINDOW
    ),
    tier_program("down and up, not pinned", several(put(B, 30, 1), get(A, 2)), before=stored(A), pinned=False),
    disk_program("read from the file", several(put(C, 40, 2), get(A, 1), get(B, 3)), before=stored(A, B)),
    disk_program(
        "paged out after its copy", several(put(A, 20, 1), put(B, 30, 2), put(C, 40, 3), get(A, 1), get(B, 2)), tier=4
    ),
    disk_program(
        "read in memory, which is used again",
        several(get(A, 1), put(C, 40, 2), get(A, 3), get(B, 1)),
        before=stored(A, B),
    ),
    disk_program("up from the file and from memory", several(get(A, 1), get(B, 2)), before=below(A, B), **TWO),
    disk_program("part of it in the file", several(put(C, 40, 2), get(B, 1), get(A, 3)), before=family, **TWO),
    disk_program(
        "read in memory, popped, its memory used again",
        several(get(A, 3, pop=True), put(C, 40, 1), get(B, 2)),
        before=stored(A, B),
    ),
    disk_program(
        "down, popped, its memory used again",
        several(put(B, 30, 1), get(A, 2, pop=True), put(C, 40, 3), get(B, 3)),
        before=stored(A),
    ),
    disk_program("paged out|get", put(C, 40, 1), get(A, 2), before=stored(A, B)),
    disk_program("paged out|paged out", put(C, 40, 1), put(D, 50, 2), before=stored(A, B)),
    disk_program("not pinned", several(put(C, 40, 2), get(A, 1), get(B, 3)), before=stored(A, B), pinned=False),
    tier_program("evict|get", put(B, 30, 1), get(A, 2), before=stored(A)),
    tier_program("up|up", get(A, 1), get(A, 2), before=below(A)),
]
