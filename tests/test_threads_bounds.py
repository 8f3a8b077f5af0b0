"""Waits are bounded and end when they can; copies hold no lock; finalisers only append; raising keys harm nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from concurrent_kv import Batch, KeysValues, KVCacheManager, KVPool, SearchEndedError, WaitTimeoutError
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool import room
from concurrent_kv.pool.writing import write
from tests.threading_support import JOIN_SECONDS, LAYOUT, WINDOW, Background, GatedPool, filled, keys_of, value_of

pytestmark = pytest.mark.usefixtures("loops")

CONFIG = {
    "num_layers": LAYOUT.num_layers,
    "num_heads": LAYOUT.num_heads,
    "embed_dim": LAYOUT.num_heads * LAYOUT.head_dim,
    "context_length": WINDOW,
    "num_simulations": 3,
    "max_cache_size": 8,
    "device": "cpu",
}


@pytest.fixture
def pools() -> Iterator[Callable[..., GatedPool]]:
    made: list[GatedPool] = []

    def make(max_entries: int = 2, **options: object) -> GatedPool:
        made.append(GatedPool(max_entries, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for pool in made:
        pool.check_integrity()
        pool.close()


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = KVCacheManager(CONFIG, 2, wait_timeout=JOIN_SECONDS)
    made.set_init_cache(0, "root", filled(1, 2))
    yield made
    made.check_integrity()
    made.close()


# --- bounded waits --------------------------------------------------------------------------------------------------


def test_a_put_into_a_pool_that_is_pinned_full_times_out_and_names_the_pool(pools: Callable[..., GatedPool]) -> None:
    pool = pools(2)
    for key in range(2):
        pool.put(key, filled(key))
    with pool.pin(0), pool.pin(1), pytest.raises(WaitTimeoutError, match=r"^pool: no room for 1 entries"):
        pool.put(2, filled(2), timeout=0.01)
    assert keys_of(pool, range(3)) == [0, 1]


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize("operation", ["get", "put", "gather", "pin", "pop", "clear"])
def test_an_operation_on_a_shard_held_by_another_thread_times_out_and_names_the_shard(
    pools: Callable[..., GatedPool], kind: str, operation: str
) -> None:
    pool = pools(2, shards=1)
    pool.put(0, filled(1))
    operations: dict[str, Callable[[], object]] = {
        "get": lambda: pool.get(0, timeout=0.01),
        "put": lambda: pool.put(0, filled(2), timeout=0.01),
        "gather": lambda: pool.gather([0], timeout=0.01),
        "pin": lambda: pool.pin(0, timeout=0.01),
        "pop": lambda: pool.pop(0, timeout=0.01),
        "clear": lambda: pool.clear(timeout=0.01),
    }
    if kind == "read" and operation in ("get", "gather", "pin"):
        return  # readers do not keep each other out
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with getattr(pool.storage.locks, kind)((0,), Deadline(JOIN_SECONDS)):
            held.set()
            assert done.wait(JOIN_SECONDS)

    holder = Background(hold)
    assert held.wait(JOIN_SECONDS)
    try:
        with pytest.raises(WaitTimeoutError, match=r"^pool: shard 0 was not free"):
            operations[operation]()
    finally:
        done.set()
        holder.result()
    # A clear that timed out had begun: what it did not sweep is a miss all the same.
    assert value_of(pool.get(0)) == (None if operation == "clear" else 1.0)
    pool.clear()


@pytest.mark.parametrize("how", ["close", "drop and do anything", "pop"])
def test_a_put_that_waits_for_room_goes_on_when_room_is_made(pools: Callable[..., GatedPool], how: str) -> None:
    pool = pools(1)
    pool.put(0, filled(0))
    pin = pool.pin(0)
    put = Background(lambda: pool.put(1, filled(1)))
    assert pool.waits.wait(JOIN_SECONDS)
    if how == "close":
        pin.close()
    elif how == "pop":
        pool.pop(0)
    else:
        del pin
        pool.get(0)
    assert put.result() is True
    assert keys_of(pool, range(2)) == [1]


def test_two_writers_whose_old_entries_were_evicted_do_not_wait_for_each_other(
    pools: Callable[..., GatedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each replaces 1 token by 4 in a pool of 6 slots, and counted on the room of its old entry, which then leaves.
    pool = pools(4, max_slots=6, headroom=16, wait_timeout=JOIN_SECONDS)
    pool.put(0, filled(0, 1))
    pool.put(1, filled(1, 1))
    both = threading.Barrier(2)
    scatter = pool.gated.scatter

    def together(*arguments: object, **options: object) -> object:
        both.wait(JOIN_SECONDS)
        return scatter(*arguments, **options)

    monkeypatch.setattr(pool.gated, "scatter", together)
    writers = [Background(lambda key=key: pool.put(key, filled(10 + key, 4))) for key in range(2)]  # type: ignore[misc]
    assert [writer.result() for writer in writers] == [True, True]
    assert len(pool) == 1


# --- no lock during a copy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scatter", "gather"])
def test_while_a_copy_runs_every_other_operation_on_its_shard_goes_on(
    pools: Callable[..., GatedPool], kind: str
) -> None:
    pool = pools(4, shards=1, wait_timeout=JOIN_SECONDS, headroom=4 * WINDOW)
    pool.put(0, filled(1))
    pool.put(1, filled(2))
    with pool.gated.hold_up(kind) as gate:
        held_up = Background(lambda: pool.put(0, filled(3)) if kind == "scatter" else value_of(pool.get(0)))
        assert gate.entered.wait(JOIN_SECONDS)
        assert value_of(pool.get(0)) == 1.0
        assert pool.put(2, filled(4))
        assert pool.put(0, filled(5))
        with pool.gather([0, 1, 2], room=0) as batch, pool.pin(1):
            assert batch.hits == (True, True, True)
        assert value_of(pool.pop(1)) == 2.0
        assert len(pool) == 2
        pool.stats()
    assert held_up.result() == (True if kind == "scatter" else 1.0)
    assert value_of(pool.get(0)) == (3.0 if kind == "scatter" else 5.0)


def test_a_write_that_is_cleared_while_it_copies_stores_nothing_and_says_so(pools: Callable[..., GatedPool]) -> None:
    pool = pools(2)
    with pool.gated.hold_up("scatter") as gate:
        put = Background(lambda: pool.put(0, filled(1)))
        assert gate.entered.wait(JOIN_SECONDS)
        pool.clear()
    assert put.result() is False
    assert 0 not in pool
    assert pool.stats().stale_write_count == 1


def test_a_pool_closed_while_a_put_copies_ends_it_with_an_error_and_keeps_nothing(
    pools: Callable[..., GatedPool],
) -> None:
    pool = pools(2)
    with pool.gated.hold_up("scatter") as gate:
        put = Background(lambda: pool.put(0, filled(1)))
        assert gate.entered.wait(JOIN_SECONDS)
        pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        put.result()
    assert len(pool) == 0


def test_a_commit_that_waits_for_room_once_more_keeps_its_batch_until_then(
    pools: Callable[..., GatedPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was to replace goes while it copies, and another entry takes that room."""
    pool = pools(2)
    pool.put("parent", filled(1, 2))
    pool.put("old", filled(2))
    batch = pool.gather(["parent"])
    append(batch)
    make, users = room.make_room, list[int]()

    def make_room(*arguments: Any) -> None:
        users.append(batch.hold.users)
        make(*arguments)

    monkeypatch.setattr("concurrent_kv.pool.writing.make_room", make_room)
    with pool.gated.hold_up("scatter") as gate:
        commit = Background(lambda: pool.commit(["old"], batch))
        assert gate.entered.wait(JOIN_SECONDS)
        pool.pop("old")
        pool.put("new", filled(3))
    assert commit.result()
    assert users == [1]
    assert batch.hold.users == 0
    pool.check_integrity()


# --- a search that ends under an operation --------------------------------------------------------------------------


def test_a_search_that_closes_just_before_a_commit_takes_room_leaves_nothing_reserved(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = manager.search([0], entries=2, tokens=4)
    batch = search.gather(["root"], [0])
    append(batch)

    def close_and_write(*arguments: object) -> bool:
        Background(search.close).result()
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("concurrent_kv.pool.committing.write", close_and_write)
    with pytest.raises(SearchEndedError):
        search.commit(["child"], batch)
    stats = manager.recur_pool.stats()
    assert (stats.reserved_entries, stats.reserved_slots, stats.slots_in_use) == (0, 0, 0)


def test_a_search_that_closes_just_before_a_commit_takes_more_than_it_reserved_leaves_nothing_reserved(
    manager: KVCacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = manager.search([0], entries=2, tokens=1)
    batch = search.gather(["root"], [0])
    append(batch)
    append(batch)
    take = room._take_from_budget

    def close_and_take(*arguments: Any) -> Any:
        Background(search.close).result()
        return take(*arguments)

    monkeypatch.setattr(room, "_take_from_budget", close_and_take)
    with pytest.raises(SearchEndedError):
        search.commit(["child"], batch)
    stats = manager.recur_pool.stats()
    assert (stats.reserved_entries, stats.reserved_slots, stats.slots_in_use) == (0, 0, 0)


def append(batch: Batch) -> None:
    """One token in every layer."""
    new = torch.ones(batch.batch_size, LAYOUT.num_heads, 1, LAYOUT.head_dim)
    for layer in range(LAYOUT.num_layers):
        batch.append(layer, new, new)


# --- finalisers only append -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("handle", ["pin", "batch", "search"])
def test_a_handle_dropped_while_the_mutex_is_held_is_released_by_the_next_operation(
    manager: KVCacheManager, handle: str
) -> None:
    kinds: dict[str, Callable[[], object]] = {
        "pin": lambda: manager.init_pools[0].pin("root"),
        "batch": lambda: manager.init_pools[0].gather(["root"]),
        "search": lambda: manager.search([0]),
    }
    opened = [kinds[handle]()]
    before = manager.check_integrity().handles

    def drop_under_the_mutex() -> None:
        with manager.storage.ledger.mutex:  # as a collection that runs in the middle of an operation would
            opened.clear()

    Background(drop_under_the_mutex).result()
    assert manager.get_init_cache(0, "root") is not None
    assert (before, manager.check_integrity().handles) == (1, 0)
    assert manager.recur_pool.stats().reserved_entries == 0


# --- keys that raise ------------------------------------------------------------------------------------------------


class Fuse:
    """Raises at its n-th use, and from then on at every use if it stays broken."""

    def __init__(self, *, stays_broken: bool) -> None:
        self.left: int | None = None
        self.stays_broken = stays_broken

    def use(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = 0 if self.stays_broken else None
                raise ArithmeticError("a key that cannot be compared")


class RaisingKey:
    """All have one hash, so that every lookup compares."""

    def __init__(self, number: int, fuse: Fuse) -> None:
        self.number, self.fuse = number, fuse

    def __hash__(self) -> int:
        self.fuse.use()
        return 7

    def __eq__(self, other: object) -> bool:
        self.fuse.use()
        return isinstance(other, RaisingKey) and self.number == other.number


@pytest.mark.parametrize("stays_broken", [False, True], ids=["raises once", "raises from then on"])
@pytest.mark.parametrize(
    "operation", ["put", "put_many", "put_many plain keys", "get", "pop", "gather", "clear", "evict"]
)
def test_a_key_whose_comparison_raises_at_any_moment_leaves_the_pool_as_it_was(
    operation: str, stays_broken: bool
) -> None:
    raised = 0
    for moment in range(200):
        fuse = Fuse(stays_broken=stays_broken)
        pool = KVPool(LAYOUT, 3 if operation == "evict" else 8, shards=1)
        for value in (10, 0):  # written twice: the index has the key object of the first write
            pool.put_many(
                [RaisingKey(number, fuse) for number in range(3)],
                filled_rows([value + number for number in range(3)]),
            )
        new = [RaisingKey(number, fuse) for number in (1, 4, 2, 5)]
        operations: dict[str, Callable[[], object]] = {
            "put": lambda pool=pool, new=new: pool.put(new[0], filled(9)),  # type: ignore[misc]
            "put_many": lambda pool=pool, new=new: pool.put_many(new, filled_rows([9] * 4)),  # type: ignore[misc]
            # 7 has the hash of the others: the index asks them whether they are 7.
            "put_many plain keys": lambda pool=pool: pool.put_many(["plain", 7], filled_rows([9] * 2)),  # type: ignore[misc]
            "get": lambda pool=pool, new=new: pool.get(new[0]),  # type: ignore[misc]
            "pop": lambda pool=pool, new=new: pool.pop(new[0]),  # type: ignore[misc]
            "gather": lambda pool=pool, new=new: pool.gather(new),  # type: ignore[misc]
            "clear": lambda pool=pool: pool.clear(),  # type: ignore[misc]
            "evict": lambda pool=pool: pool.put("another", filled(9)),  # type: ignore[misc]
        }
        fuse.left = moment
        try:
            operations[operation]()
        except ArithmeticError:
            raised += 1
        else:
            break
        finally:
            fuse.left = None
            pool.check_integrity()
        left = [value_of(pool.get(RaisingKey(number, fuse))) for number in range(6)]
        if operation == "clear":  # it has begun: nothing older is seen
            assert left == [None] * 6
        else:
            assert left == [0.0, 1.0, 2.0, None, None, None]
            assert len(pool) == 3
    assert raised or operation in ("clear", "evict")  # which look at no key
    assert moment < 199


def filled_rows(values: list[int]) -> KeysValues:
    """Rows of one number each."""

    return KeysValues.from_packed(torch.cat([filled(value).packed for value in values], dim=1))  # type: ignore[misc]
