"""Programs with searches: what is theirs stays while they are open, and nothing of it after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from concurrent_kv import CapacityError, KeyNotFoundError

from .programs import A, B, Operation, Program, must
from .search_world import SearchWorld
from .world import keys_values, or_closed, value

__all__ = ["SEARCH_PROGRAMS"]

X, Y, Z = 10, 11, 12  # keys of the search
ROOT = {A: value(1)}


def root(world: SearchWorld) -> None:
    world.store(ROOT)


def root_and_child(world: SearchWorld) -> None:
    world.store(ROOT)
    world.grow({X: (A, 91)})


def child_that_may_go(world: SearchWorld) -> None:
    root_and_child(world)
    world.own.clear()


def child_of_root(world: SearchWorld) -> None:
    must(world.grow({X: (A, 91)}), "an adopted root or an own entry was missed")


def open_and_close(world: SearchWorld) -> None:
    """What fits must open, at once or when the other search has closed."""
    with world.open(1, 4) as search:
        must(not search.closed, "a search was closed before it began")


def open_for_good(world: SearchWorld) -> None:
    def attempt() -> None:
        world.search = world.open(2, 8)

    or_closed(attempt)


def grow_twice(world: SearchWorld) -> None:
    """The second generation is gathered from the first, which must still be there; the root may be gone before."""
    if world.grow({X: (A, 91)}):
        must(world.grow({Y: (X, 92)}), "an entry of an open search was missed")


def nothing_promoted(world: SearchWorld) -> None:
    must(world.search.closed, "a version bump left a search open")
    must(world.get(B) is None, "an entry of the old weights version is a hit")


def search_program(name: str, *tasks: Operation, **options: Any) -> Program:
    fields = {key: options.pop(key) for key in ("before", "after", "preemptions") if key in options}
    return Program(name, tasks, options, make=SearchWorld, **fields)


def unless_full(action: Callable[[], object]) -> None:
    """An operation that may find the pool reserved by others."""
    with suppress(CapacityError):
        action()


def keep_both(world: SearchWorld) -> None:
    """Keep X, and Y, if that is there; where it is not yet, nothing is released."""
    with suppress(KeyNotFoundError):
        world.search.keep([X, Y])


SEARCH_PROGRAMS = [
    search_program(
        "search commit|search close",
        lambda w: or_closed(lambda: child_of_root(w)),
        lambda w: w.search.close(),
        before=root,
    ),
    search_program(
        "search commit|search close, budget spent",
        lambda w: or_closed(lambda: w.grow({Y: (X, 92)})),
        lambda w: w.search.close(),
        before=root_and_child,
        search=(1, 4),
    ),
    search_program(
        "search close|search close", lambda w: w.search.close(), lambda w: w.search.close(), before=root_and_child
    ),
    search_program(
        "search gather|replace its root",
        child_of_root,
        lambda w: w.put(A, value(8)),
        before=root,
        preemptions=1,
    ),
    search_program(
        "search gather|evict its root",
        lambda w: w.grow({X: (A, 91)}) and (w.grow({Y: (A, 92)}), w.search.close()),
        lambda w: w.put(B, value(8)),
        before=root,
        entries=1,
        evicting=True,
        preemptions=1,
    ),
    search_program(
        "search grows|clear both pools",
        grow_twice,
        lambda w: (w.clear(), w.recur.clear()),
        before=root,
        preemptions=1,
    ),
    search_program(
        "search grows|put in its pool",
        grow_twice,
        lambda w: w.recur.put(Z, keys_values((value(7),))),
        before=root,
        recur_entries=3,
        recur_slots=12,
        preemptions=1,
    ),
    search_program(
        "search commits|same search commits",
        lambda w: w.grow({X: (A, 91)}),
        lambda w: w.grow({Y: (A, 92)}),
        before=root,
        search=(2, 2),
        preemptions=1,
    ),
    search_program(
        "search releases|same search commits",
        lambda w: w.release(X),
        lambda w: unless_full(lambda: w.grow({Y: (A, 92)})),
        before=root_and_child,
        search=(1, 1),
        recur_entries=1,
        recur_slots=4,
    ),
    search_program(
        "search replaces its child, budget spent|search close",
        lambda w: or_closed(lambda: unless_full(lambda: w.grow({X: (A, 81)}))),
        lambda w: w.search.close(),
        before=root_and_child,
        search=(1, 1),
        preemptions=1,
    ),
    search_program(
        "search replaces its child, budget spent|so does another thread",
        lambda w: unless_full(lambda: w.grow({X: (A, 81)})),
        lambda w: unless_full(lambda: w.grow({X: (A, 82)})),
        before=root_and_child,
        after=lambda w: w.own.clear(),  # which of the two was last, only they know
        search=(1, 1),
    ),
    search_program(
        "search replaces its child, budget spent|put in its pool",
        lambda w: unless_full(lambda: w.grow({X: (A, 81)})),
        lambda w: w.recur.put(Y, keys_values((value(8),))),
        before=root_and_child,
        search=(1, 1),
    ),
    search_program(
        "search replaces its child, budget spent|releases it",
        lambda w: unless_full(lambda: w.grow({X: (A, 81)})),
        lambda w: w.search.release([X]),
        before=child_that_may_go,
        after=lambda w: w.own.clear(),
        search=(1, 1),
    ),
    search_program(
        "search gathers what it releases|it releases",
        lambda w: w.grow({Y: (X, 92)}),
        lambda w: w.search.release([X]),
        before=child_that_may_go,
        preemptions=1,
    ),
    search_program(
        "search keeps one child|same search commits another",
        keep_both,
        lambda w: must(w.grow({Y: (X, 92)}), "an entry that was kept was missed"),
        before=root_and_child,
    ),
    search_program(
        "search commit|close its pool",
        lambda w: or_closed(lambda: w.grow({Y: (X, 92)})),
        lambda w: w.recur.close(),
        before=root_and_child,
        preemptions=1,
    ),
    search_program(
        "put in its pool|search dropped without a close",
        lambda w: w.recur.put(Y, keys_values((value(8),))),
        lambda w: (w.drop(), w.get(A)),
        before=root_and_child,
        recur_entries=3,
        recur_slots=12,
    ),
    search_program(
        "search keeps nothing|same search gathers",
        lambda w: (w.own.clear(), w.search.keep([])),
        lambda w: w.gather_here([A]).close(),
        before=root_and_child,
    ),
    search_program("promote|clear init", lambda w: w.promote(X, B), lambda w: w.clear(), before=root_and_child),
    search_program(
        "promote|search close",
        lambda w: or_closed(lambda: w.promote(X, B)),
        lambda w: w.search.close(),
        before=root_and_child,
    ),
    search_program(
        "promote|put same key", lambda w: w.promote(X, B), lambda w: w.put(B, value(8)), before=root_and_child
    ),
    search_program(
        "promote|bump version",
        lambda w: or_closed(lambda: w.promote(X, B)),
        lambda w: w.bump(),
        before=root_and_child,
        after=nothing_promoted,
    ),
    search_program(
        "search commit|bump version",
        lambda w: or_closed(lambda: w.grow({Y: (X, 92)})),
        lambda w: w.bump(),
        before=root_and_child,
        preemptions=1,
    ),
    search_program(
        "search gather|bump version",
        lambda w: or_closed(lambda: w.gather_here([A]).close()),
        lambda w: w.bump(),
        before=root,
    ),
    search_program(
        "search open|close its pool",
        open_for_good,
        lambda w: w.recur.close(),
        search=None,
        preemptions=3,
    ),
    search_program(
        "search open|put in its pool",
        open_and_close,
        lambda w: w.recur.put(Y, keys_values((value(8),))),
        before=lambda w: w.fill_recur({X: value(9)}),
        search=None,
        recur_entries=1,
        recur_slots=4,
    ),
    search_program(
        "search open|search open, room for one",
        open_and_close,
        open_and_close,
        search=None,
        recur_entries=1,
        recur_slots=4,
    ),
    search_program(
        "search open|search close, room for one",
        open_and_close,
        lambda w: w.search.close(),
        before=root_and_child,
        search=(1, 4),
        recur_entries=1,
        recur_slots=4,
    ),
    search_program(
        "search outgrows its budget|another opens",
        lambda w: unless_full(lambda: w.grow({Y: (A, 92)})),
        lambda w: unless_full(lambda: open_and_close(w)),
        before=root_and_child,
        search=(1, 4),
        preemptions=1,
    ),
]
