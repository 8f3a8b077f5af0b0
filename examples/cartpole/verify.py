"""Gathered rows compared with a replay of their tokens through a plain cache: no pool, no batch, no sharing."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from copy import deepcopy
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from concurrent_kv.evaluation import JointBatch
from examples.cartpole.episode import Asked, Episode, next_position
from examples.cartpole.model import WorldModel
from examples.cartpole.replay import RealPath, ReplayCache
from examples.cartpole.tree import Node, path_to

# Of the row's largest element. A batch of rows and a row alone are summed in different orders, which float32 rounds to
# about 1e-6 of it; a token at a wrong place or position is wrong by about all of it.
TOLERANCE = 1e-4


class Verification(NamedTuple):
    """What was compared."""

    rows: int = 0
    max_difference: float = 0.0  # absolute
    mismatches: int = 0  # rows
    first_mismatch: str | None = None


class Verifier:
    """Replays what the pool's rows should hold, and counts those that differ. Threads may share it.

    A replay starts from the tokens' own inputs (observations, actions) and never from anything that a pool returned.
    Each path that was replayed is kept while its tree is searched: a child's replay is its parent's and one step more.
    """

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._replays: dict[int, _TreeReplays] = {}  # by environment
        self._lock = threading.Lock()  # of one tree, several steps may be asked for at once
        self._verification = Verification()

    @property
    def verification(self) -> Verification:
        """What was compared so far."""
        return self._verification

    def check(self, batch: JointBatch, asked: Sequence[Asked]) -> None:
        """Compare rows that should be what the steps asked for lead on from. Before the model appends."""
        with self._lock:
            for row, (episode, time, edge) in enumerate(asked):
                if edge is None:
                    time, path = time - 1, "the root"
                else:
                    path = f"the path {path_to(edge.parent)}"
                replays = self._replays.setdefault(episode.env_id, _TreeReplays(self._model))
                replays.follow(episode, time)
                replay = replays.of(None if edge is None else edge.parent)
                self._compare(batch, row, replay, f"{path} from step {time} of episode {episode.index}")

    def _compare(self, batch: JointBatch, row: int, replay: ReplayCache, what: str) -> None:
        expected = torch.cat(replay.keys_values())  # [2 * layers, heads, tokens, head_dim]
        found = batch.data[:, row, :, : batch.start]
        difference, bound = difference_of(found, expected), TOLERANCE * float(expected.abs().max())
        wrong = difference > bound
        before = self._verification
        first = before.first_mismatch
        if wrong and first is None:
            first = f"{what}: the gathered K and V differ by {difference:.3g} from its replay, {bound:.3g} is allowed"
        self._verification = Verification(
            before.rows + 1, max(before.max_difference, difference), before.mismatches + wrong, first
        )


def difference_of(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of a left-padded row and its tokens; infinite where it is too short or not finite."""
    padding = found.shape[2] - expected.shape[2]
    if padding < 0:
        return inf
    difference = float((found - F.pad(expected, (0, 0, padding, 0))).abs().max())
    return difference if isfinite(difference) else inf


class _TreeReplays:
    """The plain caches of one tree: its root's, and those of the nodes that were asked for."""

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._path = RealPath(model)
        self._root: tuple[Episode, int] | None = None
        self._nodes: dict[int, ReplayCache] = {}  # by number in the tree

    def follow(self, episode: Episode, time: int) -> None:
        """Go on to the tree whose root is the episode's observation `time`."""
        if self._root != (episode, time):
            self._path.follow(episode, time)
            self._root = (episode, time)
            self._nodes = {}

    def of(self, node: Node | None) -> ReplayCache:
        """The cache of a node's path; of the root's for None."""
        if node is None or node.parent is None:
            return self._path.cache
        cache = self._nodes.get(node.number)
        if cache is None:
            assert self._root is not None
            _, time = self._root
            cache = deepcopy(self.of(node.parent))
            position = torch.tensor([next_position(self._model.config, time + node.depth - 1)])
            self._model.recurrent(torch.tensor([node.action]), cache, position)
            cache.end_step()
            self._nodes[node.number] = cache
        return cache
