"""Programs over one pool with a tier: an entry on its way down or up, and another operation on its key at each step."""

from __future__ import annotations

from typing import Any

from concurrent_kv.errors import KeyNotFoundError

from .pool_programs import stored
from .programs import A, B, C, D, Operation, Program, must
from .world import World, value

__all__ = ["TIER_PROGRAMS"]

FULL = {"entries": 1, "slots": 4, "headroom": 4, "tier": 4}  # a put of another key moves what is there down


def tier_program(name: str, *tasks: Operation, **options: Any) -> Program:
    fields = {key: options.pop(key) for key in ("before", "after", "preemptions") if key in options}
    return Program(f"tier: {name}", tasks, {**FULL, **options}, **fields)


def below(world: World) -> None:
    """A is in the tier, and nothing in the pool."""
    stored(A, B)(world)
    world.pool.pop(B)
    del world.before[B]


def pinned(world: World) -> None:
    """A pin keeps what it pinned where it is, and readable."""
    try:
        pin = world.pool.pin(A)
    except KeyNotFoundError:
        return
    with pin:
        must(world.get(A) is not None, "what is pinned was evicted")
        pin.get()


def evict(world: World) -> None:
    world.put(B, value(9))


def both_below(world: World) -> None:
    """A is in the file, B in the memory before it, and C in the pool."""
    world.store({A: value(1, 4), B: value(2, 4), C: value(3, 4)})


def one_below(world: World) -> None:
    """A is in the tier's memory, and B, which is as long, in the pool."""
    world.store({A: value(1, 4), B: value(2, 4)})


def page_out(world: World) -> None:
    world.put(C, value(9, 4))


def put_another(world: World) -> None:
    world.put(D, value(8, 4))


def up_from_the_file(world: World) -> None:
    world.pop(C)
    world.get(A)


def disk_program(name: str, *tasks: Operation, **options: Any) -> Program:
    return tier_program(f"disk: {name}", *tasks, **{"disk": True, "before": one_below, **options})


DISK_PROGRAMS = [
    disk_program("paged out|get", page_out, lambda w: w.get(A), preemptions=3),
    disk_program("paged out|get, get", page_out, lambda w: (w.get(A), w.get(A)), shards=2),
    disk_program("paged out|put", page_out, lambda w: w.put(A, value(8, 4))),
    disk_program("paged out|pop, put", page_out, lambda w: (w.pop(A), w.put(A, value(8, 4)))),
    disk_program("paged out|clear", page_out, lambda w: w.clear()),
    disk_program("paged out|paged out", page_out, put_another, preemptions=3),
    disk_program("paged out|gather", page_out, lambda w: w.gather([A, B])),
    disk_program("up from the file|put", up_from_the_file, lambda w: w.put(A, value(8)), before=both_below),
    disk_program("up from the file|get", up_from_the_file, lambda w: w.get(A), before=both_below),
    disk_program("read from the file|paged out", lambda w: w.get(A), put_another, before=both_below),
    disk_program(
        "read, its memory taken|paged out",
        lambda w: (w.get(B), w.get(A)),
        lambda w: (w.put(D, value(8, 4)), w.pop(D), w.get(B)),
        before=both_below,
    ),
]

TIER_PROGRAMS = [
    tier_program("evict|get", evict, lambda w: w.get(A), before=stored(A), preemptions=3),
    tier_program("evict|put", evict, lambda w: w.put(A, value(8)), before=stored(A)),
    tier_program("evict|pop", evict, lambda w: w.pop(A), before=stored(A)),
    tier_program("evict|clear", evict, lambda w: w.clear(), before=stored(A)),
    tier_program(
        "clear|get both, one of them below", lambda w: w.clear(), lambda w: (w.get(B), w.get(A)), before=stored(A, B)
    ),
    tier_program("evict|bump", evict, lambda w: w.bump_version(), before=stored(A)),
    tier_program("evict|gather", evict, lambda w: w.gather([A, B]), before=stored(A)),
    tier_program("evict|pin", evict, pinned, before=stored(A)),
    tier_program("evict|evict", evict, lambda w: w.put(C, value(7)), before=stored(A)),
    tier_program("evict|get, get", evict, lambda w: (w.get(A), w.get(A)), before=stored(A), shards=2),
    tier_program("up|get", lambda w: w.get(A), lambda w: w.get(A), before=below, preemptions=3),
    tier_program("up|put", lambda w: w.get(A), lambda w: w.put(A, value(8)), before=below),
    tier_program("up|pop", lambda w: w.get(A), lambda w: w.pop(A), before=below),
    tier_program("up|clear", lambda w: w.get(A), lambda w: w.clear(), before=below),
    tier_program("up|bump", lambda w: w.get(A), lambda w: w.bump_version(), before=below),
    tier_program("up|evict", lambda w: w.get(A), evict, before=below),
    tier_program("up|gather", lambda w: w.get(A), lambda w: w.gather([A, A]), before=below),
    tier_program("up|pin", lambda w: w.get(A), pinned, before=below),
    tier_program("up|up|put", lambda w: w.get(A), lambda w: w.get(A), lambda w: w.put(A, value(8)), before=below),
    tier_program(
        "evict|evict, room for one below",
        evict,
        lambda w: w.put(C, value(7, 4)),
        before=lambda w: w.store({A: value(1, 4)}),
        tier=1,
        evicting=True,
    ),
    tier_program(
        "evict, evict|pin, room for one below",
        lambda w: (w.put(B, value(9, 4)), w.put(C, value(7, 4))),
        pinned,
        before=lambda w: w.store({A: value(1, 4)}),
        tier=1,
        evicting=True,
    ),
    tier_program(
        "up, evict, evict|pin, room for one below",
        lambda w: (w.get(A), w.put(B, value(9, 4)), w.put(C, value(7, 4))),
        pinned,
        before=lambda w: (w.store({A: value(1, 4), B: value(2, 4)}), w.pool.pop(B), w.before.pop(B)),
        tier=1,
        evicting=True,
    ),
    tier_program(
        "child of an entry that moves|get",
        lambda w: w.extend({B: (A, 91)}),
        lambda w: w.get(A),
        before=stored(A),
    ),
    tier_program(
        "parent and child move|get both",
        lambda w: w.put(C, value(9, 4)),
        lambda w: (w.get(A), w.get(B)),
        before=lambda w: (stored(A)(w), w.extend({B: (A, 91)})),
        entries=2,
        slots=4,
    ),
    *DISK_PROGRAMS,
]
