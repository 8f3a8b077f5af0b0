"""Programs over one pool: two or three operations at once."""

from __future__ import annotations

from typing import Any

from concurrent_kv import KeyNotFoundError

from .programs import A, B, C, D, Operation, Program, must
from .world import World, or_closed, value

__all__ = ["POOL_PROGRAMS"]


def stored(*keys: int) -> Operation:
    """Entries that are there at the beginning, with value `key + 1`."""
    return lambda world: world.store({key: value(key + 1) for key in keys})


def keeps(*keys: int) -> Operation:
    """These keys are still hits at the end: nothing evicted them."""

    def check(world: World) -> None:
        for key in keys:
            must(world.get(key) is not None, f"{key} was evicted")

    return check


def read_pinned(world: World) -> None:
    try:
        handle = world.pool.pin(A)
    except KeyNotFoundError:
        return  # evicted before
    with handle as pin:
        must(world.get(A) is not None, "a pinned entry was evicted")
        pin.get()
        must(world.get(A) is not None, "a pinned entry was evicted")


def pool_program(name: str, *tasks: Operation, **options: Any) -> Program:
    fields = {key: options.pop(key) for key in ("before", "after", "preemptions") if key in options}
    return Program(name, tasks, options, **fields)


POOL_PROGRAMS = [
    pool_program("get|put", lambda w: w.get(A), lambda w: w.put(A, value(9)), before=stored(A), preemptions=4),
    pool_program("get|clear", lambda w: w.get(A), lambda w: w.clear(), before=stored(A), preemptions=None),
    pool_program(
        "put many|put many across shards, real locks",
        lambda w: w.put_many({A: value(6), B: value(7)}),
        lambda w: w.put_many({B: value(8), A: value(9)}),
        shards=2,
        real_locks=True,
        preemptions=1,
    ),
    pool_program(
        "get|evict",
        lambda w: w.get(A),
        lambda w: w.put(B, value(9)),
        before=stored(A),
        entries=1,
        evicting=True,
        headroom=2,
        slots=4,
        preemptions=3,
    ),
    pool_program("put|put same key", lambda w: w.put(A, value(8)), lambda w: w.put(A, value(9)), preemptions=3),
    pool_program(
        "replace|replace same key, full",
        lambda w: w.put(A, value(8)),
        lambda w: w.put(A, value(9)),
        before=stored(A, B),
        after=keeps(A, B),
        entries=2,
        headroom=2,
        slots=4,
    ),
    pool_program(
        "replace|replace other key, full",
        lambda w: w.put(A, value(8)),
        lambda w: w.put(B, value(9)),
        before=stored(A, B),
        after=keeps(A, B),
        entries=2,
        headroom=2,
        slots=4,
    ),
    pool_program(
        "put|put other keys, room for one",
        lambda w: w.put(A, value(8)),
        lambda w: w.put(B, value(9)),
        entries=1,
        evicting=True,
    ),
    pool_program(
        "put|put other keys, room for two, full",
        lambda w: w.put(C, value(8)),
        lambda w: w.put(D, value(9)),
        before=stored(A, B),
        entries=2,
        slots=4,
        headroom=2,
        evicting=True,
    ),
    pool_program(
        "replace|evict it",
        lambda w: w.put(A, value(8)),
        lambda w: w.put(B, value(9)),
        before=stored(A),
        entries=1,
        evicting=True,
    ),
    pool_program(
        "put two|put two, slots for one of them",
        lambda w: w.put_many({A: value(6), B: value(7)}),
        lambda w: w.put_many({C: value(8), D: value(9)}),
        entries=4,
        slots=4,
        headroom=0,
        evicting=True,
    ),
    pool_program(
        "put three tokens|put three tokens, four slots",
        lambda w: w.put(A, value(8, 3)),
        lambda w: w.put(B, value(9, 3)),
        entries=2,
        slots=4,
        headroom=0,
        evicting=True,
    ),
    pool_program(
        "replace one and add one|replace the other and add one, full",
        lambda w: w.put_many({A: value(6), C: value(7)}),
        lambda w: w.put_many({B: value(8), D: value(9)}),
        before=stored(A, B),
        entries=2,
        evicting=True,
    ),
    pool_program(
        "put many|gather across shards",
        lambda w: w.put_many({A: value(8), B: value(9)}),
        lambda w: w.gather([A, B]),
        before=stored(A, B),
        shards=2,
        preemptions=3,
    ),
    pool_program(
        "put many|put many across shards",
        lambda w: w.put_many({A: value(6), B: value(7)}),
        lambda w: w.put_many({B: value(8), A: value(9)}),
        shards=2,
    ),
    pool_program(
        "put many|put many|gather across shards",
        lambda w: w.put_many({A: value(6), B: value(7)}),
        lambda w: w.put_many({B: value(8), C: value(9)}),
        lambda w: w.gather([C, A, B]),
        shards=2,
        preemptions=1,
    ),
    pool_program(
        "commit|evict its parent",
        lambda w: w.extend({B: (A, 91)}),
        lambda w: w.put(C, value(8)),
        before=stored(A),
        entries=1,
        evicting=True,
    ),
    pool_program(
        "commit|evict its parent, slots short",
        lambda w: w.extend({B: (A, 91)}),
        lambda w: w.put(C, value(8)),
        before=stored(A),
        entries=2,
        slots=4,
        headroom=2,
        evicting=True,
    ),
    pool_program(
        "commit|replace its parent", lambda w: w.extend({B: (A, 91)}), lambda w: w.put(A, value(8)), before=stored(A)
    ),
    pool_program("commit|clear", lambda w: w.extend({B: (A, 91)}), lambda w: w.clear(), before=stored(A)),
    pool_program("commit|bump version", lambda w: w.extend({B: (A, 91)}), lambda w: w.bump_version(), before=stored(A)),
    pool_program(
        "commit|commit same child",
        lambda w: w.extend({B: (A, 91)}),
        lambda w: w.extend({B: (A, 81)}),
        before=stored(A),
        preemptions=1,
    ),
    pool_program("put|clear", lambda w: w.put(A, value(9)), lambda w: w.clear(), before=stored(A), preemptions=3),
    pool_program(
        "put many|clear across shards",
        lambda w: w.put_many({A: value(8), B: value(9)}),
        lambda w: w.clear(),
        before=stored(A, B),
        shards=2,
    ),
    pool_program(
        "put, then get|clear, then get",
        lambda w: (w.put(A, value(9)), w.get(A)),
        lambda w: (w.clear(), w.get(A)),
        before=stored(A),
    ),
    pool_program(
        "get|clear, then put",
        lambda w: w.get(A),
        lambda w: (w.clear(), w.put(A, value(9))),
        before=stored(A),
        preemptions=3,
    ),
    pool_program(
        "get, then get|clear across shards",
        lambda w: (w.get(A), w.get(B)),
        lambda w: w.clear(),
        before=stored(A, B),
        shards=2,
    ),
    pool_program(
        "put|close a batch, slots short",
        lambda w: w.put(B, value(9, 4)),
        lambda w: w.handles.pop().close(),
        before=lambda w: (w.store({A: value(1)}), w.hold_batch([A])),
        entries=2,
        slots=4,
        headroom=0,
        evicting=True,
    ),
    pool_program(
        "put|put that drops a pin, nothing else to evict",
        lambda w: w.put(B, value(9)),
        lambda w: (w.handles.clear(), w.put(C, value(8))),
        before=lambda w: (w.store({A: value(1)}), w.handles.append(w.pool.pin(A))),
        entries=1,
        evicting=True,
    ),
    pool_program("clear|clear", lambda w: w.clear(), lambda w: w.clear(), before=stored(A), preemptions=None),
    pool_program("pop|put", lambda w: w.pop(A), lambda w: w.put(A, value(9)), before=stored(A)),
    pool_program("pop|pop", lambda w: w.pop(A), lambda w: w.pop(A), before=stored(A)),
    pool_program("pop|clear", lambda w: w.pop(A), lambda w: w.clear(), before=stored(A)),
    pool_program(
        "pop|replace, full",
        lambda w: w.pop(A),
        lambda w: w.put(A, value(9)),
        before=stored(A, B),
        after=keeps(B),
        entries=2,
        slots=4,
        headroom=2,
    ),
    pool_program("pin|evict", read_pinned, lambda w: w.put(C, value(9)), before=stored(A, B), entries=2, evicting=True),
    pool_program(
        "pin|evict the only entry",
        read_pinned,
        lambda w: w.put(B, value(9)),
        before=stored(A),
        entries=1,
        evicting=True,
        after=keeps(B),
    ),
    pool_program(
        "put|close",
        lambda w: or_closed(lambda: w.put(B, value(9))),
        lambda w: w.close(),
        before=stored(A),
        after=lambda w: must(len(w.pool) == 0, "something was stored in a closed pool"),
    ),
    pool_program(
        "waiting put|close",
        lambda w: or_closed(lambda: w.put(B, value(9))),
        lambda w: (w.close(), w.handles.pop().close()),
        before=lambda w: (w.store({A: value(1)}), w.handles.append(w.pool.pin(A))),
        entries=1,
    ),
    pool_program(
        "commit|close",
        lambda w: or_closed(lambda: w.extend({B: (A, 91)})),
        lambda w: w.close(),
        before=stored(A),
        preemptions=1,
    ),
    pool_program(
        "get|replace|evict",
        lambda w: w.get(A),
        lambda w: w.put(A, value(8)),
        lambda w: w.put(C, value(9)),
        before=stored(A, B),
        entries=2,
        slots=4,
        headroom=2,
        evicting=True,
        preemptions=1,
    ),
]
