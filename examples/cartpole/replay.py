"""The same paths without a pool: plain caches, with lists and `torch.cat`, nothing of `concurrent_kv` in them.

They are what gathered rows are compared with, what training uses, and what a search costs without a cache: there a
leaf's path is replayed from its root, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from concurrent_kv.evaluation import Walk
from examples.cartpole.episode import Asked, Episode, evaluations_of, next_position
from examples.cartpole.model import ModelConfig, RootOutput, StepOutput, WorldModel
from examples.cartpole.tree import Evaluation, path_to


class ReplayCache:
    """The K and V of one path, or of several that are walked in step and so have one length and no padding.

    The window rule is LightZero's: a path whose length reaches `limit` tokens at the end of a step drops its oldest
    `drop`. With a window of 8 the lengths run 1, 3, 5, 5, 5 and on. The cache cannot see where a step ends; its
    caller says so with `end_step`.
    """

    def __init__(self, num_layers: int, *, limit: int, drop: int, rows: int = 1) -> None:
        if not 0 < drop < limit:
            raise ValueError(f"drop must be between 0 and limit={limit}, not {drop}")
        self._limit = limit
        self._drop = drop
        self._padding = torch.zeros(rows, dtype=torch.int64)
        self._keys: list[Tensor | None] = [None] * num_layers  # each [rows, heads, tokens, head_dim]
        self._values: list[Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        """Tokens in the path; between two steps all layers have the same."""
        keys = self._keys[-1]
        return 0 if keys is None else keys.shape[2]

    @property
    def padding(self) -> Tensor:
        """Zeros: rows of one length need no padding."""
        return self._padding

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[rows, heads, n, head_dim]` to a layer; return all it holds."""
        self._keys[layer] = keys = _joined(self._keys[layer], keys)
        self._values[layer] = values = _joined(self._values[layer], values)
        return keys, values

    def end_step(self) -> None:
        """Drop the oldest tokens if the path has reached the limit."""
        if len(self) >= self._limit:
            self._keys = [None if keys is None else keys[:, :, self._drop :] for keys in self._keys]
            self._values = [None if values is None else values[:, :, self._drop :] for values in self._values]

    def keys_values(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """K and V of one path, each `[layers, heads, tokens, head_dim]`; `ValueError` while it has none."""
        keys = [keys[row] for keys in self._keys if keys is not None]
        values = [values[row] for values in self._values if values is not None]
        if len(keys) != len(self._keys):
            raise ValueError("the path has no tokens yet")
        return torch.stack(keys), torch.stack(values)


class Replay(NamedTuple):
    """A replayed path: its cache, and what the model said at its last observation token."""

    cache: ReplayCache
    output: RootOutput | StepOutput


def replay_path(model: WorldModel, observation: Tensor, actions: Sequence[int], position: int = 0) -> Replay:
    """Replay a path one token at a time under the model's own window rule.

    Args:
        model: the world model.
        observation: the real observation the path begins with, `[4]`.
        actions: taken from there, one a step; may be empty.
        position: absolute index of the first token.
    """
    config = model.config
    cache = ReplayCache(config.num_layers, limit=config.window_limit, drop=config.tokens_per_step)
    output: RootOutput | StepOutput = model.initial(observation[None], cache, torch.tensor([position]))
    for step, action in enumerate(actions):
        action_position = position + 1 + step * config.tokens_per_step
        output = model.recurrent(torch.tensor([action]), cache, torch.tensor([action_position]))
        cache.end_step()
    return Replay(cache, output)


class RealPath:
    """The K and V of one episode's real history, in a plain cache: never reads or writes a pool."""

    cache: ReplayCache
    output: RootOutput  # at the newest observation followed

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._episode: Episode | None = None
        self._time = 0

    def follow(self, episode: Episode, time: int) -> None:
        """Go on to the episode's observation `time`; from its beginning if it is another episode, or was passed."""
        if episode is not self._episode or time < self._time:
            self._episode, self._time = episode, 0
            self._begin(episode.observations[0])
        while self._time < time:
            self._step(episode.actions[self._time], episode.observations[self._time + 1])

    def _begin(self, observation: Tensor) -> None:
        config = self._model.config
        self.cache = ReplayCache(config.num_layers, limit=config.window_limit, drop=config.tokens_per_step)
        self.output = self._model.initial(observation[None], self.cache, torch.tensor([0]))

    def _step(self, action: int, observation: Tensor) -> None:
        position = torch.tensor([next_position(self._model.config, self._time)])
        self.output = self._model.observe(torch.tensor([action]), observation[None], self.cache, position)
        self.cache.end_step()
        self._time += 1


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
    """Runs walks as an `Evaluator` does, without a pool: every leaf's path is replayed from its root.

    What it keeps of an environment is the context of its real history, no more. One thread uses it.
    """

    def __init__(self, model: WorldModel) -> None:
        self._model = model
        self._paths: dict[int, RealPath] = {}  # by environment

    def run_many(self, walks: Sequence[Walk[Asked, Evaluation, Any]]) -> list[Any]:
        """What the walks return. Their leaves' keys are not looked at, nor is anything stored."""
        results: dict[int, Any] = {}
        answers: dict[int, Evaluation | None] = dict.fromkeys(range(len(walks)))
        while answers:
            asked: dict[int, Asked] = {}
            for number, answer in answers.items():
                try:
                    leaf = next(walks[number]) if answer is None else walks[number].send(answer)
                    asked[number] = leaf.inputs
                except StopIteration as stop:
                    results[number] = stop.value
            answers = dict(zip(asked, self.evaluate(list(asked.values())), strict=True))
        return [results[number] for number in range(len(walks))]

    def evaluate(self, asked: Sequence[Asked]) -> list[Evaluation]:
        """Replay every path from its root, all together, the longest for longest."""
        evaluations: dict[int, Evaluation] = {}
        steps: dict[int, list[int]] = {}  # actions of the path, by row
        with torch.inference_mode():
            for row, each in enumerate(asked):
                if each.edge is None:
                    (evaluations[row],) = evaluations_of(self._path(each).output)
                else:
                    steps[row] = [*path_to(each.edge.parent), each.action]
            # Longest first: those that go on are always the first rows.
            going = sorted(steps, key=lambda row: -len(steps[row]))
            batch = PathBatch([self._path(asked[row]).cache for row in going], self._model.config) if going else None
            number = 0
            while batch is not None and going:
                actions = torch.tensor([steps[row][number] for row in going])
                times = [asked[row].time + number for row in going]
                positions = torch.tensor([next_position(self._model.config, time) for time in times])
                output = self._model.recurrent(actions, batch, positions)
                number += 1
                staying = sum(len(steps[row]) > number for row in going)
                if staying < len(going):
                    evaluations.update(zip(going[staying:], evaluations_of(output)[staying:], strict=True))
                going = going[:staying]
                batch.end_step(first=staying)
        return [evaluations[row] for row in range(len(asked))]

    def _path(self, asked: Asked) -> RealPath:
        path = self._paths.setdefault(asked.episode.env_id, RealPath(self._model))
        path.follow(asked.episode, asked.time)
        return path


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat((old, new), dim=2)
