"""Batches whose newest tokens are taken back, and whose rows go on from each other: what drafts and beams do."""

from __future__ import annotations

import pytest
import torch

from concurrent_kv import ClosedError, InvalidArgumentError, InvalidTypeError, KVCacheManager, KVPool
from concurrent_kv.pool.batch import Batch
from tests.support import (
    LAYOUT,
    LOOPS,
    OperatorCalls,
    append,
    assert_same,
    child_of,
    config,
    joined,
    loops_of,
    row_of,
    slots_in_use,
    store,
    tokens,
)

A, B, C = tokens(1, 3), tokens(2, 1), tokens(3, 2)


@pytest.fixture(params=LOOPS)
def pool(request: pytest.FixtureRequest) -> KVPool:
    with loops_of(request.param):
        pool = KVPool(LAYOUT, 20)
        store(pool, ("a", A), ("b", B), ("c", C))
        return pool


def test_tokens_taken_back_are_not_stored_and_others_go_in_their_place(pool: KVPool) -> None:
    with pool.gather(["a", "b"]) as batch:
        append(batch, [4, 5])
        batch.crop(1)
        assert (batch.end, batch.lengths) == (4, (4, 2))
        new = tokens(7, 1)
        both = torch.cat([new.keys, new.keys], 1), torch.cat([new.values, new.values], 1)
        batch.append_layers(*both)
        pool.commit(["d", "e"], batch)
    assert_same(pool.get("d"), joined(A, tokens(4, 1, first=3), new))
    assert_same(pool.get("e"), joined(B, tokens(5, 1, first=1), new))
    assert pool.check_integrity().handles == 0


def test_as_many_tokens_are_taken_back_as_every_layer_was_given(pool: KVPool) -> None:
    with pool.gather(["a"]) as batch:
        for tokens_back in (1, -1):
            with pytest.raises(InvalidArgumentError, match="tokens must be"):
                batch.crop(tokens_back)
        append(batch, [4], 2)
        batch.append(0, *(torch.zeros(1, LAYOUT.num_heads, 1, LAYOUT.head_dim) for _ in "kv"))
        assert [batch.layer_end(layer) for layer in range(LAYOUT.num_layers)] == [6, *[5] * (LAYOUT.num_layers - 1)]
        with pytest.raises(InvalidArgumentError, match="tokens must be at most the 2 that"):
            batch.crop(3)
        batch.crop(0)
        with pytest.raises(InvalidArgumentError, match="layer must be 0 to"):
            batch.layer_end(LAYOUT.num_layers)
    with pytest.raises(ClosedError):
        batch.crop(0)
    pool.check_integrity()


def test_a_row_goes_on_from_another_its_parent_and_its_new_tokens(pool: KVPool) -> None:
    with pool.gather(["a", "b", "c"]) as batch:
        append(batch, [4, 5, 6])
        batch.reorder([2, 0, 0])
        assert batch.lengths == (4, 5, 5)
        assert [batch.padding.tolist(), batch.hits] == [[1, 0, 0], (True, True, True)]
        assert_same(row_of(batch, 0), child_of(C, 6))
        before = slots_in_use(pool)
        pool.commit(["x", "y", "z"], batch)
    assert slots_in_use(pool) == before + 6  # all that they share with their parents is shared
    for key, expected in (("x", child_of(C, 6)), ("y", child_of(A, 4)), ("z", child_of(A, 4))):
        assert_same(pool.get(key), expected)
    pool.pop("a")
    assert_same(pool.get("z"), child_of(A, 4))
    assert pool.check_integrity().handles == 0


def test_rows_that_missed_or_were_filled_move_as_others_do(pool: KVPool) -> None:
    with pool.gather(["a", "nothing", "neither"]) as batch:
        batch.fill(1, B, side="filled")
        append(batch, [4, 5, 6])
        batch.reorder([1, 2, 1])
        assert (batch.lengths, batch.side) == ((3, 2, 3), ("filled", None, "filled"))
        assert batch.hits == (False, False, False)
        pool.commit(["x", "y", "z"], batch, lengths=[2, 2, 1])
    assert_same(pool.get("x"), child_of(B, 5))
    assert_same(pool.get("y"), tokens(6, 2))
    assert_same(pool.get("z"), child_of(B, 5, 1))
    pool.check_integrity()


def test_of_rows_with_the_same_parent_only_the_new_tokens_are_copied(pool: KVPool) -> None:
    def numbers(batch: Batch) -> int:
        append(batch, [4, 5])
        with OperatorCalls() as calls:
            batch.reorder([1, 0])
        assert any("copy" in name for name in calls.names)
        return int(batch.data[:, 0, :, : batch.start].count_nonzero())

    with pool.gather(["a", "a"]) as batch:
        batch.data[:, :, :, : batch.start] = 0  # what was gathered: if it were copied, no harm would be seen
        batch.data[:, 1, :, : batch.start] = 9
        assert numbers(batch) == 0
    with pool.gather(["a", "c"]) as batch:
        batch.data[:, 0, :, : batch.start] = 0
        batch.data[:, 1, :, : batch.start] = 9
        assert numbers(batch) > 0
    pool.check_integrity()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([0], InvalidArgumentError),
        ([0, 2], InvalidArgumentError),
        ([0, -1], InvalidArgumentError),
        ([0, 1.0], InvalidTypeError),
        (7, InvalidTypeError),
    ],
)
def test_rows_that_cannot_move_leave_the_batch_as_it_was(pool: KVPool, rows: list[int], error: type[Exception]) -> None:
    with pool.gather(["a", "b"]) as batch:
        append(batch, [4, 5])
        with pytest.raises(error, match="rows must be"):
            batch.reorder(rows)
        pool.commit(["x", "y"], batch)
    assert_same(pool.get("x"), child_of(A, 4))
    pool.check_integrity()


def test_committed_rows_do_not_move(pool: KVPool) -> None:
    with pool.gather(["a", "b"]) as batch:
        append(batch, [4, 5])
        pool.commit(["x"], batch, rows=[0])
        with pytest.raises(InvalidArgumentError, match="once some of them were committed"):
            batch.reorder([1, 0])
        pool.commit(["y"], batch)
    assert_same(pool.get("y"), child_of(B, 5))
    with pytest.raises(ClosedError):
        batch.reorder([0, 1])
    pool.check_integrity()


def test_what_is_cut_off_while_rows_move_is_not_stored(pool: KVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes may have moved by then, and books not."""

    class Cut(BaseException):
        pass

    def cut_off(*args: object) -> None:
        raise Cut

    with pool.gather(["a", "b"]) as batch:
        append(batch, [4, 5])
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", cut_off)
            with pytest.raises(Cut):
                batch.reorder([1, 0])
        with pytest.raises(InvalidArgumentError, match="committed before"):
            pool.commit(["x", "y"], batch, rows=[0, 1])
    assert pool.get("x") is None
    assert pool.check_integrity().handles == 0


def test_a_search_says_how_many_tokens_it_has_beside_its_roots() -> None:
    manager = KVCacheManager(config(), 1)
    manager.set_init_cache(0, "root", A)
    with manager.search([0]) as search:
        assert search.tokens_in_use == 0
        for key in ("x", "y"):
            with search.gather(["root"], [0]) as batch:
                append(batch, [5])
                search.commit([key], batch)
        assert search.tokens_in_use == 2 + 2
        search.release(["x"])
        assert search.tokens_in_use == 2
    assert manager.check_integrity().handles == 0
    manager.close()
