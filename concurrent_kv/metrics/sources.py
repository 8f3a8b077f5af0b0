"""`KVMetrics`: managers, pools and evaluators that are watched, and their numbers at a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, TypeAlias
from weakref import ref

from ..aio.evaluator import AsyncEvaluator
from ..aio.manager import AsyncKVCacheManager
from ..aio.pool import AsyncKVPool
from ..books.stats import PoolStats, StatsSummary, role_of
from ..errors import InvalidArgumentError, InvalidTypeError, shown
from ..evaluation.evaluator import Evaluator
from ..locks.gate import gate
from ..manager import KVCacheManager, pools_of
from ..pool.pool import KVPool
from .durations import TimedEvaluator, TimedPools
from .samples import ROWS, Sample, distribution_of
from .scalars import write_scalars
from .table import (
    CALL_DURATION,
    CALL_ROWS,
    COMMIT_DURATION,
    GATHER_DURATION,
    LOCK_WAIT_DURATION,
    METRICS,
    WAITING_ROWS,
    WEIGHTS_VERSION,
    Metric,
    Subject,
)

__all__ = ["KVMetrics", "Source"]

Source: TypeAlias = (
    "KVCacheManager | KVPool | Evaluator[Any, Any] | AsyncKVCacheManager | AsyncKVPool | AsyncEvaluator[Any, Any]"
)
Watched: TypeAlias = "KVCacheManager | KVPool | Evaluator[Any, Any]"
Name: TypeAlias = "tuple[str, ...]"

_OF_POOLS, _OF_STORAGES, _OF_EVALUATORS = (
    [metric for metric in METRICS if metric.subject is subject and metric.read is not None] for subject in Subject
)
_BY_PART = [metric for metric in METRICS if metric.values]
ALONE = "alone"  # the role of a pool that is no manager's


class _Pools:
    """A manager, or a pool by itself; of which it keeps none alive."""

    def __init__(self, target: KVCacheManager | KVPool, *, by_environment: bool, durations: bool) -> None:
        self.target = ref(target)
        self._by_environment = by_environment
        self._manager = target.storage.name
        pools = _pools_of(target)
        self._roles = {name: (role_of(name) if isinstance(target, KVCacheManager) else ALONE) for name in pools}
        self._timed: TimedPools | None = None
        if durations:
            roles = [(self._roles[name], pool) for name, pool in pools.items()]
            self._timed = TimedPools(roles, target if isinstance(target, KVCacheManager) else None)

    def read(self) -> Iterator[Sample]:
        target = self.target()
        if target is None:
            return
        if isinstance(target, KVCacheManager):
            summary = target.lifetime_stats()
        else:
            summary = StatsSummary({target.name: target.lifetime_stats()})
        versions = self._versions(target)
        for name, stats in self._shown(summary):
            labels = (self._manager, name, self._roles.get(name, name))
            for metric in _OF_POOLS:
                assert metric.read is not None
                yield Sample(metric, labels, metric.read(stats))
            yield Sample(WEIGHTS_VERSION, labels, versions[name])
        total = summary.total
        for metric in _OF_STORAGES:
            assert metric.read is not None
            yield Sample(metric, (self._manager,), metric.read(total))
        if self._timed is not None:
            of_role = {role: name for name, role in self._roles.items()}
            for role, histogram in self._timed.gathers.items():
                name = of_role[role] if role == ALONE else role
                yield Sample(GATHER_DURATION, (self._manager, name, role), histogram.read())
                yield Sample(COMMIT_DURATION, (self._manager, name, role), self._timed.commits[role].read())
            yield Sample(LOCK_WAIT_DURATION, (self._manager,), self._timed.waits.read())

    def _shown(self, summary: StatsSummary) -> Iterable[tuple[str, PoolStats]]:
        """Statistics by the name of the pool, or of the role of several."""
        if self._by_environment:
            return summary.pools.items()
        of_role: dict[str, dict[str, PoolStats]] = {}
        for name, stats in summary.pools.items():
            of_role.setdefault(self._shown_as(name), {})[name] = stats
        return [(role, StatsSummary(pools).total) for role, pools in of_role.items()]

    def _shown_as(self, name: str) -> str:
        """The name of the pool, or of the role whose pools are one number."""
        role = self._roles[name]
        return name if self._by_environment or role == ALONE else role

    def _versions(self, target: KVCacheManager | KVPool) -> dict[str, int]:
        """Weights versions, as `_shown` names their pools; of several the highest: one pool may be bumped by itself."""
        versions: dict[str, int] = {}
        for name, pool in _pools_of(target).items():
            shown_as = self._shown_as(name)
            versions[shown_as] = max(pool.version, versions.get(shown_as, 0))
        return versions

    @property
    def is_open(self) -> bool:
        """Whether it is there, and not closed."""
        target = self.target()
        closed = target is None or target.storage.closed
        return not (closed or (isinstance(target, KVPool) and target.closed))

    def stop(self) -> None:
        if self._timed is not None:
            self._timed.stop()


class _Evaluator:
    def __init__(self, target: Evaluator[Any, Any], name: Name, *, durations: bool) -> None:
        self.target = ref(target)
        self._labels = name
        self._timed = TimedEvaluator(target) if durations else None

    def read(self) -> Iterator[Sample]:
        target = self.target()
        if target is None:
            return
        stats, labels = target.stats(), self._labels
        for metric in _OF_EVALUATORS:
            assert metric.read is not None
            yield Sample(metric, labels, metric.read(stats))
        for metric in _BY_PART:
            for part, read in metric.values:
                yield Sample(metric, (*labels, part), read(stats))
        yield Sample(WAITING_ROWS, labels, target.queue.waiting_rows)
        yield Sample(CALL_ROWS, labels, distribution_of(stats.rows_of_calls, ROWS))
        if self._timed is not None:
            for part, histogram in self._timed.parts.items():
                yield Sample(CALL_DURATION, (*labels, part), histogram.read())

    @property
    def is_open(self) -> bool:
        target = self.target()
        return target is not None and not target.closed

    def stop(self) -> None:
        if self._timed is not None:
            self._timed.stop()


class KVMetrics:
    """The numbers of some managers, pools and evaluators (or their facades for tasks), as `METRICS` lists them.

    It keeps none of them alive. What is closed keeps its last counts until it is removed, replaced by another of the
    same name, or dropped; then its series end. Counts only grow: `reset_stats()` does not change them.

    Args:
        sources: see `add`.
        by_environment: whether each environment's init pool has numbers of its own, instead of one sum of all.
        durations: whether gathers, commits, lock waits and the parts of calls are timed, from now on and in searches
            that are opened from now on. What that costs is in docs/metrics.md; where False, it costs nothing.
    """

    def __init__(self, *sources: Source, by_environment: bool = False, durations: bool = False) -> None:
        self.by_environment = by_environment
        self.durations = durations
        self._lock = threading.Lock()
        self._sources: dict[Name, _Pools | _Evaluator] = {}  # never changed, only replaced
        self._before: dict[str, float] = {}
        for source in sources:
            self.add(source)

    def add(self, source: Source, *, name: str | None = None) -> None:
        """Watch one more from now on; in the place of one of the same name that is closed or gone.

        Args:
            name: what an evaluator is called; if left out the first number that no open one of its manager has. Pools
                and managers have names of their own.

        Raises:
            InvalidArgumentError: another that is open is watched under its name; or this one is watched already.
            InvalidTypeError: it is none of those.
        """
        watched = _sync(source)
        if name is not None and not isinstance(watched, Evaluator):
            raise InvalidArgumentError(
                f"name must be left out for what has a name of its own, {watched.name!r}, got {shown(name)}"
            )
        with gate.lock, self._lock:
            self._add(watched, name)

    def _add(self, watched: Watched, name: str | None) -> None:
        """`_lock` held."""
        if any(known.target() is watched for known in self._sources.values()):
            raise InvalidArgumentError(f"source must be one that is not watched yet, got {shown(watched)}")
        key = self._key_of(watched, name)
        known = self._sources.get(key)
        if known is not None:
            if known.is_open:
                raise InvalidArgumentError(
                    f"source must have a name of its own: another {key[0]} called {'.'.join(key[1:])} is watched, "
                    "which is open; give one of them another name=, or remove that one"
                )
            known.stop()
        made: _Pools | _Evaluator
        if isinstance(watched, Evaluator):
            made = _Evaluator(watched, key[1:], durations=self.durations)
        else:
            made = _Pools(watched, by_environment=self.by_environment, durations=self.durations)
        staying = {key: known for key, known in self._sources.items() if known.target() is not None}
        self._sources = {**staying, key: made}

    def remove(self, source: Source) -> None:
        """Watch it no longer: its series end.

        Raises:
            InvalidArgumentError: it is not watched.
        """
        watched = _sync(source)
        with gate.lock, self._lock:
            removed = self._taken_off(watched)
        if not removed:
            raise InvalidArgumentError(f"source must be one that is watched, got {shown(source)}")

    def _taken_off(self, watched: Watched) -> bool:
        """Whether it was watched, and is no longer."""
        staying = dict(self._sources)
        for key, known in self._sources.items():
            if known.target() is watched:
                known.stop()
                del staying[key]
        removed = len(staying) < len(self._sources)
        self._sources = staying
        return removed

    def read(self) -> list[Sample]:
        """Every number as it is now; those of one manager are of one moment. Never waits for a shard."""
        found: dict[tuple[Metric, tuple[str, ...]], Sample] = {}
        for source in self._sources.values():
            for sample in source.read():
                found.setdefault((sample.metric, sample.labels), sample)  # pools of one storage have some in common
        return list(found.values())

    def log_to(self, writer: object, step: int) -> None:
        """Write every number as a scalar of its own, `concurrent_kv/<manager>/<pool>/<name>`, and two rates.

        Those are of what came since the last call: `hit_ratio`, and `rows_a_call` of an evaluator. Of a histogram the
        count and the mean are written.

        Args:
            writer: TensorBoard's `SummaryWriter`, or anything else with `add_scalar(tag, value, step)`; or a run of
                W&B's, the module `wandb` itself, or anything else with `log(dict, step=step)`.
            step: of the training, say.

        Raises:
            InvalidTypeError: the writer has neither.
        """
        self._before = write_scalars(writer, step, self.read(), self._before)

    def _key_of(self, watched: Watched, name: str | None) -> Name:
        """Its labels, after what it is."""
        if isinstance(watched, KVCacheManager):
            return ("manager", watched.storage.name)
        if isinstance(watched, KVPool):
            return ("pool", watched.storage.name, watched.name)
        manager = watched.storage.name
        names = [name] if name is not None else map(str, count())
        keys = (("evaluator", manager, each) for each in names)
        return next(key for key in keys if name is not None or not self._is_taken(key))

    def _is_taken(self, key: Name) -> bool:
        known = self._sources.get(key)
        return known is not None and known.is_open


def _pools_of(target: KVCacheManager | KVPool) -> dict[str, KVPool]:
    """By their names without the manager's, as in its statistics."""
    return {target.name: target} if isinstance(target, KVPool) else pools_of(target)


def _sync(source: object) -> Watched:
    """What is watched: of a facade, what it is for."""
    found = source.sync if isinstance(source, (AsyncKVCacheManager, AsyncKVPool, AsyncEvaluator)) else source
    if not isinstance(found, (KVCacheManager, KVPool, Evaluator)):
        raise InvalidTypeError(
            f"source must be a manager, a pool or an evaluator (or a facade of one), got {type(source).__name__}"
        )
    return found
