"""`get_or_compute` and `try_claim`: one computation for each missing key, and every caller gets its result."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio

from concurrent_kv import InvalidArgumentError, KeysValues
from stress.faults.errors import marked
from stress.possible import Write
from stress.world import Space
from stress.writing import COMPUTED, writing

if TYPE_CHECKING:
    from stress.actors import Actor

__all__ = ["Computations", "computes"]

CLAIMED = 0.25  # share of the computations that go by `try_claim`
SYNCHRONOUS = 0.5  # share of the tasks' computations that are plain functions


@dataclass(eq=False)
class _Running:
    """A computation under way."""

    cleared: tuple[int | None, ...]  # before its caller asked
    whose: str
    cut_off: bool = False  # its caller was interrupted or cancelled, and another actor may have taken over


class Computations:
    """Who computes what. Two at once for one key are wrong, unless a clear came between or one was cut off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[tuple[int, int], list[_Running]] = {}
        self._suspects: list[tuple[str, _Running, _Running]] = []

    def begin(self, space: Space, key: int, mine: _Running) -> None:
        """Inside a computation."""
        with self._lock:
            others = self._running.setdefault((space.number, key), [])
            # Nothing was cleared since the other's caller asked: both are for the same generation.
            now = _clears(space)
            if None not in now:
                self._suspects += [
                    (f"{space.name} key {key}", other, mine) for other in others if other.cleared == mine.cleared == now
                ]
            others.append(mine)

    def end(self, space: Space, key: int, mine: _Running) -> None:
        """At its end."""
        with self._lock:
            running = self._running.get((space.number, key), [])
            if mine in running:
                running.remove(mine)

    def twice(self) -> list[str]:
        """Keys that were computed twice at once; asked when nothing is under way."""
        with self._lock:
            suspects, self._suspects = self._suspects, []
            self._running.clear()
        return [
            f"{name} was computed by {one.whose} and {other.whose} at once"
            for name, one, other in suspects
            if not one.cut_off and not other.cut_off
        ]


def _clears(space: Space) -> tuple[int | None, ...]:
    """How often what the space belongs to was cleared, None where that is under way: its generation is unknown."""
    return tuple(barrier.settled() for barrier in (space.cleared, *space.above))


async def computes(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    key = rng.randrange(len(space.plain))
    if rng.random() < CLAIMED:
        await _claim(actor, space, key)
        return
    ledger = space.plain[key]
    before = ledger.before_read()
    mine = _Running(_clears(space), f"actor {actor.number}")
    compute, written = _computation(actor, space, key, mine)
    pool = space.calls(actor.access)
    try:
        kv = await actor.call(
            "compute", pool.get_or_compute(world.key("key", key), compute, side=COMPUTED, scope=space.scope)
        )
    except BaseException as error:
        if not isinstance(error, Exception):
            mine.cut_off = True
        elif isinstance(error, InvalidArgumentError) and "loaders" in world.settings.faults:
            marked(error)  # an actor computed a wrong shape on purpose, and every waiter hears it
        for write in written:
            (ledger.refused if isinstance(error, Exception) else ledger.cut_off)(write)
        raise
    for write in written:
        ledger.cut_off(write)  # it may have been stored or not: after a clear it is handed on and not kept
    world.check_plain(space, key, world.content.read(kv), before)
    actor.passed("whole", "own", "possible")
    if written:
        actor.passed("computed once")


def _computation(actor: Actor, space: Space, key: int, mine: _Running) -> tuple[Any, list[Write]]:
    """What computes a key, and the writes that it makes when it is called."""
    written: list[Write] = []

    def compute() -> KeysValues:
        actor.computations.begin(space, key, mine)
        try:
            write = space.plain[key].begin()
            written.append(write)
            wrong = actor.faults.loader(actor)
            tokens = actor.world.plain(key, space.number, write.version, actor.number)
            return wrong if wrong is not None else actor.world.content.row(tokens)
        finally:
            actor.computations.end(space, key, mine)

    async def compute_in_task() -> KeysValues:
        actor.computations.begin(space, key, mine)
        try:
            write = space.plain[key].begin()
            written.append(write)
            await anyio.sleep(0)
            wrong = await actor.faults.loader_in_task(actor)
            tokens = actor.world.plain(key, space.number, write.version, actor.number)
            return wrong if wrong is not None else actor.world.content.row(tokens)
        finally:
            actor.computations.end(space, key, mine)

    in_task = actor.access.is_task and actor.rng.random() >= SYNCHRONOUS
    return (compute_in_task if in_task else compute), written


async def _claim(actor: Actor, space: Space, key: int) -> None:
    """Compute what no other actor does, or leave it."""
    rng, world, ledger = actor.rng, actor.world, space.plain[key]
    mine = _Running(_clears(space), f"actor {actor.number}")
    claim = space.pool.try_claim(world.key("key", key), side=COMPUTED, scope=space.scope)
    if not claim.mine:
        actor.noted("claimed by somebody else")
        return
    actor.computations.begin(space, key, mine)
    try:
        chance = rng.random()
        if chance < 0.2:
            actor.computations.end(space, key, mine)  # given up: another actor takes over
            if chance < 0.1 or "abandon" not in world.settings.faults:
                claim.abandon()
            return
        with claim, writing(ledger) as write:
            kv = world.content.row(world.plain(key, space.number, write.version, actor.number))
            # Before it is handed on: from then on the key may be computed again.
            actor.computations.end(space, key, mine)
            fulfilled = actor.access.fulfil(claim, space.pool, kv)
            stored = await actor.call("write", fulfilled)
            if stored:
                ledger.stored(write)
            else:
                ledger.cut_off(write)  # not kept, but handed on to the waiters
    except BaseException:
        mine.cut_off = True
        raise
    finally:
        actor.computations.end(space, key, mine)
