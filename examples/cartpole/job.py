"""The main job: play with the shared cache, check it, and compare with the same search without a cache."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Generator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Literal

import anyio

from concurrent_kv import IntegrityError, KVCacheManager, StatsSummary
from concurrent_kv.evaluation import Evaluator, EvaluatorStats
from examples.cartpole.episode import Asked
from examples.cartpole.model import WorldModel
from examples.cartpole.play import PlaySettings, Tally, play_episodes
from examples.cartpole.replay import ReplayingEvaluator
from examples.cartpole.search import Planted, Run, TreeSearch, new_manager
from examples.cartpole.tree import Evaluation
from examples.cartpole.verify import Verification, Verifier
from examples.cartpole.workers import in_threads, on_the_loop

Backend = Literal["asyncio", "trio"]


@dataclass(frozen=True)
class JobSettings:
    """What is played and what is done beside it."""

    play: PlaySettings = field(default_factory=PlaySettings)
    backend: Backend = "asyncio"
    policy: str = "fifo"  # of eviction, of every pool
    verify: bool = False
    steps_without_cache: int = 0  # of an episode for each environment, played again without a cache


@dataclass(frozen=True)
class Watched:
    """What is going on, to be looked at from another thread at any time; no manager where there is no cache."""

    title: str
    settings: PlaySettings
    tally: Tally
    manager: KVCacheManager | None = None
    stats: Callable[[], EvaluatorStats] | None = None
    evaluators: Sequence[Evaluator[Asked, Evaluation]] = ()


Watch = Callable[[Watched], AbstractContextManager[object]]
"""What a person watches while something is played."""


@dataclass(frozen=True)
class CachedPlay:
    """All episodes, played through the cache."""

    tally: Tally
    stats: StatsSummary
    calls: EvaluatorStats
    allocated_bytes: int
    integrity: str  # "ok", or what contradicts
    verification: Verification | None

    @property
    def mean_return(self) -> float:
        """Of all episodes."""
        mean = self.tally.mean_return
        assert mean is not None
        return mean

    @property
    def evictions_during_search(self) -> int:
        """Of the recurrent pool: all that it ever holds belongs to searches that are open."""
        return self.stats.pools["recur"].eviction_count

    @property
    def roots_evicted(self) -> int:
        """Roots that left their environments' init pools for newer ones, as they should."""
        return sum(pool.eviction_count for name, pool in self.stats.pools.items() if name.startswith("init"))

    def failures(self) -> list[str]:
        """What was wrong; empty if nothing was."""
        return failures_of(self.verification, self.integrity, self.evictions_during_search)


def failures_of(verification: Verification | None, integrity: str, evictions_during_search: int) -> list[str]:
    """What was wrong with what was played; empty if nothing was."""
    found = []
    if verification is not None and verification.mismatches:
        found.append(
            f"{verification.mismatches} of {verification.rows} gathered rows are wrong; first "
            f"{verification.first_mismatch}"
        )
    if integrity != "ok":
        found.append(f"integrity: {integrity}")
    if evictions_during_search:
        found.append(f"{evictions_during_search} entries of open searches were evicted")
    return found


@dataclass(frozen=True)
class Comparison:
    """The same searches done without a cache, and where they chose otherwise."""

    settings: PlaySettings
    tally: Tally
    same_actions: int
    first_difference: tuple[int, int] | None  # episode, step


@dataclass(frozen=True)
class JobReport:
    """Everything the job found out."""

    settings: JobSettings
    main: CachedPlay
    no_cache: Comparison | None

    def failures(self) -> list[str]:
        """Why the job failed; empty if it did not."""
        return self.main.failures()


def usual_groups(threads: int) -> int:
    """How many groups so many threads best form: with a GIL, calls of the model at once only hinder each other."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return 1
    return max(1, min(threads, os.cpu_count() or 1))


def run_job(model: WorldModel, settings: JobSettings, watch: Watch | None = None) -> JobReport:
    """Play everything; returns when all is played and checked. Must not be called from within an event loop."""
    watch = watch or unwatched
    main = play_cached(model, settings, watch)
    no_cache = _play_without_cache(model, settings, main.tally, watch) if settings.steps_without_cache else None
    return JobReport(settings, main, no_cache)


def play_cached(model: WorldModel, settings: JobSettings, watch: Watch, title: str = "playing") -> CachedPlay:
    """Play all episodes through the cache."""
    play = settings.play
    verifier = Verifier(model) if settings.verify else None
    with _manager_for(model, settings) as manager, ExitStack() as stack:
        groups = [
            TreeSearch(
                model,
                manager,
                play.envs_of(group),
                simulations=play.simulations,
                workers_per_tree=play.workers_per_tree,
                check=None if verifier is None else verifier.check,
            )
            for group in range(play.groups)
        ]
        evaluators = []
        for search in groups:
            stack.callback(search.close)
            evaluators.append(search.evaluator(max_rows=play.max_rows or play.envs * play.workers_per_tree))

        def calls() -> EvaluatorStats:
            return sum([evaluator.stats() for evaluator in evaluators[1:]], evaluators[0].stats())

        async def play_all() -> None:
            async with AsyncExitStack() as running:
                decisions = []
                for group, (search, evaluator) in enumerate(zip(groups, evaluators, strict=True)):
                    run = await running.enter_async_context(_running(evaluator, play, group))
                    decisions.append(partial(search.decide, run=run))
                await play_episodes(lambda episode: decisions[episode.env_id % play.groups](episode), play, tally)

        tally = Tally(play.simulations)
        with watch(Watched(title, play, tally, manager, calls, evaluators)):
            anyio.run(play_all, backend=settings.backend)
        stack.close()
        stats, integrity, allocated = manager.get_stats_summary(), _integrity_of(manager), manager.allocation().nbytes
    return CachedPlay(tally, stats, calls(), allocated, integrity, None if verifier is None else verifier.verification)


def _manager_for(model: WorldModel, settings: JobSettings) -> KVCacheManager:
    play = settings.play
    return new_manager(
        model,
        envs=play.envs,
        simulations=play.simulations,
        workers_per_tree=play.workers_per_tree,
        policy=settings.policy,
    )


def _running(
    evaluator: Evaluator[Asked, Evaluation], play: PlaySettings, group: int
) -> AbstractAsyncContextManager[Run]:
    """Whoever runs the walks of a group."""
    threads = play.threads_of(group)
    if not threads:
        return on_the_loop(evaluator)
    walks = len(play.envs_of(group)) * play.workers_per_tree
    return in_threads([evaluator.worker] * threads, walks_per_thread=ceil(walks / threads))


def _play_without_cache(model: WorldModel, settings: JobSettings, cached: Tally, watch: Watch) -> Comparison:
    """Play a part: without a cache a search costs as many steps as its paths are long."""
    play = replace(
        settings.play,
        episodes=min(settings.play.episodes, settings.play.envs),
        max_steps=min(settings.play.max_steps or settings.steps_without_cache, settings.steps_without_cache),
    )
    walks = play.envs * play.workers_per_tree
    tally = Tally(play.simulations)
    with _manager_for(model, settings) as manager:
        search = _Uncached(
            model,
            manager,
            range(play.envs),
            simulations=play.simulations,
            workers_per_tree=play.workers_per_tree,
        )

        async def play_all() -> None:
            async with in_threads([lambda: nullcontext(ReplayingEvaluator(model))], walks_per_thread=walks) as run:
                await play_episodes(partial(search.decide, run=run), play, tally)

        with closing(search), watch(Watched("playing without a cache", play, tally)):
            anyio.run(play_all, backend=settings.backend)
    return _compared(play, tally, cached)


class _Uncached(TreeSearch):
    """Of its leaves only what they ask of the model is looked at: its manager has nothing but the first roots."""

    @contextmanager
    def released(self, planted: Planted) -> Generator[Planted, None, None]:
        """There is nothing to let go of."""
        yield planted


def _integrity_of(manager: KVCacheManager) -> str:
    try:
        manager.check_integrity()
    except IntegrityError as error:
        return str(error)
    return "ok"


def _compared(settings: PlaySettings, tally: Tally, other: Tally) -> Comparison:
    same, first_difference = 0, None
    for index, actions in sorted(tally.actions.items()):
        difference = first_difference_of(actions, other.actions[index])
        same += len(actions) if difference is None else difference
        if difference is not None and first_difference is None:
            first_difference = index, difference
    return Comparison(settings, tally, same, first_difference)


def first_difference_of(actions: list[int], longer: list[int]) -> int | None:
    """The first step at which `actions` is not the beginning of `longer`."""
    for step, action in enumerate(actions):
        if step >= len(longer) or longer[step] != action:
            return step
    return None


def unwatched(watched: Watched) -> AbstractContextManager[object]:
    """Nobody looks."""
    return nullcontext()
