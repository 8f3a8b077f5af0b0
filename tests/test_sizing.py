"""`KVCacheManager.plan`: searches of the planned sizes run to their end, and with less they would not."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    CapacityError,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    KVCacheManager,
    KVLayout,
    PositionSteps,
    RaiseOnOverflow,
    Search,
    WaitTimeoutError,
)
from concurrent_kv.books.sizing import SizePlan
from concurrent_kv.model.overflow import Overflow
from concurrent_kv.pool import room
from tests.support import HANG_SECONDS

Nodes = dict[int, list[tuple[Any, int]]]  # of each environment, keys and lengths; the root comes first


def thin(window: int) -> KVLayout:
    return KVLayout(num_layers=1, num_heads=1, head_dim=1, max_tokens=window)


def thin_config(window: int, **changes: Any) -> dict[str, Any]:
    """A configuration that does not say how large the recurrent pool is."""
    sizes = {"num_layers": 1, "num_heads": 1, "embed_dim": 1, "context_length": window, "num_simulations": 5}
    return {**sizes, "device": "cpu", **changes}


def zeros(tokens: int) -> torch.Tensor:
    return torch.zeros(1, 2, 1, tokens, 1)


def filled(window: int, length: int) -> KeysValues:
    return KeysValues.single(*(torch.ones(1, 1, length, 1) for _ in "kv"))


def policy(kind: str, window: int, limit: int, count: int) -> Overflow | None:
    layout = thin(window)
    if kind == "correct":
        return DropAndCorrect(limit, count, zeros(window), layout)
    if kind == "lazily":
        return DropLazily(limit, count, PositionSteps(layout, count, zeros(window)))
    return {"none": None, "raise": RaiseOnOverflow(limit), "oldest": DropOldest(limit, count)}[kind]


def most_before(overflow: Overflow | None, step: int, window: int) -> int:
    """The longest row that can get `step` tokens more."""
    return window - step if overflow is None else min(window, overflow.limit - 1 + overflow.count) - step


def after(length: int, step: int, overflow: Overflow | None) -> int:
    total = length + step
    return total - overflow.count if overflow is not None and total >= overflow.limit else total


def store_root(manager: KVCacheManager, env_id: int, key: Any, length: int) -> None:
    pool = manager.init_pools[env_id]
    assert pool.put(key, filled(manager.layout.max_tokens, length), timeout=0)


def grow(search: Search, parents: list[Any], children: list[Any], step: int) -> None:
    """A node more in each tree, without waiting for anything."""
    batch = search.gather(parents, search.env_ids, timeout=0)
    assert all(batch.hits)
    new = torch.ones(len(parents), 1, step, 1)
    batch.append(0, new, new)
    search.commit(children, batch, timeout=0)


def begin(search: Search, lengths: Iterable[int], *, own_root: bool) -> Nodes:
    """The trees of a search with their roots: in the init pools, or made here."""
    trees: Nodes = {}
    for env_id, length in zip(cast(tuple[int, ...], search.env_ids), lengths, strict=True):
        key: Any = "root"
        if own_root:
            key = ("root", env_id)
            with search.gather([key], [env_id], timeout=0) as batch:
                new = torch.ones(1, 1, length, 1)
                batch.append(0, new, new)
                search.commit([key], batch, lengths=[length], timeout=0, overflow=RaiseOnOverflow(length + 1))
        else:
            search.gather([key], [env_id], timeout=0).close()
        trees[env_id] = [(key, length)]
    return trees


# Searches of the planned size run to their end -----------------------------------------------------------------------


@given(data=st.data(), kind=st.sampled_from(("none", "raise", "oldest", "correct", "lazily")))
@settings(deadline=None)
def test_searches_of_any_shape_run_to_their_end_at_the_planned_size(data: st.DataObject, kind: str) -> None:
    draw = data.draw
    window = draw(st.integers(3, 12), "window")
    step = draw(st.integers(1, min(3, window - 2)), "step")
    limit = draw(st.integers(2, window + 1 - step), "limit")
    if kind not in ("none", "raise"):
        step = min(step, limit - 1)
    count = draw(st.integers(min(step, limit - 1), limit - 1), "count")
    overflow = policy(kind, window, limit, count)
    env_num, searches = draw(st.integers(1, 3), "environments"), draw(st.integers(1, 3), "searches")
    trees = draw(st.none() | st.integers(1, env_num), "trees")
    roots, simulations = draw(st.integers(0, 3), "roots"), draw(st.integers(1, 8), "simulations")
    longest = most_before(overflow, step, window)
    if longest < 1:
        return
    root_tokens = draw(st.integers(1, longest), "root")
    plan = KVCacheManager.plan(
        thin_config(window),
        env_num,
        simulations=simulations,
        step=step,
        overflow=overflow,
        searches=searches,
        trees=trees,
        roots=roots,
        root_tokens=root_tokens,
        threads=1,
    )
    with KVCacheManager(**plan.arguments, wait_timeout=0.0) as manager:
        lengths = {env: draw(st.integers(1, root_tokens), "length") for env in range(env_num)}
        for env_id in range(env_num):
            for number in range(roots):
                store_root(manager, env_id, number or "root", root_tokens if number else lengths[env_id])
        opened, left = [], []
        for number in range(searches):
            ids = [(number * plan.trees + i) % env_num for i in range(plan.trees)]
            search = manager.search(ids, overflow=overflow, timeout=0, **plan.reservation)
            opened.append((search, begin(search, [lengths[env] for env in ids], own_root=not roots)))
            left += [number] * simulations
        before = manager.get_stats_summary().total.eviction_count
        # Whatever replaces the roots while the searches hold them, there is room for it.
        for env_id in range(env_num if roots else 0):
            for number in range(roots):
                store_root(manager, env_id, number or "root", root_tokens)
        for number in draw(st.permutations(left), "turns"):
            search, grown = opened[number]
            parents, children = [], []
            for env_id, nodes in grown.items():
                able = [node for node in nodes if node[1] <= longest]
                key, length = draw(st.sampled_from(able), "parent")
                children.append((env_id, number, len(nodes)))
                nodes.append((children[-1], after(length, step, overflow)))
                parents.append(key)
            grow(search, parents, children, step)
        for search, grown in opened:
            assert search.tokens_in_use <= plan.tokens
            assert len(search) == plan.trees * (simulations + (not roots)) == plan.entries
            for env_id, nodes in grown.items():
                with search.gather([key for key, _ in nodes], [env_id] * len(nodes), timeout=0, room=0) as batch:
                    assert batch.lengths == tuple(length for _, length in nodes)
        assert manager.get_stats_summary().total.eviction_count == before == 0
        manager.check_integrity()
        for search, _ in opened:
            search.close()
        manager.check_integrity()


def test_threads_that_search_and_replace_roots_at_once_neither_wait_for_room_nor_evict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[str] = []
    wait = room._wait

    def noted(pool: Any, *arguments: Any) -> None:
        waited.append(pool.name)
        wait(pool, *arguments)

    monkeypatch.setattr(room, "_wait", noted)
    env_num, threads, rounds, window = 4, 4, 10, 8
    overflow = DropOldest(7, 2, step=2)
    plan = KVCacheManager.plan(
        thin_config(window), env_num, simulations=6, overflow=overflow, searches=threads, roots=1, threads=threads
    )
    errors: list[BaseException] = []
    start = threading.Barrier(threads)
    with KVCacheManager(**plan.arguments, wait_timeout=HANG_SECONDS) as manager:

        def work(env_id: int) -> None:
            try:
                start.wait(HANG_SECONDS)
                for _ in range(rounds):
                    assert manager.set_init_cache(env_id, "root", filled(window, 6))
                    with manager.search([env_id], overflow=overflow, **plan.reservation) as search:
                        parent: Any = "root"
                        for node in range(6):
                            grow(search, [parent], [node], 2)
                            assert manager.set_init_cache(env_id, "root", filled(window, 6))
                            parent = node
            except BaseException as error:
                errors.append(error)

        running = [threading.Thread(target=work, args=(env_id,)) for env_id in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(HANG_SECONDS)
        assert not errors
        assert not waited
        assert manager.get_stats_summary().total.eviction_count == 0
        manager.check_integrity()


# With less they do not -----------------------------------------------------------------------------------------------


def planned(overflow: Overflow | None = None, **changes: Any) -> SizePlan:
    arguments: dict[str, Any] = {"searches": 2, "roots": 2, "root_tokens": 5, "threads": 1, "simulations": 5}
    return KVCacheManager.plan(thin_config(8), 2, overflow=overflow, **{**arguments, **changes})


def open_all(plan: SizePlan, **changes: Any) -> None:
    """Open as many searches as planned at once, with the planned arguments but for these."""
    with KVCacheManager(**{**plan.arguments, **changes}, wait_timeout=0.0) as manager:
        opened = [manager.search([number], timeout=0, **plan.reservation) for number in range(plan.searches)]
        assert manager.recur_pool.stats().reserved_slots == plan.searches * plan.tokens
        for search in opened:
            search.close()


def test_a_slot_less_in_the_recurrent_pool_is_a_search_less() -> None:
    plan = planned()
    open_all(plan)
    with pytest.raises(CapacityError, match=rf"recur_slots={plan.recur_slots} would do"):
        open_all(plan, recur_slots=plan.recur_slots - 1)


def test_an_entry_less_in_the_recurrent_pool_is_a_search_less() -> None:
    plan = planned(roots=0, searches=3, trees=1)
    assert plan.max_cache_size == 3 * 6
    config = {**thin_config(8), "max_cache_size": plan.max_cache_size - 1}
    with (
        KVCacheManager(config, 2, recur_slots=plan.recur_slots, wait_timeout=0.0) as manager,
        manager.search([0], timeout=0, **plan.reservation),
        manager.search([1], timeout=0, **plan.reservation),
        pytest.raises(CapacityError, match=rf"config.max_cache_size={plan.max_cache_size} would do"),
    ):
        manager.search([0], timeout=0, **plan.reservation)


def test_an_entry_less_than_the_least_configuration_is_refused_by_the_manager() -> None:
    plan = planned()
    assert (plan.max_cache_size, plan.searches * plan.entries) == (12, 10)  # one for each environment is not needed
    with pytest.raises(InvalidArgumentError, match=r"max_cache_size must be at least 12"):
        KVCacheManager({**thin_config(8), "max_cache_size": 11}, 2)


@pytest.mark.parametrize("kind", ["oldest", "correct", "lazily"])
@pytest.mark.parametrize(
    ("window", "limit", "count", "nodes", "root_tokens"),
    [
        *[(8, 7, 2, 5, root_tokens) for root_tokens in (1, 3, 6, (5,), (1, 3, 5))],
        (12, 11, 4, 10, 5),  # a root of 4 comes to longer rows, one of 5 to them sooner
        (12, 5, 3, 4, 12),  # roots of more than 5 get no child
    ],
)
def test_the_dearest_tree_takes_every_planned_token_and_no_other_takes_more(
    kind: str, window: int, limit: int, count: int, nodes: int, root_tokens: Any
) -> None:
    overflow, step = policy(kind, window, limit, count), 2
    plan = KVCacheManager.plan(
        thin_config(window), 1, simulations=nodes, step=step, overflow=overflow, roots=1, root_tokens=root_tokens
    )
    lengths = range(1, root_tokens + 1) if isinstance(root_tokens, int) else root_tokens
    found = set()
    with KVCacheManager(**plan.arguments) as manager:
        for length in lengths:
            store_root(manager, 0, "root", length)
            for depth in range(1, nodes + 1) if length <= most_before(overflow, step, window) else ():
                for at in range(depth):  # a chain, and all other nodes below one of its
                    with manager.search([0], overflow=overflow, **plan.reservation) as search:
                        chain: list[Any] = ["root"]
                        for node in range(nodes):
                            grow(search, [chain[-1] if node < depth else chain[at]], [node], step)
                            chain.append(node)
                        found.add(search.tokens_in_use)
        manager.check_integrity()
    assert max(found) == plan.tokens


@pytest.mark.parametrize("kind", ["oldest", "correct"])
def test_a_token_less_in_the_reservation_is_a_node_less(kind: str) -> None:
    overflow = policy(kind, 8, 7, 2)
    plan = planned(overflow, searches=1, trees=2, root_tokens=6)
    with KVCacheManager(**plan.arguments) as manager:
        for env_id in range(2):
            store_root(manager, env_id, "root", 6)
        for less in (0, 1):
            with (
                manager.search([0, 1], overflow=overflow, entries=plan.entries, tokens=plan.tokens - less) as search,
                manager.search([0], entries=1, tokens=less or 1, timeout=0) if less else search,
            ):
                for node in range(4):
                    grow(search, ["root"] * 2, [(0, node), (1, node)], 2)
                if less:
                    with pytest.raises(CapacityError, match=rf"tokens={plan.tokens}, where recur_slots="):
                        grow(search, ["root"] * 2, [(0, 4), (1, 4)], 2)
                else:
                    grow(search, ["root"] * 2, [(0, 4), (1, 4)], 2)
        manager.check_integrity()


@pytest.mark.parametrize("less", [0, 1])
def test_a_slot_less_of_headroom_is_a_wait_once_all_else_is_full(less: int) -> None:
    plan = planned(DropOldest(7, 2), root_tokens=6, searches=1, trees=2)
    assert plan.headroom_tokens == 3 * 6
    changed = {**plan.arguments, "headroom_tokens": plan.headroom_tokens - less}
    with KVCacheManager(**changed, wait_timeout=0.0) as manager:
        manager.set_wm_cache("full", filled(8, 8))
        for env_id in range(2):
            for key in ("root", "other"):
                store_root(manager, env_id, key, 6)
        with manager.search([0, 1], **plan.reservation) as search:
            begin(search, [6, 6], own_root=False)
            for env_id in range(2):
                store_root(manager, env_id, "root", 6)
            if less:
                with pytest.raises(WaitTimeoutError, match="no room"):
                    store_root(manager, 0, "root", 6)
            else:
                store_root(manager, 0, "root", 6)
        assert manager.get_stats_summary().total.eviction_count == 0
        manager.check_integrity()


def test_a_root_less_than_planned_evicts_one() -> None:
    plan = planned(DropOldest(7, 2), roots=3, root_tokens=6)
    for less in (0, 1):
        with KVCacheManager(**{**plan.arguments, "init_tokens": plan.init_tokens - less}) as manager:
            for key in range(3):
                store_root(manager, 0, key, 6)
            assert manager.get_stats_summary().total.eviction_count == less


# What is said, and refused -------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_a_small_table_and_says_what_is_allocated() -> None:
    plan = planned(DropOldest(7, 2), wm_entries=3)
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    for name, value in {**plan.sizes, "config.max_cache_size": plan.max_cache_size}.items():
        assert any(line.split() == [name, f"{value:,}"] for line in lines), name
    assert plan.allocation == KVCacheManager.allocation_for(**plan.arguments)
    assert sum(slots for _, slots, _ in plan.parts.values()) == plan.allocation.total_slots
    assert sum(nbytes for *_, nbytes in plan.parts.values()) == plan.allocation.nbytes - plan.allocation.bytes_per_slot
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == plan


def test_a_plan_of_the_largest_numbers_still_fits_a_terminal() -> None:
    config = thin_config(131_072, num_layers=64, embed_dim=8_192, num_heads=64)
    plan = KVCacheManager.plan(config, 1_024, simulations=100_000, searches=64, step=4_096, roots=100)
    assert max(map(len, str(plan).splitlines())) <= 80


def test_a_manager_is_planned_of_the_config_of_another_and_of_a_language_models() -> None:
    plan = planned()
    again = KVCacheManager.plan(plan.config, 2, searches=2, roots=2, root_tokens=5, threads=1)
    assert again == plan
    language = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 1, "max_position_embeddings": 64}
    assert KVCacheManager.plan(language, 1, step=8, root_tokens=16).simulations == 64
    assert KVCacheManager.plan(language, 1, simulations=7, step=8, root_tokens=16).max_cache_size == 8


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"simulations": 0}, InvalidArgumentError, r"^simulations must be at least 1, got 0$"),
        ({"step": 8}, InvalidArgumentError, r"^step must be below the window of 8, which has a root too, got 8$"),
        ({"step": 3, "overflow": DropOldest(6, 2)}, InvalidArgumentError, r"^step must be at most 2 in a window of 8 "),
        ({"step": 3, "overflow": DropOldest(7, 4)}, InvalidArgumentError, r"^step must be at most 2 .*; got 3$"),
        ({"overflow": DropOldest(9, 2)}, InvalidArgumentError, r"^overflow.limit must be at most the window"),
        ({"overflow": "drop"}, InvalidTypeError, r"^overflow must be a RaiseOnOverflow"),
        ({"searches": 0}, InvalidArgumentError, r"^searches must be at least 1, got 0$"),
        ({"trees": 3}, InvalidArgumentError, r"^trees must be at most env_num=2, got 3$"),
        ({"roots": -1}, InvalidArgumentError, r"^roots must be at least 0, got -1$"),
        ({"root_tokens": 9}, InvalidArgumentError, r"^root_tokens must be at most the window of 8, got 9$"),
        ({"root_tokens": ()}, InvalidArgumentError, r"^root_tokens must name at least one length, got none$"),
        ({"root_tokens": 1.5}, InvalidTypeError, r"^root_tokens must be an int of at least 1, got 1.5$"),
        ({"threads": 0}, InvalidArgumentError, r"^threads must be at least 1, got 0$"),
        ({"wm_entries": 0}, InvalidArgumentError, r"^wm_entries must be at least 1, got 0$"),
    ],
)
def test_what_no_search_can_have_is_an_error_that_says_what_would_do(
    arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        KVCacheManager.plan(thin_config(8), 2, **arguments)


def test_a_configuration_that_lacks_a_size_is_refused_by_its_name() -> None:
    config = thin_config(8)
    del config["num_simulations"]
    with pytest.raises(InvalidArgumentError, match="config must have 'num_simulations'"):
        KVCacheManager.plan(config, 2)
    with pytest.raises(InvalidArgumentError, match="env_num must agree"):
        KVCacheManager.plan(planned().config, 3)


@pytest.mark.parametrize("roots", [1, 0])
def test_a_search_that_goes_on_for_the_planned_moves_has_room_and_a_token_less_is_a_node_less(roots: int) -> None:
    nodes, moves, step = 20, 6, 2
    config = {
        "num_layers": 1,
        "num_heads": 1,
        "embed_dim": 2,
        "context_length": 32,
        "num_simulations": nodes,
        "device": "cpu",
    }
    plan = KVCacheManager.plan(config, 1, moves=moves, step=step, roots=roots, root_tokens=3)
    assert plan.tokens == KVCacheManager.plan(config, 1, step=step, roots=roots, root_tokens=3).tokens + step * (
        moves - 2
    )

    def play(less: int) -> None:
        tokens = plan.tokens - less
        with KVCacheManager(**plan.arguments | {"recur_slots": tokens}) as manager:
            root = KeysValues.from_packed(torch.ones(2, 1, 1, 3, 2))
            with manager.search([0], entries=plan.entries, tokens=tokens, timeout=0.0) as search:
                if roots:
                    manager.set_init_cache(0, "root", root)
                else:
                    with search.gather(["root"], [0], room=3) as batch:
                        batch.append(0, torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
                        search.commit(["root"], batch, lengths=[3])
                best: object = "root"
                for move in range(moves):
                    for number in range(nodes - (move > 0)):
                        with search.gather([best], [0], room=step) as batch:
                            batch.append(0, torch.ones(1, 1, step, 2), torch.ones(1, 1, step, 2))
                            search.commit([(move, number)], batch)
                    best = (move, 0)
                    search.keep([best])
            manager.check_integrity()

    play(0)
    with pytest.raises(CapacityError):
        play(1)
