"""Bytes a node: what a process grows by when a search stores many, how much of it is K and V, what a commit takes.

Where memory is first touched costs too, which the other cases leave out by going round in what they have.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from typing import Any

import psutil

from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.cases.steps import steps
from benchmarks.peers.cases.windows import narrow_shape
from benchmarks.peers.contestants.base import Contestant, UnfitError
from benchmarks.peers.measuring import Stopwatch, now
from benchmarks.peers.shapes import Shape, Trees

__all__ = ["NodesRun"]

MIB = 1 << 20


def own_bytes() -> int:
    """Memory that is this process's alone, once what is free has been given back."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_full_info().uss)


class NodesRun(Run):
    """Searches of several shapes, one after the other, once; "at first" is after one step.

    Args:
        searches: by name: `{"shape": of a workload, or "window": ..., "rows", "nodes", "root": tokens, "new": tokens}`.
        copied_bytes: a contestant that stores a node's tokens whole stores fewer nodes, to stay below this.
    """

    def __init__(self, contestant: Contestant, *, searches: dict[str, dict[str, Any]], copied_bytes: int) -> None:
        self._contestant, self._searches, self._copied_bytes = contestant, searches, copied_bytes

    def verify(self) -> dict[str, list[str]] | None:
        return None

    def turn(self) -> Times:
        return {}

    def facts(self) -> dict[str, float]:
        found: dict[str, float] = {}
        refused = None
        for name, sizes in self._searches.items():
            try:
                found |= {f"{fact}, {name}": value for fact, value in self._measure(**sizes).items()}
            except UnfitError as error:
                refused = error
        if refused and not found:
            raise refused
        return found

    def _measure(
        self, rows: int, nodes: int, root: int, new: int, shape: dict[str, Any] | None = None, window: int = 0
    ) -> dict[str, float]:
        sizes = narrow_shape(window) if shape is None else Shape.from_dict(shape)
        if not self._contestant.shares:
            longest = max(root + new, min(sizes.window, root + 20 * new))
            nodes = min(nodes, max(10 * rows, self._copied_bytes // (longest * sizes.token_bytes)))
        trees = Trees(sizes, rows, max(1, nodes // rows), root, new)
        tokens = trees.tokens_of_steps(sizes)
        before = own_bytes()
        (store,) = self._contestant.searches(sizes, trees)
        store.open()
        steps(store, trees, tokens, 0, 1)
        begun, first = own_bytes(), store.kv_bytes()
        watch = Stopwatch()
        for number in range(1, trees.steps):
            store.gather(trees.parents[number])
            for layer, (keys, values) in enumerate(tokens[number]):
                store.append(layer, keys, values)
            began = now()
            store.commit(trees.children[number])
            watch.add("commit", began)
        ended, stored = own_bytes(), store.kv_bytes()
        store.close()
        store.destroy()
        return {
            "nodes": float(trees.nodes),
            "K/V bytes a node": stored / trees.nodes,
            "MiB besides K/V at first": (begun - before - first) / MIB,
            "MiB besides K/V": (ended - before - stored) / MIB,
            "microseconds of a commit": watch.per_call()["commit"][0],
        }

    def close(self) -> None:
        pass
