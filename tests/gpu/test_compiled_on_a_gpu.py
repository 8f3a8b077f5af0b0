"""Models in CUDA graphs, captured by hand and by torch.compile; the evaluator's thread has a stream of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from concurrent_kv.evaluation import Evaluator
from concurrent_kv.evaluation.leaves import Model
from tests.compiling import NEW, FixedShapes, Step, new_manager, new_transformer, play, turns_of, warm_up

from .captured import Captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here: nothing of this was run")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="torch.compile needs triton on a GPU, and it is not installed"
)

SIZES = (2, 4)
DEVICE = torch.device("cuda", 0)
TURNS = turns_of(2, [1, 2, 3, 4, 2, 3, 1, 4, 4, 3, 2, 1] * 2)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def played(model: Model[int, float], *, fixed: bool) -> tuple[list[float], list[Tensor]]:
    """All turns, whose calls are made by a thread of the evaluator's, in its own stream."""
    manager = new_manager(DEVICE)
    row_sizes = SIZES if fixed else ()
    evaluator = Evaluator(manager, model, max_rows=4, row_sizes=row_sizes, room=NEW, own_thread=True)
    if fixed:
        for _ in range(3):  # torch.compile's graphs are warmed up, recorded and replayed, in this order
            warm_up(evaluator, manager, SIZES)
    values, stored = play(evaluator, manager, TURNS)
    evaluator.close()
    manager.check_integrity()
    on_host = [each.cpu() for each in stored]
    manager.close()
    return values, on_host


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_triton)], ids=["eager", "compiled"])
def test_a_model_captured_over_the_memory_of_each_size_says_and_stores_what_the_eager_one_does(compiled: bool) -> None:
    step: Step = new_transformer(DEVICE)
    expected = played(FixedShapes(step), fixed=False)
    model = Captured(torch.compile(step, fullgraph=True, dynamic=False) if compiled else step)
    torch.testing.assert_close(played(model, fixed=True), expected)
    assert len(model.graphs) == len(SIZES)


@needs_triton
def test_a_model_that_torch_compile_captures_says_and_stores_what_the_eager_one_does() -> None:
    step: Step = new_transformer(DEVICE)
    expected = played(FixedShapes(step), fixed=False)
    fast = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def cloned(past: Tensor, padding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, keys, new_values = fast(past, padding, tokens)
        return values.clone(), keys.clone(), new_values.clone()  # the next run writes over what this one has returned

    torch.testing.assert_close(played(FixedShapes(cloned), fixed=True), expected)
