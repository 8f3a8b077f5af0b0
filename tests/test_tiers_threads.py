"""Threads over a pool of two entries with a tier that holds everything: nothing is missed, nothing old comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from concurrent_kv import KeysValues, KVCacheManager, KVLayout, KVPool
from tests.support import append, assert_same, child_of, config, row_of, tokens
from tests.threading_support import run_threads
from tests.tiers_support import TIERS, host_tier, tiers_of


@pytest.fixture(autouse=True, params=TIERS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each test with tiers in memory, and with a file behind them."""
    with tiers_of(request.param, tmp_path):
        yield request.param


KEYS, ROUNDS = 6, 60
SMALL = KVLayout(num_layers=1, num_heads=1, head_dim=1, max_tokens=4)


def value(key: int, version: int) -> KeysValues:
    """Three tokens: keys that say which key it is, values that say which version."""
    numbers = torch.tensor([float(key), float(version)]).view(2, 1, 1, 1, 1)
    return KeysValues.from_packed(numbers.expand(2, 1, 1, 3, 1).contiguous())


def read(kv: KeysValues | None, key: int) -> int:
    """The version of a value, which has to be whole, and that key's."""
    assert kv is not None, f"{key} was missed"
    assert set(kv.keys.ravel().tolist()) == {float(key)}
    (version,) = set(kv.values.ravel().tolist())
    return int(version)


@pytest.mark.parametrize("seed", range(4))
def test_readers_of_a_tiny_pool_miss_nothing_and_never_see_an_older_value_again(seed: int) -> None:
    pool = KVPool(SMALL, 2, tier=host_tier(64, SMALL), shards=2, wait_timeout=30.0)
    for key in range(KEYS):
        pool.put(key, value(key, 0))

    def write(of: range) -> None:
        for version in range(1, ROUNDS):
            for key in of:
                assert pool.put(key, value(key, version))
                assert read(pool.peek(key), key) == version  # no other thread writes it

    def look(number: int) -> None:
        chosen, seen = random.Random(seed * 10 + number), [0] * KEYS
        for _ in range(ROUNDS * 4):
            key, other = chosen.sample(range(KEYS), 2)
            with pool.gather([key, other]) as batch:
                found = [(key, row_of(batch, 0)), (other, row_of(batch, 1))]
            last = pool.get(key)
            for of, kv in (*found, (key, last)):
                version = read(kv, of)
                assert version >= seen[of], f"{of} was {seen[of]}, and then {version}"
                seen[of] = version

    run_threads(partial(write, range(0, 3)), partial(write, range(3, 6)), partial(look, 1), partial(look, 2))
    pool.check_integrity()
    stats = pool.stats()
    assert stats.miss_count == stats.tier_drop_count == 0
    assert stats.eviction_count == stats.move_down_count > 0
    pool.close()


def test_searches_in_threads_over_a_tier_read_what_was_stored() -> None:
    envs = 3
    manager = KVCacheManager(config(), envs, init_entries=1, tier=host_tier(256))

    def play(env: int) -> None:
        for turn in range(12):
            manager.set_init_cache(env, turn, tokens(turn, 3))
            for root in {turn, max(0, turn - 2)}:  # the second one is in the tier
                with manager.search([env], entries=2) as search:
                    with search.gather([root], [env]) as batch:
                        assert batch.hits == (True,)
                        append(batch, [20 + env])
                        search.commit(["child"], batch)
                    with search.gather(["child", root], [env, env]) as batch:
                        assert_same(row_of(batch, 0), child_of(tokens(root, 3), 20 + env))
                        assert_same(row_of(batch, 1), tokens(root, 3))

    run_threads(*[partial(play, env) for env in range(envs)])
    manager.check_integrity()
    manager.close()


def test_a_pool_that_is_saved_while_its_entries_move_has_nothing_older_in_the_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pool = KVPool(SMALL, 4, tier=host_tier(64, SMALL), shards=2, wait_timeout=30.0)
    written = [0] * KEYS
    for key in range(KEYS):
        pool.put(key, value(key, 0))

    def write(of: range) -> None:
        for version in range(1, ROUNDS):
            for key in of:
                assert pool.put(key, value(key, version))
                written[key] = version

    def save() -> None:
        path = tmp_path / "pool.safetensors"
        for _ in range(10):
            before = list(written)
            saved = pool.save(path)
            with KVPool(SMALL, KEYS) as restored:
                assert restored.load(path).entries == saved.entries <= 4
                for key in range(KEYS):
                    found = restored.get(key)
                    assert found is None or read(found, key) >= before[key]
                restored.check_integrity()

    run_threads(partial(write, range(0, 3)), partial(write, range(3, 6)), save)
    pool.check_integrity()
    pool.clear()
    tier = pool.storage.tier
    assert tier is not None
    assert tier.ledger.slots.in_use == pool.storage.ledger.slots.in_use == 0
    pool.check_integrity()
    pool.close()
