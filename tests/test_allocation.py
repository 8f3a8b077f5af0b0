"""What pools, managers and searches set aside: in tokens where windows are long, and said before it is allocated."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    CapacityError,
    InvalidArgumentError,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    KVStorage,
    Search,
    WaitTimeoutError,
)
from concurrent_kv.books.allocation import default_tokens
from concurrent_kv.compat.lightzero import LightZeroKVCacheManager
from tests.conftest import MakeManager, MakePool
from tests.support import LAYOUT, WINDOW, bits, config, stacked

LONG = 32_768
SIMULATIONS = 4


def thin(window: int) -> KVLayout:
    """A layout of eight bytes a token."""
    return KVLayout(num_layers=1, num_heads=1, head_dim=1, max_tokens=window)


def thin_config(window: int, **changes: Any) -> dict[str, Any]:
    sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 1, "context_length": window, "num_simulations": SIMULATIONS}
    return {**sizes, "max_cache_size": 64, "device": "cpu", **changes}


def filled(layout: KVLayout, value: float, length: int) -> KeysValues:
    shape = (layout.num_layers, layout.num_heads, length, layout.head_dim)
    return KeysValues.single(*(torch.full(shape, sign * value, dtype=layout.dtype) for sign in (1, -1)))


def add_full_window(search: Search, key: int, layout: KVLayout) -> None:
    """A node that missed, and shares nothing."""
    with search.gather([key], [0]) as batch:
        batch.fill(0, filled(layout, key, layout.max_tokens - 1))
        batch.append(0, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
        search.commit([key], batch)


def assert_allocated(made: KVPool | KVCacheManager) -> None:
    """What it says of itself is what its storage has."""
    allocation, storage = made.allocation(), made.storage
    assert storage.ledger.num_slots == allocation.total_slots
    assert storage.headroom_slots == allocation.headroom_slots
    assert storage.tensor.nbytes == storage.tensor.data.nbytes == allocation.nbytes
    assert allocation.total_slots == sum(allocation.slots.values()) + allocation.headroom_slots
    assert [pool.account.max_slots for pool in storage.pools] == list(allocation.slots.values())
    assert [pool.account.max_entries for pool in storage.pools] == list(allocation.entries.values())


# Pools ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "arguments", "slots", "headroom"),
    [
        (8, {}, 4 * 8, 4 * 8),
        (8, {"max_slots": 20}, 20, 4 * 8),
        (8, {"max_slots": 20, "writers": 2}, 20, 2 * 8),
        (8, {"max_slots": 20, "headroom_tokens": 9}, 20, 9),
        (8, {"max_slots": 20, "headroom_tokens": 9, "writers": 2}, 20, 9),
        (1_024, {"max_slots": 5_000}, 5_000, 4 * 1_024),
        (1_025, {"max_slots": 5_000}, 5_000, 1_025),
        (LONG, {"max_slots": 50_000}, 50_000, LONG),
        (LONG, {"max_bytes": 8 * 50_000}, 50_000, LONG),
        (LONG, {"max_slots": 50_000, "headroom_tokens": 40_000}, 50_000, 40_000),
        (LONG, {"max_slots": 50_000, "writers": 3}, 50_000, 3 * LONG),
        (131_072, {"max_slots": 131_072}, 131_072, 131_072),
        (LONG, {}, 4 * LONG, LONG),  # full windows of four entries are what was asked for
    ],
)
def test_a_pool_allocates_the_slots_that_were_asked_for_and_a_stated_headroom(
    make_pool: MakePool, window: int, arguments: dict[str, Any], slots: int, headroom: int
) -> None:
    said = KVPool.allocation_for(thin(window), 4, **arguments)
    assert (said.slots, said.headroom_slots) == ({"pool": slots}, headroom)
    pool = make_pool(4, thin(window), **arguments)
    assert pool.storage.ledger.num_slots == slots + headroom
    assert pool.storage.tensor.nbytes == 8 * (slots + headroom + 1)  # and the zero slot
    assert pool.allocation() == said
    assert_allocated(pool)


def test_a_pool_over_another_storage_allocates_nothing() -> None:
    storage = KVStorage(LAYOUT, 4 * WINDOW, headroom_slots=WINDOW)
    said = KVPool.allocation_for(LAYOUT, 3, storage=storage)
    pool = KVPool(LAYOUT, 3, storage=storage)
    assert pool.allocation() == said
    assert (said.slots["pool"], said.headroom_slots, said.total_slots, said.nbytes) == (3 * WINDOW, 0, 0, 0)
    assert "no slots of its own" in str(said)
    with pytest.raises(InvalidArgumentError, match=r"headroom_tokens must be left out .* got 8"):
        KVPool(LAYOUT, 1, storage=storage, headroom_tokens=8)


def test_too_little_headroom_is_an_error_that_says_what_would_do() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^headroom_tokens must be at least 32768, got 32767$"):
        KVPool(thin(LONG), 4, max_slots=50_000, headroom_tokens=LONG - 1)
    with pytest.raises(InvalidArgumentError, match=r"^headroom_tokens must be at least 32768, got 32767$"):
        KVCacheManager(thin_config(LONG), 1, headroom_tokens=LONG - 1)


@pytest.mark.parametrize("window", [WINDOW, 1_025, LONG])
def test_the_longest_entry_of_a_full_pool_is_replaced_with_the_least_headroom_and_evicts_nothing(
    make_pool: MakePool, window: int
) -> None:
    layout = thin(window)
    pool = make_pool(3, layout, max_slots=window + 5, headroom_tokens=window)
    pool.put("short", filled(layout, 1, 2))
    pool.put("other", filled(layout, 2, 3))
    pool.put("long", filled(layout, 3, window))
    assert pool.stats().slots_in_use == window + 5
    for value in (4, 5):
        assert pool.put("long", filled(layout, value, window))
        found = pool.get("long")
        assert found is not None
        assert torch.equal(bits(found.keys), bits(filled(layout, value, window).keys))
    assert pool.stats().eviction_count == 0
    assert set(pool.keys()) == {"short", "other", "long"}


# Managers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "arguments", "init", "recur", "wm", "headroom"),
    [
        # As many full windows as entries: 16 roots, 2 * (4 + 1) nodes, 2 of the world model's; 8 writers and 2 roots.
        (8, {}, 16 * 8, 10 * 8, 2 * 8, 10 * 8),
        (1_024, {}, 16 * 1_024, 10 * 1_024, 2 * 1_024, 10 * 1_024),
        # 1,024 tokens for each entry, one window at least.
        (1_025, {}, 16 * 1_024, 10 * 1_024, 2 * 1_024, 1_025),
        (LONG, {}, LONG, LONG, LONG, LONG),
        (4_096, {"init_entries": 40}, 40 * 1_024, 10 * 1_024, 4_096, 4_096),
        # What is stated.
        (LONG, {"init_tokens": 50_000, "wm_tokens": 40_000, "recur_slots": 60_000}, 50_000, 60_000, 40_000, LONG),
        (LONG, {"headroom_tokens": 33_000}, LONG, LONG, LONG, 33_000),
        (LONG, {"writers": 2}, LONG, LONG, LONG, 2 * LONG),
        (8, {"init_tokens": 11, "wm_tokens": 12, "headroom_tokens": 13}, 11, 10 * 8, 12, 13),
        (8, {"writers": 1}, 16 * 8, 10 * 8, 2 * 8, 3 * 8),
    ],
)
def test_a_manager_allocates_what_it_says(
    make_manager: MakeManager,
    window: int,
    arguments: dict[str, Any],
    init: int,
    recur: int,
    wm: int,
    headroom: int,
) -> None:
    said = KVCacheManager.allocation_for(thin_config(window), 2, **arguments)
    assert said.slots == {"init[0]": init, "init[1]": init, "recur": recur, "wm": wm}
    assert said.headroom_slots == headroom
    assert said.search_tokens == max(window, 10 * min(window, 1_024))
    manager = make_manager(2, settings=thin_config(window), **arguments)
    assert manager.allocation() == said
    assert_allocated(manager)


def test_every_pool_of_a_manager_is_full_at_once_and_replaced_without_an_eviction(make_manager: MakeManager) -> None:
    window = 2_048
    manager = make_manager(
        2,
        settings=thin_config(window),
        init_tokens=window,
        wm_tokens=window,
        recur_slots=window,
        headroom_tokens=window,
    )
    pools = (*manager.init_pools, manager.wm_pool, manager.recur_pool)
    for value in (1, 2, 3):
        for pool in pools:
            assert pool.put("long", filled(manager.layout, value, window))
    total = manager.get_stats_summary().total
    assert (total.entries, total.eviction_count) == (len(pools), 0)


@pytest.mark.parametrize(("windows", "replaced"), [(3, 3), (2, 2), (1, 1)])
def test_roots_that_a_search_keeps_after_they_were_replaced_stand_in_the_headroom(
    make_manager: MakeManager, windows: int, replaced: int
) -> None:
    window = 2_048
    sizes = {"init_tokens": window, "wm_tokens": window, "headroom_tokens": windows * window}
    manager = make_manager(3, settings=thin_config(window), **sizes)
    layout = manager.layout
    manager.set_wm_cache("fills it", filled(layout, 0, window))
    for env_id in range(3):
        manager.set_init_cache(env_id, "root", filled(layout, env_id, window))
    with manager.search(range(3)) as search:
        search.gather(["root"] * 3, range(3), room=0).close()
        for env_id in range(replaced):
            assert manager.set_init_cache(env_id, "root", filled(layout, 9, window))
        for env_id in range(replaced, 3):
            with pytest.raises(WaitTimeoutError, match="no room"):
                manager.init_pools[env_id].put("root", filled(layout, 9, window), timeout=0.01)
    for env_id in range(3):
        assert manager.set_init_cache(env_id, "root", filled(layout, 9, window))
    assert manager.get_stats_summary().total.eviction_count == 0


def test_a_manager_is_made_of_the_config_of_another_too(make_manager: MakeManager) -> None:
    manager = make_manager(3)
    assert KVCacheManager.allocation_for(manager.config, 3) == manager.allocation()
    with pytest.raises(InvalidArgumentError, match=r"env_num must agree with config.env_num=3, got 2"):
        KVCacheManager(manager.config, 2)


def test_arguments_that_change_no_size_may_be_given_and_unknown_ones_may_not(make_manager: MakeManager) -> None:
    arguments: dict[str, Any] = {
        "enable_stats": False,
        "shards": 2,
        "policy": "lru",
        "wait_timeout": 1.0,
        "name": "n",
        "wm_entries": 3,
    }
    manager = make_manager(2, **arguments)
    assert KVCacheManager.allocation_for(config(), 2, **arguments) == manager.allocation()
    with pytest.raises(TypeError, match="recur_tokens"):
        KVCacheManager.allocation_for(config(), 2, recur_tokens=80)
    assert KVPool.allocation_for(LAYOUT, 4, shards=2, name="n").slots == {"pool": 4 * WINDOW}
    with pytest.raises(TypeError, match="slots"):
        KVPool.allocation_for(LAYOUT, 4, slots=80)


# Drawn arguments -----------------------------------------------------------------------------------------------------

WINDOWS = st.sampled_from((1, 2, 8, 1_023, 1_024, 1_025, 2_500))


def tokens_for(window: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(window, 3 * window)


COUNTS = st.none() | st.integers(1, 5)


@given(data=st.data(), window=WINDOWS, entries=st.integers(1, 6))
@settings(deadline=None)
def test_a_pool_of_any_arguments_allocates_what_was_said_before(data: st.DataObject, window: int, entries: int) -> None:
    stated, tokens = data.draw(st.sampled_from(("max_slots", "max_bytes"))), data.draw(tokens_for(window))
    arguments: dict[str, Any] = {
        stated: tokens if tokens is None or stated == "max_slots" else 8 * tokens + 3,
        "headroom_tokens": data.draw(tokens_for(window)),
        "writers": data.draw(COUNTS),
    }
    said = KVPool.allocation_for(thin(window), entries, **arguments)
    with KVPool(thin(window), entries, **arguments) as pool:
        assert pool.allocation() == said
        assert_allocated(pool)


@given(data=st.data(), window=WINDOWS, env_num=st.integers(1, 3), simulations=st.integers(1, 6))
@settings(deadline=None)
def test_a_manager_of_any_arguments_allocates_what_was_said_before_and_opens_a_search(
    data: st.DataObject, window: int, env_num: int, simulations: int
) -> None:
    sizes = thin_config(window, num_simulations=simulations, max_cache_size=env_num * (simulations + 1) + 2)
    arguments: dict[str, Any] = {
        **{name: data.draw(COUNTS, name) for name in ("wm_entries", "writers")},
        **{name: data.draw(tokens_for(window), name) for name in ("init_tokens", "wm_tokens", "headroom_tokens")},
        "init_entries": data.draw(st.integers(1, 4)),
    }
    said = KVCacheManager.allocation_for(sizes, env_num, **arguments)
    with KVCacheManager(sizes, env_num, **arguments) as manager:
        assert manager.allocation() == said
        assert_allocated(manager)
        with manager.search(range(env_num)):
            assert manager.recur_pool.stats().reserved_slots == said.search_tokens
        with manager.search([0], entries=2):
            assert manager.recur_pool.stats().reserved_slots == default_tokens(2, window)


@given(entries=st.integers(1, 10_000), window=st.integers(1, 200_000))
def test_tokens_that_are_left_out_are_full_windows_while_these_are_short(entries: int, window: int) -> None:
    tokens = default_tokens(entries, window)
    assert window <= tokens <= max(window, entries * 1_024)
    if window <= 1_024:
        assert tokens == entries * window
    assert tokens <= default_tokens(entries + 1, window) <= default_tokens(entries + 1, window + 1)


# Errors that say what would do ---------------------------------------------------------------------------------------


def test_a_pool_in_tokens_names_its_tokens_when_they_are_too_few(make_manager: MakeManager) -> None:
    window = 2_048
    manager = make_manager(1, settings=thin_config(window))
    rows = stacked(*[filled(manager.layout, value, window) for value in range(9)])
    for pool, argument in ((manager.wm_pool, "wm"), (manager.init_pools[0], "init")):
        keys = range(9) if argument == "init" else range(2)
        with pytest.raises(CapacityError) as caught:
            pool.put_many(keys, stacked(*[rows.row(key) for key in keys]))
        tokens = len(keys) * window
        assert f"{argument}_tokens={tokens} would do" in str(caught.value)
    larger = make_manager(1, settings=thin_config(window), wm_entries=2, wm_tokens=2 * window, init_tokens=9 * window)
    assert larger.wm_pool.put_many(range(2), stacked(rows.row(0), rows.row(1)))
    assert larger.init_pools[0].put_many(range(9), rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({}, "wm_entries=3 would do"), ({"wm_tokens": 16}, "wm_entries=3 and wm_tokens=24 would do")],
)
def test_a_pool_in_short_windows_names_its_tokens_where_they_were_stated(
    make_manager: MakeManager, arguments: dict[str, Any], says: str
) -> None:
    manager = make_manager(2, settings=thin_config(WINDOW), **arguments)
    with pytest.raises(CapacityError, match=says):
        manager.wm_pool.put_many(range(3), stacked(*[filled(manager.layout, 1, WINDOW)] * 3))


def test_a_search_that_needs_more_than_its_default_names_tokens(make_manager: MakeManager) -> None:
    window = 2_048
    manager = make_manager(1, settings=thin_config(window))
    with manager.search([0]) as search:  # with 5 * 1,024 tokens
        for key in (0, 1):
            add_full_window(search, key, manager.layout)
        with pytest.raises(CapacityError, match=r"tokens=6144\b.*recur_slots=6144\b"):
            add_full_window(search, 2, manager.layout)
    manager = make_manager(1, settings=thin_config(window), recur_slots=6_144)
    with manager.search([0], tokens=6_144) as search:
        for key in (0, 1, 2):
            add_full_window(search, key, manager.layout)


# What is said --------------------------------------------------------------------------------------------------------


def test_an_allocation_is_read_in_lines(make_manager: MakeManager) -> None:
    said = KVCacheManager.allocation_for(thin_config(LONG), 2, init_tokens=50_000)
    assert str(said).splitlines() == [
        "init[0] to init[1]: 16 entries, 50,000 slots each",
        "recur: 64 entries, 32,768 slots",
        "wm: 2 entries, 32,768 slots",
        "headroom: 32,768 slots",
        "storage: 198,304 slots and the zero slot, 1,586,440 bytes",
        "a search over all environments: 32,768 slots, if its tokens is left out",
    ]
    assert str(KVPool.allocation_for(thin(LONG), 4, max_slots=50_000)).splitlines() == [
        "pool: 4 entries, 50,000 slots",
        "headroom: 32,768 slots",
        "storage: 82,768 slots and the zero slot, 662,152 bytes",
    ]


def test_an_allocation_stays_after_a_close_and_is_pickled_and_copied(make_manager: MakeManager) -> None:
    manager = make_manager()
    allocation = manager.allocation()
    manager.close()
    assert manager.allocation() == allocation == pickle.loads(pickle.dumps(allocation)) == copy.deepcopy(allocation)


def test_facades_hand_the_sizes_on() -> None:
    sizes: dict[str, Any] = {"init_entries": 16, "init_tokens": 11, "wm_tokens": 12, "headroom_tokens": 13}
    said = KVCacheManager.allocation_for(config(max_cache_size=10), 2, **sizes)
    facade = AsyncKVCacheManager(config=config(max_cache_size=10), env_num=2, **sizes)
    lightzero = LightZeroKVCacheManager(config(), 2, **sizes)
    assert facade.allocation() == lightzero.manager.allocation() == said
    facade.sync.close()
    lightzero.manager.close()
    with KVPool(LAYOUT, 4, headroom_tokens=8) as pool:
        assert (
            AsyncKVPool(pool).allocation() == pool.allocation() == KVPool.allocation_for(LAYOUT, 4, headroom_tokens=8)
        )
