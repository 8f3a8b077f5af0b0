"""A plain K/V cache for one path: lists and `torch.cat`, no pool, no sharing, nothing of `concurrent_kv`.

It is what the pool's rows are compared with, and what the search costs without a pool: a path is replayed through it
token by token from its first observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from examples.cartpole.model import RootOutput, StepOutput, WorldModel


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


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat((old, new), dim=2)
