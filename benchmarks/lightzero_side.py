"""One side of the comparison: a released world model with its own cache or with ours, and what its cache path takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.lightzero_trees import Trees
from benchmarks.timing import Samples
from tests.support import OperatorCalls

__all__ = ["Side", "same_states"]

# What is called the cache path: lookups and their hashes, padding, copies to and from the rings, drops and corrections.
# What attention appends to the contexts is the model's, and the same on both sides.
CACHE_PATH = ("retrieve_or_generate_kvcache", "trim_and_pad_kv_cache", "update_cache_context")
# Views and memory that is not written to launch nothing.
NO_WORK = (
    *("view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "transpose", "t.", "permute", "as_strided"),
    *("narrow", "expand", "unbind", "detach", "alias", "lift_fresh", "empty"),
)
TO_HOST = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Side:
    """A world model whose searches are timed.

    On a GPU a time is what the device has done by its end. To wait for that around the cache path would slow the rest
    of its step down, so of a search's steps every other one gives the time of its cache path, and the others theirs.

    Attributes:
        clock: of a CPU, in nanoseconds; `time.thread_time_ns` where others use the machine meanwhile.
        cache, step: the cache path of each simulated step, and the whole of it.
        calls, copies: operator calls of one step's cache path that launch work, and tensors that it copies to the host.
    """

    clock: Callable[[], int] = staticmethod(time.perf_counter_ns)

    def __init__(self, model: Any, trees: Trees, stored_bytes: Callable[[], float]) -> None:
        self.model, self.trees, self.stored_bytes = model, trees, stored_bytes
        self.cache, self.step = Samples(), Samples()
        self.calls = self.copies = 0
        self.bytes_per_node = 0.0
        self._path_ns = 0
        self._counting = False
        self._on_gpu = trees.device == "cuda"
        self._timing_path = True
        for name in CACHE_PATH:
            vars(model)[name] = self._timed(getattr(model, name))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self._counting:
                with OperatorCalls() as operators, self._copies_counted():
                    result = method(*arguments, **options)
                self.calls += sum(not name.removeprefix("aten.").startswith(NO_WORK) for name in operators.names)
                return result
            if not self._timing_path:
                return method(*arguments, **options)
            started = self._now()
            try:
                return method(*arguments, **options)
            finally:
                self._path_ns += self._now() - started

        return timed

    def search(self, *, keep: bool = True, count: bool = False) -> list[Any]:
        """A search of the shape's simulations; `keep` says whether its times count. Returns the nodes' states.

        `count`: its last step is counted instead of timed.
        """
        asked, at = self.trees.next_root()
        with torch.no_grad():
            self.trees.plant(self.model.forward_initial_inference(asked, at)[1])
            last = self.trees.shape.num_simulations - 1
            for number in range(last + 1):
                step = self.trees.next_step()
                self._path_ns, self._counting = 0, count and number == last
                self._timing_path = not self._on_gpu or number % 2 == 1
                started = self._now()
                states = self.model.forward_recurrent_inference(*step)[1]
                ended = self._now()
                if keep and not self._counting:
                    if not (self._on_gpu and self._timing_path):
                        self.step.micros.append((ended - started) / 1e3)
                    if self._timing_path:
                        self.cache.micros.append(self._path_ns / 1e3)
                self.trees.grow(states)
        self._counting = False
        self.bytes_per_node = self.stored_bytes()
        return self.trees.states

    def _now(self) -> int:
        """Nanoseconds, once the device has done its work so far."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return self.clock()

    @contextmanager
    def _copies_counted(self) -> Iterator[None]:
        """Count tensors whose numbers the host asks for: each is a wait for the device where that is not the CPU."""
        known: dict[int, object] = {}

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def count(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
                result = method(tensor, *arguments, **options)
                if tensor.data_ptr() not in known:
                    self.copies += 1
                    known[tensor.data_ptr()] = tensor
                if isinstance(result, Tensor):
                    known[result.data_ptr()] = result  # `.cpu().numpy()` is one copy, of any view
                return result

            return count

        released = {name: getattr(Tensor, name) for name in TO_HOST}
        try:
            for name, method in released.items():
                setattr(Tensor, name, counted(method))
            yield
        finally:
            for name, method in released.items():
                setattr(Tensor, name, method)


def same_states(first: list[Any], second: list[Any]) -> bool:
    """Whether two searches led to the same states, bit for bit."""
    return all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
