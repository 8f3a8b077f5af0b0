"""Rows that outgrow the window: every policy against LightZero's trimming, over chains of many steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    DropAndCorrect,
    DropLazily,
    DropOldest,
    InvalidArgumentError,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    PositionSteps,
    PositionTable,
    RaiseOnOverflow,
    WindowOverflowError,
)
from concurrent_kv.model.overflow import Overflow
from tests.support import LAYOUT, WINDOW, append, assert_same, child_of, packed, row_of, slots_in_use, tokens
from tests.trimming import KINDS, Reference, as_stored, difference_for, policy, roomy_manager, trimmed

pytestmark = pytest.mark.usefixtures("loops")

# LightZero's own: at window - 1 drop two, which leaves window - 3.
LIMIT, COUNT = WINDOW - 1, 2
RULES = [(LIMIT, COUNT, 2), (7, 3, 3), (6, 2, 2), (5, 3, 3), (8, 1, 1), (8, 2, 2), (4, 3, 3), (7, 6, 3), (2, 1, 1)]


@contextmanager
def reference(kind: str, limit: int = LIMIT, count: int = COUNT) -> Iterator[Reference]:
    with roomy_manager() as manager, manager.search([0], entries=1000, tokens=3000) as search:
        yield Reference(manager, search, kind, limit, count)
        manager.check_integrity()


def newest_is(kv: KeysValues, value: int) -> bool:
    """Whether the newest token was made by `tokens(value, ...)`, give or take a correction (they are small)."""
    numbers = (packed(kv)[:, :, :, -1] / (16 * 128)).floor()
    return bool((numbers == value).all())


# Each policy by itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_run_1_3_5_5_5_with_two_tokens_a_step(kind: str) -> None:
    with reference(kind) as model:
        model.root(0, 1)
        lengths = []
        for step in range(8):
            model.step([step], [step + 1], 2, {})
            lengths.append(model.rows[step + 1].shape[2])
        assert lengths == [3, 5, 5, 5, 5, 5, 5, 5]
        model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_many_drops_reads_as_trimmed_step_by_step(kind: str) -> None:
    with reference(kind) as model:
        model.root(0, 5)
        for step in range(40):
            model.step([step], [step + 1], 2, {})
            model.check()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_one_two_and_three_tokens_drop_as_stated(kind: str, count: int) -> None:
    with reference(kind, WINDOW - 1, 3) as model:
        model.root(0, 2)
        for step in range(12):
            model.step([step], [step + 1], min(count, WINDOW - model.rows[step].shape[2]), {})
        model.check()


def test_a_rotary_drop_copies_nothing() -> None:
    with reference("rotary") as model:
        model.root(0, 5)
        before = slots_in_use(model.manager)
        model.step([0, 0, 0], ["a", "b", "c"], 2, {})
        assert [model.rows[key].shape[2] for key in "abc"] == [5, 5, 5]
        assert slots_in_use(model.manager) - before == 3 * 2
        model.check()


def test_an_eager_correction_gives_the_row_slots_of_its_own() -> None:
    with reference("eager") as model:
        model.root(0, 5)
        before = slots_in_use(model.manager)
        model.step([0, 0], ["a", "b"], 2, {})
        assert slots_in_use(model.manager) - before == 2 * 5
        model.check()


def test_a_lazy_correction_keeps_sharing_over_many_moves() -> None:
    with reference("lazy") as model:
        model.root(0, 5)
        before = slots_in_use(model.manager)
        for step in range(10):
            model.step([step, step], [step + 1, ("sibling", step)], 2, {})
        assert slots_in_use(model.manager) - before == 10 * 2 * 2
        model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_overflow_share_everything_whatever_the_policy(kind: str) -> None:
    with reference(kind) as model:
        model.root("short", 2)
        before = slots_in_use(model.manager)
        model.step(["short"], ["child"], 2, {})
        assert slots_in_use(model.manager) - before == 2
        model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_overflow_and_rows_that_do_not_go_through_one_batch(kind: str) -> None:
    with reference(kind) as model:
        for length in (1, 3, 5, 6):
            model.root(length, length)
        model.step([5, 1, 6, 3, 5], ["a", "b", "c", "d", "e"], 2, {})
        assert [model.rows[key].shape[2] for key in "abcde"] == [5, 3, 6, 5, 5]
        model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_filled_rows_overflow_like_any_other(kind: str) -> None:
    with reference(kind) as model:
        model.root("root", 5)
        model.step(["root", None, None], ["a", "b", "c"], 2, {1: 5, 2: 2})
        assert [model.rows[key].shape[2] for key in "abc"] == [5, 5, 4]
        model.step(["a", "b", "c"], ["d", "e", "f"], 2, {})
        model.check()


@pytest.mark.parametrize("kind", KINDS)
def test_side_data_and_keys_stay_with_their_rows_when_some_overflow(kind: str) -> None:
    with reference(kind) as model:
        model.root("short", 1)
        model.root("long", 5)
        batch = model.search.gather(["short", "long", "short", "long"], [0] * 4)
        append(batch, [1, 2, 3, 4])
        model.search.commit(["a", "b", "c", "d"], batch, sides=[1, 2, 3, 4], overflow=model.overflow)
        with model.search.gather(["d", "c", "b", "a"], [0] * 4) as again:
            assert again.side == (4, 3, 2, 1)
            assert again.lengths == (5, 3, 5, 3)
            for row, value in enumerate((4, 3, 2, 1)):
                assert newest_is(row_of(again, row), value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflowed_row_promoted_to_the_init_pool_reads_alike(kind: str) -> None:
    with reference(kind) as model:
        model.root(0, 5)
        for step in range(6):
            model.step([step], [step + 1], 2, {})
        before = slots_in_use(model.manager)
        model.search.promote(6, 0, as_key="next")
        assert slots_in_use(model.manager) == before + 5  # all of it: none is a root's any more
        found = model.manager.get_init_cache(0, "next")
        assert found is not None
        assert found.packed is not None
        model.same(found.packed[:, 0], model.rows[6])


@pytest.mark.parametrize("kind", KINDS)
def test_partial_commits_overflow_row_by_row(kind: str) -> None:
    with reference(kind) as model:
        model.root("long", 5)
        batch = model.search.gather(["long", "long"], [0, 0])
        append(batch, [1, 2])
        for row, key in enumerate("ab"):
            model.search.commit([key], batch, rows=[row], overflow=model.overflow)
        assert batch.closed
        with model.search.gather(["b", "a"], [0, 0]) as again:
            assert again.lengths == (5, 5)
            assert newest_is(row_of(again, 0), 2)
            assert newest_is(row_of(again, 1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_searchs_own_policy_is_what_its_commits_follow(kind: str) -> None:
    with roomy_manager() as manager, manager.search([0], overflow=policy(kind, LIMIT, COUNT)) as search:
        manager.set_init_cache(0, "root", tokens(1, 5))
        batch = search.gather(["root"], [0])
        append(batch, [2])
        search.commit(["child"], batch)
        assert search.gather(["child"], [0]).lengths == (5,)


def test_a_commit_may_name_another_policy_than_its_search() -> None:
    with roomy_manager() as manager, manager.search([0], overflow=RaiseOnOverflow(LIMIT)) as search:
        manager.set_init_cache(0, "root", tokens(1, 5))
        batch = search.gather(["root"], [0])
        append(batch, [2])
        search.commit(["child"], batch, overflow=DropOldest(LIMIT, 4))
        assert search.gather(["child"], [0]).lengths == (3,)


# Errors --------------------------------------------------------------------------------------------------------------


def test_raise_on_overflow_is_an_error_and_stores_nothing(manager: KVCacheManager) -> None:
    manager.init_pools[0].put("short", tokens(1, 1))
    manager.init_pools[0].put("long", tokens(2, 5))
    with manager.search([0]) as search:
        batch = search.gather(["short", "long"], [0, 0])
        append(batch, [3, 4])
        before = slots_in_use(manager)
        with pytest.raises(WindowOverflowError, match="rows reach 7 tokens, the limit is 6"):
            search.commit(["a", "b"], batch, overflow=RaiseOnOverflow(LIMIT))
        assert len(search) == 0
        assert slots_in_use(manager) == before
        search.commit(["a"], batch, rows=[0], overflow=RaiseOnOverflow(LIMIT))
        search.commit(["b"], batch, overflow=DropOldest(LIMIT, COUNT))
        assert_same(row_of(search.gather(["a"], [0]), 0), child_of(tokens(1, 1), 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drop_that_leaves_a_row_at_its_limit_is_an_error_and_stores_nothing(kind: str) -> None:
    with reference(kind, 4, 1) as model:
        model.root("root", 3)
        batch = model.search.gather(["root"], [0])
        append(batch, [1], 3)
        before = slots_in_use(model.manager)
        with pytest.raises(WindowOverflowError, match=r"dropping 1 leaves 4 or more; an overflow\.count of 3 would"):
            model.search.commit(["child"], batch, overflow=model.overflow)
        assert slots_in_use(model.manager) == before
        assert len(model.search) == 0


def test_a_parent_that_was_moved_by_one_table_is_stored_whole_when_moved_by_another() -> None:
    with reference("lazy") as model:
        model.root(0, 5)
        model.step([0], [1], 2, {})
        batch = model.search.gather([1], [0])
        append(batch, [2])
        other = DropLazily(LIMIT, COUNT, PositionTable(LAYOUT, difference_for))
        before = slots_in_use(model.manager)
        whole = trimmed(batch.data[:, 0, :, : batch.end].clone(), LIMIT, COUNT, corrected=True)
        model.search.commit([2], batch, overflow=other)
        assert slots_in_use(model.manager) - before == whole.shape[2]
        with model.search.gather([2], [0]) as again:
            model.same(again.data[:, 0, :, : again.start], whole)
        model.manager.check_integrity()


@pytest.mark.parametrize("other", ["rotary", "eager", "lazy"])
def test_a_row_owed_steps_is_stored_whole_where_another_policy_drops_from_it(other: str) -> None:
    with reference("stepwise") as model:
        model.root(0, 5)
        model.step([0], [1], 2, {})
        batch = model.search.gather([1], [0])
        append(batch, [2])
        whole = trimmed(batch.data[:, 0, :, : batch.end].clone(), LIMIT, 3, corrected=False)
        if other != "rotary":
            whole = whole + as_stored(difference_for(3))[:, :, : whole.shape[2]]
        before = slots_in_use(model.manager)
        model.search.commit([2], batch, overflow=policy(other, LIMIT, 3))
        assert slots_in_use(model.manager) - before == whole.shape[2]
        with model.search.gather([2], [0]) as again:
            if other == "lazy":
                torch.testing.assert_close(again.data[:, 0, :, : again.start], whole, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(again.data[:, 0, :, : again.start], whole)
        model.manager.check_integrity()


@pytest.mark.parametrize("kinds", [*product(["oldest", "eager", "steps", "table"], repeat=3)], ids="-".join)
def test_each_policy_changes_what_was_read_before_it_whatever_came_before(kinds: tuple[str, ...]) -> None:
    layout = KVLayout(1, 1, 1, 8)
    drop = torch.full((1, 2, 1, 8, 1), 200.0)
    table = PositionTable(layout, lambda moved: torch.full((1, 2, 1, 8 - moved, 1), 100.0 * moved))
    policies: dict[str, Overflow] = {
        "oldest": DropOldest(7, 2),
        "eager": DropAndCorrect(7, 2, drop, layout),
        "steps": DropLazily(7, 2, PositionSteps(layout, 2, drop)),
        "table": DropLazily(7, 2, table),
    }
    expected = torch.arange(5.0)
    with KVPool(layout, 20) as pool:
        pool.put(0, KeysValues.from_packed(expected.expand(2, 1, 1, 5).unsqueeze(-1)))
        for step, kind in enumerate(kinds):
            # A child that fits, which shares its parent's tokens, and a row of another path in the same batch.
            with pool.gather([step, 0]) as batch:
                new = torch.tensor([10.0 * step + 5, 10.0 * step + 6])
                assert torch.equal(batch.data[0, 0, 0, : batch.end].ravel(), expected)
                batch.append(0, new.expand(2, 1, 2).unsqueeze(-1), new.expand(2, 1, 2).unsqueeze(-1))
                pool.commit([step + 1, "beside"], batch, overflow=policies[kind])
            expected = torch.cat((expected, new))[2:] + (0.0 if kind == "oldest" else 200.0)
        found = pool.get(len(kinds))
        assert found is not None
        assert torch.equal(found.keys.ravel(), expected)
        assert torch.equal(found.values.ravel(), expected)
        pool.check_integrity()


def test_a_row_that_moved_without_a_correction_shares_its_tokens_until_a_lazy_policy_drops_from_it() -> None:
    with reference("rotary") as model:
        model.root(0, 5)
        model.step([0], [1], 2, {})
        lazily = policy("lazy", LIMIT, COUNT)
        for key, taken in ((2, 1), (3, LIMIT - COUNT)):  # five tokens get one more, which fits, and another
            batch = model.search.gather([key - 1], [0])
            append(batch, [key], 1)
            before = slots_in_use(model.manager)
            model.search.commit([key], batch, overflow=lazily)
            assert slots_in_use(model.manager) - before == taken
        model.manager.check_integrity()


@pytest.mark.parametrize("overflow", [None, RaiseOnOverflow(WINDOW)])
def test_a_row_owed_steps_shares_its_tokens_where_nothing_drops(overflow: RaiseOnOverflow | None) -> None:
    with reference("stepwise") as model:
        model.root(0, 5)
        model.step([0], [1], 2, {})
        batch = model.search.gather([1], [0])
        append(batch, [2], 1)
        whole = batch.data[:, 0, :, : batch.end].clone()
        before = slots_in_use(model.manager)
        model.search.commit([2], batch, overflow=overflow)
        assert slots_in_use(model.manager) - before == 1
        with model.search.gather([2, 1], [0, 0]) as again:
            assert torch.equal(again.data[:, 0, :, : again.start], whole)
        model.manager.check_integrity()


@pytest.mark.parametrize("order", [("lazy", 1, 0), (1, "lazy", 0)])
def test_steps_and_tables_go_through_one_batch_in_either_order(order: tuple[object, ...]) -> None:
    with reference("stepwise") as model:
        other = policy("lazy", LIMIT, COUNT)
        model.root(0, 5)
        model.step([0], [1], 2, {})
        batch = model.search.gather([0], [0])
        append(batch, [2])
        model.search.commit(["lazy"], batch, overflow=other)
        with model.search.gather(order, [0] * 3) as both, model.search.gather(["lazy"], [0]) as one:
            model.rows["lazy"] = one.data[:, 0, :, : one.start]
            for row, key in enumerate(order):
                model.same(both.data[:, row, :, : both.start], model.rows[key])
        model.manager.check_integrity()


def test_steps_that_cover_too_few_tokens_are_refused_and_nothing_is_stored() -> None:
    with reference("stepwise") as model:
        model.root(0, 5)
        short = PositionSteps(LAYOUT, COUNT, difference_for(COUNT)[:, :, :, :4])
        batch = model.search.gather([0], [0])
        append(batch, [2])
        with pytest.raises(ValueError, match=r"overflow.table must cover the 5 tokens that a row keeps here, got 4"):
            model.search.commit(["child"], batch, overflow=DropLazily(LIMIT, COUNT, short))
        assert len(model.search) == 0
        model.check()


def test_negative_zeros_that_moved_nothing_stay_as_they_are() -> None:
    with reference("stepwise") as model:
        zeros = torch.full((2 * LAYOUT.num_layers, LAYOUT.num_heads, 1, LAYOUT.head_dim), -0.0)
        model.root(0, 5)
        model.step([0], [1], 2, {})
        model.manager.set_init_cache(0, "zeros", KeysValues.from_packed(zeros[:, None]))
        with model.search.gather(["zeros", 1], [0, 0]) as batch:
            assert torch.equal(batch.data[:, 0, :, batch.start - 1 : batch.start].signbit(), zeros.signbit())


def test_a_difference_is_not_written_to_nor_kept_as_the_callers_tensor() -> None:
    with reference("eager") as model:
        overflow = model.overflow
        before = difference_for(COUNT)
        model.root(0, 5)
        overflow.difference.zero_()  # type: ignore[union-attr]
        model.step([0], [1], 2, {})
        model.check()
        assert torch.equal(before, difference_for(COUNT))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_overflows_beside_one_that_ends_as_long_without(kind: str) -> None:
    with reference(kind, 8, 1) as model:
        model.root(0, 1)
        model.step([0, 0], [1, 2], 1, {0: 7, 1: 6})
        model.check()


# Anything ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sequence_of_steps_reads_as_trimmed_step_by_step(kind: str, data: st.DataObject) -> None:
    limit, count, most = data.draw(st.sampled_from(RULES), label="limit, count, most")
    with reference(kind, limit, count) as model:
        for number in range(data.draw(st.integers(1, 3), label="roots")):
            model.root(("root", number), data.draw(st.integers(1, limit - 1), label="length"))
        for step in range(data.draw(st.integers(1, 8), label="steps")):
            rows = data.draw(st.integers(1, 4), label="rows")
            parents = [data.draw(st.sampled_from(list(model.rows)), label="parent") for _ in range(rows)]
            fills = {
                row: data.draw(st.integers(1, limit - 1), label="filled")
                for row in data.draw(st.sets(st.integers(0, rows - 1), max_size=2), label="misses")
            }
            longest = max(
                fills[row] if row in fills else model.rows[parent].shape[2] for row, parent in enumerate(parents)
            )
            new = min(data.draw(st.integers(1, most), label="new"), WINDOW - longest)
            model.step(parents, [(step, row) for row in range(rows)], new, fills)
        model.check()


def test_a_limit_that_leaves_no_room_for_a_step_is_said_before_the_tables_size() -> None:
    layout = KVLayout(num_layers=1, num_heads=1, head_dim=2, max_tokens=16)
    table = PositionSteps(layout, 2, torch.zeros(1, 2, 1, 14, 2))
    with pytest.raises(InvalidArgumentError, match=r"overflow\.limit must be at most 15 in a window of 16"):
        DropLazily(limit=16, count=2, table=table, step=2)
    DropLazily(limit=15, count=2, table=table, step=2)
