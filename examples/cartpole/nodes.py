"""What the model makes of gathered rows: roots and leaves, wherever their batches come from and go to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch

from concurrent_kv import Batch, DropOldest, KeysValues
from concurrent_kv.pool.joint import JointBatch
from examples.cartpole.episode import Episode, RealPath, next_position
from examples.cartpole.evaluation import Evaluation, root_evaluations, step_evaluations
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.tree import Leaf
from examples.cartpole.verify import Verifier

NodeKey = tuple[int, int, int]  # episode, time of the root, number in the tree


class LostEntryError(RuntimeError):
    """An entry that an open search must keep was not found."""


class FirstRoot(NamedTuple):
    """The root of a new episode: one token."""

    kv: KeysValues
    side: int
    evaluation: Evaluation


class NewNodes(NamedTuple):
    """What was appended to a batch, row by row."""

    evaluations: list[Evaluation]
    sides: list[int]  # to be committed with the rows: where each one's next token goes


def root_key(episode: Episode, time: int) -> NodeKey:
    """Key of a root; it names an entry of the environment's init pool."""
    return episode.index, time, 0


def parent_keys(leaves: Sequence[tuple[Episode, Leaf]]) -> list[NodeKey]:
    """Keys of the nodes that `leaves` are steps from."""
    return [(episode.index, episode.time, leaf.parent.number) for episode, leaf in leaves]


def child_keys(leaves: Sequence[tuple[Episode, Leaf]]) -> list[NodeKey]:
    """Keys of the nodes that `leaves` become."""
    return [(episode.index, episode.time, leaf.number) for episode, leaf in leaves]


class Nodes:
    """Appends nodes to batches. Holds no state between calls: threads and tasks may share it.

    Entries carry the absolute position of the token that comes next as their side data.

    Args:
        model: the world model.
        verifier: compares every gathered row with a replay, if given.
    """

    def __init__(self, model: SharedModel, verifier: Verifier | None = None) -> None:
        self._model = model
        self._verifier = verifier
        # Positions are rotary: tokens that stay need no correction when older ones are dropped.
        self.overflow = DropOldest(limit=model.config.window_limit, count=model.config.tokens_per_step)
        self.tokens_per_step = model.config.tokens_per_step

    def first_root(self, episode: Episode) -> FirstRoot:
        """Evaluate an episode's first observation; there is nothing to gather for it."""
        with torch.inference_mode():
            path = RealPath(self._model)
            path.follow(episode, 0)
            (evaluation,) = root_evaluations(path.output)
            return FirstRoot(_keys_values(path), next_position(self._model.config, 0), evaluation)

    def rebuilt_root(self, episode: Episode) -> FirstRoot:
        """Evaluate an episode's newest observation by a replay of its history."""
        with torch.inference_mode():
            path = RealPath(self._model)
            path.follow(episode, episode.time)
            (evaluation,) = root_evaluations(path.output)
            return FirstRoot(_keys_values(path), next_position(self._model.config, episode.time), evaluation)

    def next_root(self, batch: Batch, episode: Episode) -> NewNodes:
        """As `next_roots`, of the batch's only row, which is rebuilt if it is missing."""
        with torch.inference_mode():
            if not batch.hits[0]:
                self._rebuild(batch, 0, episode, episode.time - 1)
            return self.next_roots(batch, [episode])

    def next_roots(self, batch: Batch | JointBatch, episodes: Sequence[Episode]) -> NewNodes:
        """Append each episode's newest real step and its observation to the root before it."""
        with torch.inference_mode():
            if self._verifier is not None:
                self._verifier.check_roots(batch, episodes)
            positions = cast("tuple[int, ...]", batch.side)
            actions = torch.tensor([episode.actions[-1] for episode in episodes])
            observations = torch.stack([episode.observations[-1] for episode in episodes])
            output = self._model.observe(actions, observations, batch, torch.tensor(positions))
            return NewNodes(root_evaluations(output), self._moved_on(positions))

    def leaves(self, batch: Batch | JointBatch, leaves: Sequence[tuple[Episode, Leaf]]) -> NewNodes:
        """Append each leaf's step to its parent.

        Raises:
            LostEntryError: a parent is missing that is no root.
        """
        with torch.inference_mode():
            for row, (episode, leaf) in enumerate(leaves):
                if not batch.hits[row]:
                    if leaf.parent.parent is not None:
                        raise LostEntryError(f"node {leaf.parent.number} of episode {episode.index} was lost")
                    # Cleared between the moment it was stored and the search's first look at it.
                    assert isinstance(batch, Batch), "an evaluator's rows have their parents"
                    self._rebuild(batch, row, episode, episode.time)
            if self._verifier is not None:
                self._verifier.check_parents(batch, leaves)
            positions = cast("tuple[int, ...]", batch.side)
            actions = torch.tensor([leaf.action for _, leaf in leaves])
            output = self._model.recurrent(actions, batch, torch.tensor(positions))
            return NewNodes(step_evaluations(output), self._moved_on(positions))

    def _rebuild(self, batch: Batch, row: int, episode: Episode, time: int) -> None:
        """Replay the history of a root that was evicted or cleared."""
        path = RealPath(self._model)
        path.follow(episode, time)
        batch.fill(row, _keys_values(path), side=next_position(self._model.config, time))

    def _moved_on(self, positions: Sequence[int]) -> list[int]:
        return [position + self._model.config.tokens_per_step for position in positions]


def _keys_values(path: RealPath) -> KeysValues:
    return KeysValues.single(*path.cache.keys_values())
