"""Nodes evaluated without a cache: every leaf's path is replayed from its root. What the cache is compared with."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.cartpole.episode import Episode, RealPath, next_position
from examples.cartpole.evaluation import Evaluation, root_evaluations, step_evaluations
from examples.cartpole.model import ModelConfig
from examples.cartpole.replay_cache import ReplayCache
from examples.cartpole.running import Runner
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.tree import Leaf, path_to


class PathBatch:
    """The K and V of paths that are replayed together, step by step: left-padded, and nothing outlives the replay."""

    def __init__(self, starts: Sequence[ReplayCache], config: ModelConfig) -> None:
        self._limit, self._drop = config.window_limit, config.tokens_per_step
        self._lengths = [len(start) for start in starts]
        columns = max(self._lengths)
        rows = [
            F.pad(torch.cat(start.keys_values()), (0, 0, columns - len(start), 0)) for start in starts
        ]  # each [2 * layers, heads, columns, head_dim]
        keys, values = torch.stack(rows, dim=1).chunk(2)
        self._keys = list(keys)  # each [batch, heads, columns, head_dim]
        self._values = list(values)
        self.padding = torch.tensor([columns - length for length in self._lengths])

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[batch, heads, n, head_dim]` to a layer; return all it holds."""
        self._keys[layer] = torch.cat((self._keys[layer], keys), dim=2)
        self._values[layer] = torch.cat((self._values[layer], values), dim=2)
        return self._keys[layer], self._values[layer]

    def end_step(self, *, first: int) -> None:
        """Drop the oldest tokens of paths at the limit, and the paths after the `first`."""
        longer = [length + self._drop for length in self._lengths[:first]]
        self._lengths = [length - self._drop if length >= self._limit else length for length in longer]
        columns = max(self._lengths, default=0)
        self._keys = [keys[:first, :, keys.shape[2] - columns :] for keys in self._keys]
        self._values = [values[:first, :, values.shape[2] - columns :] for values in self._values]
        self.padding = torch.tensor([columns - length for length in self._lengths])


class ReplayingEvaluator:
    """Evaluates nodes without a pool. What it keeps of an environment is the context of its real history, no more."""

    def __init__(self, model: SharedModel) -> None:
        self._model = model
        self._paths: dict[int, RealPath] = {}  # by environment; one thread at a time plans for one

    @contextmanager
    def open_round(self, episodes: Sequence[Episode]) -> Generator[ReplayingEvaluator, None, None]:
        """A round keeps nothing of its own."""
        yield self

    async def evaluate(self, episode: Episode, run: Runner) -> Evaluation:
        """Evaluate an episode's newest observation."""
        path = await run(self._path, episode)
        return root_evaluations(path.output)[0]

    def leaves(self, leaves: Sequence[tuple[Episode, Leaf]]) -> list[Evaluation]:
        """Replay every leaf's path from its root, all together, the longest for longest."""
        paths = [[*path_to(leaf.parent), leaf.action] for _, leaf in leaves]
        # Longest first: those that go on are always the first rows.
        rows = sorted(range(len(leaves)), key=lambda row: -len(paths[row]))
        batch = PathBatch([self._path(leaves[row][0]).cache for row in rows], self._model.config)
        evaluations: dict[int, Evaluation] = {}
        for step in range(len(paths[rows[0]])):
            going = [row for row in rows if len(paths[row]) > step]
            actions = torch.tensor([paths[row][step] for row in going])
            times = [leaves[row][0].time + step for row in going]
            positions = torch.tensor([next_position(self._model.config, time) for time in times])
            output = self._model.recurrent(actions, batch, positions)
            staying = sum(len(paths[row]) > step + 1 for row in going)
            if staying < len(going):
                ended = step_evaluations(output)[staying:]
                evaluations.update(zip(going[staying:], ended, strict=True))
            batch.end_step(first=staying)
        return [evaluations[row] for row in range(len(leaves))]

    def _path(self, episode: Episode) -> RealPath:
        path = self._paths.get(episode.env_id)
        if path is None:
            path = self._paths[episode.env_id] = RealPath(self._model)
        path.follow(episode, episode.time)
        return path
