"""As `test_failing_calls.py`, of what moves entries into a tier and back: where memory runs out, nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from concurrent_kv import KVCacheManager
from tests.failing_calls import OneFailure, Operation, check_whole, prepare, tokens
from tests.support import WINDOW, append, config, stacked
from tests.tiers_support import TIERS, host_tier, tiers_of

SAMPLE = 20  # places of each operation


@pytest.fixture(autouse=True, params=TIERS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each test with tiers in memory, and with a file behind them."""
    with tiers_of(request.param, tmp_path):
        yield request.param


def make_manager() -> KVCacheManager:
    tier = host_tier(6)
    return KVCacheManager(config(), 1, wm_entries=3, init_entries=2, shards=2, wait_timeout=0.5, tier=tier)


def move_down(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    for number in range(4):
        pool.put(number, tokens(number + 3, WINDOW))
    pool.get("key")
    with pool.gather(["other", 0, "missing"]):
        pass


def move_up(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    for number in range(3):
        pool.put(number, tokens(number + 3, 4))
    for number in range(3):
        pool.pop(number)
    pool.get("key")
    with pool.pin("other"):
        pass
    pool.discard("key")
    pool.get("key")


def write_anew(manager: KVCacheManager) -> None:
    pool = manager.wm_pool
    for number in range(3):
        pool.put(number, tokens(number + 3, 4))
    pool.put("key", tokens(9, 3))
    pool.put_many(["other", "new"], stacked(tokens(1, 2), tokens(2, 3)))
    pool.clear()


def search_below(manager: KVCacheManager) -> None:
    for number in range(2):
        manager.set_init_cache(0, number, tokens(number + 3, 3))
    with manager.search([0], entries=4, tokens=4 * WINDOW) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [7])
            search.commit(["child"], batch)
        with search.gather(["root", "child"], [0, 0]):
            pass
        search.promote("root", 0, as_key="again")
        search.keep(["child"])


OPERATIONS: tuple[Operation, ...] = (move_down, move_up, write_anew, search_below)


def places_of(operation: Operation) -> int:
    """Calls of the package's functions in one run."""
    with make_manager() as manager:
        prepare(manager)
        counting = OneFailure(0)
        counting.run(operation, manager)
    return counting.seen


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_fails_in_the_middle_of_a_move_loses_nothing(operation: Operation) -> None:
    places = places_of(operation)
    assert places > 200
    step = max(1, places // SAMPLE)
    for number in range(1 + OPERATIONS.index(operation) % step, places + 1, step):
        with make_manager() as manager:
            prepare(manager)
            OneFailure(number).run(operation, manager)
            check_whole(manager)
