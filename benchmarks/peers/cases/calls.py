"""How many of the package's functions an operation calls in steady state: the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import concurrent_kv
from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.cases.steps import steps
from benchmarks.peers.contestants.base import Contestant, UnfitError
from benchmarks.peers.contestants.ours import Ours
from benchmarks.peers.shapes import Shape, Trees

__all__ = ["CallsRun", "count_calls"]

PACKAGE = str(Path(concurrent_kv.__file__).parent)


def count_calls(operation: Callable[[], object], package: str = PACKAGE) -> int:
    """Calls of Python functions of a package's files while `operation()` runs; comprehensions are none."""
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.endswith("comp>"):
            count += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(before)
    return count


class CallsRun(Run):
    """Counts each operation of a search, and `get` and `put`.

    Args:
        shape, rows, simulations: of the search, whose last step is counted.
    """

    def __init__(self, contestant: Contestant, *, shape: dict[str, Any], rows: int, simulations: int) -> None:
        if not isinstance(contestant, Ours):
            raise UnfitError("is not this library")
        self._shape = Shape.from_dict(shape)
        self._trees = Trees(self._shape, rows, simulations, 1, 2)
        (self._store,) = contestant.searches(self._shape, self._trees)
        self._entries = None if self._shape.absolute else contestant.entries(self._shape, self._shape.window, 64)

    def verify(self) -> dict[str, list[str]] | None:
        return None

    def turn(self) -> Times:
        return {}

    def facts(self) -> dict[str, float]:
        store, trees = self._store, self._trees
        tokens = trees.tokens_of_steps(self._shape)
        store.open()
        steps(store, trees, tokens)
        store.close()
        found = {"open": count_calls(store.open)}
        found["first gather"] = count_calls(lambda: store.gather(trees.parents[0]))
        for layer, (keys, values) in enumerate(tokens[0]):
            store.append(layer, keys, values)
        store.commit(trees.children[0])
        last = trees.steps - 1
        for number in range(1, last):
            store.gather(trees.parents[number])
            for layer, (keys, values) in enumerate(tokens[number]):
                store.append(layer, keys, values)
            store.commit(trees.children[number])
        found["gather"] = count_calls(lambda: store.gather(trees.parents[last]))
        found["append of one layer"] = 0
        for layer, (keys, values) in enumerate(tokens[last]):

            def append(layer: int = layer, keys: Any = keys, values: Any = values) -> None:
                store.append(layer, keys, values)

            found["append of one layer"] = count_calls(append)
        found["commit"] = count_calls(lambda: store.commit(trees.children[last]))
        found["close"] = count_calls(store.close)
        if self._entries is not None:
            entries = self._entries
            made = entries.prepared(root_like(self._shape))
            for key in range(100):  # more than fit
                entries.put(key, made)
            entries.get(99)
            found["get"] = count_calls(lambda: entries.get(99))
            found["put"] = count_calls(lambda: entries.put(99, made))
            found["put of a new key, full"] = count_calls(lambda: entries.put(100, made))
        return {f"functions called, {name}": float(calls) for name, calls in found.items()}

    def close(self) -> None:
        self._store.destroy()
        if self._entries is not None:
            self._entries.destroy()


def root_like(shape: Shape) -> Any:
    """K and V that fill a window."""
    import torch

    return torch.ones(shape.parts, shape.heads, shape.window, shape.head_dim)
