"""Commits of rows that got different numbers of new tokens, and of rows that hold only what was appended to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    Batch,
    DropOldest,
    InvalidArgumentError,
    InvalidTypeError,
    KeysValues,
    KVCacheManager,
    KVPool,
    WindowOverflowError,
)
from tests.support import (
    HANG_SECONDS,
    LAYOUT,
    WINDOW,
    append,
    assert_same,
    child_of,
    config,
    joined,
    row_of,
    slots_in_use,
    snapshot,
    stacked,
    store,
    tokens,
)
from tests.trimming import KINDS, Reference, roomy_manager

pytestmark = pytest.mark.usefixtures("loops")

MOST = 3  # tokens appended at once


def pool_of(*lengths: int, **options: Any) -> KVPool:
    """A pool with one entry of each length, under its position."""
    pool = KVPool(
        LAYOUT, options.pop("max_entries", 32), wait_timeout=options.pop("wait_timeout", HANG_SECONDS), **options
    )
    for key, length in enumerate(lengths):
        store(pool, (key, tokens(key + 1, length)))
    return pool


def first_of(kv: KeysValues, count: int) -> KeysValues:
    """The oldest `count` tokens of a row."""
    return KeysValues(kv.keys[:, :, :, :count], kv.values[:, :, :, :count])


# What is stored ------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[list[int], list[int | None], int, list[int]]]:
    """Steps: parents by number, tokens that a missing row is filled with (None: a hit), appended, and lengths."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.integers(1, 5))
        new = draw(st.integers(0, MOST))
        parents = [draw(st.integers(0, 99)) for _ in range(rows)]
        fills = [draw(st.none() | st.integers(0 if new else 1, WINDOW - MOST)) for _ in range(rows)]
        lengths = [draw(st.integers(1 if fill == 0 else 0, new)) for fill in fills]
        steps.append((parents, fills, new, lengths))
    return steps


@settings(max_examples=60, deadline=None)
@given(steps=programs(), kind=st.sampled_from(KINDS), rule=st.sampled_from([(7, 2), (8, 3), (6, 3)]))
def test_rows_of_different_lengths_read_as_trimmed_tensors_whatever_the_policy(
    steps: list[tuple[list[int], list[int | None], int, list[int]]], kind: str, rule: tuple[int, int]
) -> None:
    limit, count = rule
    with roomy_manager() as manager, manager.search([0], entries=1000, tokens=3000) as search:
        model = Reference(manager, search, kind, limit, count)
        model.root("root", 3)
        for number, (parents, fills, new, lengths) in enumerate(steps):
            known = [key for key, row in model.rows.items() if row.shape[2] + new <= WINDOW]
            totals = [
                (model.rows[known[parent % len(known)]].shape[2] if fill is None else fill) + length
                for parent, fill, length in zip(parents, fills, lengths, strict=True)
            ]
            if max(totals) - count >= limit:
                continue
            model.step(
                [known[parent % len(known)] for parent in parents],
                [(number, row) for row in range(len(parents))],
                new,
                {row: fill for row, fill in enumerate(fills) if fill is not None},
                lengths,
            )
            model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rows_overflow_whose_own_tokens_are_too_many(kind: str) -> None:
    with roomy_manager() as manager, manager.search([0], entries=100, tokens=600) as search:
        model = Reference(manager, search, kind, WINDOW - 1, 2)
        for length in (2, 4, 5):
            model.root(length, length)
        model.step([5, 5, 4, 2], ["a", "b", "c", "d"], 2, {}, [2, 1, 2, 0])
        assert [model.rows[key].shape[2] for key in "abcd"] == [5, 6, 6, 2]
        model.check()


def test_a_row_that_ended_early_is_stored_without_its_padding() -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1]) as batch:
        append(batch, [5, 6], 3)
        assert pool.commit(["early", "late"], batch, lengths=[1, 3])
    assert_same(pool.get("early"), first_of(child_of(tokens(1, 2), 5, 3), 3))
    assert_same(pool.get("late"), child_of(tokens(2, 3), 6, 3))
    pool.check_integrity()


def test_each_row_takes_slots_for_its_own_new_tokens_only() -> None:
    pool = pool_of(2, 3, 1)
    before = slots_in_use(pool)
    with pool.gather([0, 1, 2]) as batch:
        append(batch, [5, 6, 7], 3)
        pool.commit(["a", "b", "c"], batch, lengths=[1, 0, 3])
    assert slots_in_use(pool) - before == 4
    pool.check_integrity()


def test_a_row_with_no_new_tokens_shares_its_parent_wholly() -> None:
    pool = pool_of(3)
    before = slots_in_use(pool)
    with pool.gather([0]) as batch:
        assert pool.commit(["again"], batch, lengths=[0], sides=["its own"])
    assert slots_in_use(pool) == before
    assert_same(pool.get("again"), tokens(1, 3))
    assert pool.side("again") == "its own"
    assert pool.pop(0) is not None
    assert_same(pool.get("again"), tokens(1, 3))
    pool.check_integrity()


def test_a_filled_row_with_no_new_tokens_is_stored_as_it_was_filled() -> None:
    pool = pool_of(2)
    with pool.gather([0, "missing"]) as batch:
        batch.fill(1, tokens(9, 4))
        append(batch, [5, 6], 1)
        pool.commit(["child", "filled"], batch, lengths=[1, 0])
    assert_same(pool.get("filled"), tokens(9, 4))
    pool.check_integrity()


def test_a_row_that_missed_is_what_the_model_appended_to_it_from_nothing() -> None:
    pool = pool_of(3)
    with pool.gather([0, "missing", "another"]) as batch:
        append(batch, [5, 6, 7], 2)
        assert batch.padding.tolist() == [0, 3, 3]
        pool.commit(["child", "new", "short"], batch, lengths=[2, 2, 1])
    assert_same(pool.get("child"), child_of(tokens(1, 3), 5))
    assert_same(pool.get("new"), tokens(6, 2))
    assert_same(pool.get("short"), tokens(7, 1))
    pool.check_integrity()


def test_a_batch_of_misses_only_can_be_appended_to_from_nothing() -> None:
    pool = pool_of()
    with pool.gather(["x", "y"]) as batch:
        assert batch.start == 0
        append(batch, [1, 2], WINDOW)
        pool.commit(["x", "y"], batch, lengths=[WINDOW, 2])
    assert_same(pool.get("x"), tokens(1, WINDOW))
    assert_same(pool.get("y"), tokens(2, 2))
    pool.check_integrity()


def test_the_same_batch_is_committed_in_parts_of_different_lengths() -> None:
    pool = pool_of(2, 3, 1)
    with pool.gather([0, 1, 2]) as batch:
        append(batch, [5, 6, 7], 3)
        pool.commit(["c", "a"], batch, rows=[2, 0], lengths=[3, 1])
        pool.commit(["b"], batch, lengths=[2])
        assert batch.closed
    assert_same(pool.get("a"), first_of(child_of(tokens(1, 2), 5, 3), 3))
    assert_same(pool.get("b"), first_of(child_of(tokens(2, 3), 6, 3), 5))
    assert_same(pool.get("c"), child_of(tokens(3, 1), 7, 3))
    pool.check_integrity()


def test_of_a_key_that_comes_twice_the_last_row_and_its_length_count() -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1, 0]) as batch:
        append(batch, [5, 6, 7], 3)
        pool.commit(["same", "other", "same"], batch, lengths=[3, 1, 2])
    assert_same(pool.get("same"), first_of(child_of(tokens(1, 2), 7, 3), 4))
    assert_same(pool.get("other"), first_of(child_of(tokens(2, 3), 6, 3), 4))
    pool.check_integrity()


def test_drops_in_the_same_commit_go_by_each_rows_own_total() -> None:
    pool = pool_of(6, 6, 2)
    with pool.gather([0, 1, 2]) as batch:
        append(batch, [5, 6, 7], 2)
        pool.commit(["over", "under", "short"], batch, lengths=[2, 0, 1], overflow=DropOldest(WINDOW - 1, 4))
    over = child_of(tokens(1, 6), 5)
    assert_same(pool.get("over"), KeysValues(over.keys[:, :, :, 4:], over.values[:, :, :, 4:]))
    assert_same(pool.get("under"), tokens(2, 6))
    assert_same(pool.get("short"), first_of(child_of(tokens(3, 2), 7), 3))
    pool.check_integrity()


def test_a_row_too_long_for_the_limit_is_an_error_and_stores_nothing_of_the_others() -> None:
    pool = pool_of(6, 2)
    with pool.gather([0, 1]) as batch:
        append(batch, [5, 6], 2)
        with pytest.raises(WindowOverflowError):
            pool.commit(["a", "b"], batch, lengths=[2, 2], overflow=DropOldest(WINDOW - 1, 1))
        assert pool.commit(["a", "b"], batch, lengths=[1, 2], overflow=DropOldest(WINDOW - 1, 1))
    assert len(pool) == 4
    pool.check_integrity()


@pytest.mark.parametrize("lengths", [torch.tensor([1, 2]), np.array([1, 2]), (1, 2), [np.int64(1), 2]])
def test_lengths_may_come_in_a_tensor_an_array_or_any_sequence(lengths: Any) -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1]) as batch:
        append(batch, [5, 6])
        pool.commit(["a", "b"], batch, lengths=lengths)
    assert_same(pool.get("a"), first_of(child_of(tokens(1, 2), 5), 3))
    assert_same(pool.get("b"), child_of(tokens(2, 3), 6))
    pool.check_integrity()


# Room ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fifo", "lru", "priority", "clock", "s3fifo"])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_entries_that_share_every_slot_with_each_other_make_room_all_the_same(policy: str, copies: int) -> None:
    pool = pool_of(6, max_slots=WINDOW, policy=policy, wait_timeout=0.05)
    with pool.gather([0] * copies) as batch:
        pool.commit([("copy", number) for number in range(copies)], batch, lengths=[0] * copies)
    assert pool.put("whole", tokens(9, WINDOW))
    assert pool.keys() == ["whole"]
    pool.check_integrity()


def test_entries_that_share_every_slot_with_a_pinned_one_stay_until_it_is_unpinned() -> None:
    pool = pool_of(6, max_slots=WINDOW, wait_timeout=0.05)
    with pool.gather([0, 0]) as batch:
        pool.commit([1, 2], batch, lengths=[0, 0])
    assert pool.put("short", tokens(3, 2))
    with pool.pin(1):
        # Nothing that goes would free a slot but the short one.
        assert pool.put("another", tokens(4, 2))
        assert {0, 1, 2} <= set(pool.keys())
    assert pool.put("whole", tokens(5, WINDOW))
    assert pool.keys() == ["whole"]
    pool.check_integrity()


def test_a_pin_that_came_while_sharers_waited_for_each_other_is_waited_for_too() -> None:
    pool = pool_of(3, max_slots=WINDOW, wait_timeout=0.05)
    with pool.gather([0, 0]) as batch:
        append(batch, [5, 6], 1)
        pool.commit(["copy", "child"], batch, lengths=[0, 1])
    pool.put("short", tokens(7, 4))
    pool.put("x", tokens(8, 1))  # passes over 0 and its copy, whose last token the child names, and evicts the child
    assert "child" not in pool
    with pool.pin(0):
        pool.put("y", tokens(9, 1))  # what the copy shares with the pinned entry would stay taken
        assert set(pool.keys()) == {0, "copy", "x", "y"}
    assert pool.put("whole", tokens(3, WINDOW))
    assert pool.keys() == ["whole"]
    pool.check_integrity()


def test_repair_leaves_no_entries_that_wait_for_each_other() -> None:
    pool = pool_of(3, max_slots=WINDOW, wait_timeout=0.05)
    with pool.gather([0] * 2) as batch:
        pool.commit([1, 2], batch, lengths=[0] * 2)
    pool.put("short", tokens(7, 4))
    with pool.pin(2):
        pool.put("another", tokens(8, 4))  # passes over 0, 1 and 2, and evicts the short one
        index = pool.default_scope.entries[pool.default_scope.part_of(hash(2))]
        index.remove(index[2])  # an eviction that was cut off here
    pool.repair()
    assert pool.put("whole", tokens(3, WINDOW))
    assert pool.keys() == ["whole"]
    pool.check_integrity()


def test_a_search_needs_no_room_in_slots_for_rows_that_got_nothing() -> None:
    with roomy_manager() as manager:
        manager.set_init_cache(0, "root", tokens(1, 3))
        with manager.search([0], entries=3, tokens=2) as search:
            batch = search.gather(["root"] * 3, [0] * 3)
            append(batch, [5, 6, 7], 2)
            search.commit(["a", "b", "c"], batch, lengths=[0, 1, 1])
            with search.gather(["a", "b"], [0, 0]) as again:
                assert_same(row_of(again, 0), tokens(1, 3))
                assert_same(row_of(again, 1), first_of(child_of(tokens(1, 3), 6), 4))
            assert search.promote("a", 0, as_key="kept")
        assert_same(manager.init_pools[0].get("kept"), tokens(1, 3))
        manager.check_integrity()


# The facade ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[1, 2], torch.tensor([1, 2])])
def test_the_async_pool_and_search_commit_rows_of_different_lengths(lengths: Any) -> None:
    async def main() -> None:
        async with AsyncKVPool(pool_of(2, 3)) as pool:
            batch = await pool.gather([0, 1])
            append(batch, [5, 6])
            assert await pool.commit(["a", "b"], batch, lengths=lengths)
            assert_same(await pool.get("a"), first_of(child_of(tokens(1, 2), 5), 3))
            pool.sync.check_integrity()
        async with AsyncKVCacheManager(KVCacheManager(config(), 1)) as manager, manager.search([0]) as search:
            batch = await search.gather(["x", "y"], [0, 0])
            append(batch, [5, 6])
            await search.commit(["x", "y"], batch, lengths=lengths)
            batch = await search.gather(["x", "y"], [0, 0])
            assert batch.lengths == (1, 2)
            manager.sync.check_integrity()

    anyio.run(main)


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(batch: Batch, pool: KVPool, lengths: Any, error: type[Exception], said: str, keys: Sequence[Any]) -> None:
    before = snapshot(pool.storage)
    with pytest.raises(error, match=said):
        pool.commit(keys, batch, lengths=lengths)
    assert snapshot(pool.storage) == before


@pytest.mark.parametrize(
    ("lengths", "error", "said"),
    [
        ([1], InvalidArgumentError, "lengths must have one number for each of 2 committed rows, got 1"),
        ([], InvalidArgumentError, "lengths must have one number for each of 2 committed rows, got 0"),
        ([1, 2, 1], InvalidArgumentError, "lengths must have one number for each of 2"),
        ([1, 3], InvalidArgumentError, "lengths must be at most the 2 tokens appended to every row, got 3 for row 1"),
        ([-1, 1], InvalidArgumentError, "lengths must be at least 0, got -1"),
        ([True, 1], InvalidTypeError, "lengths must be an int"),
        ([1.0, 1], InvalidTypeError, "lengths must be an int"),
        (torch.tensor([1.0, 2.0]), InvalidTypeError, "lengths must be an int"),
        (torch.tensor(1), InvalidTypeError, "lengths must be a sequence of whole numbers"),
        (2, InvalidTypeError, "lengths must be a sequence of whole numbers"),
        ("12", InvalidTypeError, "lengths must be a sequence of whole numbers"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_by_name_and_change_nothing(
    lengths: Any, error: type[Exception], said: str
) -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1]) as batch:
        append(batch, [5, 6])
        refused(batch, pool, lengths, error, said, ["a", "b"])
        assert pool.commit(["a", "b"], batch, lengths=[1, 2])
    pool.check_integrity()


def test_a_miss_without_tokens_has_nothing_to_commit() -> None:
    pool = pool_of(2)
    with pool.gather([0, "missing"]) as batch:
        append(batch, [5, 6])
        refused(batch, pool, [1, 0], InvalidArgumentError, "lengths must be at least 1 for row 1, which missed", [1, 2])
        refused(batch, pool, None, InvalidArgumentError, r"row 1 missed and was not filled: fill\(\) it, or", [1, 2])
    pool.check_integrity()


def test_a_row_that_was_committed_before_is_refused_with_lengths_too() -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1]) as batch:
        append(batch, [5, 6])
        pool.commit(["a"], batch, rows=[0], lengths=[1])
        with pytest.raises(InvalidArgumentError, match="row 0 was committed before"):
            pool.commit(["b"], batch, rows=[0], lengths=[1])
    pool.check_integrity()


# Tokens of all layers at once -----------------------------------------------------------------------------------------


def test_appending_to_all_layers_at_once_writes_what_appending_to_each_writes() -> None:
    pool = pool_of(2, 3)
    with pool.gather([0, 1]) as one, pool.gather([0, 1]) as other:
        new = stacked(tokens(5, 2), tokens(6, 2))
        keys, values = other.append_layers(new.keys, new.values)
        for layer in range(LAYOUT.num_layers):
            layer_keys, layer_values = one.append(layer, new.keys[layer], new.values[layer])
            assert torch.equal(keys[layer], layer_keys)
            assert torch.equal(values[layer], layer_values)
        assert torch.equal(one.data[:, :, :, : one.end], other.data[:, :, :, : other.end])
        assert (one.end, one.lengths) == (other.end, other.lengths)
        pool.commit(["a", "b"], other)
    assert_same(pool.get("a"), joined(tokens(1, 2), tokens(5, 2)))
    pool.check_integrity()


def test_what_all_layers_get_joins_no_graph_of_the_models() -> None:
    pool = pool_of(2)
    with pool.gather([0]) as batch:
        new = tokens(5, 2)
        keys, _ = batch.append_layers(new.keys.requires_grad_(), new.values)
        assert not keys.requires_grad
        pool.commit(["a"], batch)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda kv: (kv.keys[0], kv.values[0]), r"shape \[layers=2, batch=1, heads=2, tokens, head_dim="),
        (lambda kv: (kv.keys[:1], kv.values[:1]), r"shape \[layers=2, batch=1, heads=2, tokens, head_dim="),
        (lambda kv: (kv.keys, kv.values[:, :, :, :1]), r"shape \[layers=2"),
        (lambda kv: (kv.keys.double(), kv.values), "keys must be torch.float32"),
        (lambda kv: (kv.keys, kv.values.tolist()), "values must be a torch.Tensor"),
        (lambda kv: (kv.keys.repeat(1, 1, 1, 4, 1), kv.values.repeat(1, 1, 1, 4, 1)), "8 new tokens do not fit"),
    ],
)
def test_tokens_of_all_layers_that_do_not_fit_are_refused_and_change_nothing(change: Any, said: str) -> None:
    pool = pool_of(2)
    with pool.gather([0]) as batch:
        before = batch.data.clone()
        with pytest.raises((InvalidArgumentError, InvalidTypeError, WindowOverflowError), match=said):
            batch.append_layers(*change(tokens(5, 2)))
        assert torch.equal(batch.data, before)
        assert batch.end == 2
    pool.check_integrity()


def test_tokens_of_all_layers_are_refused_while_some_layers_are_ahead() -> None:
    pool = pool_of(2)
    with pool.gather([0]) as batch:
        new = tokens(5, 2)
        batch.append(0, new.keys[0], new.values[0])
        with pytest.raises(InvalidArgumentError, match="layers with different numbers of new tokens"):
            batch.append_layers(new.keys, new.values)
    pool.check_integrity()
