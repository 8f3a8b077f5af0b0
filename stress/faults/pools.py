"""Pools that go wrong by themselves: one that is closed while it is used, and one that holds a single entry."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from concurrent_kv import AsyncKVPool, ClosedError, KeyNotFoundError, KeysValues, KVPool
from stress.access import Awaited
from stress.content import BrokenPromiseError
from stress.possible import Write
from stress.world import Space
from stress.writing import said, write_key, writing

if TYPE_CHECKING:
    from stress.actors import Actor
    from stress.world import World

__all__ = ["Doomed", "Tiny"]

KEYS = 3
CLOSED = 0.1  # share of the visits that end with a close
ENDING = 0.1  # share of the visits by a thread that ends without letting go


class _Life:
    """One of the pools that follow each other."""

    def __init__(self, world: World, number: int) -> None:
        self.pool = KVPool(
            world.layout, KEYS, name=f"doomed {number}", wait_timeout=world.settings.bound_seconds / 2, shards=2
        )
        self.space = Space(self.pool.name, 300, self.pool, self.pool.default_scope, None, ())
        self.space.plain = self.space.ledgers("key", KEYS + 1)
        self.in_task = AsyncKVPool(self.pool)

    def calls(self, actor: Actor) -> Any:
        return self.in_task if actor.access.is_task else Awaited(self.pool)


@contextmanager
def computed(actor: Actor, space: Space, key: int) -> Iterator[Callable[[], KeysValues]]:
    """A computation that gives a new version, which may or may not be stored."""
    ledger, written = space.plain[key], list[Write]()

    def compute() -> KeysValues:
        written.append(ledger.begin())
        return actor.world.content.row(actor.world.plain(key, space.number, written[-1].version, actor.number))

    try:
        yield compute
    finally:
        for write in written:
            ledger.cut_off(write)


class Doomed:
    """A pool that all actors use until one closes it; then there is another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 1
        self._life = _Life(world, 1)
        self._lock = threading.Lock()

    async def visit(self, actor: Actor) -> None:
        """Write, read, now and then close. That it was closed is an answer."""
        life, rng = self._life, actor.rng
        calls, key = life.calls(actor), rng.randrange(KEYS + 1)
        ledger, named = life.space.plain[key], actor.world.key("key", key)
        try:
            with writing(ledger) as write:
                tokens = actor.world.plain(key, life.space.number, write.version, actor.number)
                said(ledger, write, await calls.put(named, actor.world.content.row(tokens)))
            before = ledger.before_read()
            with computed(actor, life.space, key) as compute:
                kv = await calls.get_or_compute(named, compute)
            actor.world.check_plain(life.space, key, actor.world.content.read(kv), before)
            with await calls.gather([named]) as batch:
                if batch.hits[0]:
                    actor.world.check_plain(life.space, key, actor.world.content.read_row(batch, 0), before)
            actor.passed("whole", "own", "possible")
        except ClosedError:
            actor.noted("pool was closed meanwhile")
        if rng.random() < CLOSED:
            with self._lock:
                if self._life is life:
                    self._number += 1
                    self._life = _Life(self._world, self._number)
            await calls.close()
            await self._check_closed(actor, life, calls)

    async def _check_closed(self, actor: Actor, life: _Life, calls: Any) -> None:
        for name, arguments in (("get", ("key",)), ("clear", ())):
            try:
                await getattr(calls, name)(*arguments)
            except ClosedError:
                continue
            raise BrokenPromiseError(f"{life.pool.name} is closed and answers")
        actor.passed("closed stays closed")

    def close(self) -> None:
        self._life.pool.close()

    @property
    def pool(self) -> KVPool:
        return self._life.pool


class Tiny:
    """A pool of one entry, for which several keys compete, some held by threads that end."""

    def __init__(self, world: World) -> None:
        self.pool = KVPool(world.layout, 1, name="tiny", wait_timeout=world.settings.bound_seconds / 2)
        self.space = Space("tiny", 301, self.pool, self.pool.default_scope, None, ())
        self.space.plain = self.space.ledgers("key", KEYS)

    async def visit(self, actor: Actor) -> None:
        """Write one key, read another, pin it for a moment."""
        rng, world = actor.rng, actor.world
        calls = self.space.calls(actor.access)
        await write_key(actor, self.space, rng.randrange(KEYS))
        key = rng.randrange(KEYS)
        before = self.space.plain[key].before_read()
        try:
            pin = await calls.pin(world.key("key", key))
        except KeyNotFoundError:
            return
        with pin:
            world.check_plain(self.space, key, world.content.read(pin.get()), before)
        actor.passed("whole", "own", "possible")

    async def visit_and_end(self, actor: Actor) -> None:
        """By a thread that ends with a pin, a batch and a claim in its hands, for which others may be waiting."""
        named = [actor.world.key("key", key) for key in range(KEYS)]

        def hold_and_end() -> None:
            held: list[object] = [self.pool.gather(named), self.pool.try_claim(named[0])]
            for key in named:
                try:
                    held.append(self.pool.pin(key))
                    break
                except KeyNotFoundError:
                    continue

        thread = threading.Thread(target=hold_and_end, name="ends", daemon=True)
        thread.start()
        join: Callable[[], Awaitable[None]] | Callable[[], None] = thread.join
        if actor.access.is_task:
            await anyio.to_thread.run_sync(join)
        else:
            join()
        actor.noted("thread ended with what it held")
        await self.visit(actor)
