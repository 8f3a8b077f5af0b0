"""`KVPool`: entries by key, under a quota, over a storage that other pools may share."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from .arguments import check_keys, hash_of, slots_of_capacity
from .batch import Batch
from .clearing import remove, sweep
from .committing import commit_batch, open_batch, put_rows
from .entry import Entry, Generation, Hold, Scope
from .errors import ClosedError, InvalidArgumentError, InvalidTypeError, KeyNotFoundError
from .eviction import EvictionPolicy, PolicyFactory, make_policy
from .integrity import IntegrityReport, RepairReport, check_integrity, repair
from .kv import KeysValues
from .layout import KVLayout, positive_int
from .locks import Deadline
from .overflow import Overflow
from .pin import Pin
from .quota import Quota
from .reading import copy_out, generations_of, retain
from .stats import Counters, PoolStats
from .storage import KVStorage

if TYPE_CHECKING:
    from .search import SearchState

__all__ = ["KVPool"]


class KVPool:
    """A thread-safe pool of K/V entries.

    Any number of threads may call anything at any time. Every wait is bounded by `timeout` seconds (`wait_timeout` of
    the storage where it is left out). What is read is a private copy; what is put is copied. Keys are any hashables;
    their `__hash__` and `__eq__` run under a lock shard and must not call the pool.

    Args:
        layout: shapes, dtype and device of every entry.
        max_entries: entries it holds.
        max_slots: tokens it holds; `max_entries` full windows if neither this nor `max_bytes` is given.
        max_bytes: the same in bytes; give one or the other.
        policy: which entry goes first when it is full: "fifo", "lru", "priority", "clock", "s3fifo", or an
            `EvictionPolicy` (instance, class or factory).
        shards: lock shards.
        wait_timeout: seconds an operation waits at most.
        writers: writers that can replace entries of a full pool at the same time without waiting for each other
            (headroom of one window each).
        name: what messages and statistics call it.
        storage: the storage to share, with room made for this quota by its owner; its own if left out.
        scope_shards: lock shards of the default scope; all if left out.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that cannot work, by name.
    """

    def __init__(
        self,
        layout: KVLayout,
        max_entries: int,
        *,
        max_slots: int | None = None,
        max_bytes: int | None = None,
        policy: str | EvictionPolicy[Entry] | PolicyFactory[EvictionPolicy[Entry]] | None = "fifo",
        shards: int = 16,
        wait_timeout: float = 10.0,
        writers: int = 4,
        name: str = "pool",
        storage: KVStorage | None = None,
        scope_shards: tuple[int, ...] | None = None,
    ) -> None:
        if not isinstance(layout, KVLayout):
            raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        max_entries = positive_int("max_entries", max_entries)
        max_slots = slots_of_capacity(layout, max_entries, max_slots, max_bytes)
        self.policy: EvictionPolicy[Entry] = make_policy(policy, capacity=max_entries)
        self.layout = layout
        self.name = name
        self.owns_storage = storage is None
        self.storage = storage or KVStorage(
            layout,
            max_slots,
            headroom_slots=positive_int("writers", writers) * layout.max_tokens,
            shards=shards,
            wait_timeout=wait_timeout,
            name=name,
        )
        self.quota = Quota(max_entries, max_slots, self.storage.ledger.slots.num_slots)
        self.counters = Counters()
        self.closed = False
        self.searches: set[SearchState] = set()  # open ones; guarded by the mutex
        self.default_scope = Scope(self, name, scope_shards or tuple(range(self.storage.locks.count)))
        self._scopes: dict[Hashable, Scope] = {name: self.default_scope}  # guarded by the mutex
        self.storage.pools.append(self)

    # Scopes --------------------------------------------------------------------------------------------------------

    def scope(self, name: Hashable) -> Scope:
        """The scope of that name, made if it is new: keys of its own, cleared by themselves. Never blocks."""
        self.storage.enter()
        hash_of(name, "name")
        with self.storage.ledger.mutex:
            scope = self._scopes.get(name)
            if scope is None:
                scope = self._scopes[name] = Scope(self, name, self.default_scope.shards)
            return scope

    def scopes(self) -> tuple[Scope, ...]:
        """Every scope, without those of searches."""
        with self.storage.ledger.mutex:
            return tuple(self._scopes.values())

    def registered_scopes(self) -> tuple[Scope, ...]:
        """As `scopes`, with the mutex held already."""
        return tuple(self._scopes.values())

    def _scope(self, scope: Scope | None) -> Scope:
        if scope is None:
            return self.default_scope
        if not isinstance(scope, Scope):
            raise InvalidTypeError(f"scope must be a Scope of this pool, got {type(scope).__name__}")
        if scope.pool is not self:
            raise InvalidArgumentError(f"scope must be a scope of {self.name}, got one of {scope.pool.name}")
        return scope

    # Reading -------------------------------------------------------------------------------------------------------

    def get(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        count_miss: bool = True,
    ) -> KeysValues | None:
        """A private copy of the entry of `key`, one row of its own tokens; None on a miss. May block.

        `count_miss=False` is for who looks elsewhere next: a row asked for is one request, wherever it was found.

        Raises:
            WaitTimeoutError: the key's shard was not free in time.
            ClosedError, WrongProcessError, InvalidTypeError (`key` is not hashable).
        """
        with self._retained(key, scope, self._enter(timeout), quiet=False) as entry:
            if entry is not None:
                return KeysValues.from_packed(copy_out(self.storage, entry))
        if count_miss:
            self.count_misses(1)
        return None

    def peek(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> KeysValues | None:
        """As `get`, without touching statistics or the eviction policy."""
        with self._retained(key, scope, self._enter(timeout)) as entry:
            return None if entry is None else KeysValues.from_packed(copy_out(self.storage, entry))

    def side(
        self, key: Hashable, default: object = None, *, scope: Scope | None = None, timeout: float | None = None
    ) -> object:
        """The side data stored with `key` (the object itself); `default` on a miss. Not counted. May block."""
        with self._retained(key, scope, self._enter(timeout)) as entry:
            return default if entry is None else entry.side

    def __contains__(self, key: Hashable) -> bool:
        """Whether `key` is stored in the default scope just now. Not counted. May block."""
        with self._retained(key, None, self._enter(None)) as entry:
            return entry is not None

    def __len__(self) -> int:
        """Entries stored, without those of searches. Never waits for a shard."""
        with self.storage.ledger.mutex:
            return self.quota.entries

    @contextmanager
    def _retained(
        self, key: Hashable, scope: Scope | None, deadline: Deadline, *, quiet: bool = True
    ) -> Iterator[Entry | None]:
        """The entry of `key`, kept alive for the length of a `with`; None on a miss."""
        hold = Hold("read", [])
        try:
            yield self._retain(key, scope, deadline, hold, quiet=quiet)
        finally:
            self.storage.ledger.release(hold)

    def _retain(
        self, key: Hashable, scope: Scope | None, deadline: Deadline, hold: Hold, *, quiet: bool
    ) -> Entry | None:
        hash_of(key)
        found_in = self._scope(scope)
        return retain(self.storage, [(found_in, key)], generations_of([found_in]), deadline, hold=hold, quiet=quiet)[0]

    def pin(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> Pin:
        """A handle that keeps the entry of `key` from being evicted until it is closed (leaving its `with`). May block.

        The entry can still be replaced, popped or cleared; the pin then keeps what it pinned.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        hold = Hold("pin", [], pinning=True)
        entry = self._retain(key, scope, self._enter(timeout), hold, quiet=True)
        if entry is None:
            self.storage.ledger.release(hold)
            raise KeyNotFoundError(f"{self.name} has no entry for {key!r} to pin")
        return Pin(self.storage, entry, hold)

    def count_misses(self, number: int) -> None:
        """Count rows that nobody had."""
        if number:
            with self.storage.ledger.mutex:
                self.counters.miss_count += number

    def gather(
        self,
        keys: Sequence[Hashable],
        *,
        scope: Scope | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
    ) -> Batch:
        """Read many entries at once into one padded batch, which `commit` extends. May block.

        Args:
            keys: one for each row; the same key may come twice.
            scope: where they are looked up.
            room: free columns after the longest row; up to the window if left out.
            out: the buffer to gather into, the caller's: contiguous `[2 * layers, batch, heads, columns, head_dim]`.

        Raises:
            InvalidArgumentError: no keys, too much room, or an `out` that does not fit.
            WaitTimeoutError: a shard was not free in time.
        """
        deadline = self._enter(timeout)
        keys = check_keys(keys)
        found_in = self._scope(scope)
        generations = generations_of([found_in])
        hold = Hold("batch", [])
        try:
            entries = retain(self.storage, [(found_in, key) for key in keys], generations, deadline, hold=hold)
            self.count_misses(sum(entry is None for entry in entries))
            return open_batch(self.storage, found_in, generations[found_in], hold, entries, room, out)
        except BaseException:
            self.storage.ledger.release(hold)
            raise

    # Writing -------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: Hashable,
        kv: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        scope: Scope | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Store a copy of `kv`, one row, under `key`; replaces an entry of that key. May block.

        Args:
            key: any hashable.
            kv: one row of 1 to `max_tokens` tokens, on the pool's device, in its dtype.
            side: anything, stored with the entry; leaves with it.
            priority: for the priority policy; the lowest goes first.

        Returns True, or False with nothing stored if the scope was cleared, or its version bumped, meanwhile.

        Raises:
            InvalidArgumentError, InvalidTypeError: an argument that cannot work; the pool is unchanged.
            WaitTimeoutError: no room (everything is pinned or reserved), or a shard not free, in time.
        """
        deadline = self._enter(timeout)
        hash_of(key)
        return put_rows(self._scope(scope), [key], kv, [side], [priority], deadline)

    def put_many(
        self,
        keys: Sequence[Hashable],
        kv: KeysValues,
        *,
        sides: Sequence[object] | None = None,
        priorities: Sequence[float] | None = None,
        scope: Scope | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Store every row of `kv` under the key of the same position; all become visible at once, or none.

        A key that comes twice gets the last of its rows. Otherwise as `put`.

        Raises:
            CapacityError: more rows or tokens than the pool holds at all.
        """
        deadline = self._enter(timeout)
        return put_rows(self._scope(scope), keys, kv, sides, priorities, deadline)

    def commit(
        self,
        keys: Sequence[Hashable],
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        overflow: Overflow | None = None,
        sides: Sequence[object] | None = None,
        priorities: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Store what was appended to a batch of this pool, sharing the slots of what was gathered. May block.

        Args:
            keys: one for each committed row.
            batch: an open batch with tokens appended. It closes when every row has been committed.
            rows: which rows, in the order of `keys`; all that are left if not given.
            overflow: what happens to rows that outgrow the window; an error if left out.
            sides, priorities: as in `put`, one for each row.

        Returns True, or False with nothing stored if the scope was cleared, or its version bumped, since the gather.

        Raises:
            WindowOverflowError: a row grew too long for `overflow`. ClosedError: the batch is closed.
            Otherwise as `put_many`.
        """
        deadline = self._enter(timeout)
        return commit_batch(self, batch, keys, rows, overflow, sides, priorities, deadline)

    def pop(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> KeysValues | None:
        """Remove the entry of `key` and return it; None on a miss. May block."""
        deadline = self._enter(timeout)
        while True:
            with self._retained(key, scope, deadline) as entry:
                if entry is None:
                    return None
                # Copied before it is removed: if the copy fails, the pool is as it was.
                kv = KeysValues.from_packed(copy_out(self.storage, entry))
                if remove(entry.scope, entry, deadline):
                    return kv

    # Clears, versions, end -----------------------------------------------------------------------------------------

    def clear(self, scope: Scope | None = None, *, timeout: float | None = None) -> None:
        """Remove every entry of `scope`, or of all scopes; open searches are not touched. May block.

        Writes that began before and publish afterwards store nothing, and say so.
        """
        deadline = self._enter(timeout)
        self.renew(deadline, None if scope is None else [self._scope(scope)])

    def bump_version(self, *, timeout: float | None = None) -> None:
        """State that the weights changed: every entry is a miss from now on, open searches end. May block."""
        deadline = self._enter(timeout)
        self.renew(deadline, version=True)
        self.end_searches(f"{self.name}: the weights version was bumped; open a new search", deadline)

    def end_searches(self, reason: str, deadline: Deadline) -> None:
        """End every open search; its user gets `SearchEndedError` with `reason`."""
        with self.storage.ledger.mutex:
            searches = list(self.searches)
        for search in searches:
            search.end(reason, deadline)

    def renew(self, deadline: Deadline, scopes: Iterable[Scope] | None = None, *, version: bool = False) -> None:
        """Begin a new epoch (or weights version) in `scopes`, all by default, and sweep what is older."""
        scopes = self.scopes() if scopes is None else tuple(scopes)
        # First the new generation, then the sweep: what is published in between is older than neither.
        with self.storage.ledger.mutex:
            for scope in scopes:
                epoch, weights = scope.generation
                scope.generation = Generation(epoch, weights + 1) if version else Generation(epoch + 1, weights)
            self.counters.clear_count += 1
        for scope in scopes:
            sweep(scope, deadline)

    def close(self, *, timeout: float | None = None) -> None:
        """End every search, drop every entry and, for a pool made alone, free the storage. Closing twice is fine.

        Operations under way fail with `ClosedError` or finish as if they had come first.
        """
        if self.closed or self.storage.closed:
            return
        deadline = self._enter(timeout)
        with self.storage.ledger.mutex:
            self.closed = True
        self.end_searches(f"{self.name} was closed", deadline)
        self.renew(deadline)
        if self.owns_storage:
            self.storage.close()

    def __enter__(self) -> KVPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # State ---------------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """One consistent moment of the counters and the fill. Never waits for a shard."""
        waits, seconds = self.storage.locks.contention()
        ledger, quota = self.storage.ledger, self.quota
        with ledger.mutex:
            searches = [search.budget for search in self.searches]
            return PoolStats(
                **vars(self.counters),
                entries=quota.entries + sum(budget.entries for budget in searches),
                max_entries=quota.max_entries,
                slots_in_use=quota.slots + sum(b.reservation.size - b.reservation.left for b in searches),
                max_slots=quota.max_slots,
                shared_slots=ledger.slots.shared_count(),
                reserved_entries=quota.reserved_entries,
                reserved_slots=quota.reserved_slots,
                lock_wait_count=waits,
                lock_wait_seconds=seconds,
            )

    def reset_stats(self) -> None:
        """Start every counter from zero."""
        with self.storage.ledger.mutex:
            self.counters = type(self.counters)()
        self.storage.locks.reset_contention()

    def check_integrity(self) -> IntegrityReport:
        """Recount everything; call it when no operation is under way.

        Raises:
            IntegrityError: the books of the storage contradict what its pools and handles hold.
        """
        return check_integrity(self.storage)

    def repair(self) -> RepairReport:
        """Rebuild the books from the index and the open handles; call it when no operation is under way.

        Returns what operations that were cut off by an asynchronous exception had taken and not given back.
        """
        return repair(self.storage)

    def check_open(self) -> None:
        """Raise `ClosedError` if the pool or its storage is closed."""
        if self.closed or self.storage.closed:
            raise ClosedError(f"{self.name} is closed")

    def _enter(self, timeout: float | None) -> Deadline:
        deadline = self.storage.enter(timeout)
        self.check_open()
        return deadline

    def __repr__(self) -> str:
        quota = self.quota
        return (
            f"<KVPool {self.name!r}: {quota.entries} of {quota.max_entries} entries, "
            f"{quota.slots} of {quota.max_slots} slots{', closed' if self.closed else ''}>"
        )
