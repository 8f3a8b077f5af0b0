"""The main job on a cluster in this process: what it does under Ray too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from concurrent_kv.cluster import Cluster, LocalCluster
from examples.cartpole.hosts import decide, play_share, report, setup, shares, together
from examples.cartpole.job import JobSettings, play_cached, unwatched
from examples.cartpole.model import load_model
from examples.cartpole.play import PlaySettings, Tally
from tests.cartpole_support import one_torch_thread
from tests.support import HANG_SECONDS

# One row a call: then the actions do not depend on whose leaves share one.
PLAY = PlaySettings(envs=4, threads=2, simulations=8, episodes=5, max_steps=7, max_rows=1)


def test_a_cluster_plays_the_same_actions_as_one_cache_and_every_row_is_right() -> None:
    settings = JobSettings(PLAY, verify=True)
    with one_torch_thread(), LocalCluster(setup(settings), hosts=2, timeout=HANG_SECONDS) as cluster:
        parts = shares(PLAY, 2)
        tallies = [anyio.run(play_share, cluster, share, number)[0] for number, share in enumerate(parts)]
        found = report(cluster, settings, together(tallies, started=0.0, ended=1.0))
        alone = play_cached(load_model(), JobSettings(PLAY), unwatched)
    assert found.tally.actions == alone.tally.actions
    assert found.tally.returns == alone.tally.returns
    assert not found.failures()
    assert found.verification is not None
    assert found.verification.rows == 5 * (7 * 8 + 6)  # of each episode: the parents of all leaves, and the last roots
    assert [stats.environments for stats in found.stats.hosts.values() if stats] == [2, 2]


def test_the_job_goes_on_where_hosts_come_and_go_and_weights_are_loaded() -> None:
    settings = JobSettings(replace(PLAY, episodes=4), verify=True)
    with one_torch_thread(), LocalCluster(setup(settings), hosts=2, timeout=HANG_SECONDS) as cluster:
        (share,) = shares(settings.play, 1)

        async def play() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(change)
                tallies.append((await play_share(cluster, share, 0))[0])

        async def change() -> None:
            await anyio.to_thread.run_sync(cluster.load_weights, load_model().state_dict())
            await anyio.to_thread.run_sync(cluster.remove_host, "host-0")

        tallies: list[Tally] = []
        anyio.run(play)
        found = report(cluster, settings, together(tallies, started=0.0, ended=1.0))
        alone = play_cached(load_model(), JobSettings(settings.play), unwatched)
    assert found.tally.actions == alone.tally.actions
    assert not found.failures()
    assert list(found.stats.hosts) == ["host-1"]
    assert found.stats.version == 1


class KilledError(Exception):
    pass


def test_a_job_that_was_cut_off_goes_on_from_its_checkpoint_and_plays_the_same(tmp_path: Path) -> None:
    settings, kept = JobSettings(PLAY, verify=True), (tmp_path / "kept", 2)
    (share,) = shares(PLAY, 1)
    with one_torch_thread(), LocalCluster(setup(settings), hosts=2, timeout=HANG_SECONDS) as cluster:
        left = 15  # steps that are played before it is killed

        async def decide_or_die(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if arguments[1] is decide:
                left -= 1
                if left < 0:
                    raise KilledError
            return await Cluster.search_async(cluster, *arguments, **named)

        cluster.search_async = decide_or_die  # type: ignore[method-assign]
        cut_off = list[BaseException]()
        try:
            anyio.run(play_share, cluster, share, 0, kept)
        except BaseException as error:
            cut_off += getattr(error, "exceptions", (error,))
        assert cut_off
        assert all(isinstance(error, KilledError) for error in cut_off)
    with one_torch_thread(), LocalCluster(setup(settings), hosts=2, timeout=HANG_SECONDS) as cluster:
        tally, restored = anyio.run(play_share, cluster, share, 0, kept)
        found = report(cluster, settings, together([tally], started=0.0, ended=1.0), restored)
        alone = play_cached(load_model(), JobSettings(PLAY), unwatched)
    assert found.tally.actions == alone.tally.actions
    assert found.tally.returns == alone.tally.returns
    assert not found.failures()
    assert restored > 0
    assert tally.steps < 5 * 7  # what was played before is not played again


def test_each_player_has_environments_and_all_episodes_are_played_once() -> None:
    for players in (1, 2, 3, 8):
        parts = shares(PLAY, players)
        assert sum(share.episodes for share in parts) == PLAY.episodes
        assert sum(share.envs for share in parts) == PLAY.envs
        seeds = [share.seed + episode for share in parts for episode in range(share.episodes)]
        assert seeds == list(range(PLAY.episodes))
