"""However a computation ends, whoever computes it: what callers of every kind hear that wait for it together.

A cell of the matrix is an ending and a computing side. In each wait threads without a loop, and tasks of two asyncio
loops, two uvloop loops and two trio loops, several of each; afterwards no flight, no waker and no handle is left.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from concurrent_kv import KVPool
from tests.flight_endings import ENDINGS, Cell, Ending, one_takes_over
from tests.flight_sides import (
    NUM_WAITERS,
    SIDES,
    LeftBehindSide,
    Portals,
    Side,
    TaskSide,
    ThreadSide,
    Waiting,
    running_portal,
    running_portals,
)
from tests.flight_support import counted_waiters
from tests.support import assert_same, tokens


@pytest.fixture(scope="module")
def portals() -> Iterator[Portals]:
    with running_portals() as running:
        yield running


CELLS = [
    pytest.param(ending, side, id=f"{ending} - {side}")
    for ending in ENDINGS
    for side in SIDES
    if ENDINGS[ending].sides(side)
]


def computing_side(ending: Ending, name: str, pool: KVPool, portals: Portals, stack: ExitStack) -> Side:
    where, how = name.split(", ")
    if where == "thread":
        return ThreadSide(pool, how)
    if ending.side is LeftBehindSide:
        return LeftBehindSide(pool, how, where)
    portal = stack.enter_context(running_portal(where)) if ending.own_loop else portals.one(where)
    return TaskSide(pool, how, portal, ending.within)


@pytest.mark.parametrize(("ending_name", "side_name"), CELLS)
def test_however_a_computation_ends_all_who_wait_for_it_go_on(
    pool: KVPool, portals: Portals, monkeypatch: pytest.MonkeyPatch, ending_name: str, side_name: str
) -> None:
    ending = ENDINGS[ending_name]
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with ExitStack() as stack, counted_waiters() as waiters:
        side = computing_side(ending, side_name, pool, portals, stack)
        side.begin()
        flight = pool.try_claim("key").flight
        waiting = Waiting(pool, portals)
        waiters.wait_for(NUM_WAITERS)
        with pytest.MonkeyPatch.context() as patch:
            ending.end(Cell(pool, portals, waiters, side, patch))
            answers = waiting.answers()
            if not ending.own_loop:
                side.open()
            computing = side.answer()
    heard = {"claim": ending.of_claims, "sync": None if side_name.startswith("thread") else ending.of_workers}.get(
        side.how
    )
    heard = heard or ending.heard
    stored = heard(answers, computing)
    assert waiting.takes_over.runs == (1 if heard is one_takes_over else 0)
    assert ending.leaves_wakers or flight.wakers == []
    assert len(pool.flights) == 0
    assert unraisable == []
    if not pool.closed:
        assert pool.contains("key") == (stored is not None)
        if stored is not None:
            assert_same(pool.peek("key"), stored)
        else:  # nothing is remembered of it
            assert_same(pool.get_or_compute("key", lambda: tokens(9, 3)), tokens(9, 3))
    assert pool.check_integrity().handles == 0
