"""A model that torch.compile has compiled for fixed shapes, as the model of an evaluator with `row_sizes`."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compiled_model as benchmark
from concurrent_kv import KVCacheManager
from concurrent_kv.evaluation import Evaluated, Evaluator, Leaf
from concurrent_kv.pool.joint import JointBatch
from tests.compiling import (
    BACKENDS,
    ENVS,
    NEW,
    OVERFLOW,
    FixedShapes,
    Step,
    append_zeros,
    new_manager,
    new_transformer,
    play,
    turns_of,
    warm_up,
)
from tests.support import HANG_SECONDS

SIZES = (2, 4)


@pytest.fixture
def manager() -> Iterator[KVCacheManager]:
    made = new_manager()
    yield made
    made.check_integrity()
    made.close()


@pytest.fixture(params=BACKENDS)
def compiled(request: pytest.FixtureRequest) -> Iterator[Step]:
    """The transformer, to be compiled at its first calls; what cannot be one graph is an error."""
    torch._dynamo.reset()
    step: Step = torch.compile(new_transformer(), backend=request.param, fullgraph=True, dynamic=False)
    yield step
    torch._dynamo.reset()


def graphs_compiled() -> int:
    """By this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_a_compiled_model_says_and_stores_what_the_eager_one_does_without_padding(
    manager: KVCacheManager, compiled: Step
) -> None:
    turns = turns_of(1, [1, 2, 3, 4, 2, 3, 1, 4, 4, 3, 2, 1] * 2)
    model, before = FixedShapes(compiled), graphs_compiled()
    evaluator = Evaluator(manager, model, max_rows=4, row_sizes=SIZES, room=NEW)
    warm_up(evaluator, manager, SIZES)
    found = play(evaluator, manager, turns)
    assert graphs_compiled() == before + len(SIZES)
    assert len(model.beyond) == sum(len(turn) % 2 for turn in turns)
    assert all(map(math.isfinite, model.beyond))
    eager = new_manager()
    alone = Evaluator(eager, FixedShapes(new_transformer()), max_rows=4, room=NEW)
    torch.testing.assert_close(found, play(alone, eager, turns))
    eager.check_integrity()
    eager.close()


@pytest.mark.parametrize("own_thread", [False, True])
def test_nothing_is_compiled_anew_whichever_thread_makes_a_call_and_in_whatever_mode(
    manager: KVCacheManager, compiled: Step, own_thread: bool
) -> None:
    failed, made_by = list[BaseException](), set[int]()
    model = FixedShapes(compiled)

    def noting(batch: JointBatch, actions: Sequence[int]) -> Evaluated[float]:
        made_by.add(threading.get_ident())
        return model(batch, actions)

    evaluator = Evaluator(manager, noting, max_rows=4, row_sizes=SIZES, room=NEW, own_thread=own_thread)
    warm_up(evaluator, manager, SIZES)
    before = graphs_compiled()
    with manager.search(range(ENVS), overflow=OVERFLOW) as search:
        for number, mode in enumerate((nullcontext, torch.no_grad, torch.inference_mode, nullcontext)):

            def work(number: int = number, mode: Callable[[], Any] = mode) -> None:
                try:
                    with mode():
                        for turn, rows in enumerate((4, 1, 3, 2)):
                            evaluator.evaluate_many(
                                [Leaf(search, "root", (number, turn, row), row, row) for row in range(rows)]
                            )
                except BaseException as error:
                    failed.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(HANG_SECONDS)
            assert not thread.is_alive()
            assert not failed
    evaluator.close()
    assert len(made_by) == 1 if own_thread else len(made_by) > 1
    assert graphs_compiled() == before


# The memory of batches ------------------------------------------------------------------------------------------------


class Addresses:
    """A model that notes where its batches lie, keeps them, and does as it is told."""

    def __init__(self) -> None:
        self.of_size: dict[int, list[int]] = {size: [] for size in SIZES}
        self.kept: list[JointBatch] = []

    def __call__(self, batch: JointBatch, actions: Sequence[Callable[[], object]]) -> Evaluated[None]:
        self.of_size[batch.batch_size].append(batch.data.data_ptr())
        self.kept.append(batch)  # with its tensors: other memory would be at another address
        for act in actions:
            act()
        append_zeros(batch)
        return Evaluated([None] * len(actions))


def nothing() -> None:
    pass


def fails() -> None:
    raise ValueError("a bug of the model's")


def test_each_size_has_its_memory_whether_earlier_batches_are_kept_or_their_model_failed(
    manager: KVCacheManager,
) -> None:
    model = Addresses()
    evaluator: Evaluator[Any, None] = Evaluator(manager, model, max_rows=4, row_sizes=SIZES, room=NEW)
    with manager.search([0]) as search:
        for turn in range(6):
            rows = 1 + turn % 4
            act = fails if turn == 2 else nothing
            leaves = [Leaf(search, "root", (turn, row), act, 0) for row in range(rows)]
            if act is fails:
                with pytest.raises(ValueError, match="a bug of the model's"):
                    evaluator.evaluate_many(leaves)
            else:
                evaluator.evaluate_many(leaves)
    assert [len(found) for found in model.of_size.values()] == [4, 2]
    (of_two,), (of_four,) = (set(found) for found in model.of_size.values())
    assert of_two != of_four
    assert all(batch.closed for batch in model.kept)


@pytest.mark.parametrize("own_thread", [False, True])
def test_calls_made_at_once_have_memories_of_their_own_and_later_ones_have_one_of_these(
    manager: KVCacheManager, own_thread: bool
) -> None:
    model, both = Addresses(), threading.Barrier(2)
    evaluator: Evaluator[Any, None] = Evaluator(
        manager, model, max_rows=1, row_sizes=SIZES, room=NEW, parallel_calls=2, own_thread=own_thread
    )

    def meet() -> None:
        both.wait(HANG_SECONDS)

    with manager.search([0]) as search:
        for turn in range(3):
            threads = [
                threading.Thread(target=evaluator.evaluate, args=(Leaf(search, "root", (turn, number), meet, 0),))
                for number in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(HANG_SECONDS)
                assert not thread.is_alive()
            *_, one, other = model.of_size[2]
            assert one != other
            evaluator.evaluate(Leaf(search, "root", turn, nothing, 0))
    evaluator.close()
    assert len(model.of_size[2]) == 9
    assert len(set(model.of_size[2])) == 2


def test_the_benchmark_measures_every_contestant_at_both_sizes(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["--quick", "--backend", "eager", "--json", str(tmp_path / "figures.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "figures.json").read_text("utf-8"))["rows"]
    assert set(found) == {str(rows) for rows in benchmark.ROWS}
    for figures in found.values():
        assert len(figures) == 3
        assert {each["calls"] for each in figures.values()} == {benchmark.QUICK_ROUNDS * benchmark.SIMULATIONS}
