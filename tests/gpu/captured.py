"""A model in CUDA graphs, one for each memory that a batch lies in; on a CPU, the work itself in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from concurrent_kv.evaluation import Evaluated
from concurrent_kv.pool.joint import JointBatch
from tests.compiling import LAYERS, NEW, Step, tokens_of

__all__ = ["Captured"]

WARM_UP_RUNS = 3  # on a side stream, before a capture: what libraries set up at first use is then there


class Captured:
    """A model for evaluators of one call at a time. A graph reads a batch, and writes to it, where it lies.

    Attributes:
        graphs: by the address of the batch.
    """

    def __init__(self, step: Step) -> None:
        self.graphs: dict[int, Graph] = {}
        self._step = step

    def __call__(self, batch: JointBatch, actions: Sequence[int]) -> Evaluated[float]:
        with torch.inference_mode():
            graph = self.graphs.get(batch.data.data_ptr())
            if graph is None:
                graph = self.graphs[batch.data.data_ptr()] = Graph(self._step, batch)
            graph.tokens.copy_(tokens_of(actions, batch.batch_size))
            graph.padding.copy_(batch.padding)
            graph.replay()
            batch.advance(NEW)  # which the graph has written in place
            return Evaluated(graph.values[: len(actions)].tolist())


class Graph:
    """One step over the memory of a batch.

    Attributes:
        tokens, padding: its inputs beside that memory; written to before each `replay`.
        values: what it made of them.
    """

    def __init__(self, step: Step, batch: JointBatch) -> None:
        past, start = batch.data, batch.start  # the same in every batch of this size
        self.padding = batch.padding.clone()
        self.tokens = tokens_of([], batch.batch_size).to(past.device)

        def work() -> Tensor:
            values, keys, new_values = step(past, self.padding, self.tokens)
            past[:LAYERS, :, :, start:].copy_(keys)
            past[LAYERS:, :, :, start:].copy_(new_values)
            return values

        self.replay, self.values = _captured(work) if past.is_cuda else _run_again(work)


def _captured(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            work()
    stream.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Pools may be used by other threads meanwhile, which "global" forbids.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        values = work()
    return graph.replay, values


def _run_again(work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    values = work()
    return lambda: values.copy_(work()), values
