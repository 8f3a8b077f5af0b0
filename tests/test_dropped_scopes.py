"""Scopes that are dropped, and clears of many scopes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from concurrent_kv import AsyncKVPool, ClosedError, InvalidArgumentError, KeyNotFoundError, KVPool, Scope
from concurrent_kv.books.records import Hold
from concurrent_kv.locks.gate import gate
from concurrent_kv.locks.shards import ShardLocks
from concurrent_kv.pool.reading import retain
from tests.conftest import MakePool
from tests.support import HANG_SECONDS, LOCKS, append, assert_same, slots_in_use, tokens
from tests.threading_support import JOIN_SECONDS, Background, GatedPool, filled

USES: dict[str, Callable[[KVPool, Scope], object]] = {
    "put": lambda pool, scope: pool.put("a", tokens(1, 2), scope=scope),
    "get": lambda pool, scope: pool.get("a", scope=scope),
    "pin": lambda pool, scope: pool.pin("a", scope=scope),
    "gather": lambda pool, scope: pool.gather(["a"], scope=scope),
    "keys": lambda pool, scope: pool.keys(scope=scope),
    "clear": lambda pool, scope: pool.clear(scope),
    "try_claim": lambda pool, scope: pool.try_claim("a", scope=scope),
    "get_or_compute": lambda pool, scope: pool.get_or_compute("a", lambda: tokens(1, 2), scope=scope),
}


@pytest.mark.parametrize("by", ["scope", "name"])
def test_a_dropped_scope_gives_its_room_and_its_name_back(pool: KVPool, by: str) -> None:
    scope = pool.scope("episode")
    pool.put("a", tokens(1, 3), scope=scope)
    pool.put("b", tokens(2, 3), scope=scope)
    pool.put("a", tokens(3, 3))
    assert pool.drop_scope(scope if by == "scope" else "episode") == 2
    assert slots_in_use(pool) == 3
    assert pool.scopes() == (pool.default_scope,)
    again = pool.scope("episode")
    assert again is not scope
    assert pool.get("a", scope=again) is None
    assert_same(pool.get("a"), tokens(3, 3))
    pool.put("a", tokens(4, 3), scope=again)
    assert_same(pool.get("a", scope=again), tokens(4, 3))


def test_a_dropped_scope_is_forgotten_whole(pool: KVPool) -> None:
    class Side:
        pass

    class Name:
        pass

    side, name = Side(), Name()
    refs: list[Any] = [weakref.ref(side), weakref.ref(name)]
    pool.put("a", tokens(1, 3), side=side, scope=pool.scope(name))
    pool.drop_scope(name)
    del side, name
    gc.collect()
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize("use", USES)
def test_a_dropped_scope_says_so_wherever_it_is_used(pool: KVPool, use: str) -> None:
    scope = pool.scope("episode")
    pool.drop_scope(scope)
    with pytest.raises(ClosedError, match="the scope 'episode' of pool was dropped") as caught:
        USES[use](pool, scope)
    assert type(caught.value) is ClosedError


def test_what_is_no_scope_of_the_pool_is_not_dropped(pool: KVPool, make_pool: MakePool) -> None:
    other = make_pool(name="other").scope("theirs")
    scope = pool.scope("episode")
    pool.drop_scope("episode")
    for unknown in (scope, "episode", "another", ("a", 1)):
        with pytest.raises(KeyNotFoundError, match=r"has no scope .* to drop"):
            pool.drop_scope(unknown)
    newer = pool.scope("episode")
    with pytest.raises(KeyNotFoundError):
        pool.drop_scope(scope)  # of the same name
    assert newer in pool.scopes()
    with pytest.raises(InvalidArgumentError, match="got one of other"):
        pool.drop_scope(other)
    for default in (pool.default_scope, "pool"):
        with pytest.raises(InvalidArgumentError, match="another than the default scope"):
            pool.drop_scope(default)


def test_what_is_pinned_or_gathered_of_a_dropped_scope_stays_with_its_handle(pool: KVPool) -> None:
    scope = pool.scope("episode")
    pool.put("a", tokens(1, 3), scope=scope)
    with pool.pin("a", scope=scope) as pin, pool.gather(["a"], scope=scope) as batch:
        pool.drop_scope(scope)
        pool.check_integrity()
        assert_same(pin.get(), tokens(1, 3))
        append(batch, [2])
        with pytest.raises(ClosedError, match="was dropped"):
            pool.commit(["b"], batch)
    assert slots_in_use(pool) == 0


def test_a_write_under_way_when_its_scope_is_dropped_stores_nothing_and_says_so() -> None:
    with GatedPool() as pool:
        scope = pool.scope("episode")
        with pool.gated.hold_up("scatter") as gate:
            writer = Background(lambda: pool.put("a", filled(1.0), scope=scope))
            assert gate.entered.wait(JOIN_SECONDS)
            assert pool.drop_scope(scope) == 0
        with pytest.raises(ClosedError, match="was dropped"):
            writer.result()
        assert slots_in_use(pool) == 0
        pool.check_integrity()


def test_a_drop_that_was_cut_off_is_finished_by_the_next(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = pool.scope("episode")
    for key in range(4):
        pool.put(key, tokens(key, 3), scope=scope)
    write = LOCKS[-1].write

    def cut_off(self: ShardLocks, shards: Any, deadline: Any) -> Any:
        if tuple(shards) == (2,):
            raise KeyboardInterrupt
        return write(self, shards, deadline)

    with monkeypatch.context() as patch:
        patch.setattr(LOCKS[-1], "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            pool.drop_scope(scope)
    pool.check_integrity()
    with pytest.raises(ClosedError, match="was dropped"):
        pool.put("a", tokens(1, 3), scope=scope)
    pool.drop_scope(scope)
    assert slots_in_use(pool) == 0
    assert pool.scope("episode") is not scope


def test_a_task_drops_a_scope_as_a_thread_does(pool: KVPool) -> None:
    async def work() -> int:
        facade = AsyncKVPool(pool)
        await facade.put("a", tokens(1, 3), scope=facade.scope("episode"))
        return await facade.drop_scope("episode")

    assert anyio.run(work) == 1
    assert len(pool.scopes()) == 1


@pytest.mark.parametrize("act", [KVPool.clear, KVPool.bump_version, KVPool.close], ids=lambda act: act.__name__)
def test_each_shard_is_locked_for_many_scopes_at_once(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, act: Callable[[KVPool], object]
) -> None:
    pool = make_pool(shards=4)
    for number in range(1000):
        pool.scope(number)
    pool.put("a", tokens(1, 3), scope=pool.scope(7))
    pool.put("a", tokens(2, 3), scope=pool.scope(700))
    taken: list[Any] = []
    write = LOCKS[-1].write

    def counted(self: ShardLocks, shards: Any, deadline: Any) -> Any:
        taken.append(shards)
        return write(self, shards, deadline)

    monkeypatch.setattr(LOCKS[-1], "write", counted)
    act(pool)
    assert len(taken) <= 4 * 4  # shards, times holds of 256 scopes
    assert pool.stats().entries == 0


def test_scopes_of_different_shards_are_cleared_together(make_pool: MakePool) -> None:
    pool = make_pool(scope_shards=(0, 2))
    pool.account.scopes["other"] = other = Scope(pool.account, "other", (1, 3, 4))
    other.generation = pool.default_scope.generation
    pool.put_many(["a"], tokens(1, 3))
    pool.put_many(["a"], tokens(2, 3), scope=other)
    pool.clear()
    assert len(pool) == 0


class Unshown:
    """A name whose `__repr__` raises, and notes whether it runs under a lock."""

    def __init__(self) -> None:
        self.inside: list[bool] = []

    def __repr__(self) -> str:
        self.inside.append(gate.is_inside)
        raise ValueError("this name cannot be shown")


def test_a_scope_is_dropped_whose_name_cannot_be_shown(make_pool: MakePool) -> None:
    pool, name = make_pool(), Unshown()
    pool.put("key", tokens(1, 2), scope=pool.scope(name))
    assert pool.drop_scope(name) == 1
    assert name.inside
    assert not any(name.inside)
    with pytest.raises(KeyNotFoundError):
        pool.drop_scope(name)


def test_a_key_of_a_scope_that_is_being_dropped_is_there_or_the_scope_is_closed(make_pool: MakePool) -> None:
    pool = make_pool()
    scope = pool.scope("scope")
    pool.put("key", tokens(1, 2), scope=scope)
    found = pool._scope(scope)  # as an operation that began before the drop has it
    deadline = pool.storage.enter()
    pool.drop_scope(scope)
    hashes, generations = [hash("key")], {found: found.generation}
    with pytest.raises(ClosedError):
        retain(pool.storage, found.locate(hashes), ["key"], hashes, generations, deadline, hold=Hold("read", []))


def test_who_waits_for_a_computation_in_a_dropped_scope_hears_at_once(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(wait_timeout=HANG_SECONDS)
    scope = pool.scope("scope")
    claim = pool.try_claim("key", scope=scope)
    other = pool.try_claim("key")  # of the default scope: goes on
    waiting = threading.Event()
    subscribe = claim.flight.subscribe

    def subscribed(waker: Callable[[], None]) -> bool:
        is_under_way = subscribe(waker)
        waiting.set()
        return is_under_way

    monkeypatch.setattr(type(claim.flight), "subscribe", lambda flight, waker: subscribed(waker))
    heard = Background(lambda: pool.get_or_compute("key", lambda: tokens(1, 2), scope=scope))
    assert waiting.wait(HANG_SECONDS)
    pool.drop_scope(scope)
    with pytest.raises(ClosedError):
        heard.result()
    assert claim.over
    assert not other.over
    other.abandon()
