"""Hosts and players as Ray actors."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import ray

from concurrent_kv.cluster import Cluster
from concurrent_kv.ray import RayCluster
from examples.cartpole.hosts import ClusterReport, play_share, report, setup, shares, together
from examples.cartpole.job import JobSettings
from examples.cartpole.play import PlaySettings, Tally

OBJECT_STORE_BYTES = 100 * 2**20


class Player:
    """An actor with environments."""

    async def ready(self) -> None:
        """Whether it is there."""

    async def play(self, cluster: Cluster, share: PlaySettings, number: int) -> Tally:
        """Play all of a share."""
        return await play_share(cluster, share, number)


def start_ray(actors: int) -> None:
    """A Ray on this machine alone, which reports to nobody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=actors,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


def run_on_ray(settings: JobSettings, *, actors: int, watch: Callable[[Cluster], Any]) -> ClusterReport:
    """Play everything: so many actors search, as many others play."""
    start_ray(actors)
    try:
        threads = settings.play.threads
        with RayCluster(setup(settings), actors=actors, threads=threads) as cluster:
            # The environments are not what is measured, and do little: Ray need not keep processors for them.
            kind, parts = ray.remote(num_cpus=0)(Player), shares(settings.play, actors)
            players = [kind.remote() for _ in parts]
            ray.get([player.ready.remote() for player in players])
            with watch(cluster):
                started = perf_counter()
                playing = [
                    player.play.remote(cluster, share, number)
                    for number, (player, share) in enumerate(zip(players, parts, strict=True))
                ]
                tallies = ray.get(playing)
            return report(cluster, settings, together(tallies, started=started, ended=perf_counter()))
    finally:
        ray.shutdown()
