"""Computations that wait for each other in a circle hear so at once, whatever they are: threads, tasks, or both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from concurrent_kv import AsyncKVPool, KeysValues, KVPool, RecursiveComputationError
from concurrent_kv.flights.table import Flight
from tests.async_support import LOOPS, run_on
from tests.conftest import MakePool
from tests.support import tokens
from tests.threading_support import JOIN_SECONDS, Background, Gate

KINDS = ["thread", *LOOPS]


def asks_when_all_compute(kind: str, pool: KVPool, key: str, other: str, gate: Gate) -> Callable[[], KeysValues]:
    """A caller of `key`, whose computation stands at a gate and then asks for `other`."""
    aio = AsyncKVPool(pool)

    def compute() -> KeysValues:
        gate.pass_through()
        return pool.get_or_compute(other, lambda: tokens(9, 2))

    async def compute_in_a_task() -> KeysValues:
        await anyio.to_thread.run_sync(gate.pass_through)
        return await aio.get_or_compute(other, lambda: tokens(9, 2))

    if kind == "thread":
        return lambda: pool.get_or_compute(key, compute)
    return lambda: run_on(kind, aio.get_or_compute, key, compute_in_a_task)


def circle(pool: KVPool, kinds: Sequence[str]) -> list[BaseException]:
    """What is heard by the callers of as many keys, each of whose computations asks for the next."""
    gates = [Gate() for _ in kinds]
    callers: list[Background] = []
    for number, (kind, gate) in enumerate(zip(kinds, gates, strict=True)):
        following = f"key {(number + 1) % len(kinds)}"
        callers.append(Background(asks_when_all_compute(kind, pool, f"key {number}", following, gate)))
        assert gate.entered.wait(JOIN_SECONDS)
    for gate in gates:
        gate.opened.set()
    heard: list[BaseException] = []
    for caller in callers:
        with pytest.raises(RecursiveComputationError) as caught:
            caller.result()
        heard.append(caught.value)
    return heard


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_two_computations_that_ask_for_each_other_hear_so(make_pool: MakePool, first: str, second: str) -> None:
    pool = make_pool(wait_timeout=JOIN_SECONDS)
    circle(pool, [first, second])
    assert len(pool.flights) == 0
    assert len(pool) == 0


def test_a_circle_of_many_is_found(make_pool: MakePool) -> None:
    circle(make_pool(8, wait_timeout=JOIN_SECONDS), ["thread", *LOOPS, "thread"])


def test_waiting_for_a_computation_that_waits_for_another_is_no_circle(make_pool: MakePool) -> None:
    """A diamond: two computations wait for one, and a fourth for both."""
    pool = make_pool(8, wait_timeout=JOIN_SECONDS)
    claim = pool.try_claim("bottom")
    asks: Callable[[str], Any] = lambda key: pool.get_or_compute(key, lambda: tokens(9, 2))  # noqa: E731
    sides = [
        Background(lambda side=side: pool.get_or_compute(side, lambda: asks("bottom")))  # type: ignore[misc]
        for side in ("left", "right")
    ]
    top = Background(lambda: pool.get_or_compute("top", lambda: (asks("left"), asks("right"))[1]))
    claim.fulfil(tokens(1, 2))
    for caller in (*sides, top):
        assert caller.result().lengths == (2,)
    assert claim.flight.waits_for == []


def test_what_is_over_makes_no_circle() -> None:
    over, here = Flight((0, "over", None)), Flight((0, "here", None))  # type: ignore[arg-type]
    over.waits_for.append(here)  # as for a moment after its result has come
    assert over.needs_one_of(frozenset({here}))
    over.state = type(over.state).DONE
    assert not over.needs_one_of(frozenset({here}))
