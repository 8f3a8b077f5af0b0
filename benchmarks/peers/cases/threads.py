"""Several threads, each on its own search: over one cache, and over one each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.cases.steps import search_once, verified_search
from benchmarks.peers.contestants.base import Contestant, SearchStore, UnfitError
from benchmarks.peers.measuring import Reading, Stopwatch, now
from benchmarks.peers.model import Model
from benchmarks.peers.shapes import Shape, Trees

__all__ = ["ThreadsRun"]

WAIT_SECONDS = 120.0


class ThreadsRun(Run):
    """Searches of one shape by so many threads at once. A time is that of one step of any of them.

    Args:
        threads: how many; more than one also apart.
        searches: of each thread in a turn.
        with_model: whether a transformer of the shape's size reads each batch and makes the new tokens.
    """

    def __init__(
        self,
        contestant: Contestant,
        *,
        shape: dict[str, Any],
        rows: int,
        simulations: int,
        threads: list[int],
        searches: int,
        with_model: bool = False,
    ) -> None:
        self._shape = Shape.from_dict(shape)
        self._trees = Trees(self._shape, rows, simulations, 1, 2)
        self._tokens = self._trees.tokens_of_steps(self._shape)
        self._model = Model(self._shape, rows, 2) if with_model else None
        self._searches = searches
        self._variants: dict[str, list[SearchStore]] = {}
        refused = None
        for count in threads:
            for apart in (False, True) if count > 1 else (False,):
                name = f"{count} thread{'s' if count > 1 else ''}{', a cache each' if apart else ''}"
                try:
                    self._variants[name] = contestant.searches(self._shape, self._trees, count, apart=apart)
                except UnfitError as error:
                    refused = error
        if not self._variants:
            raise refused or UnfitError("no number of threads was asked for")

    def verify(self) -> dict[str, list[str]] | None:
        hashes = {}
        for name, stores in self._variants.items():
            found: list[list[str]] = [[] for _ in stores]

            def verify(number: int, stores: list[SearchStore] = stores, found: list[list[str]] = found) -> None:
                found[number] = verified_search(stores[number], self._shape, self._trees)

            _together(verify, len(stores))
            hashes[name] = [one for part in found for one in part]
        return hashes

    def turn(self) -> Times:
        watch = Stopwatch()
        for name, stores in self._variants.items():

            def search(number: int, stores: list[SearchStore] = stores) -> None:
                for _ in range(self._searches):
                    self._search(stores[number])

            began, ended = _together(search, len(stores))
            watch.add(name, began, len(stores) * self._searches * self._trees.steps, ended)
        return watch.per_call()

    def _search(self, store: SearchStore) -> None:
        if self._model is None:
            search_once(store, self._trees, self._tokens)
            return
        store.open()
        for parents, children in zip(self._trees.parents, self._trees.children, strict=True):
            store.gather(parents)
            self._model.step(store)
            store.commit(children)
        store.close()

    def close(self) -> None:
        for stores in self._variants.values():
            for store in stores:
                store.destroy()


def _together(work: Callable[[int], None], threads: int) -> tuple[Reading, Reading]:
    """Run `work(number)` in as many threads at once; when they began, and when the last one had ended."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads + 1)

    def run(number: int) -> None:
        try:
            barrier.wait(WAIT_SECONDS)
            work(number)
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(threads)]
    for thread in started:
        thread.start()
    barrier.wait(WAIT_SECONDS)
    began = now()
    for thread in started:
        thread.join(WAIT_SECONDS)
    ended = now()
    if errors:
        raise errors[0]
    if any(thread.is_alive() for thread in started):
        raise TimeoutError(f"{threads} threads had not ended their searches within {WAIT_SECONDS:g} s")
    return began, ended
