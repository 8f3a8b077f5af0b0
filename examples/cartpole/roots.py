"""The roots of searches, which each environment's task keeps in its own init pool without holding its loop."""

from __future__ import annotations

from typing import Protocol

from concurrent_kv.aio import AsyncKVCacheManager
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.nodes import Nodes, root_key
from examples.cartpole.running import Runner


class Roots(Protocol):
    """Evaluates the newest real observations."""

    async def evaluate(self, episode: Episode, run: Runner) -> Evaluation:
        """Evaluate an episode's newest observation; the model is called by `run`."""
        ...


class CachedRoots:
    """Roots in the init pools of a manager, where searches of threads and tasks look them up.

    Args:
        nodes: the model.
        manager: for tasks, around the one that the searches use.
    """

    def __init__(self, nodes: Nodes, manager: AsyncKVCacheManager) -> None:
        self._nodes = nodes
        self._manager = manager

    async def evaluate(self, episode: Episode, run: Runner) -> Evaluation:
        """Evaluate the newest observation, and store its K and V for the search to come."""
        key = root_key(episode, episode.time)
        if not episode.time:
            first = await run(self._nodes.first_root, episode)
            await self._manager.set_init_cache(episode.env_id, key, first.kv, side=first.side)
            return first.evaluation
        pool = self._manager.init_pools[episode.env_id]
        # One real step after the last one: what both have of the history is stored once.
        with await pool.gather([root_key(episode, episode.time - 1)]) as batch:
            new = await run(self._nodes.next_root, batch, episode)
            await pool.commit([key], batch, overflow=self._nodes.overflow, sides=new.sides)
        return new.evaluations[0]
