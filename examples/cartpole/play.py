"""Real environments, each a task of its own, whose searches run in worker threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter

import anyio
import gymnasium
import torch
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from examples.cartpole.episode import Episode
from examples.cartpole.planner import Planner

ENVIRONMENT = "CartPole-v1"


@dataclass(frozen=True)
class PlaySettings:
    """What is played, and with how much at once."""

    envs: int = 8
    threads: int = 4
    simulations: int = 25  # of each search
    episodes: int = 20  # in all; episode i is seeded with seed + i, whichever environment plays it
    seed: int = 0
    leaf_batch: int | None = None  # leaves evaluated together; of all trees of a thread if None
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


@dataclass(eq=False)
class _Turn:
    """An environment waiting for its action."""

    episode: Episode
    decided: anyio.Event = field(default_factory=anyio.Event)
    action: int = -1


async def play(planner: Planner, settings: PlaySettings, tally: Tally) -> None:
    """Play all episodes, writing down in `tally` what happens."""
    tally.started = perf_counter()
    waiting, turns = anyio.create_memory_object_stream[_Turn](settings.envs)
    limiter = anyio.CapacityLimiter(settings.threads)
    indices = iter(range(settings.episodes))
    async with anyio.create_task_group() as dispatchers, turns:
        for _ in range(settings.threads):
            dispatchers.start_soon(_dispatch, planner, settings, turns.clone(), limiter)
        # Closing it ends the dispatchers.
        async with waiting, anyio.create_task_group() as environments:
            for env_id in range(settings.envs):
                environments.start_soon(_play_episodes, env_id, indices, settings, waiting, tally)
    tally.ended = perf_counter()


async def _dispatch(
    planner: Planner, settings: PlaySettings, turns: MemoryObjectReceiveStream[_Turn], limiter: anyio.CapacityLimiter
) -> None:
    """Take waiting environments and search their trees together, in a worker thread."""
    async with turns:
        async for first in turns:
            group = [first, *_others(turns, settings.trees_per_thread - 1)]
            episodes = [turn.episode for turn in group]
            actions = await anyio.to_thread.run_sync(planner.plan, episodes, limiter=limiter)
            for turn, action in zip(group, actions, strict=True):
                turn.action = action
                turn.decided.set()


def _others(turns: MemoryObjectReceiveStream[_Turn], most: int) -> Iterator[_Turn]:
    """Further environments that are waiting already."""
    for _ in range(most):
        try:
            yield turns.receive_nowait()
        except (anyio.WouldBlock, anyio.EndOfStream):
            return


async def _play_episodes(
    env_id: int,
    indices: Iterator[int],
    settings: PlaySettings,
    waiting: MemoryObjectSendStream[_Turn],
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
                turn = _Turn(episode)
                await waiting.send(turn)
                await turn.decided.wait()
                observation, reward, terminated, truncated, _ = environment.step(turn.action)
                episode.actions.append(turn.action)
                episode.observations.append(torch.from_numpy(observation))
                earned += float(reward)
                tally.steps += 1
                over = terminated or truncated or episode.time == settings.max_steps
            tally.actions[index] = episode.actions
            tally.returns[index] = earned
    finally:
        environment.close()
