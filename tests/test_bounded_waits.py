"""Every wait, of threads and of tasks, has a limit; past it the error names who, the shard or the room, and the limit.

The limit is the storage's `wait_timeout` here; nothing is ever let go before it has been reached.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from concurrent_kv import AsyncKVPool, CapacityError, KeysValues, KVCacheManager, KVPool, WaitTimeoutError
from concurrent_kv.books.candidates import Candidates
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.locks.deadline import Deadline, TaskTime
from concurrent_kv.pool import clearing, room
from tests.async_operations import OPERATIONS, World
from tests.async_support import LOOPS, run_on, shards_held
from tests.conftest import MakePool
from tests.guards import Removal, shown_by
from tests.support import LAYOUT, WINDOW, append, config, tokens
from tests.threading_support import JOIN_SECONDS, Background

LIMIT = 0.005
SURFACES = ["thread", *LOOPS]


class ThreadsWorld:
    """A `World` with the sync objects in place of the async ones, for `OPERATIONS` that nobody awaits."""

    def __init__(self, world: World) -> None:
        self.aio = world.manager
        self.pool = world.pool.sync
        self.search = world.search.sync
        self.batch, self.search_batch = world.batch, world.search_batch
        self.rows = world.rows


# What differs for threads: everything else is the same call without `await`.
THREAD_OPERATIONS: dict[str, Callable[[World], object]] = {
    "fulfil": lambda w: w.claim.fulfil(tokens(9, 3)),
    "search": lambda w: w.manager.search([1], entries=2),
    "search.contains": lambda w: "child" in w.search.sync,
    "get_or_compute, async": lambda w: w.pool.sync.get_or_compute("new", lambda: tokens(9, 3)),
}


def error_of(surface: str, name: str, hold: Callable[[World], Any], settings: dict[str, Any]) -> Exception:
    """What an operation hears while everything that `hold` takes is held."""
    world = World(KVCacheManager(config(), 2, wait_timeout=JOIN_SECONDS, **settings))

    def by_a_thread() -> object:
        if name in THREAD_OPERATIONS:
            return THREAD_OPERATIONS[name](world)
        return OPERATIONS[name](ThreadsWorld(world))  # type: ignore[arg-type]

    async def main() -> Exception:
        await world.prepare()
        with hold(world):
            world.manager.storage.wait_timeout = LIMIT
            try:
                if surface == "thread":
                    Background(by_a_thread).result()
                else:
                    await OPERATIONS[name](world)
            except (WaitTimeoutError, CapacityError) as error:
                return error
        raise AssertionError(f"{name} waited for nothing")

    error: Exception = run_on("asyncio" if surface == "thread" else surface, main)
    world.manager.storage.wait_timeout = JOIN_SECONDS
    world.state()
    world.end()
    return error


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_waits_longer_for_a_shard_than_its_limit(name: str, surface: str) -> None:
    error = error_of(surface, name, lambda world: shards_held(world.pool.sync), {})
    assert isinstance(error, WaitTimeoutError)
    assert re.match(r"cache\S*: shard \d+ was not free for (reading|writing) within 0\.005 s$", str(error)), error


# --- room -----------------------------------------------------------------------------------------------------------


@contextmanager
def everything_pinned(world: World) -> Iterator[None]:
    """Every pool is full, of entries that are pinned; the open search keeps what it has."""
    manager, pins = world.manager, []
    for pool in [*manager.init_pools, manager.recur_pool, manager.wm_pool]:
        for number in range(pool.account.max_entries):
            for length in (WINDOW, 1):
                if pool.account.fits(1, length):
                    pool.put(("pinned", number, length), tokens(1, length))
        pins += [pool.pin(key) for key in keys_in(pool)]
    try:
        yield
    finally:
        for pin in pins:
            pin.close()


def keys_in(pool: KVPool) -> list[Hashable]:
    return [entry.key for scope in pool.scopes() for part in scope.entries for entry in part.values()]


WANT_ROOM = ["put", "put_many", "commit", "fulfil", "get_or_compute, sync", "get_or_compute, async", "set_init_cache"]


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("name", [*WANT_ROOM, "search.promote"])
def test_no_operation_waits_longer_for_room_than_its_limit(name: str, surface: str) -> None:
    error = error_of(surface, name, everything_pinned, {"init_entries": 4})
    pool = r"cache\.init\S*" if name in ("set_init_cache", "search.promote") else r"cache\.recur"
    assert isinstance(error, WaitTimeoutError)
    assert re.match(pool + r": no room for \d entries and \d+ slots within 0\.005 s: .*pinned", str(error)), error


@pytest.mark.parametrize("surface", SURFACES)
def test_a_search_does_not_wait_longer_for_its_room_than_its_limit(surface: str) -> None:
    error = error_of(surface, "search", everything_pinned, {})
    assert isinstance(error, CapacityError)
    assert re.match(r"cache\.recur cannot set 2 entries and \d+ slots aside", str(error)), error


# --- flights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", SURFACES)
def test_nobody_waits_longer_for_a_computation_than_the_limit_of_the_storage(pool: KVPool, surface: str) -> None:
    pool.storage.wait_timeout = LIMIT
    claim = pool.try_claim("key")
    with pytest.raises(
        WaitTimeoutError, match=r"^pool: the computation of 'key' .* was not over within 0\.005 s; a timeout= "
    ):
        get_or_compute(pool, surface)
    claim.abandon()


def get_or_compute(pool: KVPool, surface: str) -> KeysValues:
    if surface == "thread":
        return pool.get_or_compute("key", lambda: tokens(1, 2))
    kv: KeysValues = run_on(surface, AsyncKVPool(pool).get_or_compute, "key", lambda: tokens(1, 2))
    return kv


@pytest.mark.parametrize("surface", SURFACES)
def test_who_asks_for_a_computation_waits_for_a_shard_no_longer_than_its_own_timeout(
    make_pool: MakePool, surface: str
) -> None:
    pool = make_pool(wait_timeout=JOIN_SECONDS)
    with (
        shards_held(pool),
        pytest.raises(WaitTimeoutError, match=r"shard \d+ was not free for reading within 0\.005 s$"),
    ):
        call(surface, pool, lambda pool: pool.get_or_compute("key", lambda: tokens(1, 2), timeout=LIMIT))


# --- worker threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_waits_for_a_worker_no_longer_than_its_timeout(pool: KVPool, loop: str) -> None:
    """The one worker waits for a shard, for longer than the task will."""
    aio = AsyncKVPool(pool, max_workers=1)

    async def main() -> bool:
        heard = False
        with shards_held(pool) as let_go:
            async with anyio.create_task_group() as group:
                group.start_soon(aio.get, "key")
                while not aio.offload_stats().worker_count:
                    await anyio.lowlevel.checkpoint()
                with anyio.move_on_after(JOIN_SECONDS):
                    with pytest.raises(WaitTimeoutError):
                        await aio.get("key", timeout=LIMIT)
                    heard = True
                let_go()
        return heard

    assert run_on(loop, main)


# --- without a limit ------------------------------------------------------------------------------------------------


class LetGo:
    """Lets go of what somebody waits for, when he is about to wait without a limit."""

    def __init__(self) -> None:
        self.act: Callable[[], object] = lambda: None

    def waiting_without_a_limit(self, patch: pytest.MonkeyPatch) -> None:
        def left(deadline: Deadline | TaskTime) -> float:
            self.act()
            return JOIN_SECONDS

        patch.setattr(Deadline, "left", left)
        patch.setattr(TaskTime, "left", left)  # of a task that waits for room


def call(surface: str, pool: KVPool, operation: Callable[[Any], Any]) -> object:
    if surface == "thread":
        return operation(pool)

    async def main() -> object:
        waited: Awaitable[object] = operation(AsyncKVPool(pool))
        return await waited

    return run_on(surface, main)


def waits_for_a_shard(surface: str, let_go: LetGo) -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=LIMIT)
    pool.put("key", tokens(1, 2))
    with shards_held(pool) as over:
        let_go.act = over
        return call(surface, pool, lambda pool: pool.contains("key"))


def waits_for_room(surface: str, let_go: LetGo) -> object:
    pool = KVPool(LAYOUT, 1, wait_timeout=LIMIT)
    pool.put("key", tokens(1, 2))
    let_go.act = pool.pin("key").close
    return call(surface, pool, lambda pool: pool.put("other", tokens(1, 2)))


def waits_for_a_flight(surface: str, let_go: LetGo) -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=LIMIT)
    claim = pool.try_claim("key")
    let_go.act = claim.abandon
    return call(surface, pool, lambda pool: pool.get_or_compute("key", lambda: tokens(1, 2))) is not None


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("scenario", [waits_for_a_shard, waits_for_room, waits_for_a_flight])
def test_without_its_limit_a_wait_would_last_until_somebody_lets_go(
    scenario: Callable[[str, LetGo], object], surface: str
) -> None:
    let_go = LetGo()
    shown_by(lambda: scenario(surface, let_go), WaitTimeoutError, let_go.waiting_without_a_limit)


# --- the mutex ------------------------------------------------------------------------------------------------------


class CountedHolds:
    """A mutex that tells the most steps of a kind which were made in one hold of it."""

    def __init__(self, mutex: Any) -> None:
        self._mutex = mutex
        self._steps = self.most = 0

    def step(self, number: int = 1) -> None:
        self._steps += number
        self.most = max(self.most, self._steps)

    def __enter__(self) -> None:
        self._mutex.__enter__()
        self._steps = 0

    def __exit__(self, *error: object) -> None:
        self._mutex.__exit__(*error)


def counted(pool: KVPool) -> CountedHolds:
    holds = pool.storage.ledger.mutex = CountedHolds(pool.storage.ledger.mutex)
    return holds


def counting(owner: type, method: str, holds: CountedHolds, patch: pytest.MonkeyPatch) -> None:
    plain = getattr(owner, method)

    def count(self: object, *arguments: Any) -> object:
        holds.step(len(arguments[0]) if method == "let_go" else 1)
        return plain(self, *arguments)

    patch.setattr(owner, method, count)


def entries_cleared_in_one_hold() -> bool:
    pool = KVPool(LAYOUT, 1000, shards=1)
    for number in range(1000):
        pool.put(number, tokens(1, 1))
    holds = counted(pool)
    with pytest.MonkeyPatch.context() as patch:
        counting(Ledger, "let_go", holds, patch)
        pool.clear()
    return 0 < holds.most < 1000


def candidates_looked_at_in_one_hold() -> bool:
    pool = KVPool(LAYOUT, 1000)
    for number in range(1000):
        pool.put(number, tokens(1, 1))
    pins = [pool.pin(number) for number in range(1000)]
    holds = counted(pool)
    with pytest.MonkeyPatch.context() as patch:
        counting(type(pool.policy), "pop_victim", holds, patch)
        with pytest.raises(WaitTimeoutError):
            pool.put("other", tokens(1, 1), timeout=LIMIT)
    assert len(pins) == 1000
    return 0 < holds.most < 1000


def set_aside_given_back_in_one_hold(number: int = 300) -> int:
    """Parents share their last token with a child: no victims where slots are short, and victims where entries are."""
    pool = KVPool(LAYOUT, 2 * number + 2, max_slots=5 * number + WINDOW)
    for parent in range(number):
        pool.put(parent, tokens(1, 3))
        batch = pool.gather([parent])
        append(batch, [2])
        pool.commit([-1 - parent], batch)
    pins = [pool.pin(-1 - parent) for parent in range(number)]
    for key in ("long", "longer"):
        pool.put(key, tokens(3, WINDOW))  # slots are short: looks at all parents, and sets them aside
    pool.put("short", tokens(3, 1))
    while len(pool) < 2 * number + 2:
        pool.put(("filling", len(pool)), tokens(3, 1))
    pins += [pool.pin(key) for key in keys_in(pool) if key not in range(number)]
    holds = counted(pool)
    with pytest.MonkeyPatch.context() as patch:
        counting(Candidates, "_unpark", holds, patch)
        pool.put("an entry more", tokens(3, 1))
    assert len(pins) >= number
    return holds.most


def without_parts(module: Any, name: str) -> Removal:
    return lambda patch: patch.setattr(module, name, 10**9)


def test_clearing_in_one_hold_would_keep_the_mutex_for_as_long_as_there_are_entries() -> None:
    shown_by(entries_cleared_in_one_hold, True, without_parts(clearing, "ENTRIES_PER_HOLD"))


def test_looking_for_a_victim_in_one_hold_would_keep_the_mutex_for_as_long_as_there_are_entries() -> None:
    shown_by(candidates_looked_at_in_one_hold, True, without_parts(room, "VICTIMS_PER_HOLD"))


def test_what_was_set_aside_for_sharing_is_given_back_in_bounded_holds_of_the_mutex() -> None:
    assert 0 < set_aside_given_back_in_one_hold() < 300
