"""A real episode, and the plain cache that walks along it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.cartpole.model import ModelConfig, RootOutput
from examples.cartpole.replay_cache import ReplayCache
from examples.cartpole.shared_model import SharedModel


@dataclass(eq=False)
class Episode:
    """What was observed and done so far; the newest observation waits for its action.

    Its environment's task appends to it, and only while no search is under way from it.
    """

    index: int
    env_id: int
    observations: list[Tensor]  # float32 [4] each, one more than actions
    actions: list[int] = field(default_factory=list)

    @property
    def time(self) -> int:
        """Steps taken."""
        return len(self.actions)


def next_position(config: ModelConfig, steps: int) -> int:
    """Absolute position, in tokens, of the action token that follows `steps` steps."""
    return 1 + steps * config.tokens_per_step


class RealPath:
    """The K and V of one episode's real history, in a plain cache: never reads or writes a pool."""

    cache: ReplayCache
    output: RootOutput  # at the newest observation followed

    def __init__(self, model: SharedModel) -> None:
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
