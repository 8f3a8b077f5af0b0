"""`KVCacheManager`: the pools of a world model by role, their clears, statistics, settings and compatibility lists."""

from __future__ import annotations

import logging
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KVCacheManager,
    KVLayout,
    PoolStats,
    SearchEndedError,
    StatsSummary,
)
from concurrent_kv.model.config import ManagerConfig
from tests.conftest import MakeManager
from tests.support import CONFIG, WINDOW, append, assert_same, config, store, tokens

pytestmark = pytest.mark.usefixtures("loops")

# Set and get ---------------------------------------------------------------------------------------------------------


def test_an_init_entry_belongs_to_its_environment(manager: KVCacheManager) -> None:
    assert manager.set_init_cache(0, "root", tokens(1, 3)) is True
    assert_same(manager.get_init_cache(0, "root"), tokens(1, 3))
    assert manager.get_init_cache(1, "root") is None


def test_the_three_roles_keep_the_same_key_apart(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "k", tokens(1, 3))
    manager.set_recur_cache("k", tokens(2, 4))
    manager.set_wm_cache("k", tokens(3, 5))
    assert_same(manager.get_init_cache(0, "k"), tokens(1, 3))
    assert_same(manager.get_recur_cache("k"), tokens(2, 4))
    assert_same(manager.get_wm_cache("k"), tokens(3, 5))


@pytest.mark.parametrize("get", ["get_recur_cache", "get_wm_cache"])
def test_a_miss_is_none(manager: KVCacheManager, get: str) -> None:
    assert getattr(manager, get)("missing") is None


def test_every_set_takes_side_data(manager: KVCacheManager) -> None:
    manager.set_init_cache(1, "k", tokens(1, 3), side="init")
    manager.set_recur_cache("k", tokens(1, 3), side="recur")
    manager.set_wm_cache("k", tokens(1, 3), side="wm")
    assert manager.init_pools[1].side("k") == "init"
    assert manager.recur_pool.side("k") == "recur"
    assert manager.wm_pool.side("k") == "wm"


def test_every_set_takes_a_priority(make_manager: MakeManager) -> None:
    manager = make_manager(policy="priority", init_entries=2, wm_entries=2)
    for number, priority in enumerate((5.0, 1.0, 3.0)):
        manager.set_init_cache(0, number, tokens(number, 2), priority=priority)
        manager.set_wm_cache(number, tokens(number, 2), priority=priority)
    assert [number in manager.init_pools[0] for number in range(3)] == [True, False, True]
    assert [number in manager.wm_pool for number in range(3)] == [True, False, True]


@pytest.mark.parametrize("env_id", [-1, 2, "0", None, True, 0.5], ids=repr)
def test_an_unknown_environment_is_an_error_that_names_the_argument(manager: KVCacheManager, env_id: Any) -> None:
    for call in (
        lambda: manager.set_init_cache(env_id, "k", tokens(1, 3)),
        lambda: manager.get_init_cache(env_id, "k"),
        lambda: manager.hierarchical_get(env_id, "k"),
    ):
        with pytest.raises(InvalidArgumentError, match="env_id must be 0 to 1"):
            call()


def test_there_is_an_init_pool_for_each_environment(make_manager: MakeManager) -> None:
    manager = make_manager(3, init_entries=5)
    assert [pool.name for pool in manager.init_pools] == ["cache.init[0]", "cache.init[1]", "cache.init[2]"]
    assert {pool.stats().max_entries for pool in manager.init_pools} == {5}
    assert manager.recur_pool.stats().max_entries == CONFIG["max_cache_size"]


def test_the_wm_pool_holds_one_entry_for_each_environment_unless_stated(make_manager: MakeManager) -> None:
    assert make_manager(3).wm_pool.stats().max_entries == 3
    assert make_manager(3, wm_entries=7).wm_pool.stats().max_entries == 7


def test_all_pools_share_one_storage(manager: KVCacheManager) -> None:
    pools = (*manager.init_pools, manager.recur_pool, manager.wm_pool)
    assert {pool.storage for pool in pools} == {manager.storage}


def test_first_in_first_out_is_the_default(make_manager: MakeManager) -> None:
    manager = make_manager(init_entries=2)
    for key in "abc":
        manager.set_init_cache(0, key, tokens(1, 2))
        manager.get_init_cache(0, "a")
    assert manager.get_init_cache(0, "a") is None
    assert manager.get_init_cache(0, "b") is not None


# The hierarchy -------------------------------------------------------------------------------------------------------


def test_hierarchical_get_asks_the_init_pool_before_the_recurrent_pool(manager: KVCacheManager) -> None:
    manager.set_recur_cache("k", tokens(2, 4))
    assert_same(manager.hierarchical_get(0, "k"), tokens(2, 4))
    manager.set_init_cache(0, "k", tokens(1, 3))
    assert_same(manager.hierarchical_get(0, "k"), tokens(1, 3))
    assert_same(manager.hierarchical_get(1, "k"), tokens(2, 4))


@pytest.mark.parametrize(
    ("order", "found"),
    [
        (("init", "recur"), 1),
        (("recur", "init"), 2),
        (("wm", "recur"), 3),
        (["recur"], 2),
        (("init", "recur", "wm"), 1),
    ],
)
def test_hierarchical_get_follows_the_order_it_is_given(manager: KVCacheManager, order: Any, found: int) -> None:
    manager.set_init_cache(0, "k", tokens(1, 3))
    manager.set_recur_cache("k", tokens(2, 3))
    manager.set_wm_cache("k", tokens(3, 3))
    assert_same(manager.hierarchical_get(0, "k", order=order), tokens(found, 3))


def test_hierarchical_get_of_a_key_that_nobody_has_is_none_and_one_miss(manager: KVCacheManager) -> None:
    assert manager.hierarchical_get(0, "k") is None
    summary = manager.get_stats_summary()
    assert summary.total.request_count == 1
    assert summary.pools["recur"].miss_count == 1
    assert summary.pools["init[0]"].miss_count == 0


def test_hierarchical_get_counts_a_hit_where_the_key_was(manager: KVCacheManager) -> None:
    manager.set_recur_cache("k", tokens(2, 4))
    manager.hierarchical_get(0, "k")
    summary = manager.get_stats_summary()
    assert summary.pools["recur"].hit_count == 1
    assert (summary.total.request_count, summary.total.miss_count) == (1, 0)


@pytest.mark.parametrize("order", [(), ("init", "other"), ("initial",)], ids=repr)
def test_an_order_of_unknown_pools_is_an_error(manager: KVCacheManager, order: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="order must name some of 'init', 'recur' and 'wm'"):
        manager.hierarchical_get(0, "k", order=order)


# Clears --------------------------------------------------------------------------------------------------------------


def filled(manager: KVCacheManager) -> KVCacheManager:
    for env_id in range(manager.env_num):
        manager.set_init_cache(env_id, "k", tokens(1, 3))
    manager.set_recur_cache("k", tokens(2, 3))
    manager.set_wm_cache("k", tokens(3, 3))
    return manager


def stored(manager: KVCacheManager) -> dict[str, int]:
    return {
        name: pool.entries
        for name, pool in manager.get_stats_summary().pools.items()
        if pool.entries or pool.slots_in_use
    }


def test_clear_all_clears_every_pool(manager: KVCacheManager) -> None:
    filled(manager).clear_all()
    assert stored(manager) == {}
    assert manager.storage.ledger.slots.in_use == 0


def test_clear_init_caches_clears_every_init_pool_and_no_other(manager: KVCacheManager) -> None:
    filled(manager).clear_init_caches()
    assert stored(manager) == {"recur": 1, "wm": 1}


def test_clear_recur_cache_clears_the_recurrent_pool_and_no_other(manager: KVCacheManager) -> None:
    filled(manager).clear_recur_cache()
    assert stored(manager) == {"init[0]": 1, "init[1]": 1, "wm": 1}


def test_bump_version_makes_every_entry_of_every_pool_a_miss(manager: KVCacheManager) -> None:
    filled(manager).bump_version()
    assert stored(manager) == {}
    assert manager.get_wm_cache("k") is None
    manager.set_wm_cache("k", tokens(4, 3))
    assert_same(manager.get_wm_cache("k"), tokens(4, 3))


def test_bump_version_ends_open_searches_with_an_error_that_says_why(manager: KVCacheManager) -> None:
    search = manager.search([0])
    manager.bump_version()
    with pytest.raises(SearchEndedError, match="version was bumped"):
        search.gather(["k"], [0])


# Statistics ----------------------------------------------------------------------------------------------------------


def test_the_summary_is_numbers_per_pool_and_in_total(manager: KVCacheManager) -> None:
    filled(manager)
    manager.get_init_cache(0, "k")
    manager.get_wm_cache("missing")
    summary = manager.get_stats_summary()
    assert list(summary.pools) == ["init[0]", "init[1]", "recur", "wm"]
    assert (summary.pools["init[0]"].hit_count, summary.pools["wm"].miss_count) == (1, 1)
    assert (summary.total.hit_count, summary.total.miss_count, summary.total.insert_count) == (1, 1, 4)
    assert (summary.total.entries, summary.total.slots_in_use) == (4, 12)


def test_what_concerns_the_shared_storage_counts_once_in_the_total(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [2])
        search.commit(["child"], batch)
        assert manager.get_stats_summary().total.shared_slots == 3


def test_the_summary_as_a_dict_is_flat_and_numeric(manager: KVCacheManager) -> None:
    filled(manager)
    values = manager.get_stats_summary().as_dict()
    assert values["total/insert_count"] == 4.0
    assert values["init[1]/entries"] == 1.0
    assert all(type(number) is float for number in values.values())


def test_a_summary_by_role_has_all_environments_roots_together(manager: KVCacheManager) -> None:
    filled(manager).get_init_cache(1, "missing")
    summary = manager.get_stats_summary()
    roles = summary.by_role()
    assert list(roles) == ["init", "recur", "wm"]
    assert roles["init"].entries == 2
    assert roles["init"].max_entries == sum(pool.account.max_entries for pool in manager.init_pools)
    assert (roles["init"].miss_count, roles["recur"].request_count) == (1, 0)
    assert roles["recur"] == summary.pools["recur"]
    for name in ("entries", "slots_in_use", "max_slots", "bytes_in_use", "insert_count"):
        assert sum(getattr(stats, name) for stats in roles.values()) == getattr(summary.total, name)


def test_what_concerns_the_storage_that_pools_share_counts_once_in_a_role() -> None:
    each = PoolStats(hit_count=1, shared_slots=3, lock_wait_count=2, lock_wait_seconds=0.5)
    together = StatsSummary({"init[0]": each, "init[1]": each}).by_role()["init"]
    assert together == StatsSummary({"init[0]": each, "init[1]": each}).total
    assert (together.hit_count, together.shared_slots) == (2, 3)
    assert (together.lock_wait_count, together.lock_wait_seconds) == (2, 0.5)


def test_a_printed_summary_has_a_row_for_each_role_and_no_rate_where_nothing_was_asked_for(
    manager: KVCacheManager,
) -> None:
    filled(manager).get_recur_cache("k")
    lines = str(manager.get_stats_summary()).splitlines()
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in lines}
    assert list(rows)[:5] == ["pool", "init (2 pools)", "recur", "wm", "total"]
    assert rows["pool"] == "pool entries slots full requests hit rate evicted"
    assert rows["init (2 pools)"].endswith(" 0 no requests 0")
    assert rows["recur"].endswith(" 1 1.0000 0")
    assert rows["total"].endswith(" 1 1.0000 0")
    assert "open searches reserve 0 entries and 0 slots" in lines
    with manager.search([0], entries=3, tokens=17):
        assert "open searches reserve 3 entries and 17 slots" in str(manager.get_stats_summary())


def test_a_printed_summary_says_that_nothing_is_counted(make_manager: MakeManager) -> None:
    shown = str(filled(make_manager(enable_stats=False)).get_stats_summary())
    assert "not counted: enable_stats is False" in shown
    assert "no requests" not in shown


def test_a_printed_summary_of_the_largest_numbers_fits_a_terminal() -> None:
    # All but the number of pools beyond what any machine has.
    most = 10**12
    each = PoolStats(most, most, eviction_count=most, entries=most, slots_in_use=most, max_slots=most)
    pools = {**{f"init[{env}]": each for env in range(1_000)}, "recur": each, "wm": PoolStats()}
    lines = str(StatsSummary(pools)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[3:5] == ["1,000", "T"]


def test_the_difference_of_two_summaries_is_what_happened_between_them(manager: KVCacheManager) -> None:
    before = filled(manager).get_stats_summary()
    manager.get_recur_cache("k")
    happened = manager.get_stats_summary() - before
    assert happened.total.hit_count == happened.pools["recur"].hit_count == 1
    assert happened.total.insert_count == 0
    assert happened.total.entries == 4


def test_reset_stats_starts_every_count_from_zero(manager: KVCacheManager) -> None:
    filled(manager)
    manager.get_recur_cache("k")
    manager.reset_stats()
    total = manager.get_stats_summary().total
    assert (total.hit_count, total.insert_count, total.entries) == (0, 0, 4)


def test_without_statistics_every_count_stays_zero(make_manager: MakeManager) -> None:
    manager = filled(make_manager(enable_stats=False))
    manager.get_recur_cache("k")
    manager.get_recur_cache("missing")
    manager.clear_recur_cache()
    manager.reset_stats()
    manager.get_recur_cache("missing")
    summary = manager.get_stats_summary()
    assert summary.stats_enabled is False
    counted = {name: number for name, number in vars(summary.total).items() if name.endswith("_count")}
    assert set(counted.values()) == {0}
    assert summary.total.entries == 3


def test_the_total_of_nothing_is_zero(manager: KVCacheManager) -> None:
    total = manager.get_stats_summary().total
    assert total.request_count == total.entries == 0
    assert isinstance(total, PoolStats)


# Logging -------------------------------------------------------------------------------------------------------------


def test_every_nth_clear_is_logged_before_anything_is_cleared(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    manager = filled(make_manager(log_every_clears=2))
    with caplog.at_level(logging.INFO, logger="concurrent_kv"):
        manager.clear_init_caches()
        assert caplog.messages == []
        manager.clear_recur_cache()
        manager.clear_all()
        manager.clear_all()
    assert len(caplog.messages) == 2
    assert "clear_recur_cache 2: 2 entries, 6 slots" in caplog.messages[0]
    assert "clear_all 4: 0 entries" in caplog.messages[1]


def test_every_nth_step_is_logged(make_manager: MakeManager, caplog: pytest.LogCaptureFixture) -> None:
    manager = filled(make_manager(log_every_steps=3))
    with caplog.at_level(logging.INFO, logger="concurrent_kv"):
        for _ in range(7):
            manager.step()
    assert [message.split(":")[1] for message in caplog.messages] == [" step 3", " step 6"]


def test_nothing_is_logged_unless_asked_for(manager: KVCacheManager, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="concurrent_kv"):
        filled(manager).step()
        manager.clear_all()
    assert caplog.messages == []


# Settings ------------------------------------------------------------------------------------------------------------


class EasyDictLike(dict[str, Any]):
    """A dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def as_dataclass() -> object:
    return make_dataclass("Config", [(name, object) for name in CONFIG])(**CONFIG)


@pytest.mark.parametrize(
    "settings",
    [config(), EasyDictLike(CONFIG), as_dataclass(), SimpleNamespace(**CONFIG), type("Config", (), CONFIG)],
    ids=["dict", "easydict", "dataclass", "namespace", "class"],
)
def test_a_config_may_be_anything_that_has_the_settings(make_manager: MakeManager, settings: object) -> None:
    layout = make_manager(settings=settings).layout
    assert (layout.num_layers, layout.num_heads, layout.head_dim, layout.max_tokens) == (2, 2, 3, WINDOW)
    assert (layout.dtype, layout.device) == (torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIG)
@pytest.mark.parametrize("kind", [dict, EasyDictLike, lambda settings: SimpleNamespace(**settings)])
def test_a_missing_setting_is_an_error_that_names_it(name: str, kind: Any) -> None:
    settings = kind({key: value for key, value in CONFIG.items() if key != name})
    with pytest.raises(InvalidArgumentError, match=f"config must have '{name}'"):
        KVCacheManager(settings, 2)


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "embed_dim", "context_length", "num_simulations"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_setting_below_one_is_an_error_that_names_it(name: str, value: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"config.{name} must be at least 1"):
        KVCacheManager(config(**{name: value}), 2)


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "embed_dim", "context_length", "max_cache_size"])
@pytest.mark.parametrize("value", [2.0, "8", None, True])
def test_a_setting_of_a_wrong_type_is_an_error_that_names_it(name: str, value: object) -> None:
    with pytest.raises(InvalidTypeError, match=f"config.{name} must be an int"):
        KVCacheManager(config(**{name: value}), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 7}, r"config.embed_dim must be a multiple of config.num_heads=2"),
        ({"max_cache_size": 9}, r"config.max_cache_size must be at least 10"),
        ({"env_num": 3}, r"env_num must agree with config.env_num=3"),
        ({"dtype": "float31"}, r"config.dtype"),
        ({"dtype": torch.int64}, r"dtype must be one of"),
        ({"device": "nowhere"}, r"device must name a torch device"),
        ({"device": "meta"}, r"device must be a CPU or a CUDA device"),
    ],
)
def test_contradictory_settings_are_an_error_that_names_them(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        KVCacheManager(config(**changes), 2)


def test_the_heads_are_those_of_keys_and_values_where_queries_share_them() -> None:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    language_model = {**sizes, "max_position_embeddings": 32, "dtype": torch.bfloat16}
    asked = ManagerConfig.read(SimpleNamespace(**language_model), 2)
    assert asked.layout == KVLayout(3, 2, 64, 32, torch.bfloat16)
    assert (asked.num_simulations, asked.max_cache_size) == (64, 2 * 65)
    assert ManagerConfig.read({**language_model, "head_dim": 128}, 1).layout.head_dim == 128
    ours = {**config(), "num_heads": 6, "num_key_value_heads": 2, "embed_dim": 24}
    assert (ManagerConfig.read(ours, 1).layout.num_heads, ManagerConfig.read(ours, 1).layout.head_dim) == (2, 4)
    for name, size in (("num_key_value_heads", 0), ("head_dim", -1), ("num_simulations", -1)):
        with pytest.raises(InvalidArgumentError, match=f"config.{name}"):
            ManagerConfig.read({**language_model, name: size}, 1)
    manager = KVCacheManager(config=SimpleNamespace(**{**language_model, "num_simulations": 5}), env_num=1)
    assert (manager.layout.num_heads, manager.allocation().entries["recur"]) == (2, 6)
    manager.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=str)
def test_a_dtype_may_be_named(make_manager: MakeManager, dtype: object) -> None:
    assert make_manager(settings=config(dtype=dtype)).layout.dtype is torch.bfloat16


# Allocation ----------------------------------------------------------------------------------------------------------


def test_the_allocation_per_pool_adds_up_to_what_the_storage_allocates(make_manager: MakeManager) -> None:
    manager = make_manager(3, init_entries=5, recur_slots=200, writers=2)
    allocation = manager.allocation()
    assert allocation.slots["init[1]"] == 5 * WINDOW
    assert allocation.slots["recur"] == 200
    assert allocation.slots["wm"] == 3 * WINDOW
    assert allocation.headroom_slots >= 2 * WINDOW  # a window for each writer
    assert allocation.total_slots == sum(allocation.slots.values()) + allocation.headroom_slots
    assert allocation.nbytes == manager.storage.tensor.data.nbytes


def test_every_pool_can_be_full_at_once_and_replaced_without_an_eviction(make_manager: MakeManager) -> None:
    manager = make_manager(init_entries=2, wm_entries=2, recur_slots=8 * WINDOW)
    pools = [(pool, 2) for pool in (*manager.init_pools, manager.wm_pool)] + [(manager.recur_pool, 8)]
    for pool, entries in pools * 2:
        store(pool, *((key, tokens(key, WINDOW)) for key in range(entries)))
    assert manager.get_stats_summary().total.eviction_count == 0
    assert manager.get_stats_summary().total.entries == 14


# Lists kept while code migrates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["keys_values_wm_list", "keys_values_wm_size_list"])
def test_assigning_a_new_list_leaves_no_alias(manager: KVCacheManager, name: str) -> None:
    before = getattr(manager, name)
    mine = [1, 2]
    setattr(manager, name, mine)
    mine.append(3)
    assert getattr(manager, name) == [1, 2]
    assert getattr(manager, name) is before


def test_clear_all_clears_the_lists_that_were_assigned(manager: KVCacheManager) -> None:
    manager.keys_values_wm_list = [object()]
    manager.keys_values_wm_size_list = [3]
    seen = manager.keys_values_wm_list
    manager.clear_all()
    assert manager.keys_values_wm_list == manager.keys_values_wm_size_list == seen == []


def test_a_list_can_be_assigned_to_itself(manager: KVCacheManager) -> None:
    manager.keys_values_wm_size_list = [1, 2]
    manager.keys_values_wm_size_list = manager.keys_values_wm_size_list
    manager.keys_values_wm_size_list += [3]
    assert manager.keys_values_wm_size_list == [1, 2, 3]


# The end -------------------------------------------------------------------------------------------------------------


def test_leaving_its_with_closes_a_manager_and_its_searches(make_manager: MakeManager) -> None:
    with make_manager() as manager:
        search = manager.search([0, 1])
    assert search.closed
    with pytest.raises(ClosedError):
        manager.get_recur_cache("k")
    with pytest.raises(ClosedError):
        manager.search([0])
    manager.close()


def test_a_manager_tells_what_it_is(make_manager: MakeManager) -> None:
    assert "2 environments" in repr(make_manager(name="mine"))
    assert make_manager(name="mine").recur_pool.name == "mine.recur"
