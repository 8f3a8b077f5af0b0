"""Single entries: `get` and `put`, from small to large, from few to many."""

from __future__ import annotations

import random
from time import perf_counter_ns
from typing import Any

import torch

from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.cases.steps import hash_of
from benchmarks.peers.contestants.base import Contestant, EntryStore
from benchmarks.peers.measuring import Stopwatch, now
from benchmarks.peers.shapes import Shape

__all__ = ["EntriesRun"]

CALLS = 500  # of one operation in a turn, at most


class EntriesRun(Run):
    """Stores of several sizes, each full.

    Args:
        stores: by name: `{"shape": ..., "tokens": of an entry, "entries": how many}`.
        turn_ms: about how long the calls of one operation on one store take in a turn.
        inserting: whether new keys are put too, for each of which the oldest entry goes.
    """

    def __init__(
        self,
        contestant: Contestant,
        *,
        stores: dict[str, dict[str, Any]],
        turn_ms: float = 5.0,
        inserting: bool = False,
    ) -> None:
        self._parts = [
            _Part(contestant, name, turn_ms, inserting, **{**sizes, "shape": Shape.from_dict(sizes["shape"])})
            for name, sizes in stores.items()
        ]

    def verify(self) -> dict[str, list[str]] | None:
        return {part.name: part.verify() for part in self._parts}

    def turn(self) -> Times:
        watch = Stopwatch()
        for part in self._parts:
            part.turn(watch)
        return watch.per_call()

    def close(self) -> None:
        for part in self._parts:
            part.store.destroy()


class _Part:
    """One store."""

    def __init__(
        self,
        contestant: Contestant,
        name: str,
        turn_ms: float,
        inserting: bool,
        *,
        shape: Shape,
        tokens: int,
        entries: int,
    ) -> None:
        self.name, self._turn_ms, self._inserting = name, turn_ms, inserting
        self.store: EntryStore = contestant.entries(shape, tokens, entries)
        generator = torch.Generator().manual_seed(entries)
        self._kv = torch.randn(shape.parts, shape.heads, tokens, shape.head_dim, generator=generator)
        self.store.fill(range(entries), self._kv)
        draw = random.Random(entries)
        self._keys = [draw.randrange(entries) for _ in range(CALLS)]
        self._made = self.store.prepared(self._kv)
        self._next = entries

    def verify(self) -> list[str]:
        """What any call put is got, and is not the caller's tensor."""
        hashes = []
        key = self._keys[0]
        for value in (1.0, 2.0):
            kv = self._kv + value
            self.store.put(key, self.store.prepared(kv))
            kv.zero_()
            hashes.append(hash_of(self.store.tensor_of(self.store.get(key))))
        self.store.put(key, self._made)
        self._calls = {"get": self._fitting(self._get), "put": self._fitting(self._put)}
        if self._inserting:
            self._calls["insert"] = self._fitting(self._insert)
            self._put(CALLS)
        return hashes

    def _fitting(self, operation: Any) -> int:
        began = perf_counter_ns()
        operation(3)
        took_ms = (perf_counter_ns() - began) / 3e6
        return max(3, min(CALLS, round(self._turn_ms / took_ms)))

    def turn(self, watch: Stopwatch) -> None:
        for measure, calls in self._calls.items():
            operation = {"get": self._get, "put": self._put, "insert": self._insert}[measure]
            began = now()
            operation(calls)
            watch.add(f"{measure}, {self.name}", began, calls)
        if self._inserting:
            self._put(CALLS)  # some of the keys that `_get` asks for may have gone

    def _get(self, calls: int) -> None:
        get = self.store.get
        for key in self._keys[:calls]:
            get(key)

    def _put(self, calls: int) -> None:
        put, kv = self.store.put, self._made
        for key in self._keys[:calls]:
            put(key, kv)

    def _insert(self, calls: int) -> None:
        """New keys, each in the place of the oldest."""
        put, kv, first = self.store.put, self._made, self._next
        self._next += calls
        for key in range(first, self._next):
            put(key, kv)
