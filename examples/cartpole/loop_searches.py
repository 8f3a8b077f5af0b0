"""Searches as tasks of the environments' own loop; no thread searches."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from concurrent_kv.aio import AsyncKVCacheManager
from examples.cartpole.episode import Episode
from examples.cartpole.leaf_batches import LeafBatches, open_leaf_batches
from examples.cartpole.nodes import Nodes
from examples.cartpole.play import Decide, PlaySettings
from examples.cartpole.roots import CachedRoots
from examples.cartpole.running import on_the_loop
from examples.cartpole.tree import Tree


class LoopSearches:
    """Each environment's task searches its own tree; the leaves of all trees are evaluated together.

    The model is called on the loop's own thread: a batch takes it about a millisecond, and handing that to a worker and
    back costs a sixth of the simulations.

    Args:
        nodes: the model.
        manager: where the K and V are.
        settings: simulations, and how leaves are put together.
        discount: per step.
    """

    def __init__(self, nodes: Nodes, manager: AsyncKVCacheManager, settings: PlaySettings, *, discount: float) -> None:
        self._nodes = nodes
        self._manager = manager
        self._settings = settings
        self._discount = discount

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Decide, None]:
        """While it is entered, leaves are evaluated."""
        settings = self._settings
        async with open_leaf_batches(
            self._nodes,
            self._manager,
            on_the_loop,
            envs=settings.envs,
            size=settings.batch_size or settings.envs,
            wait_seconds=settings.batch_wait,
        ) as batches:
            yield partial(self._decide, CachedRoots(self._nodes, self._manager), batches)

    async def _decide(self, roots: CachedRoots, batches: LeafBatches, episode: Episode) -> int:
        root = await roots.evaluate(episode, on_the_loop)
        tree = Tree(root, self._discount)
        with batches.tree(episode):
            for _ in range(self._settings.simulations):
                leaf = tree.select()
                tree.expand(leaf, await batches.evaluate(episode, leaf))
        return tree.best_action()
