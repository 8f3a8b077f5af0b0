"""The search step: look parents up, assemble a batch, append two tokens in every layer, store children."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.contestants.base import Contestant, SearchStore
from benchmarks.peers.measuring import Stopwatch, now
from benchmarks.peers.shapes import Shape, Trees, new_tokens

__all__ = ["StepRun", "hash_of", "search_once", "verified_search"]

Tokens = Sequence[Sequence[tuple[Tensor, Tensor]]]  # of each step, of each layer


def hash_of(tensor: Tensor) -> str:
    """Of a tensor's bytes in C order."""
    return hashlib.blake2b(np.ascontiguousarray(tensor.numpy()).data, digest_size=16).hexdigest()


def search_once(store: SearchStore, trees: Trees, tokens: Tokens) -> None:
    """One search, from opening to closing."""
    store.open()
    steps(store, trees, tokens)
    store.close()


def steps(store: SearchStore, trees: Trees, tokens: Tokens, first: int = 0, end: int | None = None) -> None:
    """The steps of an open search from `first` on, before `end`."""
    gather, append, commit = store.gather, store.append, store.commit
    for number in range(first, trees.steps if end is None else end):
        gather(trees.parents[number])
        for layer, (keys, values) in enumerate(tokens[number]):
            append(layer, keys, values)
        commit(trees.children[number])


def verified_search(store: SearchStore, shape: Shape, trees: Trees) -> list[str]:
    """The hash of every batch of a search, new tokens included, which no two steps have in common."""
    hashes = []
    store.open()
    for number, (parents, children) in enumerate(zip(trees.parents, trees.children, strict=True)):
        store.gather(parents)
        for layer, (keys, values) in enumerate(new_tokens(shape, trees.rows, trees.step_tokens, 1000 + number)):
            store.append(layer, keys, values)
        if store.checked:
            hashes.append(hash_of(store.tokens()))
        store.commit(children)
    store.close()
    return hashes


class StepRun(Run):
    """Searches of one shape.

    Args:
        shape: see `Shape.from_dict`.
        rows, simulations, root_tokens: of the trees.
        turn_ms: about how long a turn's searches take that are measured as a whole.
    """

    def __init__(
        self,
        contestant: Contestant,
        *,
        shape: dict[str, Any],
        rows: int,
        simulations: int,
        root_tokens: int = 1,
        turn_ms: float = 10.0,
    ) -> None:
        self._shape = Shape.from_dict(shape)
        self._trees = Trees(self._shape, rows, simulations, root_tokens, 2)
        (self._store,) = contestant.searches(self._shape, self._trees)
        self._tokens = self._trees.tokens_of_steps(self._shape)
        self._turn_ms = turn_ms
        self._searches = 1

    def verify(self) -> dict[str, list[str]] | None:
        found = verified_search(self._store, self._shape, self._trees)
        search_once(self._store, self._trees, self._tokens)
        began = perf_counter_ns()
        search_once(self._store, self._trees, self._tokens)
        took_ms = (perf_counter_ns() - began) / 1e6
        self._searches = max(1, min(10, round(self._turn_ms / took_ms)))
        return {"search": found} if self._store.checked else None

    def turn(self) -> Times:
        watch = Stopwatch()
        if self._searches > 1:
            search_once(self._store, self._trees, self._tokens)  # what was in the caches was the others'
        for _ in range(self._searches):
            self._whole(watch)
        self._by_phases(watch)
        return watch.per_call()

    def _whole(self, watch: Stopwatch) -> None:
        """A search whose steps are measured as one."""
        store, trees, tokens = self._store, self._trees, self._tokens
        began = now()
        store.open()
        opened = now()
        store.gather(trees.parents[0])
        gathered = now()
        for layer, (keys, values) in enumerate(tokens[0]):
            store.append(layer, keys, values)
        store.commit(trees.children[0])
        stepping = now()
        steps(store, trees, tokens, 1)
        stepped = now()
        store.close()
        ended = now()
        watch.add("open", began, 1, opened)
        watch.add("first gather", opened, 1, gathered)
        watch.add("step", stepping, trees.steps - 1, stepped)
        watch.add("close", stepped, 1, ended)
        watch.add("search", began, 1, ended)

    def _by_phases(self, watch: Stopwatch) -> None:
        """A search whose steps are measured in three parts, the first step left out."""
        store, trees, tokens = self._store, self._trees, self._tokens
        store.open()
        for number in range(trees.steps):
            began = now()
            store.gather(trees.parents[number])
            gathered = now()
            for layer, (keys, values) in enumerate(tokens[number]):
                store.append(layer, keys, values)
            appended = now()
            store.commit(trees.children[number])
            ended = now()
            if number:
                watch.add("gather", began, 1, gathered)
                watch.add("append", gathered, 1, appended)
                watch.add("commit", appended, 1, ended)
        store.close()

    def facts(self) -> dict[str, float]:
        """Bytes of K and V of a node, when a search ends."""
        self._store.open()
        steps(self._store, self._trees, self._tokens)
        stored = self._store.kv_bytes()
        self._store.close()
        facts = {"nodes of a search": float(self._trees.nodes)}
        return facts | {"K/V bytes a node": stored / self._trees.nodes} if self._store.checked else facts

    def close(self) -> None:
        self._store.destroy()
