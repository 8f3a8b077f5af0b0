"""Leaves and roots of all threads and tasks evaluated together: whoever comes last calls the model for all who wait."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from concurrent_kv import KeyNotFoundError, KVCacheManager, Search
from concurrent_kv.aio import AsyncEvaluator
from concurrent_kv.evaluation import Evaluated, Evaluator, EvaluatorWorker, Leaf
from concurrent_kv.pool.joint import JointBatch
from examples.cartpole.episode import Episode
from examples.cartpole.evaluation import Evaluation
from examples.cartpole.nodes import LostEntryError, NodeKey, Nodes, child_keys, parent_keys, root_key
from examples.cartpole.running import Runner
from examples.cartpole.tree import Leaf as TreeLeaf

Asked = tuple[Episode, TreeLeaf]


class CombinedEvaluator:
    """Evaluates leaves together with those of other threads, all in one search.

    Args:
        nodes: the model.
        manager: where the K and V are.
        envs: environments; each may search one tree.
        max_rows: leaves of a call, at most; those of all trees if None.
    """

    def __init__(self, nodes: Nodes, manager: KVCacheManager, *, envs: int, max_rows: int | None) -> None:
        self._nodes = nodes
        self._manager = manager
        self._envs = envs

        def model(batch: JointBatch, asked: Sequence[Asked]) -> Evaluated[Evaluation]:
            new = nodes.leaves(batch, asked)
            return Evaluated(new.evaluations, new.sides)

        self.leaves: Evaluator[Asked, Evaluation] = Evaluator(
            manager, model, max_rows=max_rows or envs, room=nodes.tokens_per_step
        )
        self._search: Search | None = None

    @contextmanager
    def open(self) -> Generator[None, None, None]:
        """While it is entered, rounds can be opened."""
        with self._manager.search(range(self._envs), overflow=self._nodes.overflow) as self._search, self.leaves:
            yield

    @contextmanager
    def open_round(self, episodes: Sequence[Episode]) -> Generator[CombinedRound, None, None]:
        """A round whose entries are let go of when it is left."""
        assert self._search is not None
        found = CombinedRound(self._nodes, self._manager, self._search, self.leaves.worker())
        with ExitStack() as stack:
            stack.callback(found.end, episodes)
            stack.enter_context(found.worker)
            yield found


class CombinedRound:
    """The trees of one thread, which is a worker of the evaluator while it searches them."""

    def __init__(
        self, nodes: Nodes, manager: KVCacheManager, search: Search, worker: EvaluatorWorker[Asked, Evaluation]
    ) -> None:
        self._nodes = nodes
        self._manager = manager
        self._search = search
        self.worker = worker
        self._stored: list[NodeKey] = []

    def leaves(self, leaves: Sequence[Asked]) -> list[Evaluation]:
        """Evaluate leaves; stores each under the key of the node that it becomes."""
        children = child_keys(leaves)
        asked = [
            Leaf(self._search, parent, child, leaf, leaf[0].env_id)
            for parent, child, leaf in zip(parent_keys(leaves), children, leaves, strict=True)
        ]
        try:
            evaluations = self.worker.evaluate_many(asked)
        except KeyNotFoundError as error:
            self._restore_roots(leaves, error)
            evaluations = self.worker.evaluate_many(asked)
        self._stored += children
        return evaluations

    def end(self, episodes: Sequence[Episode]) -> None:
        """Let go of the trees: room for those to come, and init pools can evict their roots."""
        if self._stored:
            self._search.release([*self._stored, *(root_key(episode, episode.time) for episode in episodes)])

    def _restore_roots(self, leaves: Sequence[Asked], error: KeyNotFoundError) -> None:
        """Store roots anew that were cleared between the moment they were stored and the search's first look."""
        for episode, leaf in leaves:
            if leaf.parent.parent is not None:
                raise LostEntryError(f"node {leaf.parent.number} of episode {episode.index} was lost") from error
            root = self._nodes.rebuilt_root(episode)
            self._manager.set_init_cache(episode.env_id, root_key(episode, episode.time), root.kv, side=root.side)


class CombinedRoots:
    """Roots in the init pools of a manager, those of environments that move on at the same time evaluated together."""

    def __init__(self, nodes: Nodes, manager: KVCacheManager, *, envs: int, max_rows: int | None) -> None:
        self._nodes = nodes
        self._manager = manager

        def model(batch: JointBatch, episodes: Sequence[Episode]) -> Evaluated[Evaluation]:
            new = nodes.next_roots(batch, episodes)
            return Evaluated(new.evaluations, new.sides)

        self.roots = AsyncEvaluator(
            Evaluator(manager, model, max_rows=max_rows or envs, room=nodes.tokens_per_step, overflow=nodes.overflow),
            on_loop=True,
        )

    async def evaluate(self, episode: Episode, run: Runner) -> Evaluation:
        """Evaluate the newest observation, and store its K and V for the search to come."""
        key = root_key(episode, episode.time)
        store = partial(self._manager.set_init_cache, episode.env_id)
        if not episode.time:
            first = self._nodes.first_root(episode)
            store(key, first.kv, side=first.side)
            return first.evaluation
        leaf = Leaf(self._manager.init_pools[episode.env_id], root_key(episode, episode.time - 1), key, episode)
        try:
            return await self.roots.evaluate(leaf)
        except KeyNotFoundError:  # it was evicted or cleared
            root = self._nodes.rebuilt_root(episode)
            store(key, root.kv, side=root.side)
            return root.evaluation
