"""A pool's statistics, its end, and the process it belongs to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from concurrent_kv import ClosedError, InvalidArgumentError, KVPool, KVStorage, PoolStats
from tests.conftest import MakePool
from tests.support import HANG_SECONDS, LAYOUT, append, assert_same, stacked, store, tokens

ROOT = Path(__file__).parent.parent

# Statistics ----------------------------------------------------------------------------------------------------------


def test_hits_and_misses_are_counted_row_by_row(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    pool.get("a")
    pool.get("missing")
    pool.gather(["a", "b", "x", "y", "z"]).close()
    stats = pool.stats()
    assert (stats.hit_count, stats.miss_count, stats.request_count) == (3, 4, 7)
    assert stats.hit_rate == 3 / 7
    assert stats.miss_rate == 4 / 7


def test_a_get_can_leave_its_miss_to_who_looks_next(pool: KVPool) -> None:
    pool.get("a", count_miss=False)
    assert pool.stats().request_count == 0


def test_inserts_replacements_evictions_and_removals_are_counted_apart(make_pool: MakePool) -> None:
    pool = make_pool(2)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)), ("b", tokens(3, 2)), ("c", tokens(4, 2)))
    pool.pop("c")
    pool.clear()
    stats = pool.stats()
    assert (stats.insert_count, stats.replace_count, stats.eviction_count) == (3, 1, 1)
    assert (stats.removal_count, stats.clear_count) == (2, 1)


def test_fill_and_capacity_are_in_entries_and_slots(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 5)))
    stats = pool.stats()
    assert (stats.entries, stats.max_entries) == (2, 4)
    assert (stats.slots_in_use, stats.max_slots) == (7, 32)


def test_slots_of_a_prefix_shared_by_two_entries_are_counted_as_shared_and_once(pool: KVPool) -> None:
    pool.put("a", tokens(1, 3))
    batch = pool.gather(["a"])
    append(batch, [2])
    pool.commit(["b"], batch)
    assert pool.stats().shared_slots == 3
    assert pool.stats().slots_in_use == 5


def test_a_difference_of_two_snapshots_is_what_happened_between_them(pool: KVPool) -> None:
    pool.get("a")
    before = pool.stats()
    store(pool, ("a", tokens(1, 2)))
    pool.get("a")
    happened = pool.stats() - before
    assert (happened.hit_count, happened.miss_count, happened.insert_count) == (1, 0, 1)
    assert (happened.entries, happened.max_entries) == (1, 4)


def test_a_snapshot_does_not_change(pool: KVPool) -> None:
    stats = pool.stats()
    pool.get("a")
    assert stats.miss_count == 0
    with pytest.raises(FrozenInstanceError):
        stats.miss_count = 1  # type: ignore[misc]


def test_a_snapshot_as_a_dict_is_flat_and_numeric(pool: KVPool) -> None:
    values = pool.stats().as_dict("pool/")
    assert values["pool/max_entries"] == 4.0
    assert values["pool/request_count"] == 0.0
    assert all(type(number) is float for number in values.values())


def test_a_snapshot_as_a_dict_has_rates_where_something_was_asked_for_and_none_elsewhere(pool: KVPool) -> None:
    assert not {"hit_rate", "miss_rate"} & pool.stats().as_dict().keys()
    pool.get("missing")
    values = pool.stats().as_dict()
    assert (values["hit_rate"], values["miss_rate"]) == (0.0, 1.0)


def test_hits_in_words_say_where_nothing_was_asked_for(pool: KVPool) -> None:
    assert pool.stats().hits_in_words == "no requests"
    store(pool, ("a", tokens(1, 2)))
    pool.gather(["a", "a", "a", "x"]).close()
    assert pool.stats().hits_in_words == "hit rate 0.7500 of 4 requests"


def test_an_unused_pool_missed_nothing() -> None:
    assert PoolStats().miss_rate == 0.0
    assert PoolStats().hit_rate == 1.0


def test_reset_starts_the_counts_from_zero_and_keeps_the_fill(pool: KVPool) -> None:
    store(pool, ("a", tokens(1, 2)))
    pool.get("a")
    pool.reset_stats()
    stats = pool.stats()
    assert (stats.hit_count, stats.insert_count, stats.entries) == (0, 0, 1)


# The end -------------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[KVPool], Any]] = {
    "put": lambda pool: pool.put("a", tokens(1, 2)),
    "put_many": lambda pool: pool.put_many(["a"], tokens(1, 2)),
    "get": lambda pool: pool.get("a"),
    "peek": lambda pool: pool.peek("a"),
    "side": lambda pool: pool.side("a"),
    "pop": lambda pool: pool.pop("a"),
    "in": lambda pool: "a" in pool,
    "pin": lambda pool: pool.pin("a"),
    "gather": lambda pool: pool.gather(["a"]),
    "scope": lambda pool: pool.scope("other"),
    "clear": lambda pool: pool.clear(),
    "bump_version": lambda pool: pool.bump_version(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_closed_pool_says_that_it_is_closed(make_pool: MakePool, name: str) -> None:
    pool = make_pool(name="mine")
    pool.put("a", tokens(1, 2))
    pool.close()
    with pytest.raises(ClosedError, match="mine is closed"):
        OPERATIONS[name](pool)


def test_closing_twice_is_fine(pool: KVPool) -> None:
    pool.close()
    pool.close()


def test_a_closed_pool_still_tells_its_statistics(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    pool.close()
    assert pool.stats().insert_count == 1
    assert len(pool) == 0
    assert "closed" in repr(pool)


def test_leaving_its_with_closes_a_pool_also_after_an_exception(make_pool: MakePool) -> None:
    with pytest.raises(RuntimeError, match="of the user"), make_pool() as pool:
        raise RuntimeError("of the user")
    assert pool.closed


def test_closing_frees_the_storage_of_a_pool_made_alone(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    pool.close()
    with pytest.raises(ClosedError):
        _ = pool.storage.tensor.data


def test_a_batch_left_open_closes_after_its_pool(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    batch = pool.gather(["a"])
    append(batch, [2])
    pool.close()
    with pytest.raises(ClosedError):
        pool.commit(["b"], batch)
    batch.close()
    assert pool.check_integrity().handles == 0


def test_a_pin_left_open_closes_after_its_pool(pool: KVPool) -> None:
    pool.put("a", tokens(1, 2))
    with pool.pin("a") as pin:
        pool.close()
        with pytest.raises(ClosedError):
            pin.get()
    assert pool.check_integrity().handles == 0


def test_what_was_read_outlives_the_pool(make_pool: MakePool) -> None:
    with make_pool() as pool:
        pool.put("a", tokens(1, 2))
        found = pool.get("a")
    assert_same(found, tokens(1, 2))


def test_dropping_an_open_batch_releases_it(pool: KVPool) -> None:
    pool.put("a", tokens(1, 8))
    batch = pool.gather(["a"])
    pool.pop("a")
    assert pool.storage.ledger.slots.in_use == 8
    del batch
    pool.get("a")
    assert pool.storage.ledger.slots.in_use == 0


# One process ---------------------------------------------------------------------------------------------------------

FORK = """
import os, sys
from concurrent_kv import KVCacheManager, WrongProcessError
from tests.support import config, tokens
from tests.test_pool_life import IN_A_CHILD

manager = KVCacheManager(config(), 2)
pool = manager.recur_pool
pool.put("a", tokens(1, 2))
search = manager.search([0])
pin = pool.pin("a")
child = os.fork()
if not child:
    failed = []
    for name, operation in IN_A_CHILD.items():
        try:
            operation(manager, pool, search, pin)
        except WrongProcessError as error:
            if "process" not in str(error) or str(os.getpid()) not in str(error):
                failed.append(f"{name}: unclear: {error}")
        except BaseException as error:
            failed.append(f"{name}: {error!r}")
        else:
            failed.append(f"{name}: no error")
    print("; ".join(failed), flush=True)
    os._exit(len(failed))
_, status = os.waitpid(child, 0)
assert pool.get("a") is not None
pin.close()
search.close()
manager.check_integrity()
sys.exit(os.waitstatus_to_exitcode(status))
"""

IN_A_CHILD: dict[str, Callable[..., Any]] = {
    **{name: lambda manager, pool, search, pin, do=do: do(pool) for name, do in OPERATIONS.items()},
    "close": lambda manager, pool, search, pin: pool.close(),
    "check_integrity": lambda manager, pool, search, pin: pool.check_integrity(),
    "repair": lambda manager, pool, search, pin: pool.repair(),
    "len": lambda manager, pool, search, pin: len(pool),
    "stats": lambda manager, pool, search, pin: pool.stats(),
    "reset_stats": lambda manager, pool, search, pin: pool.reset_stats(),
    "manager.search": lambda manager, pool, search, pin: manager.search([1]),
    "manager.close": lambda manager, pool, search, pin: manager.close(),
    "manager.clear_all": lambda manager, pool, search, pin: manager.clear_all(),
    "manager.get_stats_summary": lambda manager, pool, search, pin: manager.get_stats_summary(),
    "search.gather": lambda manager, pool, search, pin: search.gather(["a"], [0]),
    "search.close": lambda manager, pool, search, pin: search.close(),
    "search.in": lambda manager, pool, search, pin: "a" in search,
    "pin.get": lambda manager, pool, search, pin: pin.get(),
    "pin.close": lambda manager, pool, search, pin: pin.close(),
}


def test_a_forked_child_that_touches_a_pool_gets_a_clear_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=HANG_SECONDS, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pool_made_in_the_child_works() -> None:
    script = (
        "import os\n"
        "from concurrent_kv import KVPool\n"
        "from tests.support import LAYOUT, assert_same, tokens\n"
        "parent = KVPool(LAYOUT, 2)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    pool = KVPool(LAYOUT, 2)\n"
        "    pool.put('a', tokens(1, 2))\n"
        "    assert_same(pool.get('a'), tokens(1, 2))\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_SECONDS, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


# A storage shared by two pools ---------------------------------------------------------------------------------------


def two_pools() -> tuple[KVPool, KVPool]:
    storage = KVStorage(LAYOUT, 6 * LAYOUT.max_tokens, headroom_slots=LAYOUT.max_tokens)
    return KVPool(LAYOUT, 4, storage=storage, name="owner"), KVPool(LAYOUT, 2, storage=storage, name="guest")


def test_a_pool_that_does_not_fit_into_a_shared_storage_is_refused() -> None:
    owner, _ = two_pools()
    with pytest.raises(InvalidArgumentError, match="storage must have"):
        KVPool(LAYOUT, 1, storage=owner.storage)


def test_a_pool_over_a_shared_storage_leaves_it_open() -> None:
    owner, guest = two_pools()
    guest.put("a", tokens(1, 2))
    guest.close()
    owner.put("a", tokens(2, 2))
    assert_same(owner.get("a"), tokens(2, 2))
    with pytest.raises(ClosedError, match="guest"):
        guest.get("a")


def test_pools_over_one_storage_keep_their_keys_apart() -> None:
    owner, guest = two_pools()
    owner.put_many(["a", "b"], stacked(tokens(1, 2), tokens(2, 2)))
    guest.put("a", tokens(3, 2))
    assert_same(owner.get("a"), tokens(1, 2))
    assert_same(guest.get("a"), tokens(3, 2))
    assert guest.get("b") is None
