"""Real environments, each a task of its own, which asks for its actions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
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
    threads: int = 4  # that search; 0: the searches are led on by the environments' event loop
    workers_per_tree: int = 1
    simulations: int = 25  # of each search
    episodes: int = 20  # in all; episode i is seeded with seed + i, whichever environment plays it
    seed: int = 0
    groups: int = 1  # of threads and environments; the leaves of a group share its calls of the model
    max_rows: int | None = None  # leaves of a call; those of all trees of a group if None
    max_steps: int | None = None  # of an episode; as long as it lasts if None

    def envs_of(self, group: int) -> Sequence[int]:
        """Its environments."""
        return range(group, self.envs, self.groups)

    def threads_of(self, group: int) -> int:
        """How many it has."""
        return len(range(group, self.threads, self.groups))


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


Decide = Callable[[Episode], Awaitable[int]]
"""Chooses the action that follows an episode's newest observation."""


class Played(Protocol):
    """What an environment had played when a job was cut off."""

    returns: dict[int, float]
    actions: dict[int, list[int]]
    index: int | None
    so_far: list[int]


class Keeper(Protocol):
    """Writes down what is played, so that a job that is killed can go on: see `checkpoint.py`."""

    def played(self, env_id: int) -> Played:
        """What an environment had played before."""

    async def restore(self, env_id: int) -> None:
        """Have its roots back."""

    async def step(self, episode: Episode) -> None:
        """Note a step."""

    async def end(self, episode: Episode, earned: float) -> None:
        """Note that an episode is over."""


async def play_episodes(decide: Decide, settings: PlaySettings, tally: Tally, keeper: Keeper | None = None) -> None:
    """Play all episodes, writing down in `tally` what happens. Each environment asks for one decision at a time."""
    tally.started = perf_counter()
    taken = set[int]()  # of episodes that were played before, or go on
    if keeper is not None:
        for played in map(keeper.played, range(settings.envs)):
            tally.returns.update(played.returns)
            tally.actions.update(played.actions)
            taken |= {*played.returns, *(() if played.index is None else (played.index,))}
    indices = (index for index in range(settings.episodes) if index not in taken)
    async with anyio.create_task_group() as environments:
        for env_id in range(settings.envs):
            environments.start_soon(_play_in_turn, env_id, indices, settings, decide, tally, keeper)
    tally.ended = perf_counter()


async def _play_in_turn(
    env_id: int,
    indices: Iterator[int],
    settings: PlaySettings,
    decide: Decide,
    tally: Tally,
    keeper: Keeper | None,
) -> None:
    """Play one episode after the other in one environment, as long as there are any."""
    environment: gymnasium.Env = gymnasium.make(ENVIRONMENT)
    before: list[int] = []  # actions of an episode that goes on
    if keeper is not None:
        await keeper.restore(env_id)
        played = keeper.played(env_id)
        if played.index is not None:
            before, indices = list(played.so_far), chain([played.index], indices)
    try:
        for index in indices:
            observation, _ = environment.reset(seed=settings.seed + index)
            episode = Episode(index, env_id, [torch.from_numpy(observation)])
            earned, over = 0.0, False
            while not over:
                is_new = episode.time >= len(before)
                action = await decide(episode) if is_new else before[episode.time]
                observation, reward, terminated, truncated, _ = environment.step(action)
                episode.actions.append(action)
                episode.observations.append(torch.from_numpy(observation))
                earned += float(reward)
                tally.steps += is_new
                over = terminated or truncated or episode.time == settings.max_steps
                if keeper is not None and is_new and not over:
                    await keeper.step(episode)
            before = []
            tally.actions[index] = episode.actions
            tally.returns[index] = earned
            if keeper is not None:
                await keeper.end(episode, earned)
    finally:
        environment.close()
