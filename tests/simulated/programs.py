"""What host threads do at once on a simulated device; each program is about one order that has to be kept."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.explorer.programs import A, B, C, Operation
from tests.explorer.world import value

from . import acts, batch_acts
from .acts import WHOLE, put_often, put_whole, several
from .search_world import OWN_KEYS, GpuSearchWorld
from .world import WINDOW, GpuProgram, GpuWorld

__all__ = ["GPU_PROGRAMS"]

TINY = {"entries": 1, "headroom": WINDOW}  # two windows of slots: what is freed is used again at once


def gpu_program(name: str, *tasks: Operation, **options: Any) -> GpuProgram:
    fields = {key: options.pop(key) for key in ("before", "after", "make") if key in options}
    return GpuProgram(name, tasks, options, **fields)


def stored(*keys: int, tokens: int = 2) -> Operation:
    """Entries that are there, and written, at the beginning, with value `key + 1`."""
    return lambda world: world.store({key: value(key + 1, tokens) for key in keys})


X, Y = OWN_KEYS, OWN_KEYS + 1
TINY_SEARCH = {"entries": 1, "recur_entries": 1, "recur_slots": WINDOW, "headroom": 0}  # and the root fills the pool


def grown(world: GpuSearchWorld) -> None:
    """The search's entry has slots of its own: its parent is nobody's, and filled."""
    world.grow("search", {X: (Y, 50)}, on=1, model=1, commit=1, fill_on=1)


def search_program(name: str, *tasks: Operation, **options: Any) -> GpuProgram:
    def before(world: GpuSearchWorld) -> None:
        stored(A, tokens=WHOLE)(world)
        world.open("search", 1, WINDOW, "error", shared=True)

    return gpu_program(name, *tasks, before=before, make=GpuSearchWorld, **TINY_SEARCH, **options)


def reused_by_the_pool(world: GpuSearchWorld) -> None:
    world.put_in_recur(5, value(60, WHOLE), on=3)
    world.get_from_recur(5, on=4)


GPU_PROGRAMS = [
    gpu_program("put|get", lambda w: w.put(A, value(9), on=1), lambda w: w.get(A, on=2)),
    gpu_program(
        "read, then reused",
        several(lambda w: w.get(A, on=1), put_often(B, 20, 2, on=2)),
        before=stored(A, tokens=WHOLE),
        evicting=True,
        **TINY,
    ),
    gpu_program("get|put, reused", lambda w: w.get(A, on=1), put_often(A, 20, 3, on=2), before=stored(A), **TINY),
    gpu_program("put|put, reused", put_often(A, 20, 2, on=1), put_often(A, 30, 3, on=2), **TINY),
    gpu_program(
        "put on one, then on another, reused", several(put_often(A, 20, 2, on=1), put_often(A, 30, 2, on=2)), **TINY
    ),
    gpu_program(
        "put|clear, put, reused",
        put_often(A, 20, 2, on=1),
        several(GpuWorld.clear, put_often(B, 30, 3, on=2)),
        entries=1,
        headroom=WINDOW,
        evicting=True,
    ),
    gpu_program(
        "pop|put, reused", lambda w: w.get(A, on=1, pop=True), put_often(A, 20, 3, on=2), before=stored(A), **TINY
    ),
    gpu_program(
        "parent read, parent and child popped, reused",
        several(
            lambda w: w.get(A, on=1),
            lambda w: w.get(A, on=3, pop=True),
            lambda w: w.get(B, on=3, pop=True),
            put_often(C, 20, 1, on=2),
        ),
        before=several(stored(A), lambda w: w.extend({B: (A, 91)}, on=0), GpuWorld.settle),
        entries=2,
        slots=WINDOW,
        headroom=0,
        evicting=True,
    ),
    gpu_program(
        "several runs, reused at once",
        several(
            lambda w: w.get(A, on=1),
            lambda w: w.get(B, on=2),
            lambda w: w.get(A, on=3, pop=True),
            lambda w: w.get(B, on=3, pop=True),
            put_often(C, 20, 1, on=4),
        ),
        before=stored(A, B),
        entries=2,
        slots=WINDOW,
        headroom=0,
        evicting=True,
    ),
    gpu_program(
        "gather, gather again",
        several(lambda w: w.gather([A], on=1), lambda w: w.gather([B], on=2)),
        before=stored(A, B),
    ),
    gpu_program(
        "gather|gather",
        lambda w: w.gather([A], on=1),
        lambda w: w.gather([B, A], on=2, close_on=3),
        before=stored(A, B),
    ),
    gpu_program(
        "gather, closed on another, gather again",
        several(lambda w: w.gather([A], on=1, close_on=2), lambda w: w.gather([B], on=3)),
        before=stored(A, B),
    ),
    gpu_program(
        "gather, ordered by the user, closed on another",
        batch_acts.gathered_on_one_and_closed_on_another,
        before=stored(A, B),
    ),
    gpu_program(
        "closed while its stream is captured",
        batch_acts.closed_while_its_stream_is_captured,
        before=stored(A, B),
    ),
    gpu_program(
        "gather, gather again and drop",
        several(lambda w: w.gather([A], on=1), lambda w: w.gather([B], on=2, drop=True)),
        before=stored(A, B),
    ),
    gpu_program(
        "put|gather together", lambda w: w.put(A, value(9), on=1), lambda w: batch_acts.together(w, A, B, on=2)
    ),
    gpu_program(
        "gather together, then reused",
        several(lambda w: batch_acts.together(w, A, on=1), put_often(B, 20, 2, on=2)),
        before=stored(A, tokens=WHOLE),
        evicting=True,
        **TINY,
    ),
    gpu_program(
        "gather, gather together and drop",
        several(lambda w: w.gather([A, B], on=1), lambda w: batch_acts.together(w, B, A, on=2, drop=True)),
        before=stored(A, B),
    ),
    gpu_program(
        "gather together, gather again",
        several(lambda w: batch_acts.together(w, A, B, on=1), lambda w: w.gather([B, A], on=2)),
        before=stored(A, B),
    ),
    gpu_program("evaluate on two", lambda w: batch_acts.evaluated_on_two(w), before=stored(A, B)),
    gpu_program("gather, wait on another and drop", lambda w: batch_acts.dropped_after_wait(w), before=stored(A)),
    gpu_program(
        "gather|commit on another|gather",
        lambda w: w.extend({B: (A, 91)}, on=1, model=2, commit=3),
        lambda w: w.gather([A, B], on=4),
        before=stored(A),
    ),
    gpu_program(
        "commit on another, gather again",
        several(
            lambda w: w.extend({B: (A, 91)}, on=1, commit=3),
            lambda w: w.extend({C: (B, 92)}, on=2),
        ),
        lambda w: w.get(C, on=4),
        before=stored(A),
    ),
    gpu_program(
        "child read on another",
        several(
            lambda w: w.put(A, value(5), on=1),
            lambda w: w.extend({B: (A, 91)}, on=2),
            lambda w: w.get(B, on=3),
        ),
    ),
    gpu_program("stored once more, read on another", acts.stored_once_more),
    gpu_program("two streams read a batch", batch_acts.read_by_two, before=stored(A, B)),
    gpu_program(
        "put often|get often",
        several(*(partial(put_whole, key=key, number=20 + key, on=1) for key in (A, B, C))),
        several(*(lambda w, key=key: w.get(key, on=2) for key in (A, B, C))),
    ),
    gpu_program("written in place on another", batch_acts.written_in_place, before=stored(A)),
    gpu_program("filled on another", batch_acts.filled_on_another, before=stored(A)),
    gpu_program("reordered on another", batch_acts.reordered_on_another, before=stored(A, B)),
    gpu_program("appended from elsewhere", batch_acts.appended_from_elsewhere, before=stored(A)),
    gpu_program(
        "appended to all layers from elsewhere",
        lambda w: batch_acts.appended_from_elsewhere(w, to_all_layers=True),
        before=stored(A),
    ),
    gpu_program("padding", batch_acts.padded_and_dropped, before=lambda w: w.store({A: value(1, 1), B: value(2)})),
    gpu_program("batch waited for by the host", batch_acts.waited_for),
    gpu_program(
        "put from elsewhere", lambda w: w.put_from_elsewhere(A, value(5), made_on=3, on=1), after=lambda w: w.get(A)
    ),
    gpu_program(
        "put from elsewhere, one stream",
        lambda w: w.put_from_elsewhere(A, value(5), made_on=3, on=1),
        after=lambda w: w.get(A, on=1),
        home=1,
    ),
    gpu_program("put unpacked from elsewhere", acts.put_unpacked_from_elsewhere),
    gpu_program(
        "put from the host",
        lambda w: w.put_from_host(A, value(5), on=1, pinned=True),
        lambda w: w.put_from_host(B, value(6), on=2, pinned=False),
        after=lambda w: w.gather([A, B], on=3),
    ),
    gpu_program(
        "put from another device",
        lambda w: w.put_from_other_device(A, value(5), made_on=2, on=1),
        lambda w: w.get(A, on=2),
        devices=2,
    ),
    gpu_program(
        "put from another device's other stream",
        lambda w: w.put_from_other_device(A, value(5), made_on=2, used_on=3, on=1),
        devices=2,
        after=lambda w: w.get(A, on=2),
    ),
    gpu_program(
        "take|take", lambda w: w.take(A, value(5), on=1), lambda w: w.take(A, value(6), on=2), after=lambda w: w.get(A)
    ),
    gpu_program("taken from a flight", acts.taken_from_a_flight),
    gpu_program("misses on another than the pool's", batch_acts.misses_are_zeros, home=3),
    gpu_program("cleared while it is copied", acts.cleared_while_it_is_copied, before=stored(A), evicting=True, **TINY),
    gpu_program("put on another than the pool's", lambda w: (w.put(A, value(5), on=1), w.get(A, on=1)), home=3),
    gpu_program("corrected", acts.overflowing(acts.correcting), before=stored(A, tokens=3)),
    gpu_program(
        "corrected lazily", acts.overflowing(acts.correcting_lazily), before=stored(A, tokens=3), slots=3 * WINDOW
    ),
    gpu_program(
        "corrected stepwise", acts.overflowing(acts.correcting_stepwise), before=stored(A, tokens=3), slots=3 * WINDOW
    ),
    gpu_program(
        "corrected lazily, gathered together",
        acts.overflowing(acts.correcting_lazily, then=lambda w: batch_acts.together(w, B, A, on=2)),
        before=stored(A, tokens=3),
        slots=3 * WINDOW,
    ),
    gpu_program("closed while it works", acts.closed_while_it_works),
    gpu_program("close|get|put", GpuWorld.close, lambda w: w.or_closed(lambda: w.get(A, on=1)), before=stored(A)),
    gpu_program("dropped while it works", acts.dropped_while_it_works),
    gpu_program(
        "cut off and repaired", acts.cut_off_and_repaired, before=stored(A, tokens=WHOLE), evicting=True, **TINY
    ),
    gpu_program("put, saved on another", several(put_often(A, 20, 1, on=1), lambda w: acts.saved(w, A, 20, on=2))),
    gpu_program("checked on another than the pool's", acts.checked_on_another),
    gpu_program("handle of a stream used again", acts.recycled, before=acts.two_of_one_handle),
    gpu_program(
        "put, get on another|stream forgotten",
        acts.put_on_another_s_and_read,
        lambda w: w.get(B, on=1),
        before=acts.work_of_a_stream_that_others_made_is_done,
    ),
    gpu_program(
        "read by two of one handle, reused",
        acts.read_by_two_of_one_handle,
        before=acts.stored_beside_two_of_one_handle,
        evicting=True,
        **TINY,
    ),
    search_program(
        "search read, then closed, reused",
        several(grown, lambda w: w.look_up("search", [X], on=2), lambda w: w.end("search"), reused_by_the_pool),
    ),
    search_program(
        "root read by a search, closed, popped, reused",
        several(
            lambda w: w.look_up("search", [A], on=1),
            lambda w: w.end("search"),
            lambda w: w.put_in_recur(5, value(60, WHOLE), on=4),  # which takes what was the search's
            lambda w: w.get(A, on=3, pop=True),
            put_often(B, 20, 2, on=2),
        ),
    ),
    search_program(
        "root read by a search, not kept, popped, reused",
        several(
            lambda w: w.look_up("search", [A], on=1),
            lambda w: w.keep("search", []),
            lambda w: w.get(A, on=3, pop=True),
            put_often(B, 20, 2, on=2),
        ),
    ),
    search_program(
        "search closed|its commit, reused",
        lambda w: w.or_closed(lambda: grown(w)),
        several(lambda w: w.end("search"), reused_by_the_pool),
    ),
    search_program(
        "promoted, read on another",
        several(
            lambda w: w.grow("search", {X: (A, 50)}, on=1, model=1, commit=1, fill_on=1),
            lambda w: w.promote("search", 0, B),
            lambda w: w.get(B, on=2),
        ),
    ),
]
