"""What a model appends beyond the room of its call, and what misses without a parent count as: each hears its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence

import pytest
import torch

from concurrent_kv import InvalidArgumentError, InvalidTypeError, KVCacheError, KVCacheManager, WindowOverflowError
from concurrent_kv.evaluation import NO_PARENT, Evaluated, Evaluator, Leaf, Walk
from concurrent_kv.pool.joint import JointBatch
from tests.evaluating import HEAD_DIM, HEADS, LAYERS, WINDOW, new_manager


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager()
    yield made
    made.check_integrity()
    made.close()


def append(batch: JointBatch, tokens: int) -> None:
    new = torch.ones(batch.batch_size, HEADS, tokens, HEAD_DIM)
    for layer in range(LAYERS):
        batch.append(layer, new, new)


def model(batch: JointBatch, inputs: Sequence[int]) -> Evaluated[int]:
    """Each leaf brings so many tokens; the shorter ones are padded, as the batch wants it."""
    append(batch, max(inputs))
    return Evaluated(list(inputs), lengths=list(inputs))


def heard(leaf: Leaf[int]) -> Walk[int, int, object]:
    try:
        return (yield leaf)
    except KVCacheError as error:
        return error


def with_parents(manager: KVCacheManager, *lengths: int) -> None:
    """Roots of so many tokens, under their length, in the pool of environment 0."""
    evaluator = Evaluator(manager, model)
    for length in lengths:
        evaluator.evaluate(Leaf(manager.init_pools[0], NO_PARENT, length, length))


def test_a_long_row_and_a_neighbour_that_brings_more_are_both_evaluated(manager: KVCacheManager) -> None:
    with_parents(manager, WINDOW - 2, WINDOW - 3)
    pool, evaluator = manager.init_pools[0], Evaluator(manager, model)
    before = manager.get_stats_summary().total
    leaves = [Leaf(pool, WINDOW - 2, "a", 1), Leaf(pool, NO_PARENT, "b", 3), Leaf(pool, WINDOW - 3, "c", 3)]
    assert evaluator.evaluate_many(leaves) == [1, 3, 3]
    for key, length in (("a", WINDOW - 1), ("b", 3), ("c", WINDOW)):
        found = pool.get(key)
        assert found is not None
        assert found.lengths == (length,)
    stats, came = evaluator.stats(), manager.get_stats_summary().total - before
    assert (stats.calls, stats.rows_of_calls, stats.failed_rows) == (3, {1: 1, 2: 1, 3: 1}, 0)
    assert (came.hit_count, came.miss_count) == (2 + 3, 0)  # each parent was asked for once


@pytest.mark.parametrize("room", [None, 1])
def test_of_rows_that_bring_too_much_each_hears_so_and_no_other(manager: KVCacheManager, room: int | None) -> None:
    with_parents(manager, WINDOW - 2)
    pool, evaluator = manager.init_pools[0], Evaluator(manager, model, room=room)
    leaves = [Leaf(pool, WINDOW - 2, number, 3 if number in (2, 5) else 1) for number in range(8)]
    answers = evaluator.run_many([heard(leaf) for leaf in leaves])
    assert [answer if answer == 1 else type(answer) for answer in answers] == [
        WindowOverflowError if number in (2, 5) else 1 for number in range(8)
    ]
    assert "an overflow policy of limit=62 or less" in str(answers[2])
    assert sorted(key for key in pool if isinstance(key, int) and key < 8) == [0, 1, 3, 4, 6, 7]


def test_a_row_that_was_asked_for_beside_one_that_is_missing_is_one_request(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model)
    pool = manager.init_pools[0]
    with manager.search([1]) as search:
        for store, env in ((pool, None), (search, 1)):
            before = manager.get_stats_summary().total
            leaves = [Leaf(store, "root", "a", 1, env), Leaf(store, "nowhere", "b", 1, env)]
            evaluator.run_many([heard(leaf) for leaf in leaves])
            came = manager.get_stats_summary().total - before
            assert (came.hit_count, came.miss_count) == (1, 1)


def test_a_row_without_a_parent_counts_what_was_appended_to_it(manager: KVCacheManager) -> None:
    seen: list[tuple[int, ...]] = []

    def twice(batch: JointBatch, inputs: Sequence[int]) -> Evaluated[int]:
        for _ in range(2):
            seen.append(batch.lengths)  # the positions of the next tokens
            append(batch, 1)
        return Evaluated(list(inputs))

    pool = manager.init_pools[0]
    Evaluator(manager, twice).evaluate_many([Leaf(pool, "root", "a", 0), Leaf(pool, NO_PARENT, "b", 0)])
    assert seen == [(3, 0), (4, 1)]


def test_what_is_too_much_for_an_evaluator_names_its_own_argument(manager: KVCacheManager) -> None:
    evaluator = Evaluator(manager, model, room=1)
    with pytest.raises(WindowOverflowError, match=r"make the Evaluator with room=3, or without room="):
        evaluator.evaluate(Leaf(manager.init_pools[0], NO_PARENT, "a", 3))


def test_a_model_that_appends_nothing_hears_so(manager: KVCacheManager) -> None:
    evaluator: Evaluator[int, int] = Evaluator(manager, lambda batch, inputs: Evaluated(list(inputs)))
    for parent in ("root", NO_PARENT):
        with pytest.raises(InvalidArgumentError, match=r"batch has no new tokens: append\(\)"):
            evaluator.evaluate(Leaf(manager.init_pools[0], parent, "a", 0))


def test_errors_about_what_a_model_returned_or_appended_are_said_once(manager: KVCacheManager) -> None:
    def returns(batch: JointBatch, inputs: Sequence[int]) -> Evaluated[int]:
        append(batch, 1)
        return Evaluated([])

    def appends_here(batch: JointBatch, inputs: Sequence[int]) -> Evaluated[int]:
        batch.append(0, torch.ones(1), torch.ones(1))
        return Evaluated([])

    for wrong, function in ((returns, "_check"), (appends_here, "appends_here")):
        with pytest.raises((InvalidTypeError, InvalidArgumentError)) as caught:
            Evaluator(manager, wrong).evaluate(Leaf(manager.init_pools[0], "root", "a", 0))
        assert caught.value.__cause__ is None
        assert f"in {function}" in "".join(traceback.format_exception(caught.value))
