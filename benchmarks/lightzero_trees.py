"""Searches over LightZero's released world model: trees that grow at random, each node expanded by an action once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.lightzero_support import Shape

__all__ = ["Step", "Trees"]


class Step(NamedTuple):
    """What `forward_recurrent_inference` is called with."""

    state_action_history: list[tuple[Any, Tensor]]
    simulation_index: int
    search_depth: list[int]
    start_pos: Any


class Trees:
    """One tree for each environment, over the steps of an episode.

    As in a search, a simulated step expands one new (node, action) in every tree. Which one is drawn, not searched for:
    what a cache sees of a search is only that parents are older nodes, most of them deep enough to fill the window.
    """

    def __init__(self, shape: Shape, seed: int = 0, device: str = "cpu") -> None:
        self.shape = shape
        self.device = device  # of what the world model is given as tensors
        self.rows = shape.env_num
        self.random = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self._observation = self._observe()
        self._actions: list[Any] = [-1] * self.rows  # which begins an episode
        self.timestep = np.zeros(self.rows, dtype=np.int64)

    def next_root(self) -> tuple[dict[str, Any], Any]:
        """The environments step: what `forward_initial_inference` is called with."""
        current = self._observe()
        asked = {"obs": self._observation, "action": self._actions, "current_obs": current}
        at = self.timestep
        self._observation, self.timestep = current, at + 1
        self._actions = [self._action(int(self.random.integers(self._branches))) for _ in range(self.rows)]
        return asked, at

    def plant(self, latent_state: Tensor) -> None:
        """The roots' states `[rows, 1, embed_dim]`: every tree begins anew."""
        self.states = [latent_state.cpu().numpy()]
        self._depths = np.zeros((1, self.rows), dtype=np.int64)
        self._open: list[list[tuple[int, int]]] = [[(0, branch) for branch in self._all] for _ in range(self.rows)]

    def next_step(self) -> Step:
        """An expansion in every tree."""
        chosen = [leaves.pop(self.random.integers(len(leaves))) for leaves in self._open]
        states = np.stack([self.states[node][row] for row, (node, _) in enumerate(chosen)])
        actions = torch.from_numpy(np.array([self._action(branch) for _, branch in chosen])).to(self.device)
        depths = np.array([self._depths[node, row] for row, (node, _) in enumerate(chosen)])
        self._depths = np.concatenate([self._depths, depths[None] + 1])
        return Step([(states, actions)], len(self.states) - 1, depths.tolist(), self.timestep)

    def grow(self, latent_state: Tensor) -> None:
        """The states of the new nodes, `[rows, 1, embed_dim]`."""
        node = len(self.states)
        self.states.append(latent_state.cpu().numpy())
        for leaves in self._open:
            leaves += [(node, branch) for branch in self._all]

    def _observe(self) -> Tensor:
        size = self.shape.observation
        drawn = torch.randn(self.rows, *(size if isinstance(size, tuple) else (size,)), generator=self.generator)
        return drawn.to(self.device)

    @property
    def _branches(self) -> int:
        return 4 if self.shape.continuous else self.shape.action_space_size

    @property
    def _all(self) -> range:
        return range(self._branches)

    def _action(self, branch: int) -> Any:
        if self.shape.continuous:
            return self.random.uniform(-1, 1, self.shape.action_space_size).astype(np.float32)
        return branch
