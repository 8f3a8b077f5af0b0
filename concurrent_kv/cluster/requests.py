"""What travels between a caller and a host: requests, the entries of an environment that moves, statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..books.stats import PoolStats
from ..evaluation.evaluator import Evaluator
from ..evaluation.stats import EvaluatorStats
from ..manager import KVCacheManager
from ..model.kv import KeysValues

__all__ = ["ClusterStats", "HostParts", "HostStats", "Planner", "Request", "Roots", "SearchContext", "Setup"]


@dataclass(frozen=True)
class HostParts:
    """What a host owns. Its manager has an init pool for each environment that the host may have.

    Attributes:
        manager, evaluator, model: what planners search with.
        load: takes new weights in, in place; `model.load_state_dict` if left out. It runs while no planner does.
    """

    manager: KVCacheManager
    evaluator: Evaluator[Any, Any] | None = None
    model: Any = None
    load: Callable[[Any], object] | None = None


Setup = Callable[[], HostParts]
"""Makes a host's parts, in the process of the host; for a cluster of processes it has to be picklable."""


@dataclass(frozen=True)
class SearchContext:
    """What a planner is given.

    Attributes:
        env_id: the environment's name in the cluster.
        local_id: its number in the host's manager: `manager.init_pools[local_id]`, `manager.search([local_id])`.
        manager, evaluator, model: the host's.
        version: of the weights; the same number on every host for the same weights.
        host: the host's name.
        until: `time.monotonic()` when the caller stops waiting.
    """

    env_id: Hashable
    local_id: int
    parts: HostParts
    version: int
    host: str
    until: float

    @property
    def manager(self) -> KVCacheManager:
        """The host's."""
        return self.parts.manager

    @property
    def evaluator(self) -> Any:
        """The host's, or None."""
        return self.parts.evaluator

    @property
    def model(self) -> Any:
        """The host's."""
        return self.parts.model

    @property
    def seconds_left(self) -> float:
        """Until the caller stops waiting; 0 afterwards."""
        return max(0.0, self.until - time.monotonic())


Planner = Callable[..., Any]
"""`planner(context, *args)`: does a whole search with what the context has, and returns what the caller wants of it."""


class Request(NamedTuple):
    """A search that a caller asks for."""

    env_id: Hashable
    planner: Planner
    args: tuple[Any, ...]
    seconds: float  # that the caller waits, from the moment that the host has it: clocks of machines differ
    once: bool = False  # its planner must not run twice, not even where new weights ended it


@dataclass(frozen=True)
class Roots:
    """An environment's entries on their way to another host.

    Attributes:
        version: of the weights that they were computed with; under others they are worth nothing.
        entries: key, keys and values (in host memory), side data.
    """

    version: int = 0
    entries: tuple[tuple[Hashable, KeysValues, object], ...] = ()


@dataclass(frozen=True)
class HostStats:
    """One moment of a host. Counts since it was made, or made again.

    Attributes:
        version: of its weights.
        environments: that it has.
        searches: that ended, with a result or an error. errors: with an error of the planner.
        reruns: that were begun again as the weights changed under them.
        refused: requests that found the queue full. expired: whose caller had stopped waiting before they began.
        waiting, running: requests, now.
        cache: its manager's pools in all. evaluator: None without one.
    """

    version: int
    environments: int
    searches: int
    errors: int
    reruns: int
    refused: int
    expired: int
    waiting: int
    running: int
    cache: PoolStats
    evaluator: EvaluatorStats | None


@dataclass(frozen=True)
class ClusterStats:
    """One moment of a cluster.

    Attributes:
        version: of the weights.
        hosts: each host's by its name; None where it did not answer in time.
        made_again: how often each host was.
    """

    version: int
    hosts: Mapping[str, HostStats | None] = field(default_factory=dict)
    made_again: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> HostStats:
        """All hosts that answered, together; the version is the cluster's."""
        answered = [stats for stats in self.hosts.values() if stats is not None]
        counts = {
            each.name: sum(getattr(stats, each.name) for stats in answered)
            for each in fields(HostStats)
            if each.name not in ("version", "cache", "evaluator")
        }
        cache = PoolStats(
            **{each.name: sum(getattr(stats.cache, each.name) for stats in answered) for each in fields(PoolStats)}
        )
        evaluators = [stats.evaluator for stats in answered if stats.evaluator is not None]
        evaluator = sum(evaluators[1:], evaluators[0]) if evaluators else None
        return HostStats(version=self.version, cache=cache, evaluator=evaluator, **counts)
