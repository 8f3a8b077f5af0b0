"""Simulations a second on clusters: threads of one process, one Ray actor, two; all in turns. Needs the extra `ray`.

    python -m benchmarks.cluster [--turns 5] [--seconds 6] [--json FILE]

CartPole-v1, 25 simulations a search, torch on one thread a process. *in the hosts*: a planner plays a few steps of an
environment that its host keeps, so that one call to the host is as many searches. *in actors of their own*: the
environments are elsewhere, and each search is a call. What a plan for more machines needs is measured beside it: an
empty call, and weights that are loaded by every host.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from typing import Any

import gymnasium
import torch

from concurrent_kv.cluster import Cluster, HostParts, LocalCluster, SearchContext
from examples.cartpole.episode import Episode
from examples.cartpole.hosts import Moment, Searching, decide, setup
from examples.cartpole.job import JobSettings
from examples.cartpole.play import ENVIRONMENT, PlaySettings
from examples.cartpole.search import TreeSearch
from reporting.arguments import file_to_write
from reporting.progress import Work
from reporting.tables import Grid, console_of, origin

ENVS = 16  # of each host, and threads
STEPS = 4  # of an environment in one call, where the host has it
SIMULATIONS = 25
WEIGHTS_BYTES = (0, 64 * 2**20)  # beside those of the model
CALLS = 200
QUIET = 0.85  # processors that a host's process has got in a turn in which the machine did little else
THREADS, ONE, TWICE = "threads of one process, 16 environments", "1 actor, 16 environments", "1 actor, 32 environments"
TWO, ELSEWHERE = "2 actors, 16 environments each", "2 actors, 32 environments in 2 others"


@dataclass
class World:
    """An environment in the midst of an episode."""

    seed: int
    environment: Any = field(default_factory=lambda: gymnasium.make(ENVIRONMENT))
    episode: Episode | None = None
    played: int = 0

    def current(self, local_id: int) -> Episode:
        """The episode whose newest observation waits for its action."""
        if self.episode is None:
            observation, _ = self.environment.reset(seed=self.seed + self.played)
            self.episode = Episode(self.played, local_id, [torch.from_numpy(observation)])
            self.played += 1
        return self.episode

    def step(self, action: int) -> None:
        """Take a step; the next episode begins where this one has ended."""
        assert self.episode is not None
        observation, _, terminated, truncated, _ = self.environment.step(action)
        self.episode.actions.append(action)
        self.episode.observations.append(torch.from_numpy(observation))
        if terminated or truncated:
            self.episode = None


def new_parts(settings: JobSettings) -> HostParts:
    parts = setup(settings)()
    searching: Searching = parts.model

    def load(weights: dict[str, Any]) -> None:
        searching.model.load_state_dict({name: value for name, value in weights.items() if name != "more"})

    worlds: dict[Hashable, World] = {}
    return HostParts(parts.manager, parts.evaluator, (searching, worlds), load)


def play_steps(context: SearchContext) -> int:
    """A planner: some steps of an environment that the host has; how many simulations it made."""
    searching, worlds = context.model
    world = worlds.setdefault(context.env_id, World(seed=context.local_id))
    for _ in range(STEPS):
        episode = world.current(context.local_id)
        search = TreeSearch(searching.model, context.manager, [context.local_id], simulations=SIMULATIONS)
        try:
            action = context.evaluator.run(search.search_alone(episode))
        finally:
            search.close()
        world.step(action)
    return STEPS * SIMULATIONS


def nothing(context: SearchContext) -> None:
    """A planner that shows what a call costs."""


def decide_here(context: SearchContext, moment: Moment) -> int:
    """As the example's planner, on this benchmark's parts."""
    searching, _ = context.model
    parts = HostParts(context.manager, context.evaluator, searching)
    return decide(
        SearchContext(context.env_id, context.local_id, parts, context.version, context.host, context.until), moment
    )


async def keep_busy(seconds: float, one: Callable[[Hashable], Any], envs: Sequence[Hashable]) -> float:
    """Simulations a second, of environments each of which asks anew as soon as it is answered."""
    began = time.perf_counter()

    async def play(env: Hashable) -> int:
        count = 0
        while time.perf_counter() < began + seconds:
            count += await one(env)
        return count

    counts = await asyncio.gather(*map(play, envs))
    return sum(counts) / (time.perf_counter() - began)


def in_hosts(cluster: Cluster, number: int, seconds: float) -> float:
    envs = range(number)
    return asyncio.run(keep_busy(seconds, lambda env: cluster.search_async(env, play_steps), envs))


class Player:
    """An actor with environments of its own."""

    def __init__(self, cluster: Cluster, envs: Sequence[int]) -> None:
        torch.set_num_threads(1)
        self.cluster = cluster
        self.worlds = {("played elsewhere", env): World(seed=env) for env in envs}

    async def play(self, seconds: float) -> float:
        async def one(env: Hashable) -> int:
            world = self.worlds[env]  # type: ignore[index]
            action = await self.cluster.search_async(env, decide_here, Moment.of(world.current(0)))
            world.step(action)
            return SIMULATIONS

        return await keep_busy(seconds, one, list(self.worlds))


def measured(turns: int, seconds: float) -> dict[str, Any]:
    import ray

    from concurrent_kv.ray import RayCluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        "local",
        num_cpus=8,
        object_store_memory=400 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    settings = JobSettings(PlaySettings(envs=4 * ENVS, simulations=SIMULATIONS, max_rows=ENVS))
    parts = partial(new_parts, settings)
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        local = stack.enter_context(LocalCluster(parts, threads=ENVS))
        one = stack.enter_context(RayCluster(parts, actors=1, threads=ENVS))
        two = stack.enter_context(RayCluster(parts, actors=2, threads=ENVS))
        players = [ray.remote(num_cpus=0)(Player).remote(two, range(first, 2 * ENVS, 2)) for first in range(2)]
        ways: dict[str, Callable[[float], float]] = {
            THREADS: partial(in_hosts, local, ENVS),
            ONE: partial(in_hosts, one, ENVS),
            TWICE: partial(in_hosts, one, 2 * ENVS),
            TWO: partial(in_hosts, two, 2 * ENVS),
            ELSEWHERE: lambda seconds: sum(ray.get([player.play.remote(seconds) for player in players])),
        }
        clusters = [local, one, one, two, two]
        rates: dict[str, list[float]] = {name: [] for name in ways}
        processors: dict[str, list[float]] = {name: [] for name in ways}
        loads = []
        work = stack.enter_context(Work("turns", (turns + 1) * len(ways)))
        for turn in range(turns + 1):
            for (name, way), cluster in zip(ways.items(), clusters, strict=True):
                if turn:
                    used, began = processor_seconds(cluster), time.perf_counter()
                    rates[name].append(way(seconds))
                    processors[name].append((processor_seconds(cluster) - used) / (time.perf_counter() - began))
                else:
                    way(1.0)  # to warm up
                work.part(name)
            loads.append(os.getloadavg()[0])
        ratios = [rates[TWO][turn] / max(rates[ONE][turn], rates[TWICE][turn]) for turn in range(turns)]
        quiet = [
            ratio
            for turn, ratio in enumerate(ratios)
            if min(processors[ONE][turn], processors[TWICE][turn], processors[TWO][turn] / 2) >= QUIET
        ]
        stats = two.stats().total
        assert stats.evaluator is not None
        return {
            "about": {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "ray": ray.__version__,
                "processors": os.cpu_count(),
                "load": statistics.median(loads),
                "environments": ENVS,
                "simulations_per_search": SIMULATIONS,
                "turns": turns,
                "seconds": seconds,
            },
            "simulations_per_second": {name: summary(found) for name, found in rates.items()},
            "processors_of_hosts": {name: summary(found) for name, found in processors.items()},
            "two_by_one": summary(ratios),
            "two_by_one_of_quiet_turns": summary(quiet) if quiet else None,
            "quiet_turns": len(quiet),
            "rows_per_call_of_two": stats.evaluator.rows_per_call,
            "empty_call_seconds": {
                "in this process": summary(calls(local)),
                "to an actor": summary(calls(one)),
            },
            "load_weights_seconds": {
                f"{hosts} host(s), {size >> 20} MiB more": summary(weight_loads(cluster, size))
                for hosts, cluster in ((1, one), (2, two))
                for size in WEIGHTS_BYTES
            },
        }


def processor_seconds(cluster: Cluster) -> float:
    """That the processes of its hosts have used."""
    one_of_each = {host: env for env, host in cluster.environments().items()}
    return float(sum(cluster.search(env, used_here) for env in one_of_each.values()))


def used_here(context: SearchContext) -> float:
    return time.process_time()


def calls(cluster: Cluster) -> list[float]:
    found = []
    for _ in range(CALLS):
        began = time.perf_counter()
        cluster.search(0, nothing)
        found.append(time.perf_counter() - began)
    return found


def weight_loads(cluster: Cluster, size: int) -> list[float]:
    from examples.cartpole.model import load_model

    weights = {**load_model().state_dict(), "more": torch.zeros(size, dtype=torch.uint8)}
    found = []
    for _ in range(5):
        began = time.perf_counter()
        cluster.load_weights(weights)
        found.append(time.perf_counter() - began)
    return found


def summary(found: list[float]) -> dict[str, Any]:
    first, _, third = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": statistics.median(found), "quartiles": [first, third], "all": found[:20]}


def tables(result: dict[str, Any]) -> tuple[Grid, Grid]:
    ways = Grid("on a cluster: median (quartiles)", ("way", "simulations a second", "processors of the hosts"))
    for name, each in result["simulations_per_second"].items():
        ways.rows.append((name, number(each, ",.0f"), number(result["processors_of_hosts"][name], ".2f")))
    ways.rows.append(("2 actors by 1 (the better)", number(result["two_by_one"], ".2f"), ""))
    if result["two_by_one_of_quiet_turns"]:
        quiet = number(result["two_by_one_of_quiet_turns"], ".2f")
        ways.rows.append((f"of {result['quiet_turns']} quiet turns", quiet, ""))
    seconds = Grid("calls: median (quartiles)", ("", "what", "seconds"), keys=2)
    for key, what in (("empty_call_seconds", "an empty call"), ("load_weights_seconds", "weights, loaded by all")):
        seconds.rows += [(what, name, number(each, ".2g")) for name, each in result[key].items()]
    return ways, seconds


def number(each: dict[str, Any], form: str) -> str:
    first, third = (format(value, form) for value in each["quartiles"])
    return f"{each['median']:{form}} ({first} to {third})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each way (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a turn (default: %(default)s)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result = measured(options.turns, options.seconds)
    console_of().print(*tables(result), origin())
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
