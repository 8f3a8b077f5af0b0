"""Batches and windows, exactly: columns, padding, contiguity, stable buffers, room, hits, fill, partial commits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    InvalidArgumentError,
    KVCacheManager,
    Search,
    WindowOverflowError,
)
from tests.support import WINDOW, append, assert_same, child_of, packed, row_of, slots_in_use, store, tokens

pytestmark = pytest.mark.usefixtures("loops")


@pytest.fixture
def search(manager: KVCacheManager) -> Iterator[Search]:
    """Roots "one", "three" and "eight" of as many tokens in both environments, and a search over both."""
    for pool in manager.init_pools:
        store(pool, ("one", tokens(1, 1)), ("three", tokens(3, 3)), ("eight", tokens(8, 8)))
    with manager.search([0, 1]) as search:
        yield search


# What a gather gives -------------------------------------------------------------------------------------------------


def test_rows_are_left_padded_with_zeros_to_the_longest_row(search: Search) -> None:
    with search.gather(["one", "three"], [0, 1]) as batch:
        assert not batch.data[:, 0, :, :2].any()
        assert torch.equal(batch.data[:, 0, :, 2:3], packed(tokens(1, 1))[:, 0])
        assert torch.equal(batch.data[:, 1, :, :3], packed(tokens(3, 3))[:, 0])


def test_the_valid_tokens_of_every_row_end_at_the_same_column(search: Search) -> None:
    with search.gather(["one", "three", "one"], [0, 1, 1]) as batch:
        assert (batch.start, batch.end, batch.lengths) == (3, 3, (1, 3, 1))
        assert batch.padding.tolist() == [2, 0, 2]
        for row, expected in enumerate((tokens(1, 1), tokens(3, 3), tokens(1, 1))):
            assert_same(row_of(batch, row), expected)


def test_free_room_for_new_tokens_follows_up_to_the_window(search: Search) -> None:
    with search.gather(["one", "three"], [0, 1]) as batch:
        assert batch.data.shape == (4, 2, 2, WINDOW, 3)
        assert batch.room == WINDOW - 3


@pytest.mark.parametrize("room", range(6))
def test_room_is_as_much_as_was_asked_for(search: Search, room: int) -> None:
    with search.gather(["one", "three"], [0, 1], room=room) as batch:
        assert batch.data.shape[3] == 3 + room
        assert batch.room == room


def test_the_keys_and_values_of_each_layer_are_contiguous(search: Search) -> None:
    with search.gather(["one", "three"], [0, 1]) as batch:
        for part in (batch.keys, batch.values):
            assert part.shape == (2, 2, 2, WINDOW, 3)
            for layer in part:
                assert layer.is_contiguous()
                assert layer.shape == (2, 2, WINDOW, 3)


def test_a_layer_shows_its_columns_up_to_the_newest_token(search: Search) -> None:
    with search.gather(["three"], [0]) as batch:
        keys, values = batch.layer(1)
        assert torch.equal(keys, tokens(3, 3).keys[1])
        assert torch.equal(values, tokens(3, 3).values[1])
        new = torch.ones(1, 2, 2, 3)
        keys, values = batch.append(1, new, new + 1)
        assert keys.shape == (1, 2, 5, 3)
        assert torch.equal(keys[:, :, 3:], new)
        assert torch.equal(values[:, :, 3:], new + 1)


def test_hits_say_which_rows_were_found(search: Search) -> None:
    with search.gather(["one", "missing", "three"], [0, 0, 1]) as batch:
        assert batch.hits == (True, False, True)
        assert batch.lengths == (1, 0, 3)
        assert not batch.data[:, 1, :, :3].any()


def test_a_batch_may_consist_of_misses_only(search: Search) -> None:
    with search.gather(["x", "y"], [0, 1]) as batch:
        assert (batch.hits, batch.lengths, batch.start) == ((False, False), (0, 0), 0)
        assert batch.room == WINDOW


def test_one_key_may_come_twice_in_a_batch(search: Search) -> None:
    batch = search.gather(["three", "three"], [0, 0])
    append(batch, [5, 6])
    search.commit(["left", "right"], batch)
    with search.gather(["left", "right"], [0, 0]) as children:
        assert_same(row_of(children, 0), child_of(tokens(3, 3), 5))
        assert_same(row_of(children, 1), child_of(tokens(3, 3), 6))


def test_side_data_comes_with_its_row(manager: KVCacheManager) -> None:
    manager.set_init_cache(0, "root", tokens(1, 2), side="observation")
    with manager.search([0]) as search, search.gather(["root", "missing"], [0, 0]) as batch:
        assert batch.side == ("observation", None)


# A given buffer ------------------------------------------------------------------------------------------------------


def test_out_is_gathered_into_at_its_stable_address(search: Search) -> None:
    out = torch.full((4, 2, 2, WINDOW, 3), float("nan"))
    address = out.data_ptr()
    for keys in (["one", "three"], ["eight", "missing"]):
        with search.gather(keys, [0, 1], out=out) as batch:
            assert batch.data is out
    assert out.data_ptr() == address
    assert torch.equal(out[:, :1], packed(tokens(8, 8)))
    assert not out[:, 1].any()


def test_nothing_that_was_in_out_shows_up_to_the_newest_tokens_nor_in_what_is_committed(search: Search) -> None:
    out = torch.full((4, 2, 2, WINDOW, 3), float("nan"))
    batch = search.gather(["one", "three"], [0, 1], out=out)
    assert_same(row_of(batch, 0), tokens(1, 1))
    assert_same(row_of(batch, 1), tokens(3, 3))
    assert not out[:, 0, :, :2].any()
    append(batch, [5, 6])
    search.commit(["left", "right"], batch)
    with search.gather(["left", "right"], [0, 1]) as again:
        assert_same(row_of(again, 0), child_of(tokens(1, 1), 5))
        assert_same(row_of(again, 1), child_of(tokens(3, 3), 6))


def test_out_may_have_fewer_columns_than_the_window(search: Search) -> None:
    out = torch.zeros(4, 1, 2, 5, 3)
    batch = search.gather(["three"], [0], out=out)
    assert batch.room == 2
    append(batch, [5])
    search.commit(["child"], batch)
    with search.gather(["child"], [0]) as again:
        assert_same(row_of(again, 0), child_of(tokens(3, 3), 5))


def test_out_stays_the_callers_when_its_batch_closes(search: Search) -> None:
    out = torch.zeros(4, 1, 2, WINDOW, 3)
    search.gather(["three"], [0], out=out).close()
    with search.gather(["one"], [0]) as batch:
        assert batch.data.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("columns", [2, 7])
def test_out_too_short_for_the_longest_row_is_an_error(search: Search, columns: int) -> None:
    with pytest.raises(InvalidArgumentError, match="out must have at least 8 columns"):
        search.gather(["eight"], [0], out=torch.zeros(4, 1, 2, columns, 3))


# Appending -----------------------------------------------------------------------------------------------------------


def test_tokens_may_be_appended_in_several_steps(search: Search) -> None:
    batch = search.gather(["three"], [0])
    append(batch, [5], 1)
    append(batch, [6], 2)
    assert batch.lengths == (6,)
    search.commit(["child"], batch)
    with search.gather(["child"], [0]) as again:
        assert_same(row_of(again, 0), child_of(child_of(tokens(3, 3), 5, 1), 6, 2))


def test_tokens_written_in_place_are_stated_by_advance(search: Search) -> None:
    batch = search.gather(["three"], [0])
    batch.data[:, :, :, 3:5] = packed(tokens(5, 2, first=3))
    batch.advance(2)
    search.commit(["child"], batch)
    with search.gather(["child"], [0]) as again:
        assert_same(row_of(again, 0), child_of(tokens(3, 3), 5))


def test_appending_beyond_the_room_is_an_error_and_appends_nothing(search: Search) -> None:
    with search.gather(["eight"], [0]) as batch:
        new = torch.zeros(1, 2, 1, 3)
        with pytest.raises(WindowOverflowError, match="1 new tokens do not fit: 8 of the batch's 8 columns"):
            batch.append(0, new, new)
        with pytest.raises(WindowOverflowError):
            batch.advance(1)
        assert batch.lengths == (8,)
        assert_same(row_of(batch, 0), tokens(8, 8))


# Fill ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_missed_row_is_filled_before_the_common_end(search: Search, length: int) -> None:
    with search.gather(["three", "missing"], [0, 1]) as batch:
        batch.fill(1, tokens(7, length))
        assert batch.lengths == (3, length)
        assert batch.padding.tolist() == [0, 3 - length]
        assert_same(row_of(batch, 0), tokens(3, 3))
        assert_same(row_of(batch, 1), tokens(7, length))
        assert not batch.data[:, 1, :, : 3 - length].any()


@pytest.mark.parametrize("length", [4, 8])
def test_a_fill_longer_than_the_longest_row_moves_every_row_right(search: Search, length: int) -> None:
    with search.gather(["three", "missing", "one"], [0, 1, 0]) as batch:
        assert batch.padding.tolist() == [0, 3, 2]
        batch.fill(1, tokens(7, length))
        assert (batch.start, batch.end, batch.room) == (length, length, WINDOW - length)
        assert batch.padding.tolist() == [length - 3, 0, length - 1]
        for row, expected in enumerate((tokens(3, 3), tokens(7, length), tokens(1, 1))):
            assert_same(row_of(batch, row), expected)
        assert not batch.data[:, 0, :, : length - 3].any()


def test_several_rows_are_filled_one_after_another(search: Search) -> None:
    with search.gather(["x", "y", "z"], [0, 0, 1]) as batch:
        for row, length in enumerate((2, 5, 4)):
            batch.fill(row, tokens(row, length))
        for row, length in enumerate((2, 5, 4)):
            assert_same(row_of(batch, row), tokens(row, length))


def test_a_filled_row_is_committed_whole(search: Search, manager: KVCacheManager) -> None:
    batch = search.gather(["missing", "three"], [0, 1])
    batch.fill(0, tokens(7, 4))
    append(batch, [5, 6])
    before = slots_in_use(manager)
    search.commit(["filled", "shared"], batch)
    assert slots_in_use(manager) - before == 6 + 2
    with search.gather(["filled", "shared"], [0, 1]) as again:
        assert_same(row_of(again, 0), child_of(tokens(7, 4), 5))
        assert_same(row_of(again, 1), child_of(tokens(3, 3), 6))


def test_a_row_that_hit_or_was_filled_cannot_be_filled(search: Search) -> None:
    with search.gather(["three", "missing"], [0, 1]) as batch:
        batch.fill(1, tokens(7, 2))
        for row in (0, 1):
            with pytest.raises(InvalidArgumentError, match=f"row {row} has its tokens already"):
                batch.fill(row, tokens(9, 1))
        assert_same(row_of(batch, 1), tokens(7, 2))


def test_a_fill_longer_than_the_buffer_is_an_error(search: Search) -> None:
    with search.gather(["one", "missing"], [0, 1], room=2) as batch:
        with pytest.raises(
            WindowOverflowError, match="kv has 4 tokens, and the batch 3 columns; gather with room=3 or"
        ):
            batch.fill(1, tokens(7, 4))
        assert batch.lengths == (1, 0)


# Commit --------------------------------------------------------------------------------------------------------------


def test_some_rows_are_committed_and_the_others_later(search: Search) -> None:
    batch = search.gather(["one", "three", "one"], [0, 1, 1])
    append(batch, [4, 5, 6])
    search.commit(["b"], batch, rows=[1])
    assert not batch.closed
    assert ("a" in search, "b" in search) == (False, True)
    search.commit(["c", "a"], batch, rows=[2, 0])
    assert batch.closed
    with search.gather(["a", "b", "c"], [0, 1, 1]) as again:
        assert_same(row_of(again, 0), child_of(tokens(1, 1), 4))
        assert_same(row_of(again, 1), child_of(tokens(3, 3), 5))
        assert_same(row_of(again, 2), child_of(tokens(1, 1), 6))


def test_rows_left_out_are_all_that_are_not_committed_yet(search: Search) -> None:
    batch = search.gather(["one", "three"], [0, 1])
    append(batch, [4, 5])
    search.commit(["a"], batch, rows=[0])
    search.commit(["b"], batch)
    assert batch.closed
    assert len(search) == 2


def test_a_missed_row_does_not_keep_the_others_from_being_committed(search: Search) -> None:
    with search.gather(["one", "missing"], [0, 1]) as batch:
        append(batch, [4, 5])
        with pytest.raises(InvalidArgumentError, match="row 1 missed and was not filled"):
            search.commit(["a", "b"], batch)
        assert len(search) == 0
        search.commit(["a"], batch, rows=[0])
        assert len(search) == 1


def test_a_key_twice_in_a_commit_gets_the_last_of_its_rows(search: Search) -> None:
    batch = search.gather(["one", "three"], [0, 1])
    append(batch, [4, 5])
    search.commit(["same", "same"], batch, sides=["first", "last"])
    assert batch.closed
    assert len(search) == 1
    with search.gather(["same"], [0]) as again:
        assert_same(row_of(again, 0), child_of(tokens(3, 3), 5))
        assert again.side == ("last",)


def test_a_row_may_fill_the_window_exactly(search: Search) -> None:
    batch = search.gather(["three", "one"], [0, 1])
    append(batch, [5, 6], 5)
    search.commit(["full", "six"], batch)
    with search.gather(["full", "six"], [0, 1]) as again:
        assert_same(row_of(again, 0), child_of(tokens(3, 3), 5, 5))
        assert_same(row_of(again, 1), child_of(tokens(1, 1), 6, 5))


def test_a_closed_batch_cannot_be_used(search: Search) -> None:
    batch = search.gather(["three"], [0])
    append(batch, [5])
    batch.close()
    batch.close()
    new = torch.zeros(1, 2, 1, 3)
    for use in (
        lambda: search.commit(["child"], batch),
        lambda: batch.append(0, new, new),
        lambda: batch.advance(1),
        lambda: batch.fill(0, tokens(1, 1)),
    ):
        with pytest.raises(ClosedError, match="batch is closed"):
            use()


def test_a_batch_whose_parents_have_left_commits_all_the_same(search: Search, manager: KVCacheManager) -> None:
    batch = search.gather(["three"], [0])
    append(batch, [5])
    search.commit(["child"], batch)
    batch = search.gather(["child"], [0])
    search.release(["child"])
    append(batch, [6])
    search.commit(["grandchild"], batch)
    with search.gather(["grandchild"], [0]) as again:
        assert_same(row_of(again, 0), child_of(child_of(tokens(3, 3), 5), 6))
