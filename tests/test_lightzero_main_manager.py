"""The main branch's own `KVCacheManager` beside ours: the same calls, and everything that both answer equal."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concurrent_kv.compat.lightzero import LightZeroKVCacheManager
from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_support import NEEDS_CHECKOUT, make_main_model

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)

ENV_NUM, LAYERS, HEADS, WINDOW, EMBED = 2, 2, 2, 8, 6
CONFIG = SimpleNamespace(
    num_layers=LAYERS,
    num_heads=HEADS,
    embed_dim=EMBED,
    context_length=WINDOW,
    num_simulations=6,
    max_cache_size=9,
    device="cpu",
)


@pytest.fixture
def both() -> Iterator[list[Any]]:
    from lzero.model.unizero_world_models.kv_cache_manager import KVCacheManager

    ours = LightZeroKVCacheManager(config=CONFIG, env_num=ENV_NUM, enable_stats=True)
    yield [KVCacheManager(config=CONFIG, env_num=ENV_NUM, enable_stats=True), ours]
    ours.manager.check_integrity()
    ours.manager.close()


def entry(number: int) -> Any:
    """A container of the checkout's, of as many tokens and values as a number says."""
    from lzero.model.unizero_world_models.kv_caching import KeysValues

    made = KeysValues(1, HEADS, WINDOW, EMBED, LAYERS, torch.device("cpu"))
    generator = torch.Generator().manual_seed(number)
    for layer in made._keys_values:
        layer.update(*torch.rand(2, 1, HEADS, 1 + number % WINDOW, EMBED // HEADS, generator=generator))
    return made


def said(kv: Any) -> Any:
    return None if kv is None else [part.tolist() for layer in kv._keys_values for part in layer.get()]


def pools_of(manager: Any) -> list[Any]:
    return [*manager.init_pools, manager.recur_pool, manager.wm_pool]


def test_sizes_are_the_main_branchs_but_for_one_more_node_of_each_environment(both: list[Any]) -> None:
    theirs, ours = ([pool.pool_size for pool in pools_of(manager)] for manager in both)
    theirs[-2] += ENV_NUM
    assert ours == theirs
    assert [pool.name for pool in pools_of(both[0])] == [pool.name for pool in pools_of(both[1])]


@pytest.mark.parametrize("seed", range(5))
def test_the_same_calls_give_the_same_entries_counts_and_words(both: list[Any], seed: int) -> None:
    drawn = random.Random(seed)
    for number in range(300):
        env_id, key, call = drawn.randrange(ENV_NUM), drawn.randrange(9), drawn.randrange(9)
        answers: list[Any] = []
        for manager in both:
            pool = manager.init_pools[env_id]
            if call < 2:
                answers.append(
                    isinstance(manager.set_init_cache(env_id=env_id, cache_key=key, kv_cache=entry(number)), int)
                )
            elif call < 4:
                answers.append(isinstance(manager.set_recur_cache(cache_key=key, kv_cache=entry(number)), int))
            elif call < 6:
                answers.append(said(manager.hierarchical_get(env_id=env_id, cache_key=key)))
            elif call == 6:
                answers.append([said(manager.get_init_cache(env_id, key)), said(manager.get_recur_cache(key))])
            elif call == 7:
                answers.append([said(pool.get(key)), pool._key_to_index.keys() == set(pool._key_to_index)])
            elif number % 20 == 0:
                answers.append([manager.clear_recur_cache(), pool.clear()])
        assert answers[:1] == answers[1:]
    theirs, ours = both
    assert ours.get_stats_summary() == theirs.get_stats_summary()
    for mine, other in zip(pools_of(ours), pools_of(theirs), strict=True):
        assert set(mine._key_to_index) == set(other._key_to_index)
        assert len(mine) == len(other)
        for name in ("hits", "misses", "evictions", "total_queries", "hit_rate", "miss_rate"):
            assert getattr(mine.stats, name) == getattr(other.stats, name), name
    for manager in both:
        manager.reset_stats()
        manager.clear_all()
    assert ours.get_stats_summary() == theirs.get_stats_summary()
    assert list(map(len, pools_of(ours))) == list(map(len, pools_of(theirs)))


def test_the_oldest_give_way_in_both(both: list[Any]) -> None:
    for number in range(30):
        for manager in both:
            manager.set_init_cache(0, number, entry(number))
            manager.set_wm_cache(number, entry(number))
    theirs, ours = both
    for mine, other in zip(pools_of(ours), pools_of(theirs), strict=True):
        assert set(mine._key_to_index) == set(other._key_to_index)
        assert str(mine.stats) == str(other.stats)


@pytest.mark.parametrize("env_id", [-1, ENV_NUM])
def test_an_environment_that_is_not_there_is_a_value_error_in_both(both: list[Any], env_id: int) -> None:
    for manager in both:
        with pytest.raises(ValueError, match="env_id"):
            manager.set_init_cache(env_id, 1, entry(1))
        with pytest.raises(ValueError, match="env_id"):
            manager.get_init_cache(env_id, 1)


def test_a_target_model_can_be_made_of_a_model_that_holds_ours_and_searches_on() -> None:
    from tests.lightzero_support import SHAPES, Walk, assert_same_outputs

    model = make_main_model("checkout", manager=LightZeroKVCacheManager, use_new_cache_manager=True)
    own = make_main_model("checkout", use_new_cache_manager=True)
    target = copy.deepcopy(model)
    assert type(model.kv_cache_manager) is type(target.kv_cache_manager) is LightZeroKVCacheManager
    assert target.kv_cache_manager is not model.kv_cache_manager
    walk = Walk(SHAPES["cartpole"], 4)
    for _ in range(4):
        assert_same_outputs(walk.root([own, model, target]))
        for _ in range(8):
            assert_same_outputs(walk.simulate([own, model, target]))
        walk.act()
    assert own.hit_count == model.hit_count == target.hit_count == 4 * 8 * 4
    for each in (model, target):
        assert each.kv_cache_manager.get_stats_summary() == own.kv_cache_manager.get_stats_summary()
        each.clear_caches()
        each.kv_cache_manager.manager.check_integrity()
        each.kv_cache_manager.manager.close()
