"""`LightZeroKVCacheManager`: what LightZero calls on its own manager, with its own containers. LightZero not needed."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from concurrent_kv import InvalidArgumentError, InvalidTypeError, KeysValues, KVLayout, WindowOverflowError
from concurrent_kv.compat.lightzero import (
    LightZeroKeysValues,
    LightZeroKVCacheManager,
    attach,
    from_lightzero,
    to_lightzero,
)
from tests.support import HANG_SECONDS, config

LAYERS, HEADS, WINDOW, HEAD_DIM = 2, 2, 8, 3


class Cache:
    def __init__(self, size: int) -> None:
        self._cache = torch.full((1, HEADS, WINDOW, HEAD_DIM), float("nan"))  # what lies after `_size` is never read
        self._size = size


class Released:
    """The shape of LightZero's container."""

    def __init__(self, size: int, value: float) -> None:
        self._keys_values = tuple(SimpleNamespace(_k_cache=Cache(size), _v_cache=Cache(size)) for _ in range(LAYERS))
        caches = [layer._k_cache for layer in self._keys_values] + [layer._v_cache for layer in self._keys_values]
        for number, cache in enumerate(caches):
            generator = torch.Generator().manual_seed(number)
            cache._cache[:, :, :size] = value + torch.rand(1, HEADS, size, HEAD_DIM, generator=generator)


def released(size: int = 5, value: float = 1.0) -> Any:
    """LightZero's own container where it is installed, and one of its shape elsewhere."""
    mine = Released(size, value)
    if find_spec("lzero") is None:
        return mine
    from lzero.model.unizero_world_models.kv_caching import KeysValues as Theirs

    theirs = Theirs(1, HEADS, WINDOW, HEADS * HEAD_DIM, LAYERS, torch.device("cpu"))
    for their_layer, layer in zip(theirs._keys_values, mine._keys_values, strict=True):
        their_layer._k_cache.update(layer._k_cache._cache[:, :, :size], size)
        their_layer._v_cache.update(layer._v_cache._cache[:, :, :size], size)
    return theirs


def valid(kv: Any) -> Tensor:
    """All layers' valid keys, then all values, `[2 * layers, 1, heads, size, head_dim]`."""
    caches = [layer._k_cache for layer in kv._keys_values] + [layer._v_cache for layer in kv._keys_values]
    return torch.stack([cache._cache[:, :, : cache._size] for cache in caches])


@pytest.fixture
def manager() -> Iterator[LightZeroKVCacheManager]:
    """Two environments, four simulations, roots of three steps."""
    made = LightZeroKVCacheManager(config(max_cache_size=3), env_num=2)
    yield made
    made.manager.check_integrity()
    made.manager.close()


def test_importing_it_imports_no_lightzero() -> None:
    code = "import sys, concurrent_kv.compat.lightzero; sys.exit('lzero' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG_SECONDS, check=False).returncode == 0


@pytest.mark.parametrize("size", [1, 5, WINDOW])
@pytest.mark.parametrize("role", ["init", "recur", "wm"])
def test_what_comes_out_is_what_went_in(manager: LightZeroKVCacheManager, role: str, size: int) -> None:
    kv = released(size)
    where = (1,) if role == "init" else ()
    getattr(manager, f"set_{role}_cache")(*where, 42, kv)
    found = getattr(manager, f"get_{role}_cache")(*where, 42)
    assert found.size == size
    assert len(found) == LAYERS
    assert torch.equal(valid(found), valid(kv))
    for layer in range(LAYERS):
        assert found[layer]._k_cache._size == found._keys_values[layer]._v_cache._size == size
        assert tuple(found[layer]._k_cache._cache.shape) == (1, HEADS, WINDOW, HEAD_DIM)
        assert found[layer].shape == (1, HEADS, size, HEAD_DIM)


def test_a_miss_is_none(manager: LightZeroKVCacheManager) -> None:
    assert manager.get_init_cache(0, 1) is None
    assert manager.get_recur_cache(1) is None
    assert manager.get_wm_cache(1) is None
    assert manager.hierarchical_get(0, 1) is None


def test_what_was_read_is_private(manager: LightZeroKVCacheManager) -> None:
    kv = released()
    manager.set_recur_cache(1, kv)
    stored = valid(kv)
    first, second = manager.get_recur_cache(1), manager.get_recur_cache(1)
    assert first is not None
    assert second is not None
    first[0]._k_cache._cache.zero_()
    kv._keys_values[0]._k_cache._cache.zero_()
    assert torch.equal(valid(second), stored)
    again = manager.get_recur_cache(1)
    assert torch.equal(valid(again), stored)


def test_a_lookup_asks_the_environments_roots_before_the_nodes(manager: LightZeroKVCacheManager) -> None:
    manager.set_recur_cache(7, released(value=1.0))
    assert torch.equal(valid(manager.hierarchical_get(0, 7)), valid(released(value=1.0)))
    manager.set_init_cache(0, 7, released(value=2.0))
    assert torch.equal(valid(manager.hierarchical_get(0, 7)), valid(released(value=2.0)))
    assert torch.equal(valid(manager.hierarchical_get(1, 7)), valid(released(value=1.0)))


def test_the_pools_tell_which_keys_they_hold(manager: LightZeroKVCacheManager) -> None:
    for key in (1, 2):
        manager.init_pools[0].set(key, released())
    manager.set_recur_cache("node", released())
    index = manager.init_pools[0]._key_to_index
    assert set(index.keys()) == {1, 2}
    assert 1 in index
    assert 3 not in index
    assert len(index) == len(manager.init_pools[0]) == 2
    assert len(set(index.values())) == 2
    assert "node" in manager.recur_pool._key_to_index
    assert len(manager.init_pools[1]._key_to_index) == 0
    assert torch.equal(valid(manager.init_pools[0].get(1)), valid(released()))


def test_each_clear_clears_what_it_says(manager: LightZeroKVCacheManager) -> None:
    def fill() -> None:
        for env_id in range(2):
            manager.set_init_cache(env_id, 1, released())
        manager.set_recur_cache(1, released())
        manager.set_wm_cache(1, released())
        manager.keys_values_wm_list = [released()]
        manager.keys_values_wm_size_list = [5]

    def held() -> tuple[int, ...]:
        pools = (*manager.init_pools, manager.recur_pool, manager.wm_pool)
        return (*map(len, pools), len(manager.keys_values_wm_list))

    fill()
    manager.init_pools[0].clear()
    assert held() == (0, 1, 1, 1, 1)
    fill()
    manager.clear_init_caches()
    assert held() == (0, 0, 1, 1, 1)
    fill()
    manager.clear_recur_cache()
    assert held() == (1, 1, 0, 1, 1)
    fill()
    manager.clear_all()
    assert held() == (0, 0, 0, 0, 0)
    assert manager.keys_values_wm_size_list == []


def test_assigned_lists_are_the_ones_that_clear_all_empties(manager: LightZeroKVCacheManager) -> None:
    manager.keys_values_wm_list = [1, 2]
    kept = manager.keys_values_wm_list
    manager.clear_all()
    assert kept == []


@pytest.mark.parametrize(
    ("settings", "entries"),
    [
        ({"num_simulations": 4, "max_cache_size": 5000}, 256),
        ({"num_simulations": 200, "max_cache_size": 5000}, 400),
        ({"num_simulations": 4, "max_cache_size": 10}, 10),
        ({"max_cache_size": None, "num_simulations": None}, 256),
    ],
)
def test_init_pools_hold_two_roots_a_simulation_and_256_but_no_more_than_the_settings_most(
    settings: dict[str, Any], entries: int
) -> None:
    known = {name: value for name, value in {**config(), **settings}.items() if value is not None}
    made = LightZeroKVCacheManager(known, env_num=2)
    simulations = known.get("num_simulations", 50)
    assert [pool.pool_size for pool in made.init_pools] == [entries] * 2
    assert made.recur_pool.pool_size == 2 * (simulations + 1)
    assert made.wm_pool.pool_size == 2
    made.manager.close()


def test_the_oldest_roots_go_first(manager: LightZeroKVCacheManager) -> None:
    for key in range(5):
        manager.set_init_cache(0, key, released())
    assert set(manager.init_pools[0]._key_to_index) == {2, 3, 4}
    assert manager.init_pools[0].pool_size == 3


def test_a_root_that_is_set_again_is_the_newest(manager: LightZeroKVCacheManager) -> None:
    for key in (0, 1, 2, 0, 3):
        manager.set_init_cache(0, key, released())
    assert set(manager.init_pools[0]._key_to_index) == {2, 0, 3}


def test_setting_an_entry_returns_the_number_that_its_pool_has_for_it(manager: LightZeroKVCacheManager) -> None:
    for key in (1, 2, 1):
        assert manager.set_init_cache(0, key, released()) == manager.init_pools[0]._key_to_index[key]
        assert manager.set_recur_cache(key, released()) == manager.recur_pool._key_to_index[key]
        assert manager.set_wm_cache(key, released()) == manager.wm_pool._key_to_index[key]


def test_an_entry_that_was_cleared_has_no_number_any_more(manager: LightZeroKVCacheManager) -> None:
    number = manager.set_recur_cache("node", released())
    assert dict(manager.recur_pool._key_to_index) == {"node": number}
    manager.clear_recur_cache()
    assert dict(manager.recur_pool._key_to_index) == {}


def test_every_pool_that_is_asked_counts_and_tells_so_in_words(manager: LightZeroKVCacheManager) -> None:
    manager.set_recur_cache(1, released())
    manager.hierarchical_get(1, 1)
    manager.get_recur_cache(2)
    stats, of_init = manager.recur_pool.stats, manager.init_pools[1].stats
    assert stats is not None
    assert of_init is not None
    assert (stats.hits, stats.misses, stats.evictions, stats.total_queries) == (1, 1, 0, 2)
    assert (stats.hit_rate, stats.miss_rate) == (0.5, 0.5)
    untouched = "CacheStats(hits=0, misses=0, evictions=0, hit_rate=0.00%)"
    assert manager.get_stats_summary() == {
        "stats_enabled": True,
        "init_pools": {"env_0": untouched, "env_1": "CacheStats(hits=0, misses=1, evictions=0, hit_rate=0.00%)"},
        "recur_pool": "CacheStats(hits=1, misses=1, evictions=0, hit_rate=50.00%)",
        "wm_pool": untouched,
    }
    stats.reset()
    assert str(stats) == untouched
    assert of_init.misses == 1
    manager.reset_stats()
    assert of_init.misses == 0


def test_what_gave_way_counts_as_evicted(manager: LightZeroKVCacheManager) -> None:
    for key in range(5):
        manager.set_init_cache(0, key, released())
    assert manager.init_pools[0].stats is not None
    assert manager.init_pools[0].stats.evictions == 2


def test_statistics_can_be_off() -> None:
    made = LightZeroKVCacheManager(config(), 1, False)
    assert made.get_stats_summary() == {"stats_enabled": False}
    assert [pool.stats for pool in (*made.init_pools, made.recur_pool, made.wm_pool)] == [None] * 3
    made.manager.close()


def test_every_so_many_clears_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    made = LightZeroKVCacheManager(config(), 1, True, 2, 3)
    with caplog.at_level(logging.INFO, "concurrent_kv"):
        for _ in range(4):
            made.clear_recur_cache()
        for _ in range(4):
            made.clear_all()
    lines = [record.getMessage() for record in caplog.records]
    assert [" ".join(line.split()[1:3]) for line in lines] == [
        "clear_recur_cache 2:",
        "clear_recur_cache 4:",
        "clear_all 3:",
    ]
    made.manager.close()


def test_a_configuration_object_without_the_optional_settings_will_do() -> None:
    names = ("num_layers", "num_heads", "embed_dim", "context_length", "device")
    made = LightZeroKVCacheManager(SimpleNamespace(**{name: config()[name] for name in names}), 3)
    assert made.manager.config.num_simulations == 50
    assert made.manager.recur_pool.account.max_entries == 3 * 51
    made.manager.close()


@pytest.mark.parametrize("env_id", [-1, 2, "0", None])
def test_an_environment_that_is_not_there_is_an_error(manager: LightZeroKVCacheManager, env_id: Any) -> None:
    kv = released()
    for asked in (
        manager.get_init_cache,
        manager.hierarchical_get,
        lambda env, key: manager.set_init_cache(env, key, kv),
    ):
        with pytest.raises(InvalidArgumentError, match="env_id"):
            asked(env_id, 1)


@pytest.mark.parametrize("kv", [None, torch.ones(2), SimpleNamespace(_keys_values=())])
def test_what_is_no_container_is_an_error_that_names_it(manager: LightZeroKVCacheManager, kv: Any) -> None:
    with pytest.raises(InvalidTypeError, match="kv_cache must be a LightZero KeysValues"):
        manager.set_recur_cache(1, kv)


def test_an_empty_container_or_layers_of_different_sizes_are_errors(manager: LightZeroKVCacheManager) -> None:
    with pytest.raises(InvalidArgumentError, match="1 to 8 tokens, got 0"):
        manager.set_recur_cache(1, Released(0, 1.0))
    kv = Released(3, 1.0)
    kv._keys_values[1]._v_cache._size = 2
    with pytest.raises(InvalidArgumentError, match="one size in every layer"):
        manager.set_recur_cache(1, kv)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda manager: pickle.loads(pickle.dumps(manager))],
    ids=["deep", "shallow", "pickled"],
)
def test_a_copy_is_an_empty_manager_of_its_own_with_the_same_settings(copied: Callable[[Any], Any]) -> None:
    original = LightZeroKVCacheManager(config(), 2, False, 7, 5, init_entries=3, wm_entries=4, name="mine")
    original.set_init_cache(0, 1, released())
    original.keys_values_wm_list = [1]
    made = copied(original)
    for name in ("env_num", "enable_stats", "clear_recur_log_freq", "clear_all_log_freq"):
        assert getattr(made, name) == getattr(original, name)
    assert made.manager.allocation() == original.manager.allocation()
    assert made.manager.name == "mine"
    assert [len(pool) for pool in (*made.init_pools, made.recur_pool, made.wm_pool)] == [0, 0, 0, 0]
    assert made.keys_values_wm_list == []
    made.set_init_cache(0, 2, released())
    made.clear_init_caches()
    assert torch.equal(valid(original.get_init_cache(0, 1)), valid(released()))
    made.manager.close()
    assert len(original.init_pools[0]) == 1
    original.manager.check_integrity()
    original.manager.close()


def test_a_model_that_holds_a_manager_and_its_lists_can_be_deep_copied() -> None:
    model: Any = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(**config())
    model.kv_cache_manager = LightZeroKVCacheManager(model.config, 2)
    model.kv_cache_manager.keys_values_wm_list = [container()]
    model.keys_values_wm_list = model.kv_cache_manager.keys_values_wm_list
    made = copy.deepcopy(model)
    assert made.kv_cache_manager is not model.kv_cache_manager
    assert made.kv_cache_manager.config is made.config
    assert made.kv_cache_manager.set_recur_cache(1, released())
    assert len(model.kv_cache_manager.recur_pool) == 0
    kept, before = made.keys_values_wm_list[0], model.keys_values_wm_list[0]
    assert kept[0]._k_cache._cache.data_ptr() == kept.packed.data_ptr() != before.packed.data_ptr()
    for manager in (made.kv_cache_manager, model.kv_cache_manager):
        manager.manager.check_integrity()
        manager.manager.close()


# The container -------------------------------------------------------------------------------------------------------


def container(size: int = 3, rows: int = 2) -> LightZeroKeysValues:
    packed = torch.rand(2 * LAYERS, rows, HEADS, WINDOW, HEAD_DIM)
    return LightZeroKeysValues(packed, size)


def test_a_clone_shares_no_memory_and_keeps_dtype() -> None:
    kv = LightZeroKeysValues(torch.rand(4, 1, 2, 8, 3).to(torch.bfloat16), 3)
    copy = kv.clone()
    assert copy.size == 3
    assert copy[0]._k_cache._cache.dtype == torch.bfloat16
    before = valid(copy)
    kv.packed.zero_()
    assert torch.equal(valid(copy), before)


@pytest.fixture
def fetched() -> Iterator[LightZeroKeysValues]:
    """What a manager returns: one row that nobody has looked into."""
    manager = LightZeroKVCacheManager(config(num_layers=LAYERS, num_heads=HEADS, embed_dim=HEADS * HEAD_DIM), 1)
    manager.set_recur_cache(1, released())
    found = manager.get_recur_cache(1)
    assert found is not None
    yield found
    manager.manager.check_integrity()
    manager.manager.close()


def is_whole(kv: LightZeroKeysValues) -> bool:
    return kv.size == 5 and torch.equal(valid(kv), valid(released()))


@pytest.mark.parametrize("looked_into_first", ["original", "clone"])
def test_what_is_fetched_and_its_clone_share_no_memory_whichever_is_written_to(
    looked_into_first: str, fetched: LightZeroKeysValues
) -> None:
    other = fetched.clone()
    pair = (fetched, other) if looked_into_first == "original" else (other, fetched)
    pair[0][0]._k_cache._cache.zero_()
    assert is_whole(pair[1])
    pair[1].packed.zero_()
    assert fetched.packed.data_ptr() != other.packed.data_ptr()


def test_every_clone_of_what_is_fetched_is_its_own_also_when_the_original_is_gone(fetched: LightZeroKeysValues) -> None:
    clones = [LightZeroKeysValues.private(fetched.packed.clone(), fetched.size)]
    clones += [clones[0].clone(), clones[0].clone(), clones[0].clone()]
    del clones[0]
    for number, kv in enumerate(clones):
        assert is_whole(kv), number
        kv.packed.zero_()


def test_a_clone_of_a_clone_leaves_the_original_alone(fetched: LightZeroKeysValues) -> None:
    between = fetched.clone()
    last = between.clone()
    del between
    last.packed.zero_()
    assert is_whole(fetched)


def test_a_clone_takes_the_bytes_over_where_the_original_is_gone(fetched: LightZeroKeysValues) -> None:
    original = LightZeroKeysValues.private(fetched.packed.clone(), fetched.size)
    address, only = original._packed.data_ptr(), original.clone()
    del original
    assert only[0]._k_cache._cache.data_ptr() == address
    assert is_whole(only)


def test_what_is_fetched_is_copied_and_pickled_whole(fetched: LightZeroKeysValues) -> None:
    lent = fetched.clone()
    for made in (copy.deepcopy(lent), copy.copy(lent), pickle.loads(pickle.dumps(lent))):
        made.packed.zero_()
        assert is_whole(lent.clone())
    assert is_whole(fetched)


@pytest.mark.parametrize("size", [1, 5, 8])
def test_rows_of_windows_large_and_small_are_stored_by_their_valid_tokens(size: int) -> None:
    for heads_dim in (HEAD_DIM, 2048):
        settings = config(num_layers=LAYERS, num_heads=HEADS, embed_dim=HEADS * heads_dim)
        manager = LightZeroKVCacheManager(settings, 1, init_entries=2)
        kv = LightZeroKeysValues(torch.rand(2 * LAYERS, 1, HEADS, WINDOW, heads_dim), size)
        manager.set_recur_cache(1, kv)
        found = manager.get_recur_cache(1)
        assert found is not None
        assert found.size == size
        assert torch.equal(found.packed[..., :size, :], kv.packed[..., :size, :])
        assert not found.packed[..., size:, :].any()
        manager.manager.check_integrity()
        manager.manager.close()


def test_updates_append_in_place() -> None:
    kv = container()
    before, more = kv[1].get()[0].clone(), torch.rand(2, HEADS, 2, HEAD_DIM)
    kv[1].update(more, more)
    assert kv[1].shape == (2, HEADS, 5, HEAD_DIM)
    assert torch.equal(kv[1].get()[0], torch.cat([before, more], dim=2))
    assert torch.equal(kv.packed[1, :, :, 3:5], more)


def test_too_many_tokens_are_an_error_that_changes_nothing() -> None:
    kv = container(7)
    before = kv.packed.clone()
    with pytest.raises(WindowOverflowError, match="7 of 8 columns"):
        kv[0].update(*[torch.rand(2, HEADS, 2, HEAD_DIM)] * 2)
    assert kv.size == 7
    assert torch.equal(kv.packed, before)


def test_register_tokens_are_forgotten_from_the_end() -> None:
    kv = container(5)
    kept = kv[1].get()[1][:, :, :3].clone()
    kv.remove_register_tokens(0)
    assert kv.size == 5
    kv.remove_register_tokens(2)
    assert torch.equal(kv[1].get()[1], kept)
    kv.remove_register_tokens(9)
    assert kv.size == 0


def test_reset_forgets_tokens_and_prune_rows() -> None:
    kv = container(rows=3)
    kept = kv[0].get()[1][[0, 2]].clone()
    kv.prune(np.array([True, False, True]))
    assert torch.equal(kv[0].get()[1], kept)
    assert kv.packed.shape[1] == 2
    with pytest.raises(InvalidArgumentError, match="mask"):
        kv.prune(np.array([True]))
    kv.reset()
    assert kv.size == 0


def test_containers_and_keys_values_convert_both_ways() -> None:
    layout = KVLayout(LAYERS, HEADS, HEAD_DIM, WINDOW)
    kv = KeysValues.from_packed(torch.rand(2 * LAYERS, 1, HEADS, 5, HEAD_DIM))
    back = from_lightzero(to_lightzero(kv, layout))
    assert torch.equal(back.keys, kv.keys)
    assert torch.equal(back.values, kv.values)


def test_attaching_to_something_else_is_an_error_that_says_so() -> None:
    with pytest.raises(InvalidTypeError, match="world_model must be LightZero's WorldModel, got Linear"):
        attach(torch.nn.Linear(1, 1), "on")
