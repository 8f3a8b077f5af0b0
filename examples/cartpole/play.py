"""Real environments, each a task of its own, which asks for its actions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Protocol

import anyio
import gymnasium
import torch

from examples.cartpole.episode import Episode

ENVIRONMENT = "CartPole-v1"


@dataclass(frozen=True)
class PlaySettings:
    """What is played, and with how much at once."""

    envs: int = 8
    threads: int = 4
    simulations: int = 25  # of each search
    episodes: int = 20  # in all; episode i is seeded with seed + i, whichever environment plays it
    seed: int = 0
    combine: bool = True  # leaves of all threads in one call of the model
    leaf_batch: int | None = None  # leaves that a thread evaluates together; of all its trees if None
    batch_size: int | None = None  # leaves that a loop evaluates together; of all environments if None
    batch_wait: float = 0.0  # seconds that a loop's leaf waits for others, at most
    max_steps: int | None = None  # of an episode; as long as it lasts if None

    @property
    def trees_per_thread(self) -> int:
        """Trees that one thread searches together, at most."""
        return ceil(self.envs / self.threads)


@dataclass
class Tally:
    """What was played so far. The event loop's thread writes it; others may read it at any time."""

    simulations_per_step: int
    returns: dict[int, float] = field(default_factory=dict)  # of finished episodes, by index
    actions: dict[int, list[int]] = field(default_factory=dict)  # the same
    steps: int = 0
    started: float = field(default_factory=perf_counter)  # seconds
    ended: float | None = None

    @property
    def simulations(self) -> int:
        """Leaves evaluated."""
        return self.steps * self.simulations_per_step

    @property
    def seconds(self) -> float:
        """Of playing, so far."""
        return (self.ended or perf_counter()) - self.started

    @property
    def simulations_per_second(self) -> float:
        """Over everything between the first reset and the last step."""
        return self.simulations / self.seconds

    @property
    def mean_return(self) -> float | None:
        """Of finished episodes."""
        return sum(self.returns.values()) / len(self.returns) if self.returns else None


# Chooses the action that follows an episode's newest observation.
Decide = Callable[[Episode], Awaitable[int]]


class Searches(Protocol):
    """What decides, for all environments of one event loop."""

    def running(self) -> AbstractAsyncContextManager[Decide]:
        """While it is entered, searches run; each environment may ask for one decision at a time."""
        ...


async def play(searches: Searches, settings: PlaySettings, tally: Tally) -> None:
    """Play all episodes, writing down in `tally` what happens."""
    tally.started = perf_counter()
    indices = iter(range(settings.episodes))
    async with searches.running() as decide, anyio.create_task_group() as environments:
        for env_id in range(settings.envs):
            environments.start_soon(_play_episodes, env_id, indices, settings, decide, tally)
    tally.ended = perf_counter()


async def _play_episodes(
    env_id: int,
    indices: Iterator[int],
    settings: PlaySettings,
    decide: Decide,
    tally: Tally,
) -> None:
    """Play one episode after the other in one environment, as long as there are any."""
    environment: gymnasium.Env = gymnasium.make(ENVIRONMENT)
    try:
        for index in indices:
            observation, _ = environment.reset(seed=settings.seed + index)
            episode = Episode(index, env_id, [torch.from_numpy(observation)])
            earned, over = 0.0, False
            while not over:
                action = await decide(episode)
                observation, reward, terminated, truncated, _ = environment.step(action)
                episode.actions.append(action)
                episode.observations.append(torch.from_numpy(observation))
                earned += float(reward)
                tally.steps += 1
                over = terminated or truncated or episode.time == settings.max_steps
            tally.actions[index] = episode.actions
            tally.returns[index] = earned
    finally:
        environment.close()
