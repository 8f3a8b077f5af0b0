"""The main job: play with the shared cache, check it, and compare with the same search without a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import anyio

from concurrent_kv import IntegrityError, KVCacheManager, StatsSummary
from concurrent_kv.aio import AsyncKVCacheManager
from examples.cartpole.cached import CachedEvaluator
from examples.cartpole.combined import CombinedEvaluator, CombinedRoots
from examples.cartpole.loop_searches import LoopSearches
from examples.cartpole.model import WorldModel
from examples.cartpole.nodes import Nodes
from examples.cartpole.planner import Evaluator, Planner
from examples.cartpole.play import PlaySettings, Searches, Tally, play
from examples.cartpole.replayed import ReplayingEvaluator
from examples.cartpole.roots import CachedRoots
from examples.cartpole.shared_model import SharedModel
from examples.cartpole.thread_searches import ThreadSearches
from examples.cartpole.verify import Verification, Verifier

Backend = Literal["asyncio", "trio"]

# Without a cache a search costs as many steps as its paths are long: a part of the job is enough to measure it.
COMPARED_STEPS = 100  # of an episode
COMPARED_EPISODES_PER_ENV = 1


@dataclass(frozen=True)
class JobSettings:
    """What is played and what is done beside it."""

    play: PlaySettings = field(default_factory=PlaySettings)
    backend: Backend = "asyncio"
    policy: str = "fifo"  # of eviction, of every pool
    verify: bool = False
    no_cache: bool = False  # play a part again without a cache
    loops_only: bool = False  # searches are tasks, not threads
    compare_modes: bool = False  # play everything in threads, then everything in loops only


# What a person watches while something is played; the manager is None where there is none.
Watch = Callable[[str, Tally, PlaySettings, KVCacheManager | None], AbstractContextManager[object]]


@dataclass(frozen=True)
class CachedPlay:
    """All episodes, played through the cache."""

    tally: Tally
    stats: StatsSummary
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
        found = []
        if self.verification is not None and self.verification.mismatches:
            found.append(
                f"{self.verification.mismatches} of {self.verification.rows} gathered rows are wrong; first "
                f"{self.verification.first_mismatch}"
            )
        if self.integrity != "ok":
            found.append(f"integrity: {self.integrity}")
        if self.evictions_during_search:
            found.append(f"{self.evictions_during_search} entries of open searches were evicted")
        return found


@dataclass(frozen=True)
class Comparison:
    """The same searches done in another way, and where they chose otherwise."""

    settings: PlaySettings
    tally: Tally
    same_actions: int
    first_difference: tuple[int, int] | None  # episode, step


@dataclass(frozen=True)
class JobReport:
    """Everything the job found out."""

    settings: JobSettings
    main: CachedPlay
    loops_only: CachedPlay | None  # `main` if nothing else was played
    no_cache: Comparison | None

    @property
    def modes(self) -> Comparison | None:
        """Searches as tasks beside searches in threads, if both were played."""
        if self.loops_only is None or self.loops_only is self.main:
            return None
        return _compared(self.settings.play, self.loops_only.tally, self.main.tally)

    def failures(self) -> list[str]:
        """Why the job failed; empty if it did not."""
        found = self.main.failures()
        if self.loops_only is not None and self.loops_only is not self.main:
            found += [f"loops only: {failure}" for failure in self.loops_only.failures()]
        return found


def run_job(model: WorldModel, settings: JobSettings, watch: Watch | None = None) -> JobReport:
    """Play everything; returns when all is played and checked. Must not be called from within an event loop."""
    watch = watch or _unwatched
    shared = SharedModel(model)
    main = _play_cached("playing", shared, settings, settings.loops_only, watch)
    loops_only = main if settings.loops_only else None
    if settings.compare_modes and not settings.loops_only:
        loops_only = _play_cached("playing in loops only", shared, settings, True, watch)
    no_cache = _play_without_cache(shared, settings, main.tally, watch) if settings.no_cache else None
    return JobReport(settings, main, loops_only, no_cache)


def _play_cached(title: str, model: SharedModel, settings: JobSettings, loops_only: bool, watch: Watch) -> CachedPlay:
    play = settings.play
    config = asdict(model.config) | {
        "num_simulations": play.simulations,
        "max_cache_size": play.envs * (play.simulations + 1),
        "device": "cpu",
    }
    verifier = Verifier(model) if settings.verify else None
    nodes = Nodes(model, verifier)
    with KVCacheManager(config=config, env_num=play.envs, policy=settings.policy) as manager:
        # Around the same manager: tasks and threads work in the same pools.
        for_tasks = AsyncKVCacheManager(manager)
        stack = ExitStack()
        searches: Searches
        if loops_only:
            searches = LoopSearches(nodes, for_tasks, play, discount=model.config.discount)
        elif play.combine:
            together = CombinedEvaluator(nodes, manager, envs=play.envs, max_rows=play.leaf_batch)
            roots = CombinedRoots(nodes, manager, envs=play.envs, max_rows=play.leaf_batch)
            searches = ThreadSearches(roots, _planner(together, model, play), play)
            stack.enter_context(together.open())
        else:
            planner = _planner(CachedEvaluator(nodes, manager), model, play)
            searches = ThreadSearches(CachedRoots(nodes, for_tasks), planner, play)
        with stack:
            tally = _played(title, searches, play, settings.backend, watch, manager)
        stats, integrity = manager.get_stats_summary(), _integrity_of(manager)
        allocated_bytes = manager.allocation().nbytes
    return CachedPlay(tally, stats, allocated_bytes, integrity, None if verifier is None else verifier.verification)


def _play_without_cache(model: SharedModel, settings: JobSettings, cached: Tally, watch: Watch) -> Comparison:
    limit = settings.play.max_steps or COMPARED_STEPS
    shorter = replace(
        settings.play,
        episodes=min(settings.play.episodes, settings.play.envs * COMPARED_EPISODES_PER_ENV),
        max_steps=min(limit, COMPARED_STEPS),
    )
    evaluator = ReplayingEvaluator(model)
    searches = ThreadSearches(evaluator, _planner(evaluator, model, shorter), shorter)
    tally = _played("playing without a cache", searches, shorter, settings.backend, watch, None)
    return _compared(shorter, tally, cached)


def _planner(evaluator: Evaluator, model: SharedModel, settings: PlaySettings) -> Planner:
    discount = model.config.discount
    return Planner(evaluator, simulations=settings.simulations, discount=discount, leaf_batch=settings.leaf_batch)


def _played(
    title: str,
    searches: Searches,
    settings: PlaySettings,
    backend: Backend,
    watch: Watch,
    manager: KVCacheManager | None,
) -> Tally:
    tally = Tally(settings.simulations)
    with watch(title, tally, settings, manager):
        anyio.run(play, searches, settings, tally, backend=backend)
    return tally


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


def _unwatched(
    title: str, tally: Tally, settings: PlaySettings, manager: KVCacheManager | None
) -> AbstractContextManager[object]:
    return nullcontext()
