"""The operations of the shared pool, each followed by every check that its result allows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from concurrent_kv import Batch, KeyNotFoundError
from stress.computing import computes
from stress.content import BrokenPromiseError, Token
from stress.faults.errors import Interrupt
from stress.possible import Barrier
from stress.searching import searches
from stress.world import CHILDREN, GROUP_KEYS, GROUPED, ROOT_KEYS, Space
from stress.writing import all_writing, check_side, said, write_key, writing

if TYPE_CHECKING:
    from stress.actors import Actor

__all__ = ["MOST_ROWS", "RUN"]

MOST_ROWS = 6
HIERARCHICAL, PEEKED = 0.1, 0.2  # shares of the reads
FROM_CHILDREN = 0.3  # share of the gathers
EVERYTHING = 0.1  # share of the clears that take more than a scope


async def reads(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    chance = rng.random()
    if chance < HIERARCHICAL:
        space = rng.choice(world.root_spaces)
        key = rng.randrange(ROOT_KEYS)
        ledger, named = space.plain[key], world.key("root", key)
        before = ledger.before_read()
        call = actor.access.manager.hierarchical_get(space.env, named, order=("init", "recur"))
    else:
        space = world.any_space(rng)
        key = rng.randrange(len(space.plain))
        ledger, named = space.plain[key], world.key("key", key)
        pool = space.calls(actor.access)
        before = ledger.before_read()
        read = pool.peek if chance < HIERARCHICAL + PEEKED else pool.get
        call = read(named, scope=space.scope)
    kv = await actor.call("read", call)
    if kv is not None:
        world.check_plain(space, key, world.content.read(kv), before)
        actor.passed("whole", "own", "possible")
    elif world.check_miss(space, ledger, before):
        actor.passed("not lost")


async def gathers(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    if rng.random() < FROM_CHILDREN:
        await read_children(actor, space)
        return
    keys = [rng.randrange(len(space.plain)) for _ in range(rng.randint(1, MOST_ROWS))]
    before = [space.plain[key].before_read() for key in keys]
    named = [world.key("key", key) for key in keys]
    with await gather(actor, space, named) as batch:
        for row, key in enumerate(keys):
            if batch.hits[row]:
                tokens = world.content.read_row(batch, row)
                check_side(tokens, batch.side[row])
                world.check_plain(space, key, tokens, before[row])
                actor.passed("whole", "own", "possible")
            elif world.check_miss(space, space.plain[key], before[row]):
                actor.passed("not lost")


async def gather(actor: Actor, space: Space, named: Sequence[Hashable]) -> Batch:
    batch: Batch = await actor.call("gather", space.calls(actor.access).gather(named, scope=space.scope))
    return batch


async def read_children(actor: Actor, space: Space) -> None:
    rng, world = actor.rng, actor.world
    keys = [rng.randrange(len(space.children)) for _ in range(rng.randint(1, MOST_ROWS))]
    before = [space.children[key].before_read() for key in keys]
    with await gather(actor, space, [world.key("child", key) for key in keys]) as batch:
        for row, key in enumerate(keys):
            if batch.hits[row]:
                tokens = world.content.read_row(batch, row)
                check_side(tokens, batch.side[row])
                world.check_own(space, CHILDREN + key, tokens[-1])
                space.children[key].check(tokens[-1].version, before[row])
                actor.passed("whole", "own", "possible")
            elif world.check_miss(space, space.children[key], before[row]):
                actor.passed("not lost")


async def writes(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    await write_key(actor, space, rng.randrange(len(space.plain)))


async def groups(actor: Actor) -> None:
    """Three keys that are only ever written together: a reader that finds two of them finds one version."""
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    group = rng.randrange(len(space.groups))
    ledger = space.groups[group]
    numbers = [GROUPED + group * GROUP_KEYS + place for place in range(GROUP_KEYS)]
    named = [world.key("group", number) for number in numbers]
    if rng.random() < 0.5:
        with writing(ledger) as write:
            rows = [world.plain(number, space.number, write.version, actor.number) for number in numbers]
            call = space.calls(actor.access).put_many(
                named, world.content.rows(rows), sides=[tuple(row) for row in rows], scope=space.scope
            )
            said(ledger, write, await actor.call("write", call))
        return
    before = ledger.before_read()
    found = set()
    with await gather(actor, space, named) as batch:
        for row, number in enumerate(numbers):
            if batch.hits[row]:
                tokens = world.content.read_row(batch, row)
                check_side(tokens, batch.side[row])
                world.check_own(space, number, tokens[0])
                ledger.check(tokens[0].version, before)
                found.add(tokens[0].version)
                actor.passed("whole", "own", "possible")
    if len(found) > 1:
        raise BrokenPromiseError(f"{ledger.name}: one gather found versions {sorted(found)} of keys written together")
    if found:
        actor.passed("all at once")


async def commits(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    count = min(len(space.children), rng.randint(1, MOST_ROWS))
    parents = [rng.randrange(len(space.plain)) for _ in range(count)]
    children = rng.sample(range(len(space.children)), count)
    with await gather(actor, space, [world.key("key", key) for key in parents]) as batch:
        rows = []
        for row, parent in enumerate(parents):
            if batch.hits[row]:
                rows.append(world.content.read_row(batch, row))
            else:
                rows.append(world.plain(parent, space.number, 0, actor.number))
                batch.fill(row, world.content.row(rows[-1]))
        await write_children(actor, space, batch, rows, children)


async def write_children(
    actor: Actor, space: Space, batch: Batch, rows: Sequence[Sequence[Token]], children: Sequence[int]
) -> None:
    world = actor.world
    ledgers = [space.children[child] for child in children]
    with all_writing(ledgers) as written:
        new = [
            [Token(CHILDREN + child, space.number, write.version, actor.number, len(row) + place) for place in range(2)]
            for child, write, row in zip(children, written, rows, strict=True)
        ]
        world.content.append(batch, new)
        expected = [world.grown(row, added) for row, added in zip(rows, new, strict=True)]
        call = space.calls(actor.access).commit(
            [world.key("child", child) for child in children],
            batch,
            overflow=world.overflow,
            sides=[tuple(row) for row in expected],
        )
        stored = await actor.call("commit", call)
        for ledger, write in zip(ledgers, written, strict=True):
            said(ledger, write, stored)


async def pins(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    key = rng.randrange(len(space.plain))
    before = space.plain[key].before_read()
    try:
        pin = await actor.call("pin", space.calls(actor.access).pin(world.key("key", key), scope=space.scope))
    except KeyNotFoundError:
        return
    with pin:
        first = world.check_plain(space, key, world.content.read(pin.get()), before)
        # Where few entries are stored, all may be pinned by actors who wait for room.
        scarce = 2 * world.settings.profile.capacity < world.settings.profile.actors
        await rng.choice((reads, gathers) if scarce else (reads, gathers, writes))(actor)
        again = world.content.read(pin.get())
        check_side(again, pin.side)
        if again[0] != first:
            raise BrokenPromiseError(f"{space.name}: a pin of {first} became {again[0]}")
        actor.passed("whole", "own", "possible", "pinned stays")


async def pops(actor: Actor) -> None:
    rng, world = actor.rng, actor.world
    space = world.any_space(rng)
    key = rng.randrange(len(space.plain))
    ledger = space.plain[key]
    before, began = ledger.before_read(), ledger.begin_removal()
    kv = await actor.call("remove", space.calls(actor.access).pop(world.key("key", key), scope=space.scope))
    ledger.removed(began)
    if kv is not None:
        world.check_plain(space, key, world.content.read(kv), before)
        actor.passed("whole", "own", "possible")


async def clears(actor: Actor) -> None:
    rng, world, access = actor.rng, actor.world, actor.access
    if rng.random() >= EVERYTHING:
        space = world.any_space(rng)
        barrier, call = space.cleared, partial(space.calls(access).clear, space.scope)
    else:
        barrier, call = rng.choice(
            [
                (world.pool_cleared, access.pool(world.manager.wm_pool).clear),
                (world.init_cleared, access.manager.clear_init_caches),
                (world.everything, access.manager.clear_all),
            ]
        )
    await remove_all(actor, barrier, call)


async def bumps(actor: Actor) -> None:
    await remove_all(actor, actor.world.everything, actor.access.manager.bump_version)


async def remove_all(actor: Actor, barrier: Barrier, call: Callable[[], Awaitable[object]]) -> None:
    """A call that removes everything below a barrier."""
    began = barrier.begin()
    try:
        await actor.call("clear", call())
    except Interrupt:
        barrier.cut_off()
        raise
    barrier.ended(began)


RUN: dict[str, Callable[[Actor], Coroutine[Any, Any, object]]] = {
    "reads": reads,
    "gathers": gathers,
    "writes": writes,
    "groups": groups,
    "commits": commits,
    "computes": computes,
    "pins": pins,
    "pops": pops,
    "clears": clears,
    "bumps": bumps,
    "searches": searches,
}
