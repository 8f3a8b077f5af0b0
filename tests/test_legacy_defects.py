"""A promise for each place where the code this library replaces goes wrong; the docstrings give the defect's number."""

from __future__ import annotations

import logging
import threading
import weakref

import pytest
import torch

from concurrent_kv import (
    CapacityError,
    DropOldest,
    InvalidArgumentError,
    KeysValues,
    KVCacheManager,
    KVPool,
    WindowOverflowError,
    hash_state,
)
from tests.conftest import MakeManager, MakePool
from tests.support import (
    HANG_SECONDS,
    LAYOUT,
    WINDOW,
    OperatorCalls,
    append,
    assert_same,
    bits,
    child_of,
    config,
    layout,
    packed,
    row_of,
    slots_in_use,
    stacked,
    store,
    tokens,
)

pytestmark = pytest.mark.usefixtures("loops")


def test_replacing_a_key_replaces_that_key_and_touches_no_other(make_pool: MakePool) -> None:
    """1: a key inserted twice left a stale reverse map, and the live entry was deleted when the ring wrapped."""
    pool = make_pool(3)
    store(pool, ("a", tokens(1, 3)), ("b", tokens(2, 3)), ("a", tokens(3, 3)), ("c", tokens(4, 3)))
    for value in range(5, 12):
        pool.put("b", tokens(value, 3))
        assert_same(pool.get("a"), tokens(3, 3))
        assert_same(pool.get("b"), tokens(value, 3))
        assert_same(pool.get("c"), tokens(4, 3))


def test_clearing_leaves_nothing_behind(make_pool: MakePool) -> None:
    """2: reverse maps and ring positions survived a clear, so that the next search lost live keys."""
    pool = make_pool(200)
    for search in range(4):
        pool.put_many([(search, i) for i in range(200)], KeysValues.from_packed(torch.ones(4, 200, 2, 1, 3)))
        assert sum((search, i) in pool for i in range(200)) == 200
        pool.clear()
        assert slots_in_use(pool) == len(pool) == 0


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_an_evicted_key_is_a_miss_never_another_entry(make_pool: MakePool, policy: str) -> None:
    """3: in a ring of two slots a stale key returned another state's K/V."""
    pool = make_pool(2, policy=policy)
    for i in range(50):
        pool.put(i, tokens(i, 2))
        for key in range(i + 1):
            found = pool.get(key)
            if found is not None:
                assert_same(found, tokens(key, 2))
    assert sum(key in pool for key in range(50)) == 2


def test_a_miss_is_none(manager: KVCacheManager) -> None:
    """4: a miss in the recurrent pool raised TypeError."""
    assert manager.get_recur_cache("missing") is None
    assert manager.get_init_cache(0, "missing") is None
    assert manager.get_wm_cache("missing") is None
    assert manager.hierarchical_get(0, "missing") is None


def test_what_was_read_never_changes_afterwards(make_pool: MakePool) -> None:
    """5: get() returned the live slot; overwriting it changed what the reader held."""
    pool = make_pool(1)
    pool.put("a", tokens(1, 4))
    found = pool.get("a")
    for value in range(2, 6):
        pool.put("a", tokens(value, 4))
    assert_same(found, tokens(1, 4))


def test_priorities_are_an_argument_and_work(make_pool: MakePool) -> None:
    """6: the priority strategy was never given a priority, and a full pool raised ValueError."""
    pool = make_pool(2, policy="priority")
    pool.put("low", tokens(1, 2), priority=-5)
    pool.put("high", tokens(2, 2), priority=5.5)
    pool.put("middle", tokens(3, 2), priority=1)
    assert ["low" in pool, "high" in pool, "middle" in pool] == [False, True, True]


def test_age_is_the_age_of_the_last_write(make_pool: MakePool) -> None:
    """7: updating an entry did not refresh its age, and the key just written was evicted first."""
    pool = make_pool(2)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)), ("a", tokens(3, 2)), ("c", tokens(4, 2)))
    assert_same(pool.get("a"), tokens(3, 2))
    assert pool.get("b") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtype_in_is_dtype_out(make_pool: MakePool, dtype: torch.dtype) -> None:
    """8: clone() upcast float16 to float32, after which the slot was never reused."""
    pool = make_pool(1, layout(dtype=dtype))
    for value in (1, 2, 3):
        pool.put(value, tokens(value, 4, layout=pool.layout))
        assert_same(pool.get(value), tokens(value, 4, layout=pool.layout))
    assert pool.storage.tensor.data.dtype is dtype


def test_the_device_is_one_fact_in_one_place(pool: KVPool) -> None:
    """9: moving an object to a device left its device field behind, and a clone went back."""
    kv = tokens(1, 2)
    moved = kv.to("meta")
    assert moved.keys.device == moved.values.device == moved.row(0).keys.device == torch.device("meta")
    assert kv.to("cpu") is kv
    assert pool.layout.device == pool.storage.tensor.data.device == torch.device("cpu")
    with pytest.raises(InvalidArgumentError, match=r"kv must be on cpu, got meta"):
        pool.put("a", moved)


def test_an_error_leaves_the_data_as_it_was(pool: KVPool) -> None:
    """10: appending more tokens than the capacity wiped the cache, then raised."""
    pool.put("a", tokens(1, 6))
    with pool.gather(["a"]) as batch:
        new = torch.zeros(1, 2, 3, 3)
        with pytest.raises(WindowOverflowError):
            batch.append(0, new, new)
        assert_same(row_of(batch, 0), tokens(1, 6))
    assert_same(pool.get("a"), tokens(1, 6))


def test_the_drop_is_the_callers_stated_policy_never_a_surprise(manager: KVCacheManager) -> None:
    """11: appending one token to a full cache dropped two."""
    manager.set_init_cache(0, "root", tokens(1, WINDOW - 1))
    with manager.search([0]) as search:
        for limit, count, length in ((WINDOW, 1, WINDOW - 1), (WINDOW, 2, WINDOW - 2), (WINDOW, 5, WINDOW - 5)):
            batch = search.gather(["root"], [0])
            append(batch, [2], 1)
            search.commit([count], batch, overflow=DropOldest(limit, count))
            with search.gather([count], [0]) as again:
                assert again.lengths == (length,)
        batch = search.gather(["root"], [0])
        append(batch, [2], 1)
        search.commit(["whole"], batch)
        with search.gather(["whole"], [0]) as again:
            assert_same(row_of(again, 0), child_of(tokens(1, WINDOW - 1), 2, 1))


def test_inputs_are_never_written_to(pool: KVPool) -> None:
    """12: `+=` on a view of the batched cache changed the caller's tensor."""
    kv, filling = tokens(1, 4), tokens(2, 4)
    pool.put("a", kv)
    with pool.gather(["a", "missing"]) as batch:
        batch.fill(1, filling)
        batch.keys.add_(1.0)
        batch.values.mul_(2.0)
    assert_same(kv, tokens(1, 4))
    assert_same(filling, tokens(2, 4))
    assert_same(pool.get("a"), tokens(1, 4))


def test_the_world_model_pool_hands_out_copies(make_manager: MakeManager) -> None:
    """13: the wm ring handed out live objects that the next call reused."""
    manager = make_manager(1)
    manager.set_wm_cache("a", tokens(1, 4))
    found = manager.get_wm_cache("a")
    for value in range(5):
        manager.set_wm_cache(value, tokens(10 + value, 4))
    assert_same(found, tokens(1, 4))


def test_no_shared_mutable_alias_decides_correctness(manager: KVCacheManager) -> None:
    """14: keys_values_wm_list was orphaned when the caller assigned a new list, so clear_all cleared the wrong one."""
    known = manager.keys_values_wm_list
    manager.keys_values_wm_list = mine = [tokens(1, 2)]
    manager.clear_all()
    assert manager.keys_values_wm_list == known == []
    assert len(mine) == 1


def test_scope_dtype_shape_and_weights_version_are_part_of_the_key(pool: KVPool) -> None:
    """15: the key omitted shape, dtype, position, history and weights version; 0.0 and -0.0 differed."""
    left, right = pool.scope(("task", 1, torch.float32, (4,))), pool.scope(("task", 1, torch.float16, (2, 2)))
    key = hash_state(torch.zeros(4))
    assert key == hash_state(torch.zeros(2, 2))
    assert key != hash_state(-torch.zeros(4))
    pool.put(key, tokens(1, 2), scope=left)
    assert pool.get(key, scope=right) is None
    pool.bump_version()
    assert pool.get(key, scope=left) is None
    with pytest.raises(InvalidArgumentError, match="dtype"):
        pool.put(key, tokens(1, 2, layout=layout(dtype=torch.float16)))


def test_exact_node_keys_are_accepted(make_pool: MakePool) -> None:
    """16: equal latents of different nodes collided: 200 nodes, one key."""
    pool = make_pool(200)
    latents = torch.zeros(200, 8)
    assert len({hash_state(latent) for latent in latents}) == 1
    for node in range(200):
        pool.put(("search 1", node), tokens(node, 1))
    assert len(pool) == 200
    assert_same(pool.get(("search 1", 7)), tokens(7, 1))


def test_node_keys_do_not_depend_on_the_batch_a_latent_was_computed_in(pool: KVPool) -> None:
    """17: the hash of an encoder's output depended on the batch size it was computed with."""
    latent = torch.full((8,), 0.1)
    rounded = torch.nextafter(latent, torch.ones(8))
    assert hash_state(latent) != hash_state(rounded)
    pool.put(("root", 0), tokens(1, 2), side=latent)
    assert_same(pool.get(("root", 0)), tokens(1, 2))


def test_roles_are_separate_scopes(make_pool: MakePool) -> None:
    """18: evaluator and collector overwrote each other's context for equal observations."""
    pool = make_pool(8)
    collector, evaluator = pool.scope("collector"), pool.scope("evaluator")
    pool.put("observation", tokens(1, 2), scope=collector)
    pool.put("observation", tokens(2, 5), scope=evaluator)
    pool.clear(evaluator)
    assert_same(pool.get("observation", scope=collector), tokens(1, 2))


def test_lookups_name_their_scopes_and_order(manager: KVCacheManager) -> None:
    """19: init shadowed recur for the same key."""
    manager.set_init_cache(0, "k", tokens(1, 2))
    manager.set_recur_cache("k", tokens(2, 2))
    assert_same(manager.hierarchical_get(0, "k", order=("init", "recur")), tokens(1, 2))
    assert_same(manager.hierarchical_get(0, "k", order=("recur", "init")), tokens(2, 2))
    assert_same(manager.get_recur_cache("k"), tokens(2, 2))


def test_more_environments_than_env_num_is_an_error_that_names_the_argument(manager: KVCacheManager) -> None:
    """20: more ready environments than env_num ended in UnboundLocalError."""
    with pytest.raises(InvalidArgumentError, match="env_ids must be environments of the manager, 0 to 1, got 2"):
        manager.search(range(3))
    with pytest.raises(InvalidArgumentError, match="env_id must be 0 to 1, got 2"):
        manager.set_init_cache(2, "k", tokens(1, 2))


def test_scopes_carry_task_and_environment(make_pool: MakePool) -> None:
    """21: the multitask model used the batch position as the environment, and no task."""
    pool = make_pool(8)
    scopes = {(task, env): pool.scope((task, env)) for task in range(2) for env in range(2)}
    for (task, env), scope in scopes.items():
        pool.put("root", tokens(10 * task + env, 2), scope=scope)
    for (task, env), scope in scopes.items():
        assert_same(pool.get("root", scope=scope), tokens(10 * task + env, 2))


def test_bump_version_makes_older_entries_misses(manager: KVCacheManager) -> None:
    """22: stale weights were used unless the caller remembered to clear."""
    manager.set_init_cache(0, "k", tokens(1, 2))
    manager.set_recur_cache("k", tokens(2, 2))
    manager.bump_version()
    assert manager.hierarchical_get(0, "k") is None


def test_each_search_has_a_scope_of_its_own_and_closing_it_touches_no_other(make_manager: MakeManager) -> None:
    """23: one group's initial inference cleared the recurrent pool of every other group in mid-search."""
    manager = make_manager()
    for env_id in (0, 1):
        manager.set_init_cache(env_id, "root", tokens(env_id, 1))
    with manager.search([0]) as first:
        batch = first.gather(["root"], [0])
        append(batch, [5])
        first.commit(["node"], batch)
        for _ in range(3):
            with manager.search([1]) as second:
                batch = second.gather(["root"], [1])
                append(batch, [6])
                second.commit(["node"], batch)
            manager.clear_recur_cache()
        with first.gather(["node"], [0]) as batch:
            assert_same(row_of(batch, 0), child_of(tokens(0, 1), 5))


def test_a_searchs_own_entries_are_not_evicted_and_too_small_a_pool_says_which_would_do(
    make_manager: MakeManager,
) -> None:
    """24: an eviction in the middle of a search silently dropped context."""
    manager = make_manager(recur_slots=24)
    manager.set_init_cache(0, "root", tokens(99, 3))
    with manager.search([0], entries=8, tokens=16) as search:
        for node in range(8):
            batch = search.gather(["root"], [0])
            append(batch, [node])
            search.commit([node], batch)
            store(manager.recur_pool, *((key, tokens(key, WINDOW)) for key in range(4)))
        with search.gather(list(range(8)), [0] * 8) as batch:
            assert all(batch.hits)
    with pytest.raises(CapacityError, match="recur_slots=32 would do"):
        manager.search([0], entries=8, tokens=32)


def test_side_data_is_stored_with_the_entry_and_leaves_with_it(make_pool: MakePool) -> None:
    """25: a side table of tokens was synchronised by a full set difference at every write."""

    class Tokens:
        pass

    pool = make_pool(2)
    alive = []
    for key in range(5):
        side = Tokens()
        alive.append(weakref.ref(side))
        pool.put(key, tokens(key, 2), side=side)
        del side
    assert [ref() is not None for ref in alive] == [False, False, False, True, True]
    assert pool.side(4) is alive[4]()


def test_statistics_are_numbers_and_the_line_before_a_clear_is_logged_before_it(
    make_manager: MakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    """26: statistics were strings, the "before clear" line came after it, an unused pool's miss rate was 1.0."""
    manager = make_manager(log_every_clears=1)
    assert manager.get_stats_summary().total.miss_rate == 0.0
    manager.set_recur_cache("k", tokens(1, 2))
    with caplog.at_level(logging.INFO, logger="concurrent_kv"):
        manager.clear_all()
    assert "1 entries, 2 slots" in caplog.messages[0]
    assert all(isinstance(number, float) for number in manager.get_stats_summary().as_dict().values())


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_eight_threads_on_one_pool_read_no_wrong_or_torn_entry(make_pool: MakePool, policy: str) -> None:
    """27: KeyErrors, reads of other keys and torn reads, with eight threads on one pool."""
    pool = make_pool(4, policy=policy)
    start = threading.Barrier(8)
    failures: list[str] = []

    def work(number: int) -> None:
        start.wait(HANG_SECONDS)
        for step in range(60):
            key = (number * 7 + step) % 12
            if step % 3 == 0:
                pool.put(key, tokens(key, 4))
            found = pool.get((key + step) % 12)
            if found is not None and not torch.equal(packed(found), packed(tokens((key + step) % 12, 4))):
                failures.append(f"thread {number} step {step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_finding_room_in_a_full_pool_looks_at_a_bounded_number_of_entries(policy: str) -> None:
    """28: finding a slot under LRU or PRIORITY scanned the whole pool."""
    looked_at = {}
    for entries in (8, 512):
        with KVPool(layout(max_tokens=1), entries, policy=policy) as pool:
            pool.put_many(range(entries), KeysValues.from_packed(torch.ones(4, entries, 2, 1, 3)))
            popped = 0
            pop_victim = pool.policy.pop_victim

            def counting(pop_victim=pop_victim):
                nonlocal popped
                popped += 1
                return pop_victim()

            pool.policy.pop_victim = counting  # type: ignore[method-assign]
            for key in range(8):
                pool.put(("new", key), tokens(key, 1))
            looked_at[entries] = popped
    assert looked_at[8] == looked_at[512] == 8


def test_storage_is_allocated_once() -> None:
    """29: every clear dropped the buffers, so that a search of 50 simulations allocated 6400 tensors."""
    settings = config(num_simulations=50, max_cache_size=102)
    with KVCacheManager(settings, 2) as manager:
        for env_id in (0, 1):
            manager.set_init_cache(env_id, "root", tokens(env_id, 1))
        address = manager.storage.tensor.data.data_ptr()
        with OperatorCalls() as calls:
            for round_ in range(3):
                with manager.search([0, 1], overflow=DropOldest(WINDOW - 1, 2)) as search:
                    parents = ["root", "root"]
                    for node in range(50):
                        batch = search.gather(parents, [0, 1], room=2)
                        batch.advance(2)
                        parents = [(env_id, node) for env_id in (0, 1)]  # type: ignore[misc]
                        search.commit(parents, batch)
                manager.clear_recur_cache()
                if round_ == 0:
                    first = sum("aten.empty" in name or "aten.zeros" in name for name in calls.names)
        assert manager.storage.tensor.data.data_ptr() == address
        # One buffer for each shape of batch: rows of 1, 3 and 5 tokens with room for two more.
        assert first == 3
        assert sum("aten.empty" in name or "aten.zeros" in name for name in calls.names) == 3
        manager.check_integrity()


def test_what_is_read_back_is_what_was_put_bit_for_bit(pool: KVPool) -> None:
    """Copies keep what the old copy_() gave: every bit, of every row."""
    kv = stacked(tokens(1, 3), tokens(2, 8))
    pool.put_many(["a", "b"], kv)
    for row, key in enumerate("ab"):
        found = pool.get(key)
        assert found is not None
        assert torch.equal(bits(packed(found)), bits(packed(kv.row(row))))
    assert pool.layout == LAYOUT
