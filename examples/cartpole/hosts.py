"""The main job on a cluster: hosts search, players ask them for actions, and neither knows where the other is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from concurrent_kv import IntegrityError, StatsSummary
from concurrent_kv.cluster import Cluster, ClusterStats, HostParts, SearchContext
from concurrent_kv.cluster.requests import Planner
from examples.cartpole.checkpoint import Checkpoint
from examples.cartpole.episode import Episode
from examples.cartpole.job import JobSettings, failures_of
from examples.cartpole.model import WorldModel, load_model
from examples.cartpole.play import PlaySettings, Tally, play_episodes
from examples.cartpole.search import TreeSearch, evaluate, new_evaluator, new_manager
from examples.cartpole.steps import steps_of
from examples.cartpole.verify import Verification, Verifier

# Hosts ---------------------------------------------------------------------------------------------------------------


@dataclass
class Searching:
    """What a host of this job searches with, beside its cache."""

    model: WorldModel
    simulations: int
    verifier: Verifier | None
    url: str | None = None  # of its numbers
    until_the_end: ExitStack = field(default_factory=ExitStack)  # of the host's process: its numbers are served
    episodes: dict[int, Episode] = field(default_factory=dict)  # the newest of each environment, by its local id

    def episode_at(self, local_id: int, moment: Moment) -> Episode:
        """The episode as it is now. (Of one environment one search runs at a time: nobody else changes it.)"""
        episode = self.episodes.get(local_id)
        if episode is None or episode.index != moment.number or episode.time > len(moment.actions):
            episode = self.episodes[local_id] = Episode(moment.number, local_id, [])
        episode.observations += torch.from_numpy(moment.observations[len(episode.observations) :].copy()).unbind()
        episode.actions[:] = moment.actions
        return episode


class Moment(NamedTuple):
    """An episode whose newest observation waits for its action, as it travels."""

    number: int  # the episode's index
    observations: npt.NDArray[np.float32]  # [steps + 1, 4]
    actions: list[int]

    @classmethod
    def of(cls, episode: Episode) -> Moment:
        """Now. All of it travels: a host that is made again has seen nothing."""
        return cls(episode.index, torch.stack(episode.observations).numpy(), episode.actions)


def setup(settings: JobSettings, metrics: int | None = None) -> Callable[[], HostParts]:
    """What makes a host, with room for all environments: where another is lost, it may get them.

    `metrics` is the first port at which hosts serve their numbers.
    """
    return partial(_new_parts, settings, metrics)


def _new_parts(settings: JobSettings, metrics: int | None) -> HostParts:
    torch.set_num_threads(1)
    model, play = load_model(), settings.play
    steps = steps_of(model)
    verifier = Verifier(model) if settings.verify else None
    manager = new_manager(
        model, envs=play.envs, simulations=play.simulations, workers_per_tree=1, policy=settings.policy
    )
    check = None if verifier is None else verifier.check
    evaluator = new_evaluator(
        model,
        manager,
        lambda batch, asked: evaluate(steps, batch, asked, check),
        max_rows=play.max_rows or play.envs,
    )
    parts = HostParts(manager, evaluator, Searching(model, play.simulations, verifier), load=model.load_state_dict)
    if metrics is not None:
        from examples.cartpole.serving import serving_host  # needs the client, and playing without it does not

        parts.model.url = parts.model.until_the_end.enter_context(serving_host(parts, metrics))
    return parts


def decide(context: SearchContext, moment: Moment) -> int:
    """A planner: the action that follows the newest observation."""
    searching: Searching = context.model
    episode = searching.episode_at(context.local_id, moment)
    search = TreeSearch(searching.model, context.manager, [context.local_id], simulations=searching.simulations)
    try:
        action: int = context.evaluator.run(search.search_alone(episode))
    finally:
        search.close()
    return action


def figures(context: SearchContext) -> tuple[StatsSummary, Verification | None]:
    """A planner that only looks."""
    verifier = context.model.verifier
    return context.manager.get_stats_summary(), None if verifier is None else verifier.verification


# Players -------------------------------------------------------------------------------------------------------------


def shares(settings: PlaySettings, players: int) -> list[PlaySettings]:
    """Environments and episodes of each player: those of the first come first."""
    players = min(players, settings.envs, settings.episodes)  # each has some of both
    found: list[PlaySettings] = []
    for number in range(players):
        episodes = len(range(number, settings.episodes, players))
        envs = len(range(number, settings.envs, players))
        first = sum(share.episodes for share in found)
        found.append(replace(settings, envs=envs, episodes=episodes, seed=settings.seed + first))
    return found


async def play_share(
    cluster: Cluster, share: PlaySettings, player: int, kept: tuple[Path, int] | None = None
) -> tuple[Tally, int]:
    """Play a share's episodes in environments that are here, with actions from the cluster.

    `kept` is the folder of a checkpoint and the steps between two: with what is there already, the job goes on. Returns
    also how many roots were restored from there.
    """
    tally, keeper = Tally(share.simulations), None
    if kept is not None:
        folder, every = kept

        def run(env_id: int, planner: Planner, path: str) -> Awaitable[int]:
            return cluster.search_async((player, env_id), planner, path)

        keeper = Checkpoint(folder, player, every=every, run=run)
    await play_episodes(
        lambda episode: cluster.search_async((player, episode.env_id), decide, Moment.of(episode)), share, tally, keeper
    )
    return tally, 0 if keeper is None else keeper.restored_roots


def where_metrics_are(context: SearchContext) -> str | None:
    """A planner that says it."""
    url: str | None = context.model.url
    return url


# Report --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterReport:
    """What was played and found."""

    settings: JobSettings
    tally: Tally
    stats: ClusterStats
    evictions_during_search: int
    integrity: str  # "ok", or what contradicts
    verification: Verification | None
    restored_roots: int = 0

    def failures(self) -> list[str]:
        """What was wrong; empty if nothing was."""
        return failures_of(self.verification, self.integrity, self.evictions_during_search)


def together(tallies: Sequence[Tally], *, started: float, ended: float) -> Tally:
    """Of all players: the episodes of the first come first."""
    tally = Tally(tallies[0].simulations_per_step, started=started, ended=ended)
    for each in tallies:
        first = len(tally.returns)
        tally.returns.update({first + index: earned for index, earned in each.returns.items()})
        tally.actions.update({first + index: actions for index, actions in each.actions.items()})
        tally.steps += each.steps
    return tally


def report(cluster: Cluster, settings: JobSettings, tally: Tally, restored_roots: int = 0) -> ClusterReport:
    """Ask every host, at a quiet moment."""
    one_of_each = {host: env_id for env_id, host in cluster.environments().items()}
    looks = [cluster.search(env_id, figures) for env_id in one_of_each.values()]
    try:
        cluster.check_integrity()
        integrity = "ok"
    except IntegrityError as error:
        integrity = str(error)
    return ClusterReport(
        settings,
        tally,
        cluster.stats(),
        sum(summary.pools["recur"].eviction_count for summary, _ in looks),
        integrity,
        _joined(verification for _, verification in looks),
        restored_roots,
    )


def _joined(verifications: Iterable[Verification | None]) -> Verification | None:
    found = [each for each in verifications if each is not None]
    if not found:
        return None
    return Verification(
        sum(each.rows for each in found),
        max(each.max_difference for each in found),
        sum(each.mismatches for each in found),
        next((each.first_mismatch for each in found if each.first_mismatch is not None), None),
    )
