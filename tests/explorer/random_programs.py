"""Programs made up at random: three tasks of one or two operations each, on pools too small for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from concurrent_kv import CapacityError, KeyNotFoundError, WaitTimeoutError

from .programs import A, B, C, D, Operation, Program
from .search_world import SearchWorld
from .world import WINDOW, World, keys_values, or_closed, value

__all__ = ["random_pool_program", "random_search_program"]

TASKS = 3
Make = Callable[[random.Random, int], Operation]  # the number makes the values of an operation its own


def _put(chance: random.Random, number: int) -> Operation:
    key, tokens = chance.choice((A, B, C)), chance.choice((1, 2, 3))
    return lambda world: world.put(key, value(number, tokens))


def _put_many(chance: random.Random, number: int) -> Operation:
    first, second = chance.sample((A, B, C, D), 2)
    return lambda world: world.put_many({first: value(number), second: value(number + 50)})


def _extend(chance: random.Random, number: int) -> Operation:
    parent, child = chance.sample((A, B, C), 2)
    return lambda world: world.extend({child: (parent, 10 * number)})


def _extend_two(chance: random.Random, number: int) -> Operation:
    parent, first, second = chance.sample((A, B, C, D), 3)
    return lambda world: world.extend({first: (parent, 10 * number), second: (parent, 10 * number + 1)})


def _gather(chance: random.Random, number: int) -> Operation:
    keys = chance.sample((A, B, C, D), 3)
    return lambda world: world.gather(keys)


def _on_a_key(name: str) -> Make:
    def make(chance: random.Random, number: int) -> Operation:
        key = chance.choice((A, B, C))
        return lambda world: getattr(world, name)(key)

    return make


def _pin(chance: random.Random, number: int) -> Operation:
    key = chance.choice((A, B))

    def pin(world: World) -> None:
        try:
            with world.pool.pin(key) as pin:
                pin.get()
        except KeyNotFoundError:
            pass

    return pin


def _clear(chance: random.Random, number: int) -> Operation:
    return chance.choice((World.clear, World.bump_version))


POOL_OPERATIONS: tuple[Make, ...] = (
    _put,
    _put,
    _put_many,
    _put_many,
    _extend,
    _extend_two,
    _gather,
    _on_a_key("get"),
    _on_a_key("pop"),
    _pin,
    _clear,
)


def _tasks(chance: random.Random, operations: tuple[Make, ...]) -> tuple[Operation, ...]:
    numbers = iter(range(20, 50))

    def task() -> Operation:
        steps = [chance.choice(operations)(chance, next(numbers)) for _ in range(chance.choice((1, 1, 2)))]
        return lambda world: [step(world) for step in steps]

    return tuple(task() for _ in range(TASKS))


def random_pool_program(seed: int) -> Program:
    """Reads, writes, commits, pops, pins and clears over four keys; the same program for the same seed."""
    chance = random.Random(seed)
    entries = chance.choice((2, 3))
    setting = {
        "entries": entries,
        "slots": chance.choice((WINDOW, WINDOW + 1, entries * WINDOW)) + 2 * (entries - 1),
        "headroom": TASKS * 2 * WINDOW,
        "shards": chance.choice((1, 2)),
        "evicting": True,
        "policy": chance.choice(("fifo", "lru", "clock", "s3fifo", "priority")),
    }
    stored = {key: value(key + 1) for key in chance.sample((A, B), chance.choice((1, 2)))}
    return Program(f"random pool program {seed}", _tasks(chance, POOL_OPERATIONS), setting, lambda w: w.store(stored))


# Searches ------------------------------------------------------------------------------------------------------------

ROOT_CHILD = 10


def _unless_over_or_full(action: Callable[[Any], object]) -> Operation:
    def attempt(world: SearchWorld) -> None:
        # A wait for room may be in vain: the open search may have reserved everything.
        with suppress(CapacityError, KeyNotFoundError, WaitTimeoutError):
            or_closed(lambda: action(world))

    return attempt


def _grow(chance: random.Random, number: int) -> Operation:
    parent, child = chance.choice((A, ROOT_CHILD)), number  # a child of its own, which nobody replaces
    return _unless_over_or_full(lambda world: world.grow({child: (parent, 10 * number)}))


def _promote(chance: random.Random, number: int) -> Operation:
    key = chance.choice((A, B))
    return _unless_over_or_full(lambda world: world.promote(ROOT_CHILD, key))


def _recur_put(chance: random.Random, number: int) -> Operation:
    return _unless_over_or_full(lambda world: world.recur.put(number, keys_values((value(number),))))


def _another(chance: random.Random, number: int) -> Operation:
    entries = chance.choice((1, 2))
    return _unless_over_or_full(lambda world: world.open(entries, entries * WINDOW).close())


def _end(chance: random.Random, number: int) -> Operation:
    return chance.choice((lambda world: world.search.close(), lambda world: world.bump(), lambda world: world.clear()))


SEARCH_OPERATIONS: tuple[Make, ...] = (
    _grow,
    _grow,
    _promote,
    _recur_put,
    _another,
    _end,
    _put,
    _on_a_key("get"),
    _on_a_key("pop"),
)


def random_search_program(seed: int) -> Program:
    """A search that grows, promotes and ends while others use its pools; the same program for the same seed."""
    chance = random.Random(seed)
    budget = chance.choice(((1, 1), (2, 4), (3, 12)))
    setting = {
        "entries": 2,
        "headroom": TASKS * 2 * WINDOW,
        "shards": chance.choice((1, 2)),
        "evicting": True,
        "recur_entries": chance.choice((3, 4)),
        "recur_slots": 12,
        "search": budget,
    }

    def before(world: SearchWorld) -> None:
        world.store({A: value(1)})
        world.grow({ROOT_CHILD: (A, 91)})

    return Program(
        f"random search program {seed}", _tasks(chance, SEARCH_OPERATIONS), setting, before, make=SearchWorld
    )
