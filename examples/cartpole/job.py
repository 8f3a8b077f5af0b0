"""The main job: play with the shared cache, check it, and compare with the same search without a cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import anyio

from concurrent_kv import IntegrityError, KVCacheManager, StatsSummary
from examples.cartpole.cached import CachedEvaluator
from examples.cartpole.model import WorldModel
from examples.cartpole.planner import Evaluator, Planner
from examples.cartpole.play import PlaySettings, Tally, play
from examples.cartpole.replayed import ReplayingEvaluator
from examples.cartpole.shared_model import SharedModel
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


# What a person watches while something is played; the manager is None where there is none.
Watch = Callable[[str, Tally, PlaySettings, KVCacheManager | None], AbstractContextManager[object]]


@dataclass(frozen=True)
class Comparison:
    """The same search played without a cache, and where it chose otherwise."""

    settings: PlaySettings
    tally: Tally
    same_actions: int
    first_difference: tuple[int, int] | None  # episode, step


@dataclass(frozen=True)
class JobReport:
    """Everything the job found out."""

    settings: JobSettings
    tally: Tally
    stats: StatsSummary
    allocated_bytes: int
    integrity: str  # "ok", or what contradicts
    verification: Verification | None
    comparison: Comparison | None

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
        """Why the job failed; empty if it did not."""
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


def run_job(model: WorldModel, settings: JobSettings, watch: Watch | None = None) -> JobReport:
    """Play everything; returns when all is played and checked. Must not be called from within an event loop."""
    watch = watch or _unwatched
    shared = SharedModel(model)
    config = asdict(model.config) | {
        "num_simulations": settings.play.simulations,
        "max_cache_size": settings.play.envs * (settings.play.simulations + 1),
        "device": "cpu",
    }
    verifier = Verifier(shared) if settings.verify else None
    with KVCacheManager(config=config, env_num=settings.play.envs, policy=settings.policy) as manager:
        evaluator = CachedEvaluator(shared, manager, verifier)
        tally = _played("playing", shared, evaluator, settings.play, settings.backend, watch, manager)
        stats, integrity = manager.get_stats_summary(), _integrity_of(manager)
        allocated_bytes = manager.allocation()["total"]
    comparison = _compare(shared, settings, tally, watch) if settings.no_cache else None
    verification = None if verifier is None else verifier.verification
    return JobReport(settings, tally, stats, allocated_bytes, integrity, verification, comparison)


def _played(
    title: str,
    model: SharedModel,
    evaluator: Evaluator,
    settings: PlaySettings,
    backend: Backend,
    watch: Watch,
    manager: KVCacheManager | None,
) -> Tally:
    discount = model.config.discount
    planner = Planner(evaluator, simulations=settings.simulations, discount=discount, leaf_batch=settings.leaf_batch)
    tally = Tally(settings.simulations)
    with watch(title, tally, settings, manager):
        anyio.run(play, planner, settings, tally, backend=backend)
    return tally


def _integrity_of(manager: KVCacheManager) -> str:
    try:
        manager.check_integrity()
    except IntegrityError as error:
        return str(error)
    return "ok"


def _compare(model: SharedModel, settings: JobSettings, cached: Tally, watch: Watch) -> Comparison:
    limit = settings.play.max_steps or COMPARED_STEPS
    shorter = replace(
        settings.play,
        episodes=min(settings.play.episodes, settings.play.envs * COMPARED_EPISODES_PER_ENV),
        max_steps=min(limit, COMPARED_STEPS),
    )
    evaluator = ReplayingEvaluator(model)
    tally = _played("playing without a cache", model, evaluator, shorter, settings.backend, watch, None)
    same, first_difference = 0, None
    for index, actions in sorted(tally.actions.items()):
        difference = first_difference_of(actions, cached.actions[index])
        same += len(actions) if difference is None else difference
        if difference is not None and first_difference is None:
            first_difference = index, difference
    return Comparison(shorter, tally, same, first_difference)


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
