"""A tiny pool under a scheduler, whose operations note what they did and saw, and the checks after each execution."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import count
from typing import Any

import torch

from concurrent_kv import Batch, DiskTier, HostTier, KeysValues, KVLayout, KVPool, KVStorage
from concurrent_kv.books.records import Entry, Scope
from concurrent_kv.errors import ClosedError
from concurrent_kv.pool.tier import put_beneath
from tests.support import ledgers_of, searches_of, slots_named

from .history import Call, Kind, State, Value, check_linearizable
from .parts import ModelEvent, ModelLock, ModelShards, ModelTensor
from .scheduler import BrokenPromiseError, Scheduler

__all__ = ["WINDOW", "World", "value"]

WINDOW = 4
LAYOUT = KVLayout(num_layers=1, num_heads=1, head_dim=1, max_tokens=WINDOW)


def value(number: int, tokens: int = 2) -> Value:
    """A value of its own for each number: `12` and two tokens are the labels 121 and 122."""
    return tuple(10 * number + token for token in range(1, tokens + 1))


@cache
def keys_values(rows: tuple[Value, ...]) -> KeysValues:
    """The rows, left-padded: labels as keys, their negatives as values."""
    end = max(map(len, rows))
    labels = torch.tensor([[0] * (end - len(row)) + list(row) for row in rows], dtype=torch.float32)
    packed = torch.stack([labels, -labels]).view(2, len(rows), 1, end, 1)
    return KeysValues.from_packed(packed, [len(row) for row in rows])


def labels_of(kv: KeysValues) -> Value:
    """The labels of one row, which must be those of a whole value."""
    found, mirrored = kv.keys.ravel().tolist(), kv.values.ravel().tolist()
    if found != [-label for label in mirrored]:
        raise BrokenPromiseError(f"keys {found} and values {mirrored} do not belong together")
    return tuple(map(int, found))


def rows_of(batch: Batch) -> tuple[Value | None, ...]:
    """What a gather found in each row; the padding must be zeros."""
    rows: list[Value | None] = []
    for row, (hit, length) in enumerate(zip(batch.hits, batch.lengths, strict=True)):
        labels = labels_of(KeysValues(batch.keys[:, row : row + 1], batch.values[:, row : row + 1]))[: batch.end]
        padding, labels = labels[: batch.end - length], labels[batch.end - length :]
        if any(padding):
            raise BrokenPromiseError(f"the padding of row {row} holds {padding}")
        rows.append(labels if hit else None)
    return tuple(rows)


class World:
    """One storage with one pool, `pool`, and what its callers saw.

    Args:
        scheduler: who drives it.
        entries: entries that the pool holds.
        slots: slots that it holds; full windows if left out.
        headroom: slots of the storage above that.
        shards: lock shards; key `k` is in shard `k % shards`.
        evicting: whether the program may evict (see `check_linearizable`).
        real_locks: whether the shards have the real reader-writer locks, made of model locks.
        policy: the pool's eviction policy.
        more_slots: slots of the storage for other pools.
        tier: windows of a tier beneath it; none if 0.
        disk: whether it is in a file, with one window of memory before it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        entries: int = 4,
        slots: int | None = None,
        headroom: int = 2 * WINDOW,
        shards: int = 1,
        evicting: bool = False,
        real_locks: bool = False,
        policy: str = "fifo",
        more_slots: int = 0,
        tier: int = 0,
        disk: bool = False,
    ) -> None:
        slots = entries * WINDOW if slots is None else slots
        total = slots + more_slots + headroom
        self.scheduler = scheduler
        self.storage = KVStorage(
            LAYOUT,
            slots + more_slots,
            headroom_slots=headroom,
            shards=shards,
            lock_factory=lambda: ModelLock(scheduler),
            event_factory=lambda: ModelEvent(scheduler),
            locks=None if real_locks else ModelShards(scheduler, shards),
            search_locks=None if real_locks else partial(ModelShards, scheduler, 1),
            tensor=ModelTensor(scheduler, LAYOUT, total),
        )
        if tier:
            window = LAYOUT.bytes_per_entry
            behind = DiskTier(tempfile.gettempdir(), tier * window)
            put_beneath(self.storage, HostTier(window, behind=behind) if disk else HostTier(tier * window))
        self.pool = KVPool(LAYOUT, entries, max_slots=slots, storage=self.storage, name="pool", policy=policy)
        self.calls: list[Call] = []
        self.before: State = {}
        self.handles: list[Any] = []  # pins and batches that a program opened before it began
        self.evicting = evicting
        self._clock = count()
        scheduler.watch = self.watch

    # Operations --------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self, kind: Kind, keys: Iterable[int] = (), writes: Iterable[Value] = ()) -> Iterator[Call]:
        call = Call(kind, tuple(keys), tuple(writes), next(self._clock))
        self.calls.append(call)
        yield call
        call.ended = next(self._clock)

    def put(self, key: int, what: Value) -> bool:
        with self._call(Kind.WRITE, [key], [what]) as call:
            call.since, call.stored = call.began, self.pool.put(key, keys_values((what,)))
        return call.stored

    def put_many(self, what: Mapping[int, Value]) -> bool:
        with self._call(Kind.WRITE, what, what.values()) as call:
            call.since = call.began
            call.stored = self.pool.put_many(list(what), keys_values(tuple(what.values())))
        return call.stored

    def get(self, key: int) -> Value | None:
        with self._call(Kind.READ, [key]) as call:
            found = self.pool.get(key)
            call.seen = (None if found is None else labels_of(found),)
        return call.seen[0]

    def pop(self, key: int) -> Value | None:
        with self._call(Kind.POP, [key]) as call:
            found = self.pool.pop(key)
            call.seen = (None if found is None else labels_of(found),)
        return call.seen[0]

    def gather(self, keys: Sequence[int]) -> tuple[Value | None, ...]:
        with self._call(Kind.READ, keys) as call, self.pool.gather(keys) as batch:
            call.seen = rows_of(batch)
        return call.seen

    def hold_batch(self, keys: Sequence[int]) -> None:
        """Gather into a batch that stays open, among `handles`."""
        with self._call(Kind.READ, keys) as call:
            self.handles.append(self.pool.gather(keys))
            call.seen = rows_of(self.handles[-1])

    def extend(self, children: Mapping[int, tuple[int, int]]) -> bool | None:
        """Gather parents and commit children, `{child: (parent, label)}`; None if one is missing or full."""
        parents = [parent for parent, _ in children.values()]
        with self._call(Kind.READ, parents) as read:
            batch = self.pool.gather(parents)
            read.seen = rows_of(batch)
        with batch:
            found = [row for row in read.seen if row is not None and len(row) < WINDOW]
            if len(found) < len(parents):
                return None
            labels = [label for _, label in children.values()]
            append(batch, labels)
            with self._call(
                Kind.WRITE, children, [(*row, label) for row, label in zip(found, labels, strict=True)]
            ) as call:
                call.since, call.stored = read.began, self.pool.commit(list(children), batch)
        return call.stored

    def clear(self) -> None:
        with self._call(Kind.CLEAR):
            self.pool.clear()

    def bump_version(self) -> None:
        with self._call(Kind.CLEAR):
            self.pool.bump_version()

    def close(self) -> None:
        with self._call(Kind.CLEAR):
            self.pool.close()

    def store(self, what: Mapping[int, Value]) -> None:
        """Put entries in before the program begins."""
        for key, stored in what.items():
            self.pool.put(key, keys_values((stored,)))
        self.before.update(what)

    # Checks ------------------------------------------------------------------------------------------------------

    def pools(self) -> Sequence[KVPool]:
        return [self.pool]

    def watch(self) -> None:
        """What holds at every step: no index is over its quota."""
        ledger = self.storage.ledger
        for pool in self.pools():
            entries = [entry for scope in pool.registered_scopes() for entry in entries_of(scope)]
            if len(entries) > pool.account.max_entries:
                raise BrokenPromiseError(f"{pool.name} holds {len(entries)} entries of {pool.account.max_entries}")
            used = {slot for entry in entries if entry.row >= 0 for slot in slots_named(ledger, entry)}
            if len(used) > pool.account.max_slots:
                raise BrokenPromiseError(f"{pool.name} holds {len(used)} slots of {pool.account.max_slots}")

    def check(self) -> None:
        """What holds when every operation is over and every batch and pin closed."""
        self.storage.enter_quietly()
        self.pool.check_integrity()
        self._check_holds()
        for pool in self.pools():
            for scope in pool.registered_scopes():
                for entry in entries_of(scope):
                    if entry.generation is not scope.generation:
                        raise BrokenPromiseError(
                            f"{entry.key} of {pool.name} is older than its scope, and was not swept"
                        )
        self.check_statistics()
        keys = {key for call in self.calls for key in call.keys} | set(self.before)
        if not self.storage.closed and not self.pool.closed:
            for key in sorted(keys):
                self.get(key)
        check_linearizable(self.calls, self.before, evicting=self.evicting)

    def check_statistics(self) -> None:
        """Every counter is exact."""
        stats = self.pool.stats()
        asked = sum(len(call.keys) for call in self.calls if call.kind is Kind.READ and call.ended >= 0)
        if not self.pool.closed and stats.request_count != asked:
            raise BrokenPromiseError(f"{asked} rows were asked for, {stats.request_count} counted")
        if stats.insert_count + stats.move_up_count - stats.eviction_count - stats.removal_count != stats.entries:
            raise BrokenPromiseError(f"{stats} do not add up")

    def _check_holds(self) -> None:
        searches = searches_of(self.storage)
        known = {hold for search in searches for hold in (search.roots_hold, search.stand_ins)}
        tier = self.storage.tier
        ledgers = [*ledgers_of(self.storage), *([] if tier is None else [tier.ledger])]
        left = {hold for ledger in ledgers for hold in ledger.holds} - known
        if left:
            raise BrokenPromiseError(f"{len(left)} references were never let go: {[hold.what for hold in left]}")
        for pool in self.pools():
            reserved = sum(search.budget.max_slots for search in pool.searches)
            if pool.account.reserved_slots != reserved:
                raise BrokenPromiseError(
                    f"{pool.name} counts {pool.account.reserved_slots} reserved slots, searches {reserved}"
                )


def entries_of(scope: Scope) -> list[Entry]:
    return [entry for part in scope.entries for entry in part.values()]


def append(batch: Batch, labels: Sequence[int]) -> None:
    """What a model does: one new token for each row."""
    end = batch.end
    new = torch.tensor(labels, dtype=torch.float32)
    batch.data[0, :, 0, end, 0] = new
    batch.data[1, :, 0, end, 0] = -new
    batch.advance(1)


def or_closed(action: Callable[[], object]) -> None:
    """An operation that a close may cut short."""
    with suppress(ClosedError):
        action()
