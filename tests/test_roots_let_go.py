"""Roots that a search has adopted: held while its entries name their slots, and no longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from concurrent_kv import KeyNotFoundError, KeysValues, KVCacheManager, Search
from concurrent_kv.search.state import SearchState
from tests.conftest import MakeManager
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.support import append, assert_same, config, tokens
from tests.test_manager_streams import run_device

pytestmark = pytest.mark.usefixtures("loops")

Way = Callable[[Search], None]


def grow(search: Search, parent: object, child: object) -> None:
    with search.gather([parent], [0]) as batch:
        append(batch, [7])
        search.commit([child], batch)


def tree_released(search: Search) -> None:
    grow(search, "root", "child")
    search.release(["child", "root"])


def root_released_before_its_child(search: Search) -> None:
    grow(search, "root", "child")
    search.release(["root"])
    search.release(["child"])


def kept_while_read(search: Search) -> None:
    with search.gather(["root"], [0]):
        search.keep([])


def child_discarded(search: Search) -> None:
    grow(search, "root", "child")
    search.keep(["child"])
    search.discard("child")


def child_replaced(search: Search) -> None:
    grow(search, "root", "child")
    search.keep(["child"])
    with search.gather(["none"], [0]) as batch:
        batch.fill(0, tokens(3, 2))
        append(batch, [7])
        search.commit(["child"], batch)


def child_released_while_read(search: Search) -> None:
    grow(search, "root", "child")
    search.keep(["child"])
    with search.gather(["child"], [0]):
        search.release(["child"])


def child_released(search: Search) -> None:
    grow(search, "root", "child")
    search.keep(["child"])
    search.release(["child"])


WAYS = [
    tree_released,
    root_released_before_its_child,
    kept_while_read,
    child_discarded,
    child_replaced,
    child_released_while_read,
    child_released,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_root_that_was_not_kept_goes_with_the_last_entry_that_names_its_slots(
    make_manager: MakeManager, way: Way
) -> None:
    manager = make_manager(1, settings=config(max_cache_size=2, num_simulations=1), init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 6))
    with manager.search([0], entries=2, tokens=16) as search:
        way(search)
        manager.get_init_cache(0, "none")  # does what was left to the next operation
        assert search._state.roots_hold.entries == []
        assert not search._state.ledger.parted
        free = manager.storage.ledger.slots.free_count
        manager.clear_init_caches()
        assert manager.storage.ledger.slots.free_count == free + 6
        manager.check_integrity()


def test_a_root_that_was_not_kept_stays_while_a_child_names_some_of_it(make_manager: MakeManager) -> None:
    manager = make_manager(1, init_entries=1)
    manager.set_init_cache(0, "root", tokens(1, 3))
    with manager.search([0]) as search:
        grow(search, "root", "child")
        search.keep(["child"])
        manager.clear_init_caches()
        for value in range(4):  # which would be written to its slots
            manager.set_init_cache(0, "root", tokens(value, 3))
        with search.gather(["child"], [0]) as batch:
            assert batch.lengths == (5,)
            assert_same(KeysValues.from_packed(batch.data[:, :, :, :3].clone()), tokens(1, 3))
        manager.check_integrity()


def test_a_closed_search_keeps_no_side_data_of_its_roots(make_manager: MakeManager) -> None:
    class Side:
        pass

    side = Side()
    seen = weakref.ref(side)
    manager = make_manager(1)
    manager.set_init_cache(0, "root", tokens(1, 3), side=side)
    del side
    search = manager.search([0])
    grow(search, "root", "child")
    search.close()
    manager.clear_all()
    gc.collect()
    assert seen() is None
    assert search.closed


class Closes:
    """A key whose `__eq__` closes a search, outside of all locks."""

    def __init__(self, search: Search | None = None) -> None:
        self.search = search

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        for key in (self, other):
            if isinstance(key, Closes) and key.search is not None:
                search, key.search = key.search, None
                search.close()
        return True


def test_a_search_that_a_commit_finds_closed_has_no_rows_to_look_at(make_manager: MakeManager) -> None:
    manager = make_manager(1, settings=config(max_cache_size=2, num_simulations=1))
    search = manager.search([0], entries=1, tokens=8)
    batches = [search.gather(["none"], [0]) for _ in range(2)]  # before it has an entry: they keep nothing
    for batch in batches:
        batch.fill(0, tokens(1, 2))
        append(batch, [7])
    search.commit([Closes()], batches[0])
    others = manager.search([0], entries=1, tokens=8) if manager.recur_pool.account.fits(1, 8) else None
    with pytest.raises(Exception, match="closed"):
        search.commit([Closes(search)], batches[1])
    if others is not None:
        others.close()
    manager.check_integrity()


def test_what_a_search_read_of_a_root_is_waited_for_after_repair(gpu: SimGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the search is cut off; the root is replaced on another stream before the gather of it has run."""
    settings = {"num_layers": 1, "num_heads": 1, "embed_dim": 1, "context_length": 4, "num_simulations": 1}
    manager = KVCacheManager({**settings, "max_cache_size": 4, "device": gpu.devices[0]}, 1, init_entries=1)

    def filled(value: float) -> KeysValues:
        return KeysValues.from_packed(torch.full((2, 1, 1, 4, 1), value).to(gpu.devices[0]))

    manager.set_init_cache(0, "root", filled(1.0))
    run_device(gpu)
    search = manager.search([0], entries=1, tokens=4)
    stream: Any = gpu.stream(1)
    search.gather(["root"], [0], stream=stream)

    def cut_off(state: SearchState) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchState, "_end_holds", cut_off)
        with pytest.raises(KeyboardInterrupt):
            search.close()
    manager.repair()
    root = manager.init_pools[0].default_scope.entries[0].get("root")
    assert root is not None
    assert len(root.ticks) > 1  # of its write, and of the read that has not run
    del root
    run_device(gpu)
    manager.close()


def test_one_of_two_trees_of_a_search_can_be_released_alone(make_manager: MakeManager) -> None:
    manager = make_manager(2)
    for env in range(2):
        manager.set_init_cache(env, ("root", env), tokens(1 + env, 3))
    with manager.search([0, 1]) as search:
        for env in range(2):
            with search.gather([("root", env)], [env]) as batch:
                append(batch, [7])
                search.commit([("child", env)], batch)
        with pytest.raises(KeyNotFoundError, match="nowhere"):
            search.release([("root", 0), ("child", 0), "nowhere"])
        assert search.held == 4
        search.release([("root", 0), ("child", 0)])
        assert search.held == 2
        with search.gather([("child", 1)], [1]) as batch:
            assert batch.lengths == (5,)
        # What is gone can be adopted again.
        with search.gather([("root", 0)], [0]) as batch:
            assert batch.hits == (True,)
    manager.check_integrity()
