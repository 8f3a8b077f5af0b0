"""Statistics: counters under the mutex, and immutable numeric snapshots under Caffeine's names.

A row asked for is one request: a hit counts in the pool that had it, a miss in the last pool that was asked;
a search's in its own, the recurrent one, whatever its `order`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .columns import in_columns

__all__ = ["Counters", "NoCounters", "PoolStats", "StatsSummary", "TierStats", "role_of"]


@dataclass
class Counters:
    """What a pool counts, each exactly, under the ledger's mutex."""

    hit_count: int = 0
    miss_count: int = 0
    insert_count: int = 0
    replace_count: int = 0
    eviction_count: int = 0
    removal_count: int = 0
    clear_count: int = 0
    stale_write_count: int = 0
    tier_hit_count: int = 0
    move_down_count: int = 0
    move_up_count: int = 0
    tier_drop_count: int = 0

    def add(self, other: Counters, times: int = 1) -> None:
        """Count what another has counted, too, so many times."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


COUNTS = tuple([each.name for each in fields(Counters)])


class NoCounters(Counters):
    """Counters of a pool without statistics: every count stays 0."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, 0)


@dataclass(frozen=True)
class PoolStats:
    """One moment of a pool. Counts since the pool was made (or `reset_stats()`); everything is a number.

    Attributes:
        hit_count, miss_count: rows asked for and found, or not.
        insert_count: entries stored under a new key. replace_count: entries that replaced another.
        eviction_count: entries evicted to make room. removal_count: entries popped, released or swept by a clear.
        clear_count: clears. stale_write_count: entries not stored because their epoch or version was over.
        tier_hit_count: hits that were found in the tier beneath the pool. move_down_count: entries that were evicted
            into it. move_up_count: entries that came back. tier_drop_count: entries that were evicted and that it did
            not take. All 0 without a tier.
        entries, max_entries: entries stored now (those of open searches included), and the quota.
        slots_in_use, max_slots: slots of the pool's own entries and of its open searches, and the quota.
        bytes_in_use, max_bytes: the same in bytes.
        shared_slots: slots that two or more entries of the storage, or of one of its open searches, name.
        reserved_entries, reserved_slots: set aside by open searches.
        open_searches: searches that take their room from the pool. waiters: operations that wait for room in it.
        lock_wait_count, lock_wait_seconds: how often, and how long in all, a lock shard had to be waited for
            (of the whole storage).
    """

    hit_count: int = 0
    miss_count: int = 0
    insert_count: int = 0
    replace_count: int = 0
    eviction_count: int = 0
    removal_count: int = 0
    clear_count: int = 0
    stale_write_count: int = 0
    tier_hit_count: int = 0
    move_down_count: int = 0
    move_up_count: int = 0
    tier_drop_count: int = 0
    entries: int = 0
    max_entries: int = 0
    slots_in_use: int = 0
    max_slots: int = 0
    bytes_in_use: int = 0
    max_bytes: int = 0
    shared_slots: int = 0
    reserved_entries: int = 0
    reserved_slots: int = 0
    open_searches: int = 0
    waiters: int = 0
    lock_wait_count: int = 0
    lock_wait_seconds: float = 0.0

    @property
    def request_count(self) -> int:
        """Rows asked for."""
        return self.hit_count + self.miss_count

    @property
    def hit_rate(self) -> float:
        """Hits by requests; 1.0 where nothing was asked for, as Caffeine's `CacheStats.hitRate` has it.

        `as_dict()` and what is printed say nothing of a rate there.
        """
        return self.hit_count / self.request_count if self.request_count else 1.0

    @property
    def miss_rate(self) -> float:
        """Misses by requests; 0.0 where nothing was asked for."""
        return self.miss_count / self.request_count if self.request_count else 0.0

    def __sub__(self, earlier: PoolStats) -> PoolStats:
        """What happened since `earlier`: counts and seconds are differences, fill and capacity are the later ones."""
        return PoolStats(
            **{
                field.name: getattr(self, field.name) - getattr(earlier, field.name)
                if field.name.endswith(("_count", "_seconds"))
                else getattr(self, field.name)
                for field in fields(self)
            }
        )

    @property
    def hits_in_words(self) -> str:
        """ "hit rate 0.9950 of 400 requests", or "no requests"."""
        if not self.request_count:
            return NO_REQUESTS
        return f"hit rate {self.hit_rate:.4f} of {self.request_count} requests"

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Every number and rate, flat. `hit_rate` and `miss_rate` are left out where nothing was asked for.

        So a plot has no point there, instead of a rate of 1.0 that nothing was measured by.
        """
        values = {prefix + field.name: float(getattr(self, field.name)) for field in fields(self)}
        for name in ("request_count", *(("hit_rate", "miss_rate") if self.request_count else ())):
            values[prefix + name] = float(getattr(self, name))
        return values


@dataclass(frozen=True)
class TierStats:
    """One moment of a tier. Counts since it was made; everything is a number.

    Attributes:
        entries: entries that it has.
        slots_in_use, max_slots: slots that they name, and all.
        bytes_in_use, max_bytes: the same in bytes.
        shared_slots: slots that two or more of its entries name.
        eviction_count: entries that it evicted, for good, to make room.
        removal_count: entries written anew, popped, moved up, or swept by a clear.
        memory_slots: of its slots, those that fit into host memory at once; the others are in a `DiskTier`'s file.
        disk_written_count, disk_read_count: slots that were written to that file, and read from it.
    """

    entries: int = 0
    slots_in_use: int = 0
    max_slots: int = 0
    bytes_in_use: int = 0
    max_bytes: int = 0
    shared_slots: int = 0
    eviction_count: int = 0
    removal_count: int = 0
    memory_slots: int = 0
    disk_written_count: int = 0
    disk_read_count: int = 0


NO_REQUESTS = "no requests"
# Facts about the storage that pools share: adding them up would count them several times.
_OF_THE_STORAGE = ("shared_slots", "lock_wait_count", "lock_wait_seconds")


class _PoolsByName(dict[str, PoolStats]):
    """A dict that cannot be changed, and so can be hashed. (`dataclasses.asdict` enters no other mapping.)"""

    def _refuse(self, *arguments: object, **named: object) -> NoReturn:
        raise TypeError("the pools of a StatsSummary cannot be changed; dict(summary.pools) is a dict of your own")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Not item by item, which is refused.
        return type(self), (dict(self),)


def role_of(pool: str) -> str:
    """The role of a manager's pool of that name, without its environment."""
    return pool.partition("[")[0]


@dataclass(frozen=True)
class StatsSummary:
    """One moment of a manager: its pools by name, and their total. Can be hashed, pickled and copied; `print` shows it.

    Attributes:
        pools: the statistics of each pool, by its name without the manager's ("init[0]", "recur", "wm"); a read-only
            dict.
        stats_enabled: whether hits, misses and the rest were counted.
    """

    pools: Mapping[str, PoolStats]
    stats_enabled: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "pools", _PoolsByName(self.pools))

    @property
    def total(self) -> PoolStats:
        """All pools together; what concerns the shared storage counts once."""
        return _together(self.pools.values())

    def by_role(self) -> dict[str, PoolStats]:
        """The pools of each role together, as in `total`: all environments' as "init", then "recur" and "wm"."""
        return {role: _together(self.pools[name] for name in names) for role, names in self._names_by_role().items()}

    def _names_by_role(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.pools:
            names.setdefault(role_of(name), []).append(name)
        return names

    def __sub__(self, earlier: StatsSummary) -> StatsSummary:
        """What happened since `earlier`, pool by pool."""
        difference = {name: pool - earlier.pools.get(name, PoolStats()) for name, pool in self.pools.items()}
        return StatsSummary(difference, self.stats_enabled)

    def as_dict(self) -> dict[str, float]:
        """Every number of every pool and of the total, flat, under `<pool>/<name>`; rates as in `PoolStats.as_dict`."""
        values = self.total.as_dict("total/")
        for name, pool in self.pools.items():
            values.update(pool.as_dict(f"{name}/"))
        return values

    def __str__(self) -> str:
        """A table of at most 80 columns, a row for each role."""
        names, total = self._names_by_role(), self.total
        rows: list[tuple[str, ...]] = [("pool", "entries", "slots", "full", "requests", "hit rate", "evicted")]
        for role, stats in [*self.by_role().items(), ("total", total)]:
            count = len(names.get(role, ()))
            rows.append(self._row(f"{role} ({count} pools)" if count > 1 else role, stats))
        reserved = f"open searches reserve {total.reserved_entries:,} entries and {total.reserved_slots:,} slots"
        waits = f"waits for locks: {total.lock_wait_count:,}, {total.lock_wait_seconds:,.3f} s in all"
        counted = [] if self.stats_enabled else ["requests and evictions are not counted: enable_stats is False"]
        return "\n".join([in_columns(rows), reserved, waits, *counted])

    def _row(self, name: str, stats: PoolStats) -> tuple[str, ...]:
        full = f"{stats.slots_in_use / stats.max_slots:.0%}" if stats.max_slots else ""
        fill = (name, _short(stats.entries), _short(stats.slots_in_use), full)
        if not self.stats_enabled:
            return (*fill, "", "", "")
        rate = f"{stats.hit_rate:.4f}" if stats.request_count else NO_REQUESTS
        return (*fill, _short(stats.request_count), rate, _short(stats.eviction_count))


def _together(pools: Iterable[PoolStats]) -> PoolStats:
    """Pools of one storage as one."""
    pools = list(pools)
    return PoolStats(
        **{
            field.name: (max if field.name in _OF_THE_STORAGE else sum)(
                [getattr(pool, field.name) for pool in pools] or [0]
            )
            for field in fields(PoolStats)
        }
    )


def _short(number: int) -> str:
    """A number of at most eight characters or so."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:,.1f} {unit}" if number < 100 * size else f"{number // size:,} {unit}"
    return f"{number:,}"
