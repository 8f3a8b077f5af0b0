"""Hosts and players as Ray actors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import ray

from concurrent_kv.cluster import Cluster
from concurrent_kv.ray import RayCluster
from examples.cartpole.hosts import ClusterReport, play_share, report, setup, shares, together, where_metrics_are
from examples.cartpole.job import JobSettings
from examples.cartpole.play import PlaySettings, Tally

OBJECT_STORE_BYTES = 100 * 2**20


class Player:
    """An actor with environments."""

    async def ready(self) -> None:
        """Whether it is there."""

    async def play(
        self, cluster: Cluster, share: PlaySettings, number: int, kept: tuple[Path, int] | None
    ) -> tuple[Tally, int]:
        """Play all of a share."""
        return await play_share(cluster, share, number, kept)


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


def run_on_ray(
    settings: JobSettings,
    *,
    actors: int,
    watch: Callable[[Cluster], Any],
    kept: tuple[Path, int] | None = None,
    metrics: int | None = None,
    say: Callable[[str], object] = print,
) -> ClusterReport:
    """Play everything: so many actors search, as many others play.

    Args:
        kept: the folder of a checkpoint, and the steps of an environment between two.
        metrics: the first port at which hosts serve their numbers.
    """
    start_ray(actors)
    try:
        threads = settings.play.threads
        with RayCluster(setup(settings, metrics), actors=actors, threads=threads) as cluster:
            # The environments are not what is measured, and do little: Ray need not keep processors for them.
            kind, parts = ray.remote(num_cpus=0)(Player), shares(settings.play, actors)
            players = [kind.remote() for _ in parts]
            ray.get([player.ready.remote() for player in players])
            if metrics is not None:
                # One environment for each player's first: so every host that will play is asked.
                urls = {cluster.search((number, 0), where_metrics_are) for number in range(len(parts))}
                say("metrics: " + " ".join(sorted(filter(None, urls))))
            with watch(cluster):
                started = perf_counter()
                playing = [
                    player.play.remote(cluster, share, number, kept)
                    for number, (player, share) in enumerate(zip(players, parts, strict=True))
                ]
                tallies, restored = zip(*ray.get(playing), strict=True)
            tally = together(tallies, started=started, ended=perf_counter())
            return report(cluster, settings, tally, sum(restored))
    finally:
        ray.shutdown()
