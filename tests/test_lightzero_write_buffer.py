"""Nodes that the one import stores many at a time: nothing that looks finds them missing, or finds other bytes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from concurrent_kv import (
    ClosedError,
    DropLazily,
    HostTier,
    InvalidArgumentError,
    KeysValues,
    KVCacheManager,
    PositionSteps,
    ReentrantCallError,
    WaitTimeoutError,
    WrongProcessError,
)
from concurrent_kv.books import index
from concurrent_kv.compat.lightzero import LightZeroKeysValues, LightZeroKVCacheManager, from_lightzero, write_buffer
from concurrent_kv.compat.lightzero import manager as lightzero_manager
from concurrent_kv.compat.lightzero.manager import ROWS_TOGETHER
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.locks.gate import gate
from concurrent_kv.native import native
from concurrent_kv.pool import storage
from concurrent_kv.pool.core import PoolCore
from tests.support import HANG_SECONDS, config

LAYERS, HEADS, WINDOW, HEAD_DIM = 2, 2, 8, 3

compiled = pytest.mark.skipif(native is None, reason="reads without a hold are compiled code's")


def container(value: float, size: int = 5) -> LightZeroKeysValues:
    return LightZeroKeysValues(torch.full((2 * LAYERS, 1, HEADS, WINDOW, HEAD_DIM), float(value)), size)


def container_as_row(value: float) -> KeysValues:
    return from_lightzero(container(value))


def value_of(found: Any) -> float | None:
    """What all valid numbers of a container are; they must be the same."""
    if found is None:
        return None
    valid: Tensor = found.packed[..., : found.size, :]
    assert (valid == valid.ravel()[0]).all()
    return float(valid.ravel()[0])


def overtake(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object]) -> None:
    """Have `act` come before the next call of a function."""
    called = getattr(owner, name)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        act()
        return called(*arguments, **options)

    monkeypatch.setattr(owner, name, overtaken)


@pytest.fixture
def manager() -> Iterator[LightZeroKVCacheManager]:
    """Two environments, and room for 42 nodes."""
    made = LightZeroKVCacheManager(config(num_simulations=20), env_num=2)
    yield made
    if not made.manager.storage.closed:
        made.manager.check_integrity()
        made.manager.close()


@pytest.fixture
def pool(manager: LightZeroKVCacheManager) -> Any:
    """The pool of nodes, as kept by a user before anything is set."""
    return manager.manager.recur_pool


def waiting(manager: LightZeroKVCacheManager) -> int:
    return 0 if manager._buffer is None else len(manager._buffer._rows)


@compiled
def test_new_nodes_are_stored_by_one_write_for_many(manager: LightZeroKVCacheManager, pool: Any) -> None:
    for key in range(ROWS_TOGETHER - 1):
        manager.set_recur_cache(key, container(key))
    assert (waiting(manager), len(pool)) == (ROWS_TOGETHER - 1, 0)
    assert [value_of(manager.get_recur_cache(key)) for key in range(ROWS_TOGETHER)] == [
        *range(ROWS_TOGETHER - 1),
        None,
    ]
    manager.set_recur_cache(-1, container(-1.0))
    assert (waiting(manager), len(pool)) == (0, ROWS_TOGETHER)
    assert [value_of(manager.hierarchical_get(1, key)) for key in range(-1, 5)] == [*range(-1, 5)]


@pytest.mark.parametrize(
    "look",
    [
        lambda lz, pool: lz.get_recur_cache(7) is not None,
        lambda lz, pool: lz.hierarchical_get(1, 7) is not None,
        lambda lz, pool: 7 in lz.recur_pool._key_to_index,
        lambda lz, pool: len(lz.recur_pool) == 1,
        lambda lz, pool: len(lz.recur_pool.pool) == 1,
        lambda lz, pool: lz.manager.get_stats_summary().total.entries == 1,
        lambda lz, pool: pool.get(7) is not None,
        lambda lz, pool: 7 in pool,
        lambda lz, pool: pool.keys() == [7],
        lambda lz, pool: pool.pop(7) is not None and lz.get_recur_cache(7) is None,
        lambda lz, pool: lz.get_init_cache(0, 7) is None and lz.get_recur_cache(7) is not None,
    ],
)
def test_a_node_is_found_from_when_it_is_set_on_whoever_looks(
    manager: LightZeroKVCacheManager, pool: Any, look: Callable[[Any, Any], bool]
) -> None:
    manager.set_recur_cache(7, container(7.0))
    assert look(manager, pool)


def test_what_is_set_is_copied_at_once(manager: LightZeroKVCacheManager) -> None:
    kv = container(1.0)
    manager.set_recur_cache(1, kv)
    kv.packed.zero_()
    found = manager.get_recur_cache(1)
    assert value_of(found) == 1.0
    found.packed.fill_(9.0)  # type: ignore[union-attr]
    assert value_of(manager.get_recur_cache(1)) == 1.0
    assert manager.manager.recur_pool.get(1).packed.eq(1.0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("stored", [False, True])
def test_the_last_of_a_key_is_found(manager: LightZeroKVCacheManager, pool: Any, stored: bool) -> None:
    for value in (1.0, 2.0, 3.0):
        manager.set_recur_cache(1, container(value))
        if stored:
            assert 1 in pool
        assert value_of(manager.get_recur_cache(1)) == value
    assert float(pool.get(1).keys.ravel()[0]) == 3.0
    assert pool.keys() == [1]


@pytest.mark.parametrize("end", ["clear", "bump_version"])
def test_what_was_set_before_the_pools_end_of_a_generation_is_gone_after_it(
    manager: LightZeroKVCacheManager, pool: Any, end: str
) -> None:
    manager.set_recur_cache(1, container(1.0))
    getattr(pool, end)()
    assert manager.get_recur_cache(1) is None
    manager.set_recur_cache(2, container(2.0))
    assert value_of(manager.get_recur_cache(2)) == 2.0
    assert manager.get_recur_cache(1) is None


@compiled
def test_rows_of_a_generation_that_ended_while_they_waited_are_neither_found_nor_stored(
    manager: LightZeroKVCacheManager, pool: Any
) -> None:
    manager.set_recur_cache(1, container(1.0))
    pool.storage.ledger.abandoned.clear()  # as if the end had come between the look at the notes and this
    pool.bump_version()
    assert manager.get_recur_cache(1) is None
    manager.recur_pool._buffer.store()  # type: ignore[union-attr]
    assert len(pool) == 0


def test_the_order_of_victims_is_that_of_the_calls(manager: LightZeroKVCacheManager) -> None:
    size = manager.recur_pool.pool_size
    for key in range(size + 3):
        manager.set_recur_cache(key, container(key, size=5 if key % 7 else 3))
    assert set(manager.recur_pool._key_to_index) == set(range(3, size + 3))
    manager.set_recur_cache(4, container(0.0))  # the newest now
    manager.set_recur_cache(-1, container(0.0))
    manager.set_recur_cache(-2, container(0.0))
    assert set(manager.recur_pool._key_to_index) == {-1, -2, 4, *range(6, size + 3)}
    assert manager.recur_pool.stats is not None
    assert manager.recur_pool.stats.evictions == 5


def test_nodes_that_cannot_be_stored_just_now_wait_and_are_found(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))

    def busy(*arguments: object) -> bool:
        raise WaitTimeoutError("busy")

    if waiting(manager):
        with monkeypatch.context() as patch:
            patch.setattr(write_buffer, "put_rows", busy)
            assert pool.get(1) is None  # who comes by is not held up
            assert value_of(manager.get_recur_cache(1)) == 1.0
            with pytest.raises(WaitTimeoutError):
                len(manager.recur_pool)
    assert pool.get(1) is not None


def test_a_call_from_inside_a_critical_section_raises_and_leaves_what_waits(manager: LightZeroKVCacheManager) -> None:
    manager.set_recur_cache(1, container(1.0))
    with gate.lock:
        for call in (
            lambda: manager.get_recur_cache(1),
            lambda: manager.set_recur_cache(2, container(2.0)),
        ):
            with pytest.raises(ReentrantCallError):
                call()
        assert len(manager.recur_pool) <= 1
    assert value_of(manager.get_recur_cache(1)) == 1.0
    assert manager.get_recur_cache(2) is None


@compiled
def test_a_finaliser_that_sets_a_node_while_one_is_set_loses_neither(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = torch._foreach_copy_

    def interrupted(to: list[Tensor], of: list[Tensor]) -> None:
        copied(to, of)
        monkeypatch.undo()
        manager.set_recur_cache(2, container(2.0))
        assert value_of(manager.get_recur_cache(2)) == 2.0

    manager.set_recur_cache(0, container(0.0))
    monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
    manager.set_recur_cache(1, container(1.0))
    assert [value_of(manager.get_recur_cache(key)) for key in range(3)] == [0.0, 1.0, 2.0]
    assert set(pool.keys()) == {0, 1, 2}


@compiled
def test_who_waits_for_a_thread_that_sets_a_node_hears_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads whose finalisers set nodes of each other's managers would wait for ever."""
    managers = [LightZeroKVCacheManager(config(), 2, wait_timeout=0.2) for _ in range(2)]
    both_set, heard, began = threading.Barrier(2), list[str](), set[str]()
    copied = torch._foreach_copy_

    def crosswise(to: list[Tensor], of: list[Tensor]) -> None:
        copied(to, of)
        name = threading.current_thread().name
        if name in began:
            return
        began.add(name)
        both_set.wait(HANG_SECONDS)
        try:
            managers[1 - int(name)].set_recur_cache(2, container(2.0))
        except WaitTimeoutError as error:
            heard.append(str(error))

    monkeypatch.setattr(torch, "_foreach_copy_", crosswise)
    threads = [
        threading.Thread(target=manager.set_recur_cache, args=(1, container(1.0)), name=str(number), daemon=True)
        for number, manager in enumerate(managers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert heard
    assert all("another thread was setting a row" in words for words in heard)
    for manager in managers:
        assert value_of(manager.get_recur_cache(1)) == 1.0
        manager.manager.check_integrity()
        manager.manager.close()


@pytest.mark.parametrize("settings", [{"policy": "lru"}, {"tier": HostTier(1 << 16)}], ids=["lru", "tier"])
def test_where_hits_are_noted_or_a_tier_is_beneath_every_row_is_stored_at_once(settings: dict[str, Any]) -> None:
    manager = LightZeroKVCacheManager(config(), 2, **settings)
    pool: KVCacheManager = manager.manager
    manager.set_recur_cache(1, container(1.0))
    assert len(pool.recur_pool) == 1
    assert value_of(manager.hierarchical_get(0, 1)) == 1.0
    manager.manager.close()


def test_threads_find_what_they_have_set(manager: LightZeroKVCacheManager, pool: Any) -> None:
    errors: list[str] = []
    barrier = threading.Barrier(3)

    def run(number: int) -> None:
        barrier.wait(HANG_SECONDS)
        for turn in range(150):
            key = number * 4 + turn % 4
            value = float(100 * turn + number)
            manager.set_recur_cache(key, container(value))
            found = value_of(manager.get_recur_cache(key))
            direct = pool.get(key)
            if found != value or direct is None or float(direct.keys.ravel()[0]) != value:
                errors.append(f"{key}: {found} and {direct} for {value}")
            if turn % 10 == number:
                manager.recur_pool._key_to_index.keys()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert errors == []


# Reads that hold nothing ---------------------------------------------------------------------------------------------


@compiled
def test_an_entry_that_dies_while_it_is_copied_is_not_what_is_found(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))
    assert 1 in pool

    def others_come() -> None:
        pool.pop(1)
        for key in range(2, 12):  # its slots are others' now
            pool.put(key, container_as_row(9.0))
        pool.put(1, container_as_row(4.0))

    overtake(monkeypatch, SlotTensor, "gather", others_come)
    assert value_of(manager.get_recur_cache(1)) == 4.0


@compiled
def test_an_entry_that_is_dead_before_it_is_copied_is_looked_up_anew(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))
    assert 1 in pool

    def another_comes() -> None:
        pool.pop(1)  # it has no row in the tables any more
        pool.put(1, container_as_row(4.0))

    overtake(monkeypatch, lightzero_manager, "copy_unheld", another_comes)
    assert value_of(manager.get_recur_cache(1)) == 4.0


@compiled
def test_an_entry_that_is_replaced_while_it_is_copied_may_still_be_what_is_found(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))
    pin = pool.pin(1)
    overtake(monkeypatch, SlotTensor, "gather", lambda: pool.put(1, container_as_row(4.0)))
    assert value_of(manager.get_recur_cache(1)) == 1.0  # current when it was looked up, and pinned
    assert value_of(manager.get_recur_cache(1)) == 4.0
    pin.close()


@compiled
def test_what_was_discarded_is_not_found(manager: LightZeroKVCacheManager, pool: Any) -> None:
    for lz, kv_pool in ((manager.recur_pool, pool), (manager.init_pools[0], manager.init_pools[0].pool)):
        lz.set(1, container(1.0))
        assert 1 in kv_pool
        kv_pool.discard(1)
        assert lz.get(1) is None


@compiled
def test_a_close_during_a_lookup_is_no_miss(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))
    assert 1 in pool
    overtake(monkeypatch, index.Index, "get", lambda: manager.manager.close())
    with pytest.raises(ClosedError):
        manager.get_recur_cache(1)


def test_a_closed_pool_says_so(manager: LightZeroKVCacheManager) -> None:
    manager.set_recur_cache(1, container(1.0))
    manager.manager.close()
    for call in (
        lambda: manager.get_recur_cache(1),
        lambda: manager.hierarchical_get(0, 2),
        lambda: manager.set_recur_cache(3, container(1.0)),
    ):
        with pytest.raises(ClosedError):
            call()


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_hears_so_whatever_another_thread_was_setting(manager: LightZeroKVCacheManager) -> None:
    manager.set_recur_cache(1, container(1.0))
    assert manager._buffer is not None
    held, done = threading.Event(), threading.Event()

    def hold(turn: Any) -> None:
        with turn:
            held.set()
            done.wait(HANG_SECONDS)

    thread = threading.Thread(target=hold, args=(manager._buffer._turn,))
    thread.start()
    assert held.wait(HANG_SECONDS)
    child = os.fork()
    if not child:
        signal.alarm(10)  # it would wait for good
        heard = 0
        for call in (
            lambda: manager.get_recur_cache(1),
            lambda: manager.set_recur_cache(2, container(1.0)),
            lambda: len(manager.recur_pool),
            lambda: manager.manager,
        ):
            with suppress(WrongProcessError):
                call()
                continue
            heard += 1
        os._exit(0 if heard == 4 else 1)
    done.set()
    thread.join(HANG_SECONDS)
    assert os.waitpid(child, 0)[1] == 0


# What an attack found ------------------------------------------------------------------------------------------------


@compiled
def test_two_operations_that_store_what_waits_leave_what_is_set_between_them(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have done one note; the first takes it off, a row is set, and the second must not take its note off."""
    manager.set_recur_cache(1, container(1.0))
    taken_off, have_done, may_go_on = storage._take_off, threading.Barrier(3), threading.Semaphore(0)

    def held_up(abandoned: Any, release: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            have_done.wait(HANG_SECONDS)
            assert may_go_on.acquire(timeout=HANG_SECONDS)
        taken_off(abandoned, release)

    monkeypatch.setattr(storage, "_take_off", held_up)
    threads = [threading.Thread(target=pool.get, args=(1,), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    have_done.wait(HANG_SECONDS)
    manager.set_recur_cache(2, container(2.0))
    may_go_on.release(2)
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert pool.get(2) is not None


@compiled
def test_a_store_that_raises_what_no_operation_expects_is_done_by_a_later_one(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))

    def fails(*arguments: Any) -> bool:
        monkeypatch.undo()
        raise ValueError("a mode of torch's, say")

    monkeypatch.setattr(write_buffer, "put_rows", fails)
    pool.contains("another")
    assert pool.contains(1)


@compiled
def test_rows_wait_in_host_memory_whatever_the_default_device(manager: LightZeroKVCacheManager, pool: Any) -> None:
    row = container(1.0)
    with torch.device("meta"):
        manager.set_recur_cache(1, row)
    manager.set_recur_cache(2, container(2.0))
    assert value_of(manager.get_recur_cache(1)) == 1.0
    assert {1, 2} == set(pool.keys())


@compiled
def test_a_key_among_others_of_its_hash_is_found_while_one_of_those_goes(
    manager: LightZeroKVCacheManager, pool: Any
) -> None:
    compared, gone = threading.Event(), threading.Event()
    is_armed = False

    class Key:
        def __init__(self, number: int) -> None:
            self.number = number

        def __hash__(self) -> int:
            return 12345

        def __eq__(self, other: object) -> bool:
            assert isinstance(other, Key)
            if is_armed and threading.current_thread() is reader and 1 in (self.number, other.number):
                compared.set()
                gone.wait(1.0)
            return self.number == other.number

    for number in range(3):
        manager.set_recur_cache(Key(number), container(float(number)))
    found: list[float | None] = []
    reader = threading.Thread(target=lambda: found.append(value_of(manager.get_recur_cache(Key(2)))), daemon=True)
    is_armed = True
    reader.start()
    assert compared.wait(HANG_SECONDS)
    with suppress(WaitTimeoutError):  # the reader has the shard
        pool.pop(Key(1), timeout=0.1)
    gone.set()
    reader.join(HANG_SECONDS)
    assert found == [2.0]


@compiled
def test_where_no_more_can_wait_and_none_can_be_stored_a_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = LightZeroKVCacheManager(config(num_simulations=60), env_num=2, wait_timeout=0.05)

    def busy(*arguments: Any) -> bool:
        raise WaitTimeoutError("a shard is busy")

    monkeypatch.setattr(write_buffer, "put_rows", busy)
    for key in range(ROWS_TOGETHER - 1):
        manager.set_recur_cache(key, container(float(key)))
    for key in (ROWS_TOGETHER - 1, ROWS_TOGETHER, ROWS_TOGETHER + 1):
        with pytest.raises(WaitTimeoutError, match="a shard is busy"):
            manager.set_recur_cache(key, container(float(key)))
    monkeypatch.undo()
    manager.set_recur_cache(100, container(100.0))
    assert value_of(manager.get_recur_cache(0)) == 0.0
    assert value_of(manager.get_recur_cache(100)) == 100.0
    assert len(manager.recur_pool) == ROWS_TOGETHER + 1
    manager.manager.check_integrity()
    manager.manager.close()


@compiled
def test_a_row_that_waits_and_is_set_again_is_replaced(manager: LightZeroKVCacheManager) -> None:
    for value in range(5):
        manager.set_recur_cache(7, container(float(value)))
    assert value_of(manager.get_recur_cache(7)) == 4.0
    assert manager.manager.recur_pool.stats().replace_count == 4


@compiled
def test_a_manager_that_is_closed_while_a_row_is_set_can_be_asked_and_closed_again(
    manager: LightZeroKVCacheManager,
) -> None:
    pools = manager.manager

    class Closing:
        @property
        def _keys_values(self) -> Any:
            pools.close()
            return container(1.0)._keys_values

    manager.set_recur_cache(1, Closing())  # as if it had come before
    assert manager.manager is pools
    manager.manager.close()
    with pytest.raises(ClosedError):
        manager.get_recur_cache(1)


@compiled
def test_a_sparse_tensor_in_a_container_is_refused_by_name(manager: LightZeroKVCacheManager) -> None:
    bad = container(1.0)
    bad._keys_values[0]._k_cache._cache = torch.zeros(1, HEADS, WINDOW, HEAD_DIM).to_sparse()
    with pytest.raises(InvalidArgumentError, match="dense"):
        manager.set_recur_cache(1, bad)


@compiled
def test_what_is_older_than_its_scope_is_no_hit_while_a_clear_sweeps(
    manager: LightZeroKVCacheManager, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.set_recur_cache(1, container(1.0))
    assert 1 in pool
    found: list[Any] = []
    overtake(monkeypatch, PoolCore, "_sweep", lambda: found.append(manager.get_recur_cache(1)))
    manager.clear_recur_cache()
    assert found == [None]


@compiled
def test_a_root_that_is_owed_corrections_gets_them(manager: LightZeroKVCacheManager) -> None:
    pools = manager.manager
    layout = pools.recur_pool.layout
    difference = torch.randn(LAYERS, 2, HEADS, WINDOW - 3, HEAD_DIM)
    lazily = DropLazily(WINDOW - 1, 2, PositionSteps(layout, 2, difference))
    pools.set_init_cache(0, "root", container_as_row(1.0))
    with pools.search([0], overflow=lazily) as search:
        batch = search.gather(["root"], [0])
        for layer in range(LAYERS):
            batch.append(layer, torch.ones(1, HEADS, 2, HEAD_DIM), torch.ones(1, HEADS, 2, HEAD_DIM))
        search.commit(["child"], batch)
        assert search.promote("child", 0, as_key=7)
    expected = pools.init_pools[0].get(7)
    found = manager.get_init_cache(0, 7)
    assert expected is not None
    assert found is not None
    assert (expected.keys[:, :, :, :1] != 1.0).any()  # what moved is owed something
    assert torch.equal(found.packed[:LAYERS, ..., : found.size, :], expected.keys)


@compiled
def test_behind_a_row_that_waits_there_are_zeros(manager: LightZeroKVCacheManager) -> None:
    row = container(1.0)
    row.packed[..., 5:, :] = 9.0
    manager.set_recur_cache(1, row)
    assert waiting(manager) == 1
    found = manager.get_recur_cache(1)
    assert found is not None
    assert bool((found.packed[..., 5:, :] == 0.0).all())


@compiled
def test_a_row_for_which_another_has_to_go_does_not_wait(manager: LightZeroKVCacheManager, pool: Any) -> None:
    most = pool.account.max_entries
    for key in range(most):
        manager.set_recur_cache(key, container(float(key)))
    manager.set_recur_cache(most, container(float(most)))
    assert manager.get_recur_cache(0) is None
    assert value_of(manager.get_recur_cache(most)) == float(most)


@compiled
def test_rows_of_other_lengths_do_not_wait_together(manager: LightZeroKVCacheManager, pool: Any) -> None:
    sizes = {1: 5, 2: 3, 3: 3, 4: 8, 5: 5}
    for key, size in sizes.items():
        manager.set_recur_cache(key, container(float(key), size))
    for key, size in sizes.items():
        found = manager.get_recur_cache(key)
        assert (value_of(found), found and found.size) == (float(key), size)
    assert {key: pool.get(key).lengths for key in sizes} == {key: (size,) for key, size in sizes.items()}


@compiled
@pytest.mark.parametrize("kind", [tuple, frozenset])
def test_a_key_whose_comparison_may_run_code_of_its_own_does_not_wait(
    manager: LightZeroKVCacheManager, kind: Callable[[Any], Any]
) -> None:
    key = kind([1, 2])
    manager.set_recur_cache(key, container(1.0))
    assert waiting(manager) == 0
    assert value_of(manager.get_recur_cache(kind([1, 2]))) == 1.0
