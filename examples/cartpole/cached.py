"""Leaves evaluated through the shared cache by threads: one gather, one call of the model, one commit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from concurrent_kv import KVCacheManager, Search
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.nodes import Nodes, child_keys, parent_keys
from examples.cartpole.tree import Leaf


class CachedEvaluator:
    """Evaluates leaves from the K and V of their parents, which all threads keep in one manager.

    Args:
        nodes: the model.
        manager: where the K and V are.
    """

    def __init__(self, nodes: Nodes, manager: KVCacheManager) -> None:
        self._nodes = nodes
        self._manager = manager

    @contextmanager
    def open_round(self, episodes: Sequence[Episode]) -> Generator[CachedRound, None, None]:
        """A round with a search of its own."""
        env_ids = [episode.env_id for episode in episodes]
        with self._manager.search(env_ids, overflow=self._nodes.overflow) as search:
            yield CachedRound(self._nodes, search)


class CachedRound:
    """One search. It finds its roots in the init pools, where the environments' tasks stored them."""

    def __init__(self, nodes: Nodes, search: Search) -> None:
        self._nodes = nodes
        self._search = search

    def leaves(self, leaves: Sequence[tuple[Episode, Leaf]]) -> list[Evaluation]:
        """Evaluate leaves; stores each under the key of the node that it becomes."""
        with self._search.gather(parent_keys(leaves), [episode.env_id for episode, _ in leaves]) as batch:
            new = self._nodes.leaves(batch, leaves)
            self._search.commit(child_keys(leaves), batch, sides=new.sides)
        return new.evaluations
