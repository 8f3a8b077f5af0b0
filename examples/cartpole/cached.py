"""Nodes evaluated through the shared cache: one gather, one call of the model, one commit."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch

from concurrent_kv import Batch, DropOldest, KeysValues, KVCacheManager, Search
from examples.cartpole.episode import Episode, RealPath, next_position
from examples.cartpole.evaluation import Evaluation, root_evaluations, step_evaluations
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.tree import Leaf
from examples.cartpole.verify import Verifier

NodeKey = tuple[int, int, int]  # episode, time of the root, number in the tree


class LostEntryError(RuntimeError):
    """An entry that an open search must keep was not found."""


def root_key(episode: Episode, time: int) -> NodeKey:
    """Key of a root; it names an entry of the environment's init pool."""
    return episode.index, time, 0


class CachedEvaluator:
    """Evaluates nodes from the K and V of their parents, which all threads keep in one manager.

    Args:
        model: the world model.
        manager: where the K and V are.
        verifier: compares every gathered row with a replay, if given.
    """

    def __init__(self, model: SharedModel, manager: KVCacheManager, verifier: Verifier | None = None) -> None:
        self._model = model
        self._manager = manager
        self._verifier = verifier
        # Positions are rotary: tokens that stay need no correction when older ones are dropped.
        self._overflow = DropOldest(limit=model.config.window_limit, count=model.config.tokens_per_step)

    @contextmanager
    def open_round(self, episodes: Sequence[Episode]) -> Generator[CachedRound, None, None]:
        """A round with a search of its own."""
        with self._manager.search([episode.env_id for episode in episodes], overflow=self._overflow) as search:
            yield CachedRound(self._model, self._manager, search, self._verifier)


class CachedRound:
    """One search. Entries carry the absolute position of the token that comes next as their side data."""

    def __init__(self, model: SharedModel, manager: KVCacheManager, search: Search, verifier: Verifier | None) -> None:
        self._model = model
        self._manager = manager
        self._search = search
        self._verifier = verifier

    def roots(self, episodes: Sequence[Episode]) -> list[Evaluation]:
        """Evaluate the newest real observations, and leave them in the init pools for the rounds to come."""
        new = [episode for episode in episodes if not episode.time]
        old = [episode for episode in episodes if episode.time]
        evaluations = self._begin(new) if new else {}
        if old:
            evaluations |= self._advance(old)
        return [evaluations[episode] for episode in episodes]

    def leaves(self, leaves: Sequence[tuple[Episode, Leaf]]) -> list[Evaluation]:
        """Evaluate leaves; stores each under the key of the node that it becomes."""
        times = [episode.time for episode, _ in leaves]
        keys = [(episode.index, time, leaf.parent.number) for time, (episode, leaf) in zip(times, leaves, strict=True)]
        batch = self._search.gather(keys, [episode.env_id for episode, _ in leaves])
        if not all(batch.hits):
            lost = [key for key, hit in zip(keys, batch.hits, strict=True) if not hit]
            raise LostEntryError(f"{self._search!r} lost its entries {lost}")
        if self._verifier is not None:
            self._verifier.check_parents(batch, leaves)
        positions = positions_of(batch)
        actions = torch.tensor([leaf.action for _, leaf in leaves])
        output = self._model.recurrent(actions, batch, torch.tensor(positions))
        children = [(episode.index, time, leaf.number) for time, (episode, leaf) in zip(times, leaves, strict=True)]
        self._search.commit(children, batch, sides=self._moved_on(positions))
        return step_evaluations(output)

    def _begin(self, episodes: Sequence[Episode]) -> dict[Episode, Evaluation]:
        """Roots of new episodes: one token each, computed without the pool."""
        evaluations = {}
        for episode in episodes:
            path = RealPath(self._model)
            path.follow(episode, 0)
            side = next_position(self._model.config, 0)
            root = KeysValues.single(*path.cache.keys_values())
            self._manager.set_init_cache(episode.env_id, root_key(episode, 0), root, side=side)
            (evaluations[episode],) = root_evaluations(path.output)
        return evaluations

    def _advance(self, episodes: Sequence[Episode]) -> dict[Episode, Evaluation]:
        """Roots one real step after the last ones: what both have of the history is stored once."""
        env_ids = [episode.env_id for episode in episodes]
        batch = self._search.gather([root_key(episode, episode.time - 1) for episode in episodes], env_ids)
        for row, hit in enumerate(batch.hits):
            if not hit:
                self._rebuild(batch, row, episodes[row])
        if self._verifier is not None:
            self._verifier.check_roots(batch, episodes)
        # Not from the side data: rows that were rebuilt have none.
        positions = [next_position(self._model.config, episode.time - 1) for episode in episodes]
        actions = torch.tensor([episode.actions[-1] for episode in episodes])
        observations = torch.stack([episode.observations[-1] for episode in episodes])
        output = self._model.observe(actions, observations, batch, torch.tensor(positions))
        keys = [root_key(episode, episode.time) for episode in episodes]
        self._search.commit(keys, batch, sides=self._moved_on(positions))
        for key, env_id in zip(keys, env_ids, strict=True):
            self._search.promote(key, env_id)
        return dict(zip(episodes, root_evaluations(output), strict=True))

    def _rebuild(self, batch: Batch, row: int, episode: Episode) -> None:
        """Replay the history of a root that was evicted or cleared since the last round."""
        path = RealPath(self._model)
        path.follow(episode, episode.time - 1)
        batch.fill(row, KeysValues.single(*path.cache.keys_values()))

    def _moved_on(self, positions: Sequence[int]) -> list[int]:
        return [position + self._model.config.tokens_per_step for position in positions]


def positions_of(batch: Batch) -> tuple[int, ...]:
    """Where each row's next token goes."""
    return cast("tuple[int, ...]", batch.side)
