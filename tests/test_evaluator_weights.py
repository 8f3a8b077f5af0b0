"""Weights that change between a leaf's gather and the end of its model call: no leaf gets an output that mixes both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from concurrent_kv import (
    ClosedError,
    KeyNotFoundError,
    KVCacheError,
    KVCacheManager,
    KVPool,
    SearchEndedError,
    WaitTimeoutError,
)
from concurrent_kv.evaluation import NO_PARENT, Evaluated, Evaluator, Leaf, Walk
from concurrent_kv.evaluation.tickets import MOST_CALLS
from concurrent_kv.pool.joint import JointBatch
from tests.evaluating import HEAD_DIM, HEADS, LAYERS, look_every, new_manager
from tests.support import HANG_SECONDS


@pytest.fixture(autouse=True)
def woken_or_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks by itself: a wake-up that is missing is a hang."""
    look_every(10 * HANG_SECONDS, monkeypatch)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager()
    yield made
    made.check_integrity()
    made.close()


class Learning:
    """A model whose keys and values are its weights, one number; it says by which weights its whole row was made.

    Attributes:
        calls: the lock that is held by each call, and while the weights change.
        in_between: what happens next between a gather and the model's own part, where it waits for the lock.
    """

    def __init__(self) -> None:
        self.weights, self.calls = 0.0, threading.Lock()
        self.in_between: list[Callable[[], object]] = []
        self.rows: list[int] = []

    def change(self, bump: Callable[[], object]) -> None:
        with self.calls:
            self.weights += 1.0
            bump()

    def __call__(self, batch: JointBatch, inputs: Sequence[None]) -> Evaluated[list[float]]:
        if self.in_between:
            self.in_between.pop(0)()
        with self.calls:
            self.rows.append(len(inputs))
            new = torch.full((batch.batch_size, HEADS, 1, HEAD_DIM), self.weights)
            for layer in range(LAYERS):
                keys, _ = batch.append(layer, new, new)
            of_rows = zip(keys, batch.padding.tolist(), strict=True)
            return Evaluated([torch.unique(row[:, padding:]).tolist() for row, padding in of_rows][: len(inputs)])


def roots_of(manager: KVCacheManager, model: Learning, evaluator: Evaluator[None, list[float]]) -> None:
    for pool in manager.init_pools:
        assert evaluator.evaluate(Leaf(pool, NO_PARENT, "root", None)) == [model.weights]


@pytest.mark.parametrize("own_thread", [False, True])
def test_a_leaf_of_a_pool_whose_weights_changed_before_its_model_call_hears_that_its_parent_is_gone(
    manager: KVCacheManager, own_thread: bool
) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model, own_thread=own_thread)
    roots_of(manager, model, evaluator)
    model.in_between = [partial(model.change, manager.bump_version)]
    pool = manager.init_pools[0]
    with pytest.raises(KeyNotFoundError, match="the parent 'root'"):
        evaluator.evaluate(Leaf(pool, "root", "child", None))
    assert "child" not in pool
    evaluator.close()


@pytest.mark.parametrize("own_thread", [False, True])
def test_a_root_is_evaluated_again_by_the_weights_that_changed_and_is_stored(
    manager: KVCacheManager, own_thread: bool
) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model, own_thread=own_thread)
    pool = manager.init_pools[0]
    seen: list[float] = []

    def model_and_change(batch: JointBatch, inputs: Sequence[None]) -> Evaluated[list[float]]:
        answer = model(batch, inputs)
        seen.append(answer.outputs[0][0])
        if len(seen) == 1:  # after the model's own part, and before the commit
            model.change(pool.bump_version)
        return answer

    for kind in (model, model_and_change):
        evaluator = Evaluator(manager, kind, own_thread=own_thread)
        model.in_between = [partial(model.change, pool.bump_version)] if kind is model else []
        assert evaluator.evaluate(Leaf(pool, NO_PARENT, "root", None)) == [model.weights]
        with pool.gather(["root"]) as batch:
            assert batch.hits == (True,)
            assert torch.unique(batch.data[:, :, :, : batch.end]).tolist() == [model.weights]
        evaluator.close()
    assert (model.rows, seen) == ([1, 1, 1, 1], [1.0, 2.0])


def test_a_parent_that_was_made_again_meanwhile_is_what_a_leaf_goes_on_from(manager: KVCacheManager) -> None:
    model = Learning()
    evaluator, other = Evaluator(manager, model), Evaluator(manager, model)
    roots_of(manager, model, evaluator)

    def change() -> None:
        model.change(manager.bump_version)
        roots_of(manager, model, other)

    model.in_between = [change]
    assert evaluator.evaluate(Leaf(manager.init_pools[0], "root", "child", None)) == [1.0]
    assert "child" in manager.init_pools[0]


def test_leaves_of_other_pools_and_searches_in_that_call_go_on(manager: KVCacheManager) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model)
    roots_of(manager, model, evaluator)
    first, second = manager.init_pools[:2]

    def change() -> None:
        model.change(first.bump_version)
        ended.close()

    def walk(store: Any, env: int | None) -> Walk[None, list[float], object]:
        try:
            return (yield Leaf(store, "root", "child", None, env))
        except KVCacheError as error:
            return error

    with manager.search([2]) as search, manager.search([3]) as ended:
        model.in_between = [change]
        stores: list[tuple[Any, int | None]] = [(first, None), (second, None), (search, 2), (ended, 3)]
        of_first, of_second, of_search, of_ended = evaluator.run_many([walk(*store) for store in stores])
        assert isinstance(of_first, KeyNotFoundError)
        assert isinstance(of_ended, SearchEndedError)
        assert of_second == of_search == [0.0, 1.0]  # the versions of these two were not bumped
        assert "child" in second
        assert search.contains("child")
    assert model.rows == [1, 1, 1, 1, 4]  # the one without its parent comes to no second


def test_a_walk_whose_root_was_evaluated_again_goes_on_by_the_new_weights(manager: KVCacheManager) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model)
    pool = manager.init_pools[0]

    def walk() -> Walk[None, list[float], list[list[float]]]:
        root = yield Leaf(pool, NO_PARENT, "root", None)
        child = yield Leaf(pool, "root", "child", None)
        return [root, child]

    model.in_between = [partial(model.change, manager.bump_version)]
    assert evaluator.run(walk()) == [[1.0], [1.0]]


def test_a_leaf_whose_weights_change_in_every_call_is_not_evaluated_without_end(manager: KVCacheManager) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model)
    pool: KVPool = manager.init_pools[0]
    model.in_between = [partial(model.change, pool.bump_version)] * (MOST_CALLS + 1)
    with pytest.raises(WaitTimeoutError, match=f"during each of {MOST_CALLS} calls"):
        evaluator.evaluate(Leaf(pool, NO_PARENT, "root", None))
    assert len(model.rows) == MOST_CALLS


def test_a_clear_in_between_is_no_change_of_weights(manager: KVCacheManager) -> None:
    model = Learning()
    evaluator = Evaluator(manager, model)
    pool = manager.init_pools[0]
    model.in_between = [pool.clear]
    assert evaluator.evaluate(Leaf(pool, NO_PARENT, "root", None)) == [0.0]
    assert (model.rows, len(pool.keys())) == ([1], 0)


@pytest.mark.parametrize("operation", ["append", "append_layers", "advance", "crop", "wait"])
def test_the_batch_of_a_call_stays_open_until_the_call_is_over_whichever_search_ends(
    manager: KVCacheManager, operation: str
) -> None:
    kept: list[JointBatch] = []
    shape = HEADS, 1, HEAD_DIM

    def model(batch: JointBatch, inputs: Sequence[None]) -> Evaluated[int]:
        manager.bump_version()
        assert [part.closed for part in batch.parts] == [True, False]  # of the search, and of the pool
        assert not batch.closed
        new = torch.ones(batch.batch_size, *shape)
        for layer in range(LAYERS):
            batch.append(layer, new, new)
        call(batch)
        kept.append(batch)
        return Evaluated([0] * len(inputs))

    def call(batch: JointBatch) -> None:
        layers = torch.ones(LAYERS, batch.batch_size, *shape)
        operations: dict[str, Callable[[], object]] = {
            "append": lambda: batch.append(0, layers[0], layers[0]),
            "append_layers": lambda: batch.append_layers(layers, layers),
            "advance": lambda: batch.advance(1),
            "crop": lambda: batch.crop(0),
            "wait": batch.wait,
        }
        operations[operation]()

    evaluator = Evaluator(manager, model)
    with manager.search([0]) as search:
        leaves = [Leaf(search, "root", "child", None, 0), Leaf(manager.init_pools[1], "root", "child", None)]
        with pytest.raises(SearchEndedError):
            evaluator.evaluate_many(leaves)
    (batch,) = kept
    assert batch.closed
    with pytest.raises(ClosedError, match="its evaluation is over"):
        call(batch)
