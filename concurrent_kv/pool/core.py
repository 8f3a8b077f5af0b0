"""`PoolCore`: what a pool is made of, its scopes, its clears and its end; `KVPool` adds the reads and writes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from contextlib import suppress
from inspect import signature
from typing import Any

from .._checks import check_seconds, hash_of, positive_int, sequence_of
from ..books.allocation import Allocation, headroom_of
from ..books.eviction import EvictionPolicy, PolicyFactory, make_policy
from ..books.guarded import guarded
from ..books.integrity import IntegrityReport, RepairReport
from ..books.records import Account, Entry, Generation, Scope
from ..books.size_arguments import SizeArguments
from ..books.stats import Counters, PoolStats, TierStats
from ..device.layout import KVLayout, slots_of_capacity
from ..errors import ClosedError, InvalidArgumentError, InvalidTypeError, KeyNotFoundError, shown
from ..locks.deadline import Deadline
from ..locks.gate import gate
from .checking import check_integrity, repair
from .clearing import sweep_if, sweep_scopes
from .handle import Handle
from .storage import KVStorage, PoolState
from .tier import HostTier, Tier, disk_bytes, put_beneath, tier_bytes

__all__ = ["PoolCore", "bump_versions", "end_older"]


def check_shared_storage(storage: object, layout: KVLayout) -> None:
    """Raise unless a pool of `layout` can be made over `storage`."""
    if not isinstance(storage, KVStorage):
        raise InvalidTypeError(f"storage must be a KVStorage, got {type(storage).__name__}")
    if storage.layout != layout:
        raise InvalidArgumentError(f"layout must be that of the storage, {storage.layout}, got {layout}")
    storage.check_call()
    if storage.closed:
        raise ClosedError(f"{storage.name} is closed")


def _shards_of_scopes(shards: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The lock shards of a pool's scopes, of `count` that its storage has; or an error that names the argument."""
    if shards is None:
        return tuple(range(count))
    chosen = tuple(
        positive_int("scope_shards", shard, minimum=0) for shard in sequence_of("scope_shards", shards, "ints")
    )
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[-1] >= count:
        raise InvalidArgumentError(
            f"scope_shards must be ascending numbers of the storage's {count} lock shards, from 0, got {shown(shards)}"
        )
    return chosen


def _check_room(storage: KVStorage, max_slots: int) -> None:
    """Raise unless a pool of `max_slots` has room in `storage` beside the pools that are there. Mutex held."""
    total = storage.ledger.num_slots - storage.headroom_slots
    left = total - sum(pool.account.max_slots for pool in storage.pools)
    if max_slots > left:
        raise InvalidArgumentError(
            f"storage must have {max_slots} slots for this pool, and {left} of its {total} are no open pool's; "
            f"num_slots={total + max_slots - left} of the storage would do"
        )


class PoolCore(PoolState, Handle):
    """A quota, a policy and scopes over a storage. See `KVPool`, whose constructor this is."""

    _internal = frozenset(("end_searches", "lifetime_now", "registered_scopes", "renew", "stats_now"))

    instead_of_copy = "share the one object between threads; in another process make a pool there, and send entries"

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
        writers: int | None = None,
        headroom_tokens: int | None = None,
        name: str = "pool",
        storage: KVStorage | None = None,
        scope_shards: Sequence[int] | None = None,
        tier: HostTier | None = None,
    ) -> None:
        self._allocation = self.allocation_for(
            layout,
            max_entries,
            max_slots=max_slots,
            max_bytes=max_bytes,
            writers=writers,
            headroom_tokens=headroom_tokens,
            storage=storage,
            tier=tier,
        )
        max_entries, max_slots = self._allocation.entries["pool"], self._allocation.slots["pool"]
        own_policy: EvictionPolicy[Entry] = make_policy(policy, capacity=max_entries)
        hash_of(name, "name")
        if storage is not None:
            check_shared_storage(storage, layout)
        self.owns_storage = storage is None
        storage = storage or KVStorage(
            layout,
            max_slots,
            headroom_slots=self._allocation.headroom_slots,
            shards=shards,
            wait_timeout=wait_timeout,
            name=name,
        )
        if self.owns_storage:
            storage.headroom_argument = "headroom_tokens"
        if tier is not None:
            put_beneath(storage, tier)
        stated = None if max_bytes is None else SizeArguments(slots="max_bytes", per_slot=layout.bytes_per_token)
        candidates = guarded(own_policy, storage.ledger.abandoned.append, str(name))
        account = Account(name, max_entries, max_slots, storage.ledger.tables, candidates, stated)
        super().__init__(storage, account)
        self._emptied = False
        self.default_scope = Scope(self.account, name, _shards_of_scopes(scope_shards, storage.locks.count))
        self.account.scopes[name] = self.default_scope
        with gate.lock, storage.ledger.mutex:
            _check_room(storage, max_slots)
            if storage.tier is not None:
                storage.tier.add_scope(self.default_scope)
            storage.pools.append(self)

    @classmethod
    def allocation_for(
        cls,
        layout: KVLayout,
        max_entries: int,
        *,
        max_slots: int | None = None,
        max_bytes: int | None = None,
        writers: int | None = None,
        headroom_tokens: int | None = None,
        storage: KVStorage | None = None,
        tier: HostTier | None = None,
        **others: Any,
    ) -> Allocation:
        """What a pool made with these arguments allocates, in slots and bytes; allocates nothing. Never blocks.

        Args:
            layout, max_entries, max_slots, max_bytes, writers, headroom_tokens, storage, tier: see the constructor.
            others: its other arguments; they change no size, and their values are not looked at.

        Raises:
            InvalidArgumentError, InvalidTypeError: a size that the constructor refuses too, by name.
            TypeError: an argument that the constructor does not have.
        """
        signature(cls).bind_partial(**others)
        if not isinstance(layout, KVLayout):
            raise InvalidTypeError(f"layout must be a KVLayout, got {type(layout).__name__}")
        max_entries = positive_int("max_entries", max_entries)
        slots = slots_of_capacity(layout, max_entries, max_slots, max_bytes)
        headroom = total = 0
        below = tier_bytes(tier, layout)
        if tier is not None and storage is not None:
            raise InvalidArgumentError("tier must be left out where a storage is given, which has its own or none")
        if storage is None:
            headroom = headroom_of(headroom_tokens, writers, layout.max_tokens, usual_writers=4)
            total = slots + headroom
        elif headroom_tokens is not None:
            raise InvalidArgumentError(
                "headroom_tokens must be left out where a storage is given, which has its own headroom "
                f"(headroom_slots), got {shown(headroom_tokens)}"
            )
        return Allocation(
            {"pool": max_entries},
            {"pool": slots},
            headroom,
            total,
            layout.bytes_per_token,
            tier_bytes=below,
            disk_bytes=disk_bytes(tier, layout),
        )

    # Scopes --------------------------------------------------------------------------------------------------------

    def scope(self, name: Hashable) -> Scope:
        """The scope of that name, made if it is new: keys of its own, cleared by themselves. Never blocks."""
        self.storage.check_call()
        self.check_open()
        hash_of(name, "name")
        with gate.lock, self.storage.ledger.mutex:
            scope = self.account.scopes.get(name)
            if scope is None:
                scope = Scope(self.account, name, self.default_scope.shards)
                scope.generation = Generation(0, self.default_scope.version)
                if self.storage.tier is not None:
                    self.storage.tier.add_scope(scope)
                # Last: where memory runs out, there is no scope that has none below it beside others that have.
                self.account.scopes[name] = scope
            return scope

    def drop_scope(self, scope: Scope | Hashable, *, timeout: float | None = None) -> int:
        """Remove every entry of a scope, and forget the scope; returns how many entries. May block.

        Operations on it, also those under way that would store something, end with `ClosedError`; what is pinned or
        gathered stays with its handles. Its name is free then: `scope(name)` makes a new one.

        Args:
            scope: the scope, or its name.

        Raises:
            KeyNotFoundError: there is no scope of that name, or it was dropped before.
            InvalidArgumentError: it is the default scope, or another pool's.
            WaitTimeoutError: a shard was not free in time. The scope has ended if anything was removed; drop it again.
        """
        deadline = self.storage.enter(timeout, self.account)
        name = scope.name if isinstance(scope, Scope) else scope
        hash_of(name, "scope")
        with gate.lock, self.storage.ledger.mutex:
            found = self.account.scopes.get(name)
        if isinstance(scope, Scope) and scope.account is not self.account:
            raise InvalidArgumentError(f"scope must be a scope of {self.name}, got one of {scope.account.name}")
        if found is None or (isinstance(scope, Scope) and found is not scope):
            raise KeyNotFoundError(f"{self.name} has no scope {shown(name)} to drop")
        if found is self.default_scope:
            raise InvalidArgumentError(
                f"scope must be another than the default scope of {self.name}, got {shown(name)}"
            )
        reason = f"the scope {shown(name)} of {self.name} was dropped"  # no name's `__repr__` runs under a lock
        with gate.lock, self.storage.locks.write(found.shards, deadline):
            found.ended = reason
        self.flights.close_scope(found.number)
        removed = sweep_if(self, found, lambda entry: True, deadline)
        if found.below is not None and self.storage.tier is not None:
            removed += sweep_if(self.storage.tier, found.below, lambda entry: True, deadline)
            self.storage.tier.forget_scope(found)
        # Last: what is cut off before this is found, and finished, by the next call.
        with gate.lock, self.storage.ledger.mutex:
            if self.account.scopes.get(name) is found:
                del self.account.scopes[name]
        return removed

    def scopes(self) -> tuple[Scope, ...]:
        """Every scope, without those of searches."""
        self.storage.check_call()
        with gate.lock, self.storage.ledger.mutex:
            return tuple(self.account.scopes.values())

    def registered_scopes(self) -> tuple[Scope, ...]:
        """As `scopes`, with the mutex held already."""
        return tuple(self.account.scopes.values())

    def _scope(self, scope: Scope | None) -> Scope:
        found = self.default_scope if scope is None else self._own_scope(scope)
        ended = None if found.ended is None else found.why_ended()
        if ended is not None:
            raise ended
        return found

    def _own_scope(self, scope: Scope | None) -> Scope:
        """As `_scope`, also after its end."""
        if scope is None:
            return self.default_scope
        if not isinstance(scope, Scope):
            raise InvalidTypeError(f"scope must be a Scope of this pool, got {type(scope).__name__}")
        if scope.account is not self.account:
            raise InvalidArgumentError(f"scope must be a scope of {self.name}, got one of {scope.account.name}")
        return scope

    # Clears, versions, end -----------------------------------------------------------------------------------------

    def clear(self, scope: Scope | None = None, *, timeout: float | None = None) -> None:
        """Remove every entry of `scope`, or of all scopes; open searches are not touched. May block.

        Writes that began before and publish afterwards store nothing, and say so.
        """
        deadline = self.storage.enter(timeout, self.account)
        self.renew(deadline, None if scope is None else [self._scope(scope)])

    def bump_version(self, *, timeout: float | None = None) -> None:
        """State that the weights changed: every entry is a miss from now on, open searches end. May block."""
        bump_versions([self], self.name, self.storage.enter(timeout, self.account))

    @property
    def version(self) -> int:
        """The weights version: how often `bump_version()` was called. Never blocks."""
        return self.default_scope.version

    def end_searches(self, reason: str, deadline: Deadline) -> None:
        """End every open search; its user gets `SearchEndedError` with `reason`."""
        self.storage.check_call()
        with gate.lock, self.storage.ledger.mutex:
            searches = list(self.searches)
        for search in searches:
            search.end(reason, deadline)

    def renew(self, deadline: Deadline, scopes: Iterable[Scope] | None = None) -> None:
        """Begin a new epoch in `scopes`, all by default, and sweep what is older."""
        scopes = self.scopes() if scopes is None else tuple(scopes)
        # First the new epoch, then the sweep: what is published in between is older than neither.
        with gate.lock, self.storage.ledger.mutex:
            _begin_epoch(scopes)
            self.account.counters.clear_count += 1
        self._sweep(scopes, deadline)

    def _sweep(self, scopes: Sequence[Scope], deadline: Deadline) -> None:
        """Remove what is older than its scope, from the pool and the tier beneath it."""
        sweep_scopes(self, scopes, deadline)
        if self.storage.tier is not None:
            below = [scope.below for scope in scopes if scope.below is not None]
            sweep_scopes(self.storage.tier, below, deadline)

    def close(self, *, timeout: float | None = None) -> None:
        """End every search, drop every entry and, for a pool made alone, free the storage. Closing twice is fine.

        Operations under way fail with `ClosedError` or finish as if they had come first.
        """
        self.storage.check_call()
        if timeout is not None:
            check_seconds("timeout", timeout)
        self.flights.close()  # also where the storage was closed first, and its waiters know nothing of it
        if self._emptied or self.storage.closed:
            if self.owns_storage:
                self.storage.close(timeout)
            return
        deadline = self.storage.enter_quietly(timeout)
        with gate.lock, self.storage.ledger.mutex:
            self.account.closed = True
        self.end_searches(f"{self.name} was closed", deadline)
        self.renew(deadline)
        if not self.owns_storage:
            # What handles still hold of it comes back when they let go.
            with gate.lock, self.storage.ledger.mutex, suppress(ValueError):  # of two closes at once
                self.storage.pools.remove(self)
            tier = self.storage.tier
            for scope in () if tier is None else self.scopes():
                assert tier is not None
                tier.forget_scope(scope)
        self._emptied = True  # a close that timed out before this is finished by the next
        if self.owns_storage:
            self.storage.close(deadline.left())

    # State ---------------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """One moment of the counters and the fill; of each open search, a moment close by. Never waits for a shard.

        Inside a critical section of the calling thread (in a finaliser, say) the numbers may be of different moments.
        """
        self.storage.check_process()
        contention = self.storage.locks.contention.read()
        mutex = self.storage.ledger.mutex_for_numbers()
        with gate.lock, mutex:
            return self.stats_now(contention)

    def lifetime_stats(self) -> PoolStats:
        """As `stats`, with the counts since the pool was made, whatever was reset. Never waits for a shard."""
        self.storage.check_process()
        contention = self.storage.locks.contention.read_lifetime()
        mutex = self.storage.ledger.mutex_for_numbers()
        with gate.lock, mutex:
            return self.lifetime_now(contention)

    def stats_now(self, contention: tuple[int, float]) -> PoolStats:
        """As `stats`, with the mutex held already, and with what the locks counted looked up before."""
        return self._stats_of(self.account.count(), contention)

    def lifetime_now(self, contention: tuple[int, float]) -> PoolStats:
        """As `lifetime_stats`, likewise."""
        return self._stats_of(self.account.count_of_lifetime(), contention)

    def _stats_of(self, counted: Counters, contention: tuple[int, float]) -> PoolStats:
        account, searches = self.account, self.searches.copy()
        in_use = account.slots + sum(search.slots_in_use for search in searches)
        return PoolStats(
            **vars(counted),
            entries=account.entries + sum(search.budget.entries for search in searches),
            max_entries=account.max_entries,
            slots_in_use=in_use,
            max_slots=account.max_slots,
            bytes_in_use=in_use * self.layout.bytes_per_token,
            max_bytes=account.max_slots * self.layout.bytes_per_token,
            shared_slots=self.storage.ledger.tables.shared + sum(search.shared_slots for search in searches),
            reserved_entries=account.reserved_entries,
            reserved_slots=account.reserved_slots,
            open_searches=len(searches),
            waiters=len(account.turns),
            lock_wait_count=contention[0],
            lock_wait_seconds=contention[1],
        )

    def tier_stats(self) -> TierStats | None:
        """One moment of the tier beneath the pool, which is that of all pools of its storage; None without one."""
        self.storage.check_process()
        tier = self.storage.tier
        return tier.stats() if isinstance(tier, Tier) else None

    def reset_stats(self) -> None:
        """Start every counter from zero."""
        self.storage.check_call()
        with gate.lock, self.storage.ledger.mutex:
            self.account.count_from_zero()
        if self.owns_storage:
            self.storage.locks.contention.reset()

    def allocation(self) -> Allocation:
        """What was allocated when it was made: what `allocation_for()` says for its arguments. Never blocks."""
        return self._allocation

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

    def __repr__(self) -> str:
        account = self.account
        return (
            f"<{type(self).__name__} {self.name!r}: {account.entries} of {account.max_entries} entries, "
            f"{account.slots} of {account.max_slots} slots{', closed' if self.closed else ''}>"
        )


def bump_versions(pools: Sequence[PoolCore], name: str, deadline: Deadline) -> None:
    """Begin a new weights version in every scope of `pools`, of one storage, at once; end searches, sweep the rest.

    If it raises `WaitTimeoutError` the versions are bumped all the same: older entries are misses, searches are over.
    """
    reason = f"{name}: the weights version was bumped; open a new search"
    with gate.lock, pools[0].storage.ledger.mutex:
        _begin_version(pools, reason)
    for pool in pools:
        pool.end_searches(reason, deadline)
    for pool in pools:
        pool._sweep(pool.scopes(), deadline)


def end_older(pool: PoolCore, version: int, is_newer: bool, deadline: Deadline) -> None:
    """Sweep what is older than a load that renewed a pool; where its `version` is newer, end the searches too."""
    if is_newer:
        pool.end_searches(f"{pool.name}: a snapshot of newer weights was loaded; open a new search", deadline)
    scopes = pool.scopes()
    with gate.lock, pool.storage.ledger.mutex:
        _catch_up(scopes, version)
    pool._sweep(scopes, deadline)


def _begin_epoch(scopes: Iterable[Scope]) -> None:
    """Mutex held."""
    for scope in scopes:
        scope.renew(Generation(scope.epoch + 1, scope.version))


def _catch_up(scopes: Iterable[Scope], version: int) -> None:
    """Have scopes that were made meanwhile be of this version, too. Mutex held."""
    for scope in scopes:
        if scope.version < version:
            scope.renew(Generation(scope.epoch, version))


def _begin_version(pools: Sequence[PoolCore], reason: str) -> None:
    """In every scope; open searches are told that they are over. Mutex held."""
    for pool in pools:
        for scope in pool.registered_scopes():
            scope.renew(Generation(scope.epoch, scope.version + 1))
        for search in pool.searches:
            search.budget.ended = reason
