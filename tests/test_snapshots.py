"""Pools and managers into files and back: what is kept, what is shared, what moment it is, and what does not go in."""

from __future__ import annotations

import json
import os
import pickle
import threading
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    ClosedError,
    DropAndCorrect,
    DropLazily,
    DropOldest,
    HostTier,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    KVCacheManager,
    KVPool,
    PositionSteps,
    PositionTable,
    SearchEndedError,
    SnapshotContentError,
    SnapshotMismatchError,
    WaitTimeoutError,
)
from concurrent_kv.books.index import FEW
from concurrent_kv.device.tensors import SlotTensor
from concurrent_kv.eviction import FIFO
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.snapshots import describe, reading
from concurrent_kv.snapshots import keys as key_forms
from tests.conftest import MakeManager, MakePool
from tests.support import (
    LAYOUT,
    WINDOW,
    append,
    assert_same,
    child_of,
    layout,
    slots_in_use,
    stacked,
    store,
    tokens,
)
from tests.support import snapshot as state_of
from tests.threading_support import Background, run_threads

BOUND_SECONDS = 60.0


class Codec:
    """Side data as JSON."""

    def encode(self, side: Any) -> bytes:
        return json.dumps(side).encode()

    def decode(self, data: bytes) -> Any:
        return json.loads(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.snapshot"


def tree(pool: KVPool) -> dict[Hashable, KeysValues]:
    """A root, two children and a grandchild, which share; what a get of each gives."""
    root = tokens(1, 3)
    pool.put("root", root)
    batch = pool.gather(["root", "root"])
    append(batch, [2, 3])
    pool.commit(["left", "right"], batch)
    batch = pool.gather(["left"])
    append(batch, [4])
    pool.commit(["leaf"], batch)
    left = child_of(root, 2)
    return {"root": root, "left": left, "right": child_of(root, 3), "leaf": child_of(left, 4)}


def victims(pool: KVPool) -> list[Hashable]:
    """The keys in the order in which they leave a pool that one new entry after the other is put into."""
    order: list[Hashable] = []
    for number in range(64):
        before = set(pool)
        pool.put(number, tokens(number, WINDOW), priority=float("inf"))
        order += [key for key in before - set(pool) if type(key) is not int]
    return order


# What is kept --------------------------------------------------------------------------------------------------------


def test_every_entry_comes_back_bit_for_bit_and_shares_what_it_shared(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(name="other")
    entries = tree(pool)
    saved, loaded = pool.save(path), other.load(path)
    assert saved == (4, 9, path.stat().st_size)
    assert loaded == (4, 9, 0, True)
    for key, kv in entries.items():
        assert_same(other.get(key), kv)
    assert slots_in_use(other) == slots_in_use(pool) == 9
    assert other.account.slots == pool.account.slots


def test_what_was_loaded_is_shared_with_what_is_committed_from_it_and_freed_with_its_last_user(
    make_pool: MakePool, path: Path
) -> None:
    pool, other = make_pool(), make_pool(8)
    entries = tree(pool)
    pool.save(path)
    other.load(path)
    batch = other.gather(["leaf"])
    append(batch, [5], 1)
    other.commit(["new"], batch)
    assert slots_in_use(other) == 9 + 1
    for key, left in (("root", 10), ("right", 8), ("leaf", 8), ("left", 8), ("new", 0)):
        other.pop(key)
        assert slots_in_use(other) == left, key
        other.check_integrity()
    assert_same(pool.get("leaf"), entries["leaf"])


KEYS: list[Hashable] = [
    0, -1, 2**53, -(2**200), "", "text", "\ud800", "ünï\n", b"", b"\x00\xff", 0.5, -0.0, float("inf"), 1e-320, None,
    (), ("a", (1, (b"x", None))), np.int64(-7), np.uint8(200), np.float32(0.1), np.bool_(True), np.complex128(1 + 2j),
    np.str_("numpy"), np.bytes_(b"numpy"), (np.float16(1.5), True),
]  # fmt: skip


def test_a_key_comes_back_as_what_it_was_and_of_its_type(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(len(KEYS)), make_pool(len(KEYS))
    store(pool, *((key, tokens(number, 2)) for number, key in enumerate(KEYS)))
    distinct = pool.keys()
    pool.save(path)
    other.load(path)
    for key in distinct:
        assert_same(other.get(key), pool.get(key))  # type: ignore[arg-type]
    assert sorted(map(shape_of_key, other.keys())) == sorted(map(shape_of_key, distinct))


def shape_of_key(key: Hashable) -> str:
    """Its value and the types of all its parts."""
    return f"{type(key).__name__} {[*map(shape_of_key, key)] if isinstance(key, tuple) else repr(key)}"


plain_keys = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(plain_keys)
def test_any_plain_key_is_the_same_after_a_way_through_json(key: Hashable) -> None:
    form = json.loads(json.dumps(key_forms.encoded(key)))
    assert shape_of_key(key_forms.decoded(form)) == shape_of_key(key)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (frozenset([1]), "builtins.frozenset"),
        (("a", 1j), "builtins.complex"),
        (st, "builtins.module"),
        (float("nan"), "NaN"),
        (np.float64("nan"), "NaN"),
        (np.datetime64("2020-01-01"), "numpy.datetime64"),
        (FIFO, "abc.ABCMeta"),
    ],
)
def test_a_key_that_cannot_be_in_a_file_is_named_with_its_type_and_nothing_is_written(
    pool: KVPool, path: Path, key: Hashable, named: str
) -> None:
    pool.put(key, tokens(1, 2))
    before = state_of(pool.storage)
    with pytest.raises(SnapshotContentError, match=named) as raised:
        pool.save(path)
    assert raised.value.path == str(path)
    assert pool.name in str(raised.value)
    assert list(path.parent.iterdir()) == []
    assert state_of(pool.storage) == before


def test_tuples_nested_without_end_are_refused_on_both_ways(pool: KVPool, path: Path) -> None:
    key: Hashable = ()
    for _ in range(key_forms.DEEPEST + 1):
        key = (key,)
    pool.put(key, tokens(1, 2))
    with pytest.raises(SnapshotContentError, match="deep"):
        pool.save(path)


def test_the_name_of_a_scope_that_cannot_be_in_a_file_is_named(pool: KVPool, path: Path) -> None:
    pool.put("key", tokens(1, 2), scope=pool.scope(frozenset("a")))
    with pytest.raises(SnapshotContentError, match="name of a scope"):
        pool.save(path)


def test_scopes_come_back_by_name_and_the_default_scope_as_that(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(name="one"), make_pool(name="two")
    pool.put("key", tokens(1, 2))
    pool.put("key", tokens(2, 3), scope=pool.scope(("episode", 7)))
    pool.put("key", tokens(3, 4), scope=pool.scope("two"))
    pool.save(path)
    other.load(path)
    assert_same(other.get("key"), tokens(1, 2))
    assert_same(other.get("key", scope=other.scope(("episode", 7))), tokens(2, 3))
    assert {scope.name for scope in other.scopes()} == {"two", ("episode", 7)} or len(other.scopes()) == 3


def test_side_data_and_priorities_come_back(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(policy="priority"), make_pool(policy="priority")
    pool.put("a", tokens(1, 2), side={"value": [1, 2]}, priority=2**70)
    pool.put("b", tokens(2, 2), side="", priority=-0.5)
    pool.put("c", tokens(3, 2), priority=float("inf"))
    pool.save(path, side=Codec())
    other.load(path, side=Codec())
    assert [other.side(key) for key in "abc"] == [{"value": [1, 2]}, "", None]
    assert victims(other) == ["b", "a", "c"] == victims(pool)


def test_side_data_without_a_codec_are_named_on_both_ways(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool()
    pool.put("a", tokens(1, 2), side=[1])
    with pytest.raises(SnapshotContentError, match=r"'a', of the type list, need side="):
        pool.save(path)
    pool.save(path, side=Codec())
    with pytest.raises(InvalidArgumentError, match=r"side must be the codec"):
        other.load(path)
    assert len(other) == 0


class Wrong(Codec):
    def encode(self, side: Any) -> Any:
        return "text"


def test_a_codec_that_is_none_is_refused(pool: KVPool, path: Path) -> None:
    pool.put("a", tokens(1, 2), side=[1])
    nonsense: Any = json
    for call in (pool.save, pool.load):
        with pytest.raises(InvalidTypeError, match="side must have encode"):
            call(path, side=nonsense)
    with pytest.raises(InvalidTypeError, match="must return bytes"):
        pool.save(path, side=Wrong())
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
def test_what_was_evicted_next_before_is_evicted_next_after_loading(
    make_pool: MakePool, path: Path, policy: str
) -> None:
    pool, other = (make_pool(6, policy=policy, max_slots=6 * WINDOW) for _ in range(2))
    for number in range(6):
        pool.put(f"{number}", tokens(number, WINDOW), priority=number % 2)
    if policy in ("fifo", "lru", "priority"):
        for key in ("1", "4", "0"):
            pool.get(key)
    pool.put("2", tokens(2, WINDOW))
    pool.save(path)
    other.load(path)
    assert victims(other) == victims(pool)


def test_an_entry_that_was_set_aside_keeps_its_age(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(3), make_pool(3)
    store(pool, *((key, tokens(1, WINDOW)) for key in ("a", "b", "c")))
    with pool.pin("a"):
        pool.put("d", tokens(2, WINDOW))  # "b" goes, "a" is set aside
        pool.save(path)
    other.load(path)
    assert victims(other) == ["a", "c", "d"]


def test_entries_that_were_given_back_in_another_order_keep_their_ages(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(3, shards=1), make_pool(3)
    store(pool, *((key, tokens(1, WINDOW)) for key in ("b", "a", "c")))
    pins = [pool.pin("b"), pool.pin("a")]
    pool.put("d", tokens(2, WINDOW))
    for pin in reversed(pins):
        pin.close()
    pool.save(path)
    other.load(path)
    assert victims(other) == ["b", "a", "d"]


class Reversed(FIFO[Any]):
    """A policy of the user's, with the age in the wrong order."""

    def in_order(self) -> list[Any]:
        raise AssertionError("the pool asks no policy of the user's for its order")


def test_with_a_policy_of_the_users_the_order_is_that_of_the_writes(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(3, policy=Reversed), make_pool(3)
    store(pool, ("b", tokens(1, WINDOW)), ("a", tokens(2, WINDOW)), ("c", tokens(3, WINDOW)))
    pool.save(path)
    other.load(path)
    assert victims(other) == ["b", "a", "c"]


def test_an_empty_pool_makes_a_file_that_loads(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool()
    assert pool.save(path)[:2] == (0, 0)
    other.put("key", tokens(1, 2))
    assert other.load(path) == (0, 0, 0, True)
    assert len(other) == 1
    other.load(path, replace=True)
    assert len(other) == 0


def test_describe_says_what_makes_a_pool_for_the_file(make_pool: MakePool, path: Path) -> None:
    pool = make_pool(5, layout=layout(dtype=torch.bfloat16), policy="lru")
    pool.put("key", KeysValues.from_packed(torch.ones(4, 1, 2, 3, 3, dtype=torch.bfloat16)), scope=pool.scope("s"))
    pool.save(path)
    info = describe(path)
    assert (info.layout, info.entries, info.slots, info.format_version) == (pool.layout, 1, 3, 1)
    of_pool = info.pools["pool"]
    assert (of_pool.entries, of_pool.slots, of_pool.policy, of_pool.scopes) == (1, 3, "LRU", ("s",))
    made = make_pool(of_pool.max_entries, layout=info.layout, max_slots=of_pool.max_slots)
    assert made.load(path).entries == 1


# Trees ---------------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "commit", "commit", "commit", "pop", "replace"]),
        st.integers(0, 7),
        st.integers(0, 7),
        st.integers(1, 3),
    ),
    min_size=1,
    max_size=24,
)


@pytest.mark.parametrize("window", [WINDOW, 72])  # a page each, and many
@settings(max_examples=60, deadline=None)
@given(data=st.data(), made=steps)
def test_any_tree_comes_back_with_every_slot_shared_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, window: int, data: st.DataObject, made: list[tuple[str, int, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("trees") / "tree"
    shape = replace(LAYOUT, num_heads=1, head_dim=2, max_tokens=window)
    overflow = DropOldest(window - 1, 3)
    with KVPool(shape, 32) as pool, KVPool(shape, 32) as other:
        for what, first, second, number in made:
            if what in ("put", "replace"):
                kv = torch.randn(4, 1, 1, min(number * window // 4, window), 2)
                pool.put(first, KeysValues.from_packed(kv))
            elif what == "pop":
                pool.pop(first)
            elif pool.contains(second):
                batch = pool.gather([second], room=min(number, window - pool.peek(second).end))  # type: ignore[union-attr]
                if not batch.room:
                    batch.close()
                    continue
                new = torch.randn(1, 1, min(number, batch.room), 2)
                for layer in range(2):
                    batch.append(layer, new, new)
                pool.commit([first], batch, overflow=overflow)
        keys = pool.keys()
        saved = pool.save(path)
        assert other.load(path).entries == len(keys)
        assert saved.slots == slots_in_use(other) == slots_in_use(pool)
        for key in keys:
            assert_same(other.get(key), pool.get(key))  # type: ignore[arg-type]
        other.check_integrity()
        for key in data.draw(st.permutations(keys)):
            other.pop(key)
            pool.pop(key)
            assert slots_in_use(other) == slots_in_use(pool)
            other.check_integrity()


# One moment ----------------------------------------------------------------------------------------------------------


def test_a_file_has_a_pair_that_is_written_together_whole_whatever_other_threads_do(
    make_pool: MakePool, path: Path
) -> None:
    pool, other = make_pool(8, shards=4), make_pool(8)
    stop = threading.Event()
    files = [path.with_suffix(f".{number}") for number in range(12)]

    def write(scope_name: str) -> None:
        scope, number = pool.scope(scope_name), 0
        while not stop.is_set():
            number = (number + 1) % 100
            pool.put_many(["a", "b"], stacked(tokens(number, 3), tokens(number, 2)), scope=scope)
            if number % 7 == 0:
                pool.clear(scope)

    def save() -> None:
        try:
            for file in files:
                pool.save(file)
        finally:
            stop.set()

    run_threads(partial(write, "one"), partial(write, "two"), save)
    for file in files:
        other.load(file, replace=True)
        for name in ("one", "two"):
            first, second = (other.get(key, scope=other.scope(name)) for key in ("a", "b"))
            assert (first is None) == (second is None)
            if first is not None and second is not None:
                assert_same(second, tokens(int(first.keys.flatten()[0]) // (16 * 128), 2))
        other.check_integrity()


def test_a_save_waits_for_the_writer_of_any_shard(make_pool: MakePool, path: Path) -> None:
    pool = make_pool(shards=3)
    tree(pool)
    for shard in range(3):
        with pool.storage.locks.write((shard,), Deadline(BOUND_SECONDS)), pytest.raises(WaitTimeoutError):
            Background(lambda: pool.save(path, timeout=0.02)).result()
    assert pool.save(path).entries == 4


def test_the_pools_of_a_manager_are_saved_at_one_moment(make_manager: MakeManager, path: Path) -> None:
    manager, other = make_manager(), make_manager()
    stop = threading.Event()
    files = [path.with_suffix(f".{number}") for number in range(12)]

    def write() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 100
            manager.set_init_cache(0, "count", tokens(number, 2))
            manager.set_wm_cache("count", tokens(number, 2))

    def save() -> None:
        try:
            for file in files:
                manager.save(file)
        finally:
            stop.set()

    run_threads(write, save)
    for file in files:
        other.load(file)
        first, second = other.get_init_cache(0, "count"), other.get_wm_cache("count")
        if first is not None and second is not None:
            ahead, behind = (int(kv.keys.flatten()[0]) // (16 * 128) for kv in (first, second))
            assert (ahead - behind) % 100 in (0, 1)


def test_while_a_pool_is_saved_others_read_write_and_evict(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, other = make_pool(4), make_pool(4)
    entries = tree(pool)
    inside, go_on = threading.Event(), threading.Event()
    read_slots = SlotTensor.read_slots

    def held_up(self: SlotTensor, slots: Any) -> Any:
        inside.set()
        assert go_on.wait(BOUND_SECONDS)
        return read_slots(self, slots)

    monkeypatch.setattr(SlotTensor, "read_slots", held_up)
    saving = Background(lambda: pool.save(path))
    assert inside.wait(BOUND_SECONDS)
    assert_same(pool.get("leaf"), entries["leaf"])
    pool.put("root", tokens(9, 4))
    pool.put("more", tokens(10, 4))  # evicts
    pool.clear()
    assert len(pool) == 0
    go_on.set()
    assert saving.result().entries == 4
    assert slots_in_use(pool) == 0
    other.load(path)
    for key, kv in entries.items():
        assert_same(other.get(key), kv)


def test_what_is_evicted_next_is_written_first_and_free_while_the_rest_is_written(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("concurrent_kv.pool.saving.CHUNK_BYTES", WINDOW * LAYOUT.bytes_per_token)
    pool = make_pool(4, writers=1)
    store(pool, *((key, tokens(1, WINDOW)) for key in range(4)))
    read_slots, chunks = SlotTensor.read_slots, 0

    def writes_meanwhile(self: SlotTensor, slots: Any) -> Any:
        nonlocal chunks
        chunks += 1
        found = read_slots(self, slots)
        # One entry of headroom, and each time one more entry is evicted that is in the file already.
        pool.put(f"new {chunks}", tokens(2, WINDOW), timeout=BOUND_SECONDS)
        return found

    monkeypatch.setattr(SlotTensor, "read_slots", writes_meanwhile)
    assert pool.save(path).entries == 4
    assert chunks == 4


@pytest.mark.parametrize("step", ["read_slots", "write_file"])
def test_a_save_that_fails_lets_go_of_everything(
    pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    tree(pool)
    before = state_of(pool.storage)

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("in the middle")

    where: Any = SlotTensor if step == "read_slots" else "concurrent_kv.pool.saving.write_file"
    if step == "read_slots":
        monkeypatch.setattr(where, step, fails)
    else:
        monkeypatch.setattr(where, fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        pool.save(path)
    assert state_of(pool.storage) == before
    assert list(path.parent.iterdir()) == []


# Loading into a pool that has something ------------------------------------------------------------------------------


def test_loading_replaces_equal_keys_and_leaves_others(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(8)
    entries = tree(pool)
    pool.save(path)
    store(other, ("root", tokens(8, 5)), ("mine", tokens(9, 5)))
    other.load(path)
    assert_same(other.get("mine"), tokens(9, 5))
    for key, kv in entries.items():
        assert_same(other.get(key), kv)
    assert slots_in_use(other) == 9 + 5


def test_loading_over_what_was_saved_replaces_all_of_it(pool: KVPool, path: Path) -> None:
    entries = tree(pool)
    pool.save(path)
    for _ in range(3):
        assert pool.load(path).entries == 4
        assert slots_in_use(pool) == 9
    for key, kv in entries.items():
        assert_same(pool.get(key), kv)


def test_more_entries_than_are_compared_in_pairs_replace_each_other_and_none_twice(
    make_pool: MakePool, path: Path
) -> None:
    number = FEW + 44
    pool, other = make_pool(number), make_pool(number)
    for each, value in ((pool, 1), (other, 2)):
        for key in range(number):
            each.put((key, "key"), tokens(value, 1), scope=each.scope(key % 3))
    pool.save(path)
    assert other.load(path).entries == len(other) == number
    for key in range(number):
        assert_same(other.get((key, "key"), scope=other.scope(key % 3)), tokens(1, 1))


def test_a_full_pool_takes_a_full_file(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(4), make_pool(4)
    store(pool, *((key, tokens(key, WINDOW)) for key in range(4)))
    store(other, *((key, tokens(key, WINDOW)) for key in range(2, 6)))
    pool.save(path)
    assert other.load(path).entries == 4
    assert sorted(other.keys()) == [0, 1, 2, 3]  # type: ignore[type-var]


def test_with_replace_everything_older_goes_in_every_scope(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(8)
    tree(pool)
    pool.save(path)
    scope = other.scope("mine")
    other.put("mine", tokens(9, 5), scope=scope)
    other.put("root", tokens(8, 5))
    pin = other.pin("root")
    other.load(path, replace=True)
    assert sorted(other.keys()) == ["leaf", "left", "right", "root"]  # type: ignore[type-var]
    assert other.keys(scope=scope) == []
    assert other.put("mine", tokens(9, 5), scope=scope)
    assert_same(other.get("mine", scope=scope), tokens(9, 5))
    with pin:
        assert_same(pin.get(), tokens(8, 5))
    assert len(other) == 5


def test_a_file_of_newer_weights_ends_what_is_older_and_gives_its_version(
    make_manager: MakeManager, path: Path
) -> None:
    manager, other = make_manager(), make_manager()
    for _ in range(3):
        manager.bump_version()
    manager.set_init_cache(0, "root", tokens(1, 3))
    manager.save(path)
    other.set_init_cache(0, "old", tokens(2, 3))
    other.set_wm_cache("old", tokens(2, 3))
    search = other.search([0])
    search.gather(["old"], [0]).close()
    other.load(path)
    assert other.version == 3
    assert {pool.version for pool in other.init_pools} == {3}
    assert other.get_wm_cache("old") is None
    assert_same(other.get_init_cache(0, "root"), tokens(1, 3))
    with pytest.raises(SearchEndedError, match="newer weights"):
        search.gather(["root"], [0])
    assert slots_in_use(other) == 3
    assert other.init_pools[0].scope("new").version == 3


def test_a_file_of_older_weights_is_refused(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool()
    tree(pool)
    pool.save(path)
    other.bump_version()
    for how in ("error", "convert"):
        with pytest.raises(SnapshotMismatchError, match=r"weights version 0, and pool is at 1"):
            other.load(path, on_mismatch=how)
    assert len(other) == 0


@pytest.mark.parametrize("change", [KVPool.clear, KVPool.bump_version])
@pytest.mark.parametrize("everything", [False, True])
def test_where_a_clear_comes_in_between_nothing_is_stored(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, everything: bool
) -> None:
    pool, other = make_pool(), make_pool()
    tree(pool)
    pool.save(path)
    write_slots = SlotTensor.write_slots

    def and_changes(self: SlotTensor, slots: Any, given: Any) -> None:
        write_slots(self, slots, given)
        change(other)

    monkeypatch.setattr(SlotTensor, "write_slots", and_changes)
    assert other.load(path, replace=everything) == (0, 0, 0, False)
    assert len(other) == 0
    assert slots_in_use(other) == 0


def test_a_scope_that_is_dropped_in_between_is_an_error_and_nothing_is_stored(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, other = make_pool(), make_pool()
    tree(pool)
    pool.put("key", tokens(1, 2), scope=pool.scope("episode"))
    pool.save(path)
    monkeypatch.setattr(SlotTensor, "write_slots", lambda *_: other.drop_scope("episode"))
    with pytest.raises(ClosedError, match="'episode' of pool was dropped"):
        other.load(path)
    assert len(other) == 0
    assert slots_in_use(other) == 0


@pytest.mark.parametrize("step", ["write_slots", "decode", "room"])
def test_a_load_that_fails_leaves_the_pool_as_it_was(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    pool, other = make_pool(), make_pool(6, max_slots=24)
    tree(pool)
    pool.put("leaf", tokens(5, WINDOW), side=1)
    pool.save(path, side=Codec())
    store(other, ("root", tokens(8, 5)), ("mine", tokens(9, 5)))
    pins = [other.pin(key) for key in ("root", "mine")] if step == "room" else []
    if step == "room":
        other.put("also", tokens(9, WINDOW))
        pins += [other.pin("also")]
    before = state_of(other.storage)
    codec = Codec()

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("in the middle")

    if step == "room":
        # What is pinned cannot go: the file does not fit beside it.
        with pytest.raises(WaitTimeoutError, match="no room"):
            other.load(path, side=codec, timeout=0.05)
    else:
        monkeypatch.setattr(SlotTensor if step == "write_slots" else codec, step, fails)
        with pytest.raises(RuntimeError, match="in the middle"):
            other.load(path, side=codec, replace=True)
    assert state_of(other.storage) == before
    for pin in pins:
        pin.close()


def test_readers_see_all_of_a_load_or_nothing(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(2, shards=4), make_pool(2, shards=4)
    files = []
    for number in range(2):
        pool.put_many(["a", "b"], stacked(tokens(number, 3), tokens(number, 3)))
        files.append(path.with_suffix(f".{number}"))
        pool.save(files[-1])
    other.load(files[0])
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            with other.gather(["a", "b"]) as batch:
                first, second = batch.data[0, :, 0, 0, 0].tolist()
                assert first == second

    def load() -> None:
        try:
            for number in range(60):
                other.load(files[number % 2])
        finally:
            stop.set()

    run_threads(read, read, load)


# Other sizes, dtypes, layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_heads": 1}, {"head_dim": 4}], ids=str)
@pytest.mark.parametrize("how", ["error", "convert"])
def test_another_shape_of_tokens_is_always_an_error(
    make_pool: MakePool, path: Path, change: dict[str, int], how: str
) -> None:
    pool, other = make_pool(), make_pool(layout=layout(**change))
    tree(pool)
    pool.save(path)
    ((name, number),) = change.items()
    with pytest.raises(SnapshotMismatchError, match=f"{name}={getattr(LAYOUT, name)}, and pool {name}={number}"):
        other.load(path, on_mismatch=how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_an_error_or_rounded(make_pool: MakePool, path: Path, dtype: torch.dtype) -> None:
    pool, other = make_pool(), make_pool(layout=layout(dtype=dtype))
    entries = tree(pool)
    pool.save(path)
    with pytest.raises(SnapshotMismatchError, match=r"torch\.float32"):
        other.load(path)
    assert other.load(path, on_mismatch="convert") == (4, 9, 0, True)
    for key, kv in entries.items():
        assert_same(other.get(key), KeysValues(kv.keys.to(dtype), kv.values.to(dtype)))


def test_of_what_is_too_much_the_youngest_stay(make_pool: MakePool, path: Path) -> None:
    pool, few, small = make_pool(6), make_pool(3), make_pool(6, max_slots=20)
    store(pool, *((key, tokens(key, WINDOW)) for key in range(6)))
    pool.save(path)
    for other, number in ((few, 3), (small, 2)):
        with pytest.raises(SnapshotMismatchError, match=r"6 entries with 48 slots.*would do"):
            other.load(path)
        assert other.load(path, on_mismatch="convert") == (number, number * WINDOW, 6 - number, True)
        assert sorted(other.keys()) == list(range(6 - number, 6))  # type: ignore[type-var]


def test_of_entries_that_share_as_many_fit_as_their_slots_do(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(4, max_slots=8)
    entries = tree(pool)  # 3, 5, 5 and 7 tokens in 9 slots; the youngest three need all of them
    pool.save(path)
    loaded = other.load(path, on_mismatch="convert")
    assert loaded == (1, 7, 3, True)
    assert_same(other.get("leaf"), entries["leaf"])


def test_an_entry_that_is_longer_than_the_window_is_an_error_or_left_out(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(layout=layout(max_tokens=6))
    entries = tree(pool)
    pool.save(path)
    with pytest.raises(SnapshotMismatchError, match="window of 6"):
        other.load(path)
    assert other.load(path, on_mismatch="convert") == (3, 7, 1, True)
    assert_same(other.get("right"), entries["right"])
    assert other.get("leaf") is None
    assert make_pool(layout=layout(max_tokens=11)).load(path).entries == 4


def test_a_word_for_mismatches_that_is_none_is_refused(pool: KVPool, path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="on_mismatch must be"):
        pool.load(path, on_mismatch="ignore")


@pytest.mark.parametrize("wrong", [1, None, b"bytes", "", "a\0b"], ids=repr)
def test_a_path_that_is_none_is_refused_by_name(pool: KVPool, wrong: Any) -> None:
    for call in (pool.save, pool.load):
        with pytest.raises((InvalidArgumentError, InvalidTypeError), match="path must"):
            call(wrong)


# Lazy corrections ----------------------------------------------------------------------------------------------------


def steps_of(seed: int) -> PositionSteps:
    draw = torch.Generator().manual_seed(seed)
    return PositionSteps(LAYOUT, 2, torch.randn(2, 2, 2, WINDOW, 3, generator=draw))


def table_of(seed: int) -> PositionTable:
    draw = torch.Generator().manual_seed(seed)
    return PositionTable(LAYOUT, lambda distance: torch.randn(2, 2, 2, WINDOW - distance, 3, generator=draw))


def moved_on(pool: KVPool, overflow: Any) -> None:
    """A chain of entries, of which the later ones have dropped tokens again and again."""
    pool.put(0, tokens(1, 5))
    for number in range(6):
        batch = pool.gather([number])
        append(batch, [number + 2], 1)
        pool.commit([number + 1], batch, overflow=overflow)


@pytest.mark.parametrize("table", [steps_of, table_of])
def test_what_is_owed_corrections_comes_back_owed_and_reads_the_same(
    make_pool: MakePool, path: Path, table: Callable[[int], Any]
) -> None:
    pool, other = make_pool(8), make_pool(8)
    moved_on(pool, DropLazily(7, 2, table(1)))
    pool.save(path)
    # Made anew from the model, as after a crash.
    again = DropLazily(7, 2, table(1))
    assert other.load(path, overflow=again).entries == 7
    assert slots_in_use(other) == slots_in_use(pool)
    for key in range(7):
        assert_same(other.get(key), pool.get(key))  # type: ignore[arg-type]
    for each, overflow in ((pool, DropLazily(7, 2, table(1))), (other, again)):
        batch = each.gather([6])
        append(batch, [9], 1)
        each.commit(["next"], batch, overflow=overflow)
    assert_same(other.get("next"), pool.get("next"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "overflow",
    [None, DropOldest(7, 2), DropLazily(7, 2, steps_of(2)), DropLazily(7, 2, table_of(1))],
    ids=["none", "another kind", "other numbers", "a table"],
)
def test_what_is_owed_corrections_by_another_table_is_refused(make_pool: MakePool, path: Path, overflow: Any) -> None:
    pool, other = make_pool(8), make_pool(8)
    moved_on(pool, DropLazily(7, 2, steps_of(1)))
    pool.save(path)
    with pytest.raises(SnapshotMismatchError, match="owed corrections"):
        other.load(path, overflow=overflow)
    assert len(other) == 0


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"max_tokens": WINDOW + 1}], ids=str)
def test_what_is_owed_corrections_is_not_converted(make_pool: MakePool, path: Path, change: dict[str, Any]) -> None:
    pool, other = make_pool(8), make_pool(8, layout=layout(**change))
    moved_on(pool, DropLazily(7, 2, steps_of(1)))
    pool.save(path)
    with pytest.raises(SnapshotMismatchError, match="owed corrections"):
        other.load(path, on_mismatch="convert")


def test_tokens_that_were_corrected_when_they_moved_need_nothing(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(8), make_pool(8)
    moved_on(pool, DropAndCorrect(7, 2, torch.randn(2, 2, 2, WINDOW, 3), LAYOUT))
    pool.save(path)
    other.load(path)
    for key in range(7):
        assert_same(other.get(key), pool.get(key))  # type: ignore[arg-type]


# Managers ------------------------------------------------------------------------------------------------------------


def filled_manager(manager: KVCacheManager) -> None:
    for env in range(2):
        manager.set_init_cache(env, "root", tokens(env, 3))
    manager.set_recur_cache("state", tokens(3, 4))
    manager.set_wm_cache("state", tokens(4, 5), side=[1])


def test_every_pool_of_a_manager_comes_back_and_entries_of_searches_do_not(
    make_manager: MakeManager, path: Path
) -> None:
    manager, other = make_manager(recur_slots=200), make_manager(3)
    filled_manager(manager)
    with manager.search([0]) as search:
        batch = search.gather(["root"], [0])
        append(batch, [7])
        search.commit(["child"], batch)
        search.commit(["kept"], _grown(search, "child"))
        search.promote("kept", 0, as_key="promoted")
        saved = manager.save(path, side=Codec())
    assert saved.entries == 5
    assert other.load(path, side=Codec()) == (5, saved.slots, 0, True)
    assert_same(other.get_init_cache(1, "root"), tokens(1, 3))
    assert_same(other.get_init_cache(0, "promoted"), child_of(child_of(tokens(0, 3), 7), 8, 1))
    assert_same(other.get_recur_cache("state"), tokens(3, 4))
    assert_same(other.get_wm_cache("state"), tokens(4, 5))
    assert other.wm_pool.side("state") == [1]
    assert slots_in_use(other) == slots_in_use(manager) == saved.slots


def _grown(search: Any, key: str) -> Any:
    batch = search.gather([key], [0])
    append(batch, [8], 1)
    return batch


def test_a_pool_that_the_manager_does_not_have_is_an_error_or_left_out(make_manager: MakeManager, path: Path) -> None:
    manager, other = make_manager(2), make_manager(1)
    filled_manager(manager)
    manager.save(path, side=Codec())
    before = state_of(other.storage)
    with pytest.raises(SnapshotMismatchError, match=r"a pool 'init\[1\]' of 1 entries"):
        other.load(path, side=Codec())
    assert state_of(other.storage) == before
    assert other.load(path, side=Codec(), on_mismatch="convert") == (3, 12, 1, True)


def test_what_does_not_fit_into_the_last_pool_is_found_before_the_first_is_written(
    make_manager: MakeManager, path: Path
) -> None:
    manager, other = make_manager(wm_entries=3), make_manager(wm_entries=1)
    filled_manager(manager)
    manager.set_wm_cache("more", tokens(1, 2))
    manager.save(path, side=Codec())
    before = state_of(other.storage)
    with pytest.raises(SnapshotMismatchError, match=r"wm has 2 entries"):
        other.load(path, side=Codec())
    assert state_of(other.storage) == before


def test_the_file_of_a_manager_is_not_one_of_a_pool(make_manager: MakeManager, make_pool: MakePool, path: Path) -> None:
    manager, pool = make_manager(), make_pool()
    filled_manager(manager)
    manager.save(path, side=Codec())
    with pytest.raises(SnapshotMismatchError, match="init"):
        pool.load(path, side=Codec())


# From tasks, and in the world ----------------------------------------------------------------------------------------


def test_tasks_save_and_load_in_a_worker_thread(make_manager: MakeManager, make_pool: MakePool, path: Path) -> None:
    manager, other, pool, second = make_manager(), make_manager(), make_pool(), make_pool()
    filled_manager(manager)
    tree(pool)

    async def both() -> None:
        saver, loader = AsyncKVCacheManager(manager), AsyncKVCacheManager(other)
        saved = await saver.save(path, side=Codec())
        assert (await loader.load(path, side=Codec())).entries == saved.entries == 4
        assert loader.offload_stats().inline_count == 0
        of_pool = AsyncKVPool(pool)
        await of_pool.save(path)
        assert (await AsyncKVPool(second).load(path, replace=True)).entries == 4

    anyio.run(both)
    assert slots_in_use(second) == 9


def test_nothing_is_ever_pickled_or_unpickled(
    make_manager: MakeManager, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a pickle")

    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(np, "load", never)
    manager, other = make_manager(), make_manager()
    filled_manager(manager)
    manager.save(path, side=Codec())
    assert other.load(path, side=Codec()).entries == 4
    folder = Path(reading.__file__).parent
    for source in (*folder.glob("*.py"), folder.parent / "pool" / "saving.py", folder.parent / "pool" / "restoring.py"):
        text = source.read_text("utf-8")
        assert not any(word in text for word in ("pickle", "eval(", "exec(", "torch.load", "np.load")), source


def test_without_safetensors_the_error_says_what_to_install(
    pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    for call in (pool.save, pool.load, describe):
        with pytest.raises(ImportError, match=r"pip install concurrent-kv\[snapshots\]"):
            call(path)


def test_any_tool_for_safetensors_reads_the_tokens(pool: KVPool, path: Path) -> None:
    tree(pool)
    pool.save(path)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == {"slots", "positions", "lengths", "tables", "index", "sides"}
        slots, lengths, tables = (file.get_tensor(name) for name in ("slots", "lengths", "tables"))
        assert file.metadata()["format"] == "concurrent_kv snapshot"
    ends = lengths.cumsum(0).tolist()
    rows = [slots[tables[begin:end].long()].permute(1, 2, 0, 3) for begin, end in pairwise([0, *ends])]
    for row, key in zip(rows, ("root", "left", "right", "leaf"), strict=True):
        assert_same(KeysValues.from_packed(row.unsqueeze(1).contiguous()), pool.get(key))  # type: ignore[arg-type]


def test_it_works_whatever_modes_of_torch_the_caller_is_in(make_pool: MakePool, path: Path) -> None:
    pool, other = make_pool(), make_pool(5)
    entries = tree(pool)
    with torch.inference_mode(), torch.device("meta"):
        pool.save(path)
        other.load(path)
    other.put("after", tokens(1, 2))
    for key, kv in entries.items():
        assert_same(other.get(key), kv)


def test_the_file_is_on_the_disk_before_it_has_its_name(
    pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(pool)
    done: list[str] = []

    def noted(name: str, real: Callable[..., Any], *given: Any) -> Any:
        done.append(name)
        return real(*given)

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, partial(noted, name, getattr(os, name)))
    pool.save(path)
    assert done == ["fsync", "replace", "fsync"]


def below(pool: KVPool) -> int:
    found = pool.tier_stats()
    assert found is not None
    return found.entries


def test_what_a_tier_has_of_a_loaded_key_is_over_and_never_read_again(tmp_path: Path) -> None:
    """In every scope of the file, and with `replace=True` in every other one too."""
    path = tmp_path / "pool.safetensors"
    with KVPool(LAYOUT, 4) as saved:
        for key in ("a", "b"):
            saved.put(key, tokens(1, 2))
            saved.put(key, tokens(2, 2), scope=saved.scope("other"))
        saved.save(path)
    tier = HostTier(max_bytes=20 * LAYOUT.bytes_per_entry)
    with KVPool(LAYOUT, 4, tier=tier) as pool:
        other, third = pool.scope("other"), pool.scope("third")
        for scope in (pool.default_scope, other, third):
            for key in ("a", "b"):
                pool.put(key, tokens(9, 3), scope=scope)
        assert below(pool) == 2
        pool.load(path)
        for key in ("a", "b"):
            assert_same(pool.get(key), tokens(1, 2))
            assert_same(pool.get(key, scope=other), tokens(2, 2))
        assert below(pool) == 2  # the third scope's, which had to make room
        assert_same(pool.get("a", scope=third), tokens(9, 3))
        pool.load(path, replace=True)
        assert pool.get("a", scope=third) is None
        assert below(pool) == 0
        assert len(pool) == 4
        pool.check_integrity()
