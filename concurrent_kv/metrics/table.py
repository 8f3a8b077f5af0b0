"""`METRICS`: every number that is published, once, for Prometheus, OpenTelemetry and all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from ..books.stats import PoolStats

__all__ = ["LABELS", "METRICS", "PREFIX", "Kind", "Metric", "Subject"]

PREFIX = "concurrent_kv"


class Kind(Enum):
    """What may become of a number."""

    COUNTER = "counter"  # it only grows
    GAUGE = "gauge"
    HISTOGRAM = "histogram"  # counts by size, which only grow


class Subject(Enum):
    """What a number is of."""

    POOL = "pool"
    STORAGE = "storage"  # what the pools of a manager have in common
    EVALUATOR = "evaluator"


LABELS = {
    Subject.POOL: ("manager", "pool", "role"),
    Subject.STORAGE: ("manager",),
    Subject.EVALUATOR: ("manager", "evaluator"),
}


@dataclass(frozen=True)
class Metric:
    """A number, and how it is read.

    Attributes:
        name: without prefix, unit and ending.
        about: what it says, in a sentence.
        unit: "seconds", "bytes", "ratio", or none.
        read: of the statistics of its subject (`PoolStats`, `EvaluatorStats`); None where it is read elsewhere.
        label: that it has beside its subject's.
        values: of that label, each with what is read for it.
    """

    name: str
    kind: Kind
    subject: Subject
    about: str
    unit: str = ""
    read: Callable[[Any], float] | None = None
    label: str | None = None
    values: tuple[tuple[str, Callable[[Any], float]], ...] = ()

    @property
    def family(self) -> str:
        """Its name in Prometheus, without the ending of a counter."""
        return "_".join(filter(None, (PREFIX, self.name, self.unit)))

    @property
    def prometheus(self) -> str:
        """Its name in Prometheus."""
        return f"{self.family}_total" if self.kind is Kind.COUNTER else self.family

    @property
    def otel(self) -> str:
        """Its name in OpenTelemetry, where units are no part of it."""
        return f"{PREFIX}.{self.name}"

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""
        return LABELS[self.subject] + ((self.label,) if self.label else ())


def _counter(name: str, read: str | Callable[[Any], float], about: str, **more: Any) -> Metric:
    return Metric(
        name, Kind.COUNTER, Subject.POOL, about, read=attrgetter(read) if isinstance(read, str) else read, **more
    )


def _gauge(name: str, read: str | Callable[[Any], float], about: str, **more: Any) -> Metric:
    return Metric(
        name, Kind.GAUGE, Subject.POOL, about, read=attrgetter(read) if isinstance(read, str) else read, **more
    )


def _of_storage(name: str, kind: Kind, read: str, about: str, unit: str = "") -> Metric:
    return Metric(name, kind, Subject.STORAGE, about, unit, attrgetter(read))


def _of_evaluator(name: str, kind: Kind, read: str | None, about: str, unit: str = "", **more: Any) -> Metric:
    return Metric(name, kind, Subject.EVALUATOR, about, unit, attrgetter(read) if read else None, **more)


def _entries_used(stats: PoolStats) -> float:
    return stats.entries / stats.max_entries if stats.max_entries else 0.0


def _slots_used(stats: PoolStats) -> float:
    return stats.slots_in_use / stats.max_slots if stats.max_slots else 0.0


PARTS = ("gather", "model", "commit", "walk")
_BUSY = tuple((part, attrgetter(f"{part}_seconds")) for part in PARTS)

GATHER_DURATION = Metric(
    "gather_duration", Kind.HISTOGRAM, Subject.POOL, "Gathers of pools and searches that returned a batch.", "seconds"
)
COMMIT_DURATION = Metric(
    "commit_duration", Kind.HISTOGRAM, Subject.POOL, "Commits of pools and searches that returned.", "seconds"
)
LOCK_WAIT_DURATION = Metric(
    "lock_wait_duration", Kind.HISTOGRAM, Subject.STORAGE, "Waits for a lock shard that was not free.", "seconds"
)
WEIGHTS_VERSION = Metric(
    "weights_version",
    Kind.GAUGE,
    Subject.POOL,
    "How often it was said that the weights changed; of several pools the most.",
)
CALL_DURATION = Metric(
    "evaluator_call_duration",
    Kind.HISTOGRAM,
    Subject.EVALUATOR,
    "Parts of the evaluator's calls: the gather, the model, the commit.",
    "seconds",
    label="part",
)
CALL_ROWS = Metric("evaluator_call_rows", Kind.HISTOGRAM, Subject.EVALUATOR, "Leaves of a call of the model.")
WAITING_ROWS = Metric(
    "evaluator_waiting_rows", Kind.GAUGE, Subject.EVALUATOR, "Leaves that wait for a call of the model."
)

METRICS: tuple[Metric, ...] = (
    _counter("queries", "request_count", "Rows asked for."),
    _counter("hits", "hit_count", "Rows asked for and found."),
    _counter("inserts", "insert_count", "Entries stored under a new key."),
    _counter("replacements", "replace_count", "Entries that replaced another."),
    _counter("evictions", "eviction_count", "Entries evicted to make room."),
    _counter("tier_hits", "tier_hit_count", "Hits that were found in the tier beneath the pool."),
    _counter("moves_down", "move_down_count", "Entries that were evicted into the tier."),
    _counter("moves_up", "move_up_count", "Entries that came back from the tier."),
    _counter("tier_drops", "tier_drop_count", "Entries that were evicted and that the tier did not take."),
    _counter("removals", "removal_count", "Entries popped, released, or swept by a clear or a bump."),
    _counter("clears", "clear_count", "Clears."),
    _counter("stale_writes", "stale_write_count", "Entries not stored, as their epoch or version was over."),
    _gauge("entries", "entries", "Entries stored, those of open searches included."),
    _gauge("max_entries", "max_entries", "The quota of entries."),
    _gauge("entries_usage", _entries_used, "Entries stored by the quota.", unit="ratio"),
    _gauge("reserved_entries", "reserved_entries", "Entries set aside by open searches."),
    _gauge("slots", "slots_in_use", "Slots in use, those of open searches included; one slot is one token."),
    _gauge("max_slots", "max_slots", "The quota of slots."),
    _gauge("slots_usage", _slots_used, "Slots in use by the quota.", unit="ratio"),
    _gauge("reserved_slots", "reserved_slots", "Slots set aside by open searches."),
    _gauge("used", "bytes_in_use", "Bytes of the slots in use.", unit="bytes"),
    _gauge("open_searches", "open_searches", "Searches that take their room from the pool."),
    _gauge("waiters", "waiters", "Operations that wait for room in the pool."),
    WEIGHTS_VERSION,
    GATHER_DURATION,
    COMMIT_DURATION,
    _of_storage("shared_slots", Kind.GAUGE, "shared_slots", "Slots that two or more entries name."),
    _of_storage("lock_waits", Kind.COUNTER, "lock_wait_count", "How often a lock shard had to be waited for."),
    _of_storage("lock_wait", Kind.COUNTER, "lock_wait_seconds", "Waited for lock shards, in all.", "seconds"),
    LOCK_WAIT_DURATION,
    _of_evaluator("evaluator_calls", Kind.COUNTER, "calls", "Calls of the model."),
    _of_evaluator("evaluator_rows", Kind.COUNTER, "rows", "Leaves in calls of the model."),
    _of_evaluator("evaluator_failed_rows", Kind.COUNTER, "failed_rows", "Leaves whose caller heard an error."),
    _of_evaluator("evaluator_wait", Kind.COUNTER, "wait_seconds", "That leaves waited for their call.", "seconds"),
    _of_evaluator(
        "evaluator_busy",
        Kind.COUNTER,
        None,
        "In the parts of calls, and in the code of walks; calls of several threads overlap.",
        "seconds",
        label="part",
        values=_BUSY,
    ),
    WAITING_ROWS,
    CALL_ROWS,
    CALL_DURATION,
)
