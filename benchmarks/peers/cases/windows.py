"""Long windows and deep trees: what a gather and a commit cost where a node names many tokens and adds a few."""

from __future__ import annotations

from benchmarks.peers.cases.base import Run, Times
from benchmarks.peers.cases.steps import hash_of
from benchmarks.peers.contestants.base import Contestant
from benchmarks.peers.measuring import Stopwatch, now
from benchmarks.peers.shapes import Shape, Trees, new_tokens

__all__ = ["WindowsRun", "narrow_shape"]

CALLS = 2  # in a turn, each of a gather, an append and a commit


def narrow_shape(window: int) -> Shape:
    """Tokens of 64 bytes, so that long rows fit: it is the books that are measured."""
    return Shape(layers=1, heads=1, head_dim=8, window=window, limit=window)


class WindowsRun(Run):
    """Searches that stay open, each with a deep tree; every turn adds children to its leaves.

    Args:
        places: by name: `{"window": ..., "depth": tokens of the parents, "new": tokens of a node}`.
        rows: of a batch.
        turns: as many as will be asked for, at most.
    """

    def __init__(self, contestant: Contestant, *, places: dict[str, dict[str, int]], rows: int, turns: int) -> None:
        self._parts = [_Part(contestant, name, rows, turns, **place) for name, place in places.items()]

    def verify(self) -> dict[str, list[str]] | None:
        hashes = {part.name: part.grow() for part in self._parts}
        return hashes if self._parts[0].store.checked else None

    def turn(self) -> Times:
        watch = Stopwatch()
        for part in self._parts:
            part.turn(watch)
        return watch.per_call()

    def facts(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for part in self._parts:
            allocated = part.store.allocated_bytes()
            if allocated is not None:
                found[f"slots allocated for each wanted, {part.name}"] = allocated / part.wanted_bytes
        return found

    def close(self) -> None:
        for part in self._parts:
            part.store.close()
            part.store.destroy()


class _Part:
    """One place: a tree as deep as it says, under a window."""

    def __init__(
        self, contestant: Contestant, name: str, rows: int, turns: int, *, window: int, depth: int, new: int
    ) -> None:
        shape = narrow_shape(window)
        self.name, self._shape = name, shape
        self._deep = depth // new - 1
        children = 1 + (turns + 1) * CALLS
        self._trees = trees = Trees(
            shape, rows, self._deep + children, new, new, deep=self._deep, reuse_keys=not contestant.shares
        )
        (self.store,) = contestant.searches(shape, trees)
        self.wanted_bytes = (trees.root_tokens * rows + trees.nodes * new) * shape.token_bytes
        self._step = 0
        self._tokens = new_tokens(shape, rows, new, 0)

    def grow(self) -> list[str]:
        """Open the search, grow the tree, and one node more; the hashes of a few batches and of the last one."""
        store, trees = self.store, self._trees
        hashes = []
        store.open()
        for number in range(self._deep + 1):
            store.gather(trees.parents[number])
            store.append(0, *new_tokens(self._shape, trees.rows, trees.step_tokens, 1000 + number)[0])
            if store.checked and number in (0, self._deep // 2, self._deep):
                hashes.append(hash_of(store.tokens()))
            store.commit(trees.children[number])
        self._step = self._deep + 1
        return hashes

    def turn(self, watch: Stopwatch) -> None:
        store, trees, (keys, values) = self.store, self._trees, self._tokens[0]
        for _ in range(CALLS):
            step, self._step = self._step, self._step + 1
            began = now()
            store.gather(trees.parents[step])
            gathered = now()
            store.append(0, keys, values)
            appended = now()
            store.commit(trees.children[step])
            ended = now()
            watch.add(f"gather, {self.name}", began, 1, gathered)
            watch.add(f"commit, {self.name}", appended, 1, ended)
