"""The tier beneath a pool: what is evicted is found again, and what is promised without a tier is promised with one."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from concurrent_kv import (
    DropLazily,
    HostTier,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    KVCacheManager,
    KVPool,
    PositionSteps,
    TierStats,
)
from concurrent_kv.books.records import CLAIMED, Entry, Hold
from concurrent_kv.books.turns import Turn
from concurrent_kv.device.host_slots import HostSlots
from concurrent_kv.errors import ClosedError, KeyNotFoundError
from concurrent_kv.evaluation import Evaluator, Leaf
from concurrent_kv.locks.gate import gate
from concurrent_kv.pool.clearing import sweep_if
from concurrent_kv.pool.joint import open_together
from concurrent_kv.pool.pool import gather_part_of_pool
from concurrent_kv.pool.storage import Domain
from concurrent_kv.pool.tier import Tier
from concurrent_kv.search.state import SearchState
from tests import evaluating
from tests.support import LAYOUT, WINDOW, append, assert_same, child_of, config, packed, row_of, store, tokens
from tests.tiers_support import TIERS, host_tier, tiers_of

pytestmark = pytest.mark.usefixtures("loops")

BYTES = LAYOUT.bytes_per_entry


@pytest.fixture(autouse=True, params=TIERS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each test with tiers in memory, and with a file behind them."""
    with tiers_of(request.param, tmp_path):
        yield request.param


def tiered(entries: int = 2, windows: int = 8, **options: Any) -> KVPool:
    return KVPool(LAYOUT, entries, tier=host_tier(windows), **options)


def tier_of(pool: KVPool) -> Tier:
    tier = pool.storage.tier
    assert isinstance(tier, Tier)
    return tier


def filled(pool: KVPool) -> TierStats:
    found = pool.tier_stats()
    assert found is not None
    return found


@pytest.fixture
def pool() -> Iterator[KVPool]:
    """Of two entries, of which "new" and "newer" are in the pool, and "old" and "older" in the tier."""
    made = tiered()
    for number, key in enumerate(("older", "old", "new", "newer")):
        made.put(key, tokens(number, 3), side=f"side of {key}", priority=float(number))
    assert made.stats().move_down_count == filled(made).entries == 2
    yield made
    made.check_integrity()
    made.close()


# Reading -------------------------------------------------------------------------------------------------------------


def test_what_was_evicted_is_read_with_its_side_data(pool: KVPool) -> None:
    for number, key in enumerate(("older", "old", "new", "newer")):
        assert_same(pool.get(key), tokens(number, 3))
        assert_same(pool.peek(key), tokens(number, 3))
        assert pool.side(key) == f"side of {key}"
        assert key in pool
    assert {*pool.keys()} == {"new", "newer", "old", "older"}
    assert len(pool) == 4


def test_a_hit_moves_up_where_there_is_room_and_evicts_nothing(pool: KVPool) -> None:
    pool.get("old")
    assert (pool.stats().move_up_count, pool.stats().eviction_count) == (0, 2)
    pool.pop("new")
    assert_same(pool.get("old"), tokens(1, 3))
    assert (pool.stats().move_up_count, pool.stats().eviction_count) == (1, 2)
    assert pool.stats().entries == 2
    assert filled(pool).entries == 1
    assert pool.side("old") == "side of old"


def test_a_look_that_is_not_counted_moves_nothing(pool: KVPool) -> None:
    pool.pop("new")
    assert_same(pool.peek("old"), tokens(1, 3))
    assert pool.side("old") == "side of old"
    assert "old" in pool
    assert pool.stats().move_up_count == 0


def test_a_gather_reads_from_both_and_its_children_are_right(pool: KVPool) -> None:
    with pool.gather(["older", "nothing", "newer", "older"]) as batch:
        assert batch.hits == (True, False, True, True)
        assert batch.side == ("side of older", None, "side of newer", "side of older")
        assert batch.lengths == (3, 0, 3, 3)
        for row, number in ((0, 0), (2, 3), (3, 0)):
            assert_same(row_of(batch, row), tokens(number, 3))
        append(batch, [10, 11, 12, 13])
        assert pool.commit(["a", "c"], batch, rows=[0, 2])
    assert_same(pool.get("a"), child_of(tokens(0, 3), 10))
    assert_same(pool.get("c"), child_of(tokens(3, 3), 12))


def test_a_row_of_a_gather_that_moves_up_is_shared_by_its_children(pool: KVPool) -> None:
    pool.pop("new")
    with pool.gather(["old"]) as batch:
        append(batch, [10], 1)
        pool.pop("newer")
        assert pool.commit(["child"], batch)
    assert pool.stats().slots_in_use == 4
    assert_same(pool.get("child"), child_of(tokens(1, 3), 10, 1))


def test_a_longer_row_in_the_tier_makes_the_batch_as_long(pool: KVPool) -> None:
    pool.put("long", tokens(7, 6))
    store(pool, ("x", tokens(8, 1)), ("y", tokens(9, 1)))
    with pool.gather(["x", "long"], room=1) as batch:
        assert batch.data.shape[3] == 7
        assert_same(row_of(batch, 1), tokens(7, 6))
        assert_same(row_of(batch, 0), tokens(8, 1))


def test_rows_of_a_joint_gather_come_from_the_tier_too(pool: KVPool) -> None:
    first = gather_part_of_pool(pool, ["new"], 1)
    second = gather_part_of_pool(pool, ["old", "nothing", "older"], 3)
    with open_together(pool.storage, [first, second]) as joint:
        assert joint.hits == (True, True, False, True)
        assert joint.side == ("side of new", "side of old", None, "side of older")
        for row, number in ((0, 2), (1, 1), (3, 0)):
            assert_same(KeysValues.from_packed(joint.data[:, row : row + 1, :, : joint.end].clone()), tokens(number, 3))
        end = joint.end
        joint.data[:, :, :, end : end + 2] = 7.0
        joint.advance(2)
        joint.settle()
        assert pool.commit(["child"], second, rows=[0])
        found = pool.get("child")
        assert found is not None
        assert found.lengths == (5,)
        assert_same(KeysValues.from_packed(packed(found)[:, :, :, :3].clone()), tokens(1, 3))


@pytest.mark.parametrize("room", [False, True], ids=["no room", "room"])
def test_an_evaluator_says_of_roots_in_the_tier_what_it_says_of_others(room: bool) -> None:
    manager = evaluating.new_manager(init_entries=1, tier=HostTier(64 * 1024 * 1024))
    for env in range(evaluating.ENVS):
        manager.set_init_cache(env, "other", KeysValues.from_packed(torch.zeros(4, 1, 2, 3, 3)))
        if room:
            manager.init_pools[env].pop("other")
    with manager.search(range(evaluating.ENVS)) as search, Evaluator(manager, evaluating.model) as evaluator:
        for number in (3, 4):
            leaves = [Leaf(search, "root", (number, env), number, env) for env in range(evaluating.ENVS)]
            expected = [evaluating.value_after(evaluating.root_sum(env), number) for env in range(evaluating.ENVS)]
            assert evaluator.evaluate_many(leaves) == [value for value, _ in expected]
            below = [Leaf(search, (number, env), (number, env, 5), 5, env) for env in range(evaluating.ENVS)]
            assert evaluator.evaluate_many(below) == [evaluating.value_after(total, 5)[0] for _, total in expected]
    assert manager.get_stats_summary().total.move_up_count == (evaluating.ENVS if room else 0)
    manager.check_integrity()
    manager.close()


# Sharing -------------------------------------------------------------------------------------------------------------


def grown(pool: KVPool, parent: str, child: str, value: int) -> None:
    with pool.gather([parent]) as batch:
        append(batch, [value], 1)
        assert pool.commit([child], batch)


def test_a_token_is_in_the_tier_once_and_once_in_the_pool_after_it_came_back() -> None:
    pool = tiered(3)
    pool.put("root", tokens(1, 4))
    grown(pool, "root", "left", 2)
    grown(pool, "root", "right", 3)
    assert pool.stats().slots_in_use == 6
    store(pool, *[(number, tokens(number, 1)) for number in range(3)])
    assert (filled(pool).entries, filled(pool).slots_in_use, filled(pool).shared_slots) == (3, 6, 4)
    for number in range(3):
        pool.pop(number)
    for key in ("left", "root", "right"):
        assert pool.get(key) is not None
    assert pool.stats().move_up_count == 3
    assert pool.stats().slots_in_use == 6
    assert filled(pool).slots_in_use == 0
    assert_same(pool.get("left"), child_of(tokens(1, 4), 2, 1))
    assert_same(pool.get("right"), child_of(tokens(1, 4), 3, 1))
    pool.check_integrity()


def test_what_comes_back_shares_with_what_stayed() -> None:
    pool = tiered(2)
    pool.put("root", tokens(1, 4))
    grown(pool, "root", "child", 2)
    pool.put("other", tokens(3, 1))  # root moves down
    assert filled(pool).slots_in_use == 4
    pool.pop("other")
    pool.get("root")
    assert pool.stats().slots_in_use == 5
    pool.check_integrity()


def test_slots_that_were_used_again_are_not_taken_for_the_same() -> None:
    pool = tiered(2, headroom_tokens=WINDOW, max_slots=2 * WINDOW)
    pool.put("root", tokens(1, 4))
    grown(pool, "root", "child", 2)
    store(pool, ("x", tokens(3, 1)), ("y", tokens(4, 1)))  # both are in the tier, and their slots are free
    pool.pop("root")
    pool.pop("child")
    for number in range(5, 12):
        pool.put(number, tokens(number, 5))
    for number in range(5, 12):
        assert_same(pool.get(number), tokens(number, 5))
    pool.check_integrity()


# Room ----------------------------------------------------------------------------------------------------------------


def test_the_oldest_of_the_tier_go_for_what_moves_down() -> None:
    pool = tiered(1, windows=2)
    for number in range(5):
        pool.put(number, tokens(number, WINDOW))
    assert [number for number in range(5) if number in pool] == [2, 3, 4]
    assert filled(pool).eviction_count == 2
    assert pool.stats().tier_drop_count == 0
    pool.get(2)  # which is the newest of the tier's now
    pool.put(5, tokens(5, WINDOW))
    assert [number for number in range(6) if number in pool] == [2, 4, 5]
    pool.check_integrity()


def test_what_the_tier_cannot_take_is_dropped_and_counted() -> None:
    pool = tiered(1, windows=1)
    pool.put("pinned", tokens(1, WINDOW))
    pool.put("a", tokens(2, WINDOW))
    with pool.pin("pinned") as pin:  # in the tier, where it stays
        pool.put("b", tokens(3, WINDOW))
        assert "a" not in pool
        assert pool.stats().tier_drop_count == 1
        assert_same(pin.get(), tokens(1, WINDOW))
    assert "pinned" in pool
    pool.check_integrity()


def test_an_eviction_goes_on_where_the_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> object:
        raise RuntimeError("out of memory")

    pool = tiered(1)
    pool.put("a", tokens(1, 3))
    monkeypatch.setattr(HostSlots, "store", failing)
    pool.put("b", tokens(2, 3))
    assert "a" not in pool
    assert pool.stats().tier_drop_count == pool.stats().eviction_count == 1
    assert filled(pool).slots_in_use == 0
    pool.check_integrity()


def test_a_read_whose_copy_fails_leaves_the_entry_where_it_was(monkeypatch: pytest.MonkeyPatch, pool: KVPool) -> None:
    def failing(*arguments: object) -> object:
        raise RuntimeError("out of memory")

    pool.pop("new")
    with monkeypatch.context() as patch:
        patch.setattr(HostSlots, "restore", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            pool.get("old")
    pool.check_integrity()
    assert_same(pool.get("old"), tokens(1, 3))
    assert pool.stats().move_up_count == 1


def test_lazily_corrected_entries_are_dropped() -> None:
    difference = torch.ones(2, 2, 2, WINDOW, 3)
    pool = tiered(1)
    pool.put("a", tokens(1, 4))
    with pool.gather(["a"]) as batch:
        append(batch, [2], 1)
        pool.commit(["a"], batch, overflow=DropLazily(5, 2, PositionSteps(LAYOUT, 2, difference)))
    pool.put("b", tokens(3, 1))
    assert "a" not in pool
    assert pool.stats().tier_drop_count == 1
    pool.check_integrity()


def test_an_entry_that_came_back_is_corrected_as_it_would_have_been() -> None:
    difference = torch.randn(2, 2, 2, WINDOW, 3)
    rule = DropLazily(6, 2, PositionSteps(LAYOUT, 2, difference))

    def grown_child(pool: KVPool, *, moved: bool) -> KeysValues:
        pool.put("a", tokens(1, 5))
        if moved:
            pool.put("b", tokens(2, 1))
            pool.pop("b")
        with pool.gather(["a"]) as batch:
            append(batch, [3], 2)
            pool.pop("a")
            pool.commit(["child"], batch, overflow=rule)
        found = pool.get("child")
        assert found is not None
        assert pool.stats().move_up_count == moved
        pool.check_integrity()
        return found

    assert_same(grown_child(tiered(1), moved=True), grown_child(KVPool(LAYOUT, 1), moved=False))


def test_a_read_takes_no_room_that_an_operation_waits_for(pool: KVPool) -> None:
    pool.pop("new")
    turn = Turn(0.0)
    with gate.lock, pool.storage.ledger.mutex:
        pool.account.turns.join(turn, pool.storage.ledger.stir)
    assert_same(pool.get("old"), tokens(1, 3))
    assert pool.stats().move_up_count == 0
    with gate.lock, pool.storage.ledger.mutex:
        pool.account.turns.leave(turn)
    pool.get("old")
    assert pool.stats().move_up_count == 1


# Ends ----------------------------------------------------------------------------------------------------------------

ENDS: dict[str, Callable[[KVPool], object]] = {
    "put": lambda pool: pool.put("old", tokens(9, 2)),
    "put many": lambda pool: pool.put_many(["old"], tokens(9, 2)),
    "pop": lambda pool: pool.pop("old"),
    "discard": lambda pool: pool.discard("old"),
    "clear": lambda pool: pool.clear(),
    "clear of the scope": lambda pool: pool.clear(pool.default_scope),
    "bump": lambda pool: pool.bump_version(),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_an_entry_of_a_pool_ends_one_in_the_tier(pool: KVPool, name: str) -> None:
    ENDS[name](pool)
    found = pool.get("old")
    if name.startswith("put"):
        assert_same(found, tokens(9, 2))
        pool.pop("old")
        assert pool.get("old") is None
    else:
        assert found is None
    if name in ("clear", "clear of the scope", "bump"):
        assert len(pool) == filled(pool).slots_in_use == 0


def test_a_dropped_scope_takes_what_the_tier_has_of_it() -> None:
    pool = tiered(1)
    scope = pool.scope("other")
    pool.put("a", tokens(1, 3), scope=scope)
    pool.put("a", tokens(2, 3))
    assert_same(pool.get("a", scope=scope), tokens(1, 3))
    assert_same(pool.get("a"), tokens(2, 3))
    assert pool.drop_scope(scope) == 1
    assert filled(pool).slots_in_use == 0
    assert len(tier_of(pool).account.scopes) == 1
    assert pool.get("a", scope=pool.scope("other")) is None
    pool.check_integrity()


def entry_of(pool: KVPool, key: str) -> Entry:
    scope = pool.default_scope
    return scope.entries[scope.part_of(hash(key))][key]


def test_what_was_discarded_is_removed_though_it_has_moved() -> None:
    pool = tiered(1)
    pool.put("a", tokens(1, 3))
    deadline = pool.storage.enter()
    pool.discard("a")
    with gate.lock, pool.storage.ledger.mutex:  # an operation that was under way moves it
        victim = pool.account.policy.pop_victim()
        assert victim is entry_of(pool, "a")
        victim.place = CLAIMED
    assert tier_of(pool).move_down(pool, victim, deadline)
    assert filled(pool).entries == 1
    assert pool.peek("a") is None
    assert filled(pool).entries == filled(pool).slots_in_use == 0
    pool.check_integrity()


def test_what_was_discarded_in_the_tier_is_removed_though_it_came_back(pool: KVPool) -> None:
    pool.pop("new")
    scope, deadline, hold = pool.default_scope.below, pool.storage.enter(), Hold("read", [])
    assert scope is not None
    entry = scope.entries[scope.part_of(hash("old"))]["old"]
    pool.discard("old")
    assert tier_of(pool).move_up(pool, entry, hold, deadline) is entry_of(pool, "old")
    pool.storage.ledger.release(hold)
    assert pool.peek("old") is None
    assert pool.stats().entries == 1


def test_what_is_stored_after_a_discard_stays() -> None:
    pool = tiered(1)
    pool.put("a", tokens(1, 3))
    deadline = pool.storage.enter()
    pool.discard("a")
    notes, pool.storage.ledger.abandoned = list(pool.storage.ledger.abandoned), deque()
    pool.put("a", tokens(2, 3))
    pool.put("b", tokens(3, 3))
    for note in notes:
        note(deadline)
    assert_same(pool.get("a"), tokens(2, 3))


def test_what_is_pinned_in_the_tier_is_not_copied_in_vain(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[object] = []
    with pool.pin("old"):
        pool.pop("new")
        monkeypatch.setattr(HostSlots, "restore", lambda *arguments: copied.append(arguments))
        assert_same(pool.get("old"), tokens(1, 3))
    assert not copied


def test_what_is_pinned_while_it_is_copied_does_not_move(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.pop("new")
    pins, copy = [], Tier._copy_up

    def pinning(*arguments: Any) -> None:
        copy(*arguments)
        pins.append(pool.pin("old"))

    monkeypatch.setattr(Tier, "_copy_up", pinning)
    assert_same(pool.get("old"), tokens(1, 3))
    assert pool.stats().move_up_count == 0
    (pin,) = pins
    assert_same(pin.get(), tokens(1, 3))
    pin.close()


def test_nothing_moves_up_between_the_two_sweeps_of_a_dropped_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tiered(1)
    scope = pool.scope("other")
    pool.put("a", tokens(1, 3), scope=scope)
    pool.put("b", tokens(2, 3))
    pool.pop("b")
    below = scope.below
    assert below is not None
    entry = below.entries[below.part_of(hash("a"))]["a"]
    moved: list[Entry | None] = []

    def late(domain: Domain, *arguments: Any) -> int:
        if domain is pool.storage.tier:  # a read that found it earlier gets here now
            hold = Hold("read", [])
            moved.append(tier_of(pool).move_up(pool, entry, hold, pool.storage.enter()))
            pool.storage.ledger.release(hold)
        return sweep_if(domain, *arguments)

    monkeypatch.setattr("concurrent_kv.pool.core.sweep_if", late)
    assert pool.drop_scope(scope) == 1
    assert moved == [None]
    assert pool.stats().entries == filled(pool).entries == 0
    pool.check_integrity()


def test_a_pin_keeps_what_is_in_the_tier_where_it_is(pool: KVPool) -> None:
    with pool.pin("old") as pin:
        assert pool.stats().move_up_count == 0
        assert pin.side == "side of old"
        assert_same(pin.get(), tokens(1, 3))
        pool.pop("new")
        assert_same(pool.get("old"), tokens(1, 3))
        assert pool.stats().move_up_count == 0
        pool.check_integrity()
    pool.get("old")
    assert pool.stats().move_up_count == 1


def test_a_pin_moves_up_where_there_is_room_and_is_not_evicted(pool: KVPool) -> None:
    pool.pop("new")
    with pool.pin("old"):
        assert pool.stats().move_up_count == 1
        for number in range(3):
            pool.put(number, tokens(number, 1))
        assert entry_of(pool, "old").pins == 1
        pool.check_integrity()
    with pytest.raises(KeyNotFoundError):
        pool.pin("nothing")


def test_a_closed_pool_frees_the_tier() -> None:
    pool = tiered()
    tier = tier_of(pool)
    store(pool, *[(number, tokens(number, 3)) for number in range(4)])
    pool.close()
    with pytest.raises(ClosedError, match="freed by close"):
        tier.host.load(tier.ledger.slots.free_slots())
    assert "data" not in vars(tier.host)


def test_a_closed_pool_of_a_manager_leaves_nothing_in_its_tier() -> None:
    manager = tiered_manager()
    for number in range(4):
        manager.set_wm_cache(number, tokens(number, 3))
    stats = manager.tier_stats()
    assert stats is not None
    assert stats.entries == 3
    manager.wm_pool.close()
    stats = manager.tier_stats()
    assert stats is not None
    assert stats.entries == stats.slots_in_use == 0
    manager.check_integrity()
    manager.close()


ENDS_MEANWHILE: dict[str, Callable[[KVPool], object]] = {
    "dropped": lambda pool: pool.drop_scope("other"),
    "cleared": lambda pool: pool.clear(pool.scope("other")),
    "bumped": lambda pool: pool.bump_version(),
    "popped": lambda pool: pool.pop("a", scope=pool.scope("other")),
}


@pytest.mark.parametrize("way", ["down", "up"])
@pytest.mark.parametrize("name", ENDS_MEANWHILE)
def test_what_ends_while_it_is_copied_arrives_nowhere(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tiered(1)
    scope = pool.scope("other")
    pool.put("a", tokens(1, 3), scope=scope)
    if way == "up":
        pool.put("b", tokens(2, 3))
        pool.pop("b")
    copy = getattr(Tier, f"_copy_{way}")

    def ending(*arguments: Any) -> None:
        copy(*arguments)
        monkeypatch.undo()
        ENDS_MEANWHILE[name](pool)

    monkeypatch.setattr(Tier, f"_copy_{way}", ending)
    if way == "up":
        assert_same(pool.get("a", scope=scope), tokens(1, 3))  # as it was when it was looked up
    else:
        pool.put("b", tokens(2, 3))
    assert scope.below is not None
    assert not [entry for of in (scope, scope.below) for part in of.entries for entry in part.values()]
    assert pool.get("a", scope=pool.scope("other")) is None
    pool.check_integrity()


# Searches ------------------------------------------------------------------------------------------------------------


def tiered_manager(**options: Any) -> KVCacheManager:
    return KVCacheManager(config(), env_num=1, init_entries=1, wm_entries=1, tier=host_tier(16), **options)


@pytest.mark.parametrize("room", [False, True], ids=["no room", "room"])
@pytest.mark.parametrize("order", ["own_first", "init_first"])
def test_a_search_keeps_a_root_from_the_tier_until_it_closes(room: bool, order: Any) -> None:
    manager = tiered_manager()
    manager.set_init_cache(0, "old", tokens(1, 3), side="side")
    manager.set_init_cache(0, "root", tokens(2, 3))
    if room:
        manager.init_pools[0].pop("root")
    with manager.search([0], order=order) as search:
        with search.gather(["old"], [0]) as batch:
            assert batch.hits == (True,)
            assert batch.side == ("side",)
            append(batch, [5])
            search.commit(["child"], batch)
        assert manager.init_pools[0].stats().move_up_count == room
        manager.clear_all()
        assert manager.get_init_cache(0, "old") is None
        batch = search.gather(["old", "child"], [0, 0])
        assert batch.hits == (True, True)
        assert_same(row_of(batch, 1), child_of(tokens(1, 3), 5))
        assert search.held == 2
        manager.check_integrity()
        assert search.promote("old", 0, as_key="again")
        assert_same(manager.get_init_cache(0, "again"), tokens(1, 3))
        search.keep(["child"])
        assert search.gather(["old"], [0]).hits == (False,)
    manager.check_integrity()
    stats = manager.tier_stats()
    assert stats is not None
    assert stats.slots_in_use == 0
    assert tier_of(manager.init_pools[0]).ledger.slots.in_use == 0
    manager.close()


def test_a_search_that_was_dropped_lets_go_of_roots_in_the_tier() -> None:
    manager = tiered_manager()
    manager.set_init_cache(0, "old", tokens(1, 3))
    manager.set_init_cache(0, "root", tokens(2, 3))
    search = manager.search([0])
    search.gather(["old"], [0]).close()
    search.release(["old"])
    search.gather(["old"], [0]).close()
    del search
    gc.collect()
    manager.clear_all()
    assert tier_of(manager.init_pools[0]).ledger.slots.in_use == 0
    manager.check_integrity()
    manager.close()


def test_a_root_that_stayed_in_the_tier_is_released_only_where_the_search_has_no_entry_of_its_key() -> None:
    manager = tiered_manager()
    roots = manager.init_pools[0]
    store(roots, ("root", tokens(1, 3)), ("other", tokens(2, 3)))
    with manager.search([0]) as search:
        with search.gather(["root"], [0]) as batch:
            append(batch, [7])
            search.commit(["root"], batch)
        roots.put("root", tokens(3, 3))
        search.release(["root"])
        assert search.held == 1
        with search.gather(["root"], [0]) as batch:
            assert_same(row_of(batch, 0), tokens(1, 3))
        search.release(["root"])
        assert search.held == 0
        with search.gather(["root"], [0]) as batch:
            assert_same(row_of(batch, 0), tokens(3, 3))
    manager.check_integrity()
    manager.close()


def test_a_gather_that_fails_gives_up_a_root_that_stayed_in_the_tier_unless_it_was_found_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = tiered_manager()
    roots = manager.init_pools[0]
    store(roots, ("root", tokens(1, 3)), ("other", tokens(2, 3)))

    class NoMoreError(Exception):
        pass

    with manager.search([0]) as search:

        def without_roots(*arguments: Any) -> None:
            raise NoMoreError

        def failing(*arguments: Any) -> None:
            patch.undo()
            if found_since:
                search.gather(["root"], [0]).close()
            raise NoMoreError

        for found_since in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr("concurrent_kv.search.search.open_batch", failing)
                with pytest.raises(NoMoreError):
                    search.gather(["root"], [0])
            assert search.held == found_since
        roots.put("root", tokens(3, 3))
        with search.gather(["root"], [0]) as batch:
            assert_same(row_of(batch, 0), tokens(1, 3))
        with monkeypatch.context() as patch:
            patch.setattr(SearchState, "adopt", without_roots)
            roots.put("again", tokens(4, 3))
            roots.put("last", tokens(4, 3))
            with pytest.raises(NoMoreError):
                search.gather(["again"], [0])
            assert search.held == 1
    manager.check_integrity()
    manager.clear_all()
    assert tier_of(roots).ledger.slots.in_use == 0
    manager.close()


@pytest.mark.parametrize("name", ["release", "keep", "close"])
def test_side_data_of_a_root_that_stayed_in_the_tier_are_finalised_outside_of_every_lock(name: str) -> None:
    inside: list[bool] = []

    class Side:
        def __del__(self) -> None:
            inside.append(gate.holds())

    manager = tiered_manager()
    roots = manager.init_pools[0]
    roots.put("root", tokens(1, 3), side=Side())
    roots.put("other", tokens(2, 3))
    search = manager.search([0])
    search.gather(["root"], [0]).close()
    roots.pop("root")
    gc.collect()
    assert not inside
    ends: dict[str, Callable[[], object]] = {
        "release": lambda: search.release(["root"]),
        "keep": lambda: search.keep([]),
        "close": search.close,
    }
    ends[name]()
    gc.collect()
    assert inside == [False]
    search.close()
    manager.check_integrity()
    manager.close()


# What comes in between -----------------------------------------------------------------------------------------------


def test_a_writer_that_finds_nothing_to_evict_gets_the_room_of_what_moved_up_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch that moved it up stays open, so nothing is let go of that would wake the writer."""
    pool = tiered(1, wait_timeout=30.0)
    store(pool, ("old", tokens(1, 3)), ("new", tokens(2, 3)))
    pool.pop("new")
    copying, waited = threading.Event(), threading.Event()
    copy, batches, stored = Tier._copy_up, list[Any](), list[bool]()

    def slowly(*arguments: Any) -> None:
        copy(*arguments)
        copying.set()
        assert waited.wait(30.0)

    monkeypatch.setattr(Tier, "_copy_up", slowly)
    reader = threading.Thread(target=lambda: batches.append(pool.gather(["old"])))
    reader.start()
    assert copying.wait(30.0)
    writer = threading.Thread(target=lambda: stored.append(pool.put("newer", tokens(3, 3), timeout=5.0)))
    ledger, wait_for_more = pool.storage.ledger, threading.Event()
    writer.start()
    while not ledger.waiters:
        wait_for_more.wait(0.001)
    waited.set()
    reader.join(30.0)
    writer.join(30.0)
    assert stored == [True]
    (batch,) = batches
    assert_same(row_of(batch, 0), tokens(1, 3))
    batch.close()
    pool.check_integrity()
    pool.close()


@pytest.mark.parametrize("name", ["get", "peek", "gather", "pin"])
def test_a_read_from_the_tier_of_a_pool_that_is_closed_meanwhile_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = tiered()
    store(pool, *[(key, tokens(number, 3)) for number, key in enumerate("abcd")])
    load = HostSlots.load

    def after_a_close(*arguments: Any) -> Any:
        pool.close()
        return load(*arguments)

    monkeypatch.setattr(HostSlots, "load", after_a_close)
    reads: dict[str, Callable[[], object]] = {
        "get": lambda: pool.get("a"),
        "peek": lambda: pool.peek("a"),
        "gather": lambda: pool.gather(["a"]),
        "pin": lambda: pool.pin("a").get(),
    }
    with pytest.raises(ClosedError, match="freed by close"):
        reads[name]()
    pool.check_integrity()


def test_what_a_write_could_not_take_out_of_the_tier_hides_nothing_that_moves_down_later(
    pool: KVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tier, "drop", without_memory)
        assert pool.put("old", tokens(9, 3))
    store(pool, ("x", tokens(4, 2)), ("y", tokens(5, 2)))
    assert pool.stats().entries == 2
    assert_same(pool.get("old"), tokens(9, 3))
    assert len(pool.keys()) == len(pool) == 6  # each once
    pool.clear()
    assert filled(pool).slots_in_use == 0


def test_a_scope_that_could_not_be_made_whole_is_none(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Tier, "add_scope", without_memory)
        with pytest.raises(MemoryError):
            pool.scope("other")
    assert pool.scopes() == (pool.default_scope,)
    assert pool.scope("other").below is not None


# Repair --------------------------------------------------------------------------------------------------------------

STEPS = ("_room_for", "_copy_down", "_publish_down", "_admit", "_free_room_for", "_copy_up", "_publish_up")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_a_move_that_is_cut_off_is_mended_by_repair(step: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tiered(1)
    pool.put("a", tokens(1, 3))
    pool.put("b", tokens(2, 3))  # a is in the tier
    up = step in ("_free_room_for", "_copy_up", "_publish_up")
    if up:
        pool.pop("b")
    original = getattr(Tier, step)

    def cut(*arguments: Any, **options: Any) -> Any:
        if after:
            original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tier, step, staticmethod(cut) if step == "_admit" else cut)
        with pytest.raises(KeyboardInterrupt):
            pool.get("a") if up else pool.put("c", tokens(3, 3))
    pool.repair()
    pool.check_integrity()
    assert_same(pool.get("a"), tokens(1, 3))
    if not up:
        assert_same(pool.get("b"), tokens(2, 3))
    for number in range(6):
        pool.put(number, tokens(number, 3))
    for number in range(6):
        assert_same(pool.get(number), tokens(number, 3))
    pool.check_integrity()


def test_slots_that_repair_freed_are_not_taken_for_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    pool = tiered(1, headroom_tokens=WINDOW, max_slots=WINDOW)
    pool.put("a", tokens(1, WINDOW))
    with monkeypatch.context() as patch:
        patch.setattr("concurrent_kv.pool.tier.unpublish", cut)  # it has arrived, and its old slots are still counted
        with pytest.raises(KeyboardInterrupt):
            pool.put("b", tokens(2, WINDOW))
    pool.repair()
    for number in range(3, 7):
        pool.put(number, tokens(number, WINDOW))
    for number in range(3, 7):
        assert_same(pool.get(number), tokens(number, WINDOW))
    assert_same(pool.get("a"), tokens(1, WINDOW))
    pool.check_integrity()


@pytest.mark.parametrize("what", ["refs", "slots", "uses"])
def test_check_integrity_sees_what_is_wrong_with_the_tier(pool: KVPool, what: str) -> None:
    tier = tier_of(pool)
    (entry, *_) = [entry for scope in tier.account.scopes.values() for part in scope.entries for entry in part.values()]
    if what == "refs":
        entry.refs += 1
    elif what == "slots":
        tier.ledger.slots.allocate(1)
    else:
        tier.account.uses.remove([entry.row])
    with pytest.raises(Exception, match=r"reference|free|use counts"):
        pool.check_integrity()
    pool.repair()
    pool.check_integrity()


# Arguments -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_tier_is_refused_by_name() -> None:
    with pytest.raises(InvalidTypeError, match="tier must be a HostTier or None, got int"):
        KVPool(LAYOUT, 2, tier=1 << 20)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="max_bytes must be at least 1, got 0"):
        HostTier(0)
    with pytest.raises(InvalidTypeError, match="pinned must be True, False or None"):
        HostTier(1, pinned=1)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=f"one window of 8 tokens, {BYTES} bytes, got {BYTES - 1}"):
        KVPool(LAYOUT, 2, tier=HostTier(BYTES - 1))
    pool = KVPool(LAYOUT, 2)
    with pytest.raises(InvalidArgumentError, match="tier must be left out where a storage is given"):
        KVPool(LAYOUT, 2, storage=pool.storage, tier=HostTier(BYTES))


def test_allocation_says_what_the_tier_takes(kind: str) -> None:
    in_file = kind == "disk"
    expected = (1 if in_file else 16) * BYTES + LAYOUT.bytes_per_token
    tier = host_tier(16)
    assert KVPool.allocation_for(LAYOUT, 2, tier=tier).disk_bytes == in_file * 16 * BYTES
    assert KVPool.allocation_for(LAYOUT, 2, tier=tier).tier_bytes == expected
    assert f"tier: {expected:,} bytes of host memory" in str(KVPool.allocation_for(LAYOUT, 2, tier=tier))
    manager = tiered_manager()
    assert manager.allocation().tier_bytes == expected
    assert tier_of(manager.init_pools[0]).host.nbytes == expected
    assert KVPool.allocation_for(LAYOUT, 2).tier_bytes == 0
    manager.close()


def test_hits_in_the_tier_are_hits(pool: KVPool, kind: str) -> None:
    pool.get("old")
    pool.get("new")
    pool.gather(["older", "newer", "nothing"]).close()
    stats = pool.stats()
    assert (stats.hit_count, stats.tier_hit_count, stats.miss_count) == (4, 2, 1)
    assert (stats.move_down_count, stats.move_up_count, stats.tier_drop_count) == (2, 0, 0)
    slots = 64 if kind == "memory" else WINDOW
    assert filled(pool) == TierStats(2, 6, 64, 6 * LAYOUT.bytes_per_token, 64 * LAYOUT.bytes_per_token, 0, 0, 0, slots)


def test_without_a_tier_there_is_nothing_of_one() -> None:
    pool = KVPool(LAYOUT, 1)
    store(pool, ("a", tokens(1, 2)), ("b", tokens(2, 2)))
    assert pool.tier_stats() is None
    assert pool.storage.ledger.copies is None
    assert pool.default_scope.below is None
    assert "a" not in pool
    assert pool.stats().tier_drop_count == pool.stats().move_down_count == 0
