"""Real CartPole-v1 transitions: several environments stepped side by side, every step recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Generator, Tensor

Policy = Callable[[Tensor], Tensor]
"""From observations `[envs, 4]` to actions, int64 `[envs]`."""


class Transitions(NamedTuple):
    """Steps of several environments. Row `t + 1` continues row `t` unless the episode ended there."""

    observation: Tensor  # float32 [steps, envs, 4]
    action: Tensor  # int64 [steps, envs]
    reward: Tensor  # float32 [steps, envs]
    terminated: Tensor  # bool [steps, envs]
    truncated: Tensor  # bool [steps, envs]
    next_observation: Tensor  # float32 [steps, envs, 4]; of an ended episode, its last

    @property
    def ended(self) -> Tensor:
        """Where an episode ended for either reason, bool `[steps, envs]`."""
        return self.terminated | self.truncated

    @staticmethod
    def joined(parts: Sequence[Transitions]) -> Transitions:
        """Put what one collector recorded, call after call, in one piece."""
        return Transitions(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class Collector:
    """Environments which go on from where the last call left them."""

    def __init__(self, envs: int, seed: int) -> None:
        self._envs = [gymnasium.make("CartPole-v1") for _ in range(envs)]
        seeds = np.random.SeedSequence(seed).generate_state(envs)
        resets = [env.reset(seed=int(seed))[0] for env, seed in zip(self._envs, seeds, strict=True)]
        self._observation = torch.from_numpy(np.stack(resets))  # float32 [envs, 4]

    @property
    def envs(self) -> int:
        """How many environments are stepped side by side."""
        return len(self._envs)

    def collect(self, policy: Policy, steps: int) -> Transitions:
        """Step every environment `steps` times; episodes that end begin anew."""
        rows = [self._step(policy(self._observation)) for _ in range(steps)]
        return Transitions(*(torch.stack(fields) for fields in zip(*rows, strict=True)))

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _step(self, action: Tensor) -> tuple[Tensor, ...]:
        observation = self._observation
        following, begun, rewards, terminations, truncations = [], [], [], [], []
        for env, choice in zip(self._envs, action.tolist(), strict=True):
            next_observation, reward, terminated, truncated, _ = env.step(choice)
            following.append(next_observation)
            begun.append(env.reset()[0] if terminated or truncated else next_observation)
            rewards.append(float(reward))
            terminations.append(terminated)
            truncations.append(truncated)
        self._observation = torch.from_numpy(np.stack(begun))
        next_observations = torch.from_numpy(np.stack(following))
        ends = torch.tensor(terminations), torch.tensor(truncations)
        return observation, action, torch.tensor(rewards), *ends, next_observations


class Disturbed:
    """A policy now and then overruled for some steps, so that there are states it would never reach by itself.

    A burst of pushes that lean to one side brings the pole, or the cart, where nothing saves it: a search which has
    never seen such states would not know that they are bad.
    """

    def __init__(self, policy: Policy, envs: int, generator: Generator) -> None:
        self._policy = policy
        self._generator = generator
        self._chance = 0.05  # of a burst to begin, per step
        self._longest = 12  # steps
        self._left = torch.zeros(envs, dtype=torch.int64)  # steps of the burst still to come
        self._lean = torch.zeros(envs)  # probability of a push to the right in the burst

    def __call__(self, observation: Tensor) -> Tensor:
        """Choose the actions, int64 `[envs]`."""
        envs = len(observation)
        begins = (self._left == 0) & (torch.rand(envs, generator=self._generator) < self._chance)
        length = torch.randint(1, self._longest + 1, (envs,), generator=self._generator)
        self._left = torch.where(begins, length, (self._left - 1).clamp(min=0))
        self._lean = torch.where(begins, torch.rand(envs, generator=self._generator), self._lean)
        pushed = (torch.rand(envs, generator=self._generator) < self._lean).long()
        return torch.where(self._left > 0, pushed, self._policy(observation))
