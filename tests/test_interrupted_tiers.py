"""As `test_interrupted_operations.py`, of what moves entries into a tier and back: nothing wrong is ever read."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from concurrent_kv import KeysValues, KVPool
from tests.interrupting import cut_at
from tests.support import LAYOUT, WINDOW, append, assert_same, child_of, tokens
from tests.test_interrupted_operations import PACKAGE
from tests.test_interrupted_operations import cheap_collections as cheap_collections
from tests.tiers_support import TIERS, host_tier, tiers_of

KEYS = range(5)
MOST_PLACES = 20_000


@pytest.fixture(params=TIERS)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KVPool]:
    """Of two entries; the tier has room for four, one of them in memory where it has a file."""
    with tiers_of(request.param, tmp_path):
        made = KVPool(LAYOUT, 2, shards=2, tier=host_tier(4), wait_timeout=0.5)
    yield made
    made.close()


def filled(pool: KVPool) -> None:
    for key in KEYS:
        pool.put(key, tokens(key, WINDOW - key % 2))


def move_down(pool: KVPool) -> None:
    pool.put("new", tokens(9, WINDOW))
    pool.put("newer", tokens(10, 3))


def move_up(pool: KVPool) -> None:
    pool.pop(3)
    pool.pop(4)
    pool.get(0)
    with pool.pin(1):
        pool.get(2)


def gather(pool: KVPool) -> None:
    with pool.gather([1, 3]) as batch:
        append(batch, [7, 8], 1)
        pool.commit(["first", "second"], batch)


def write_anew(pool: KVPool) -> None:
    pool.put(0, tokens(0, WINDOW))
    pool.put(2, tokens(2, WINDOW))
    pool.clear()


EXPECTED: dict[object, KeysValues] = {
    **{key: tokens(key, WINDOW - key % 2) for key in KEYS},
    "new": tokens(9, WINDOW),
    "newer": tokens(10, 3),
    "first": child_of(tokens(1, WINDOW - 1), 7, 1),
    "second": child_of(tokens(3, WINDOW - 1), 8, 1),
}


@pytest.mark.parametrize("work", [move_down, move_up, gather, write_anew])
def test_what_was_cut_off_in_the_middle_of_a_move_is_repaired_and_nothing_wrong_is_read(
    work: Callable[[KVPool], None], pool: KVPool
) -> None:
    for number in range(1, MOST_PLACES):
        pool.clear()
        filled(pool)
        cut = cut_at(number, lambda: work(pool), PACKAGE, jumps=True)
        gc.collect()
        pool.repair()
        assert pool.check_integrity().handles == 0
        for key, expected in EXPECTED.items():
            found = pool.get(key)
            if found is not None:
                assert_same(found, expected)
        if not cut:
            break
    assert number > 300
