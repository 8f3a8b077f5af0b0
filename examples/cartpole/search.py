"""The search: all that a tree search needs to know of the cache. What else is here measures it, checks it or shows it.

A search is a generator: it yields leaves, and is sent what the model says of them. An evaluator leads all searches that
run at the same time from leaf to leaf: it gathers the K and V of all their parents, calls the model once, and stores
those of all children. Where it does so, in threads or on an event loop, is nothing that a search has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import anyio
import torch

from concurrent_kv import DropOldest, KeyNotFoundError, KeysValues, KVCacheManager
from concurrent_kv.evaluation import Evaluated, Evaluator, JointBatch, Leaf, Walk
from examples.cartpole.episode import Asked, Episode, evaluations_in, evaluations_of, next_position
from examples.cartpole.model import WorldModel
from examples.cartpole.replay import replay_path
from examples.cartpole.steps import Steps, steps_of
from examples.cartpole.tree import Evaluation, Tree

Run = Callable[[Walk[Asked, Evaluation, Any]], Coroutine[Any, Any, Any]]
"""Runs a walk to its end, wherever, and returns what it returns."""

Check = Callable[[JointBatch, Sequence[Asked]], None]
"""Looks at a batch before the model does."""

Model = Callable[[JointBatch, Sequence[Asked]], Evaluated[Evaluation]]

NodeKey = tuple[int, int, int]  # episode, time of the root, number in the tree


class Planted(NamedTuple):
    """A tree that is being searched."""

    episode: Episode
    tree: Tree
    keys: list[NodeKey]  # of the entries that its nodes have; the root's is the init pool's


def new_manager(
    model: WorldModel, *, envs: int, simulations: int, workers_per_tree: int, policy: str = "fifo"
) -> KVCacheManager:
    """One with room for a tree of each environment; `policy` is that of eviction."""
    nodes = simulations + workers_per_tree  # two workers may store the same node, one after the other
    sizes = {"num_simulations": nodes, "max_cache_size": envs * (nodes + 1), "device": "cpu"}
    return KVCacheManager(config=asdict(model.config) | sizes, env_num=envs, policy=policy)


class TreeSearch:
    """Searches a tree for each of several environments, all at the same time if they ask for it.

    Entries carry the absolute position of the token that comes next as their side data.

    Args:
        model: the world model.
        manager: where K and V are; several may share it.
        env_ids: environments; each may search one tree at a time.
        simulations: of each tree.
        workers_per_tree: that share a tree's simulations.
        check: looks at every batch before the model does.
    """

    def __init__(
        self,
        model: WorldModel,
        manager: KVCacheManager,
        env_ids: Sequence[int],
        *,
        simulations: int,
        workers_per_tree: int = 1,
        check: Check | None = None,
    ) -> None:
        self._model = model
        self._simulations = simulations
        self._workers = workers_per_tree
        self._check = check
        self._manager = manager
        # One for all trees: a batch of eight trees is then one gather and one commit, and not eight.
        self._search = manager.search(env_ids, overflow=overflow_of(model))

    def evaluator(self, *, max_rows: int) -> Evaluator[Asked, Evaluation]:
        """One that evaluates this search's leaves, at most so many in a call of the model."""
        self._steps = steps_of(self._model)  # traced only here: searches of a host share its evaluator
        return new_evaluator(self._model, self._manager, self._evaluate, max_rows=max_rows)

    def _evaluate(self, batch: JointBatch, asked: Sequence[Asked]) -> Evaluated[Evaluation]:
        return evaluate(self._steps, batch, asked, self._check)

    async def decide(self, episode: Episode, run: Run) -> int:
        """The action that follows the episode's newest observation, by a search that `run` runs."""
        if self._workers == 1:
            action: int = await run(self.search_alone(episode))
            return action
        with self.released(await run(self._plant(episode))) as planted:
            async with anyio.create_task_group() as workers:
                for _ in range(self._workers):
                    workers.start_soon(run, self._simulate(planted))
        return planted.tree.best_action()

    def close(self) -> None:
        """Let go of everything."""
        self._search.close()

    # Walks ---------------------------------------------------------------------------------------------------------

    def search_alone(self, episode: Episode) -> Walk[Asked, Evaluation, int]:
        """The action that follows the episode's newest observation, by a walk of its own."""
        with self.released((yield from self._plant(episode))) as planted:
            yield from self._simulate(planted)
        return planted.tree.best_action()

    def _plant(self, episode: Episode) -> Walk[Asked, Evaluation, Planted]:
        """Evaluate the newest observation, and store its K and V in the environment's init pool."""
        try:
            root = yield from self._root(episode, episode.time)
        except KeyNotFoundError:  # the root before it was cleared or evicted: walk its whole history again
            for time in range(episode.time + 1):
                root = yield from self._root(episode, time)
        tree = Tree(root, simulations=self._simulations, discount=self._model.config.discount)
        return Planted(episode, tree, [])

    def _root(self, episode: Episode, time: int) -> Walk[Asked, Evaluation, Evaluation]:
        key, env_id = (episode.index, time, 0), episode.env_id
        if not time:  # nothing is before it that could be gathered
            with torch.inference_mode():
                first = replay_path(self._model, episode.observations[0], ())
                kv = KeysValues.single(*first.cache.keys_values())
                self._manager.set_init_cache(env_id, key, kv, side=next_position(self._model.config, 0))
                return evaluations_of(first.output)[0]
        # One real step after the last one: what both have of the history is stored once.
        return (yield Leaf(self._manager.init_pools[env_id], (episode.index, time - 1, 0), key, Asked(episode, time)))

    def _simulate(self, planted: Planted) -> Walk[Asked, Evaluation, None]:
        """Simulations of one worker until there are no more to begin."""
        (episode, tree, keys), time = planted, planted.episode.time
        while (edge := tree.select()) is not None:
            parent, child = (episode.index, time, edge.parent.number), (episode.index, time, edge.number)
            tree.expand(edge, (yield Leaf(self._search, parent, child, Asked(episode, time, edge), episode.env_id)))
            keys.append(child)

    @contextmanager
    def released(self, planted: Planted) -> Generator[Planted, None, None]:
        """Let go of a tree when its search has ended: room for those to come, and the init pool can evict its root."""
        yield planted
        # Not after an error: threads may still search the tree then. `close` lets go of it.
        if planted.keys:  # the search knows the root since it gathered it
            self._search.release([*planted.keys, (planted.episode.index, planted.episode.time, 0)])


# The model's call ----------------------------------------------------------------------------------------------------


def evaluate(steps: Steps, batch: JointBatch, asked: Sequence[Asked], check: Check | None) -> Evaluated[Evaluation]:
    """What the model says of the steps that are asked for; each row of the batch is what one of them leads on from."""
    with torch.inference_mode():
        if check is not None:
            check(batch, asked)
        positions = cast("tuple[int, ...]", batch.side)
        actions, at = torch.tensor([each.action for each in asked]), torch.tensor(positions)
        is_real = [each.edge is None for each in asked]
        if any(is_real):
            observations = torch.stack([each.episode.observations[each.time] for each in asked])
            numbers = steps.step(actions, observations, torch.tensor(is_real), batch, at)
        else:
            numbers = steps.recurrent(actions, batch, at)
        return Evaluated(evaluations_in(numbers), sides=[position + steps.tokens for position in positions])


def new_evaluator(
    model: WorldModel, manager: KVCacheManager, call: Model, *, max_rows: int
) -> Evaluator[Asked, Evaluation]:
    """One that evaluates the leaves of any searches of the manager's, at most so many in a call of the model."""
    room = model.config.tokens_per_step
    return Evaluator(manager, call, max_rows=max_rows, room=room, overflow=overflow_of(model))


def overflow_of(model: WorldModel) -> DropOldest:
    """Positions are rotary: tokens that stay need no correction when older ones are dropped."""
    return DropOldest(limit=model.config.window_limit, count=model.config.tokens_per_step)
