"""`KVPool`: entries by key, under a quota, over a storage that other pools may share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from os import PathLike
from typing import TypeVar

import torch
from torch import Tensor

from .._checks import PLAIN, check_compute, check_keys, hash_of
from ..books.records import Entry, Generation, Hold, Located, Scope
from ..errors import InvalidTypeError, KeyNotFoundError, shown
from ..flights.table import Claim, FlightState
from ..flights.waiting import outcome, wait_in_thread
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..model.kv import KeysValues
from ..model.overflow import Overflow
from ..snapshots.contents import SideCodec
from .batch import Batch
from .clearing import discard, remove
from .committing import commit_batch, open_batch, put_row, put_rows
from .core import PoolCore
from .joint import Part, open_part
from .loading import claim, heard_by_all
from .pin import Pin
from .reading import copy_out, retain
from .restoring import Loaded, load_pools
from .saving import Saved, save_pools
from .tier import move_up_each, release_both

__all__ = ["KVPool", "gather_part_of_pool", "read_from_pool"]

B = TypeVar("B", bound=Batch)
R = TypeVar("R")
ALONE = "pool"  # the role of a pool that has a file to itself


class KVPool(PoolCore):
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
            (headroom of one window each); 4 if left out, 1 where a window is more than 1,024 tokens.
        headroom_tokens: tokens of slots that its storage has beyond the quota, one window at least; `writers` windows
            if left out. What is replaced needs them until the new entry is stored and no handle reads the old one.
        name: what messages and statistics call it.
        storage: the storage to share, with room made for this quota by its owner; its own if left out. `writers` and
            `headroom_tokens` are of a storage of its own, and so is `tier`.
        scope_shards: numbers of the lock shards that guard its keys, ascending; all if left out.
        tier: a `HostTier`: host memory that entries move down to where they are evicted; they are lost if left out.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that cannot work, by name.

    `KVPool.allocation_for(...)`, with the same arguments, says before anything is allocated how much it will be.
    """

    _internal = frozenset(("count_misses",))

    # Reading -------------------------------------------------------------------------------------------------------

    def get(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        count_miss: bool = True,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """A private copy of the entry of `key`, one row of its own tokens; None on a miss. May block.

        Args:
            key: any hashable.
            scope: where it is looked up.
            timeout: seconds to wait for the key's shard.
            count_miss: False if the caller looks elsewhere next: a row asked for is one request, wherever it was found.
            to: the device of the copy, the pool's if left out. To a CPU this blocks until the copy is done.
            stream: of the pool's device, the one that the copy is made in; the calling thread's current one if left
                out. On other devices the copy comes in their current streams.

        Raises:
            WaitTimeoutError: the key's shard was not free in time.
            StreamCaptureError: the stream is being captured into a graph.
            ClosedError, WrongProcessError, InvalidTypeError (`key` is not hashable).
        """
        if stream is not None:
            with self.storage.clock.using(stream):
                return self.get(key, scope=scope, timeout=timeout, count_miss=count_miss, to=to)
        deadline = self.storage.enter(timeout, self.account)
        found = self._read(key, scope, deadline, partial(copy_out, self, to=to), quiet=False)
        if found is None and count_miss:
            self.count_misses(1)
        return found

    def peek(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """As `get`, without touching statistics or the eviction policy."""
        with self.storage.clock.using(stream):
            return self._read(key, scope, self.storage.enter(timeout, self.account), partial(copy_out, self, to=to))

    def side(
        self, key: Hashable, default: object = None, *, scope: Scope | None = None, timeout: float | None = None
    ) -> object:
        """The side data stored with `key` (the object itself); `default` on a miss. Not counted. May block."""
        found = self._read(key, scope, self.storage.enter(timeout, self.account), lambda entry: (entry.side,))
        return default if found is None else found[0]

    def contains(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> bool:
        """Whether `key` is stored just now. Not counted. May block."""
        return self._read(key, scope, self.storage.enter(timeout, self.account), lambda entry: True) is not None

    def __contains__(self, key: Hashable) -> bool:
        """As `contains`, in the default scope."""
        return self.contains(key)

    def keys(self, *, scope: Scope | None = None, timeout: float | None = None) -> list[Hashable]:
        """The keys stored in a scope, in no order; a list of its own. May block.

        One shard is looked at after the other: a key that is there all the time is among them, one that came or went
        meanwhile may be.
        """
        deadline = self.storage.enter(timeout, self.account)
        looked_in = self._scope(scope)
        generation = looked_in.generation
        found: list[Hashable] = []
        for number, (shard, part) in enumerate(zip(looked_in.shards, looked_in.entries, strict=True)):
            with gate.lock, self.storage.locks.read((shard,), deadline):
                items = part.listed()
                if looked_in.below is not None:
                    items += looked_in.below.entries[number].listed()
            self.check_open()  # after the look: a close, or a drop of the scope, may have swept this shard
            self._scope(looked_in)
            found += [key for key, entry in items if entry.generation is generation]
            del items  # keys and side data are finalised here, outside of the shard
        return found

    def __iter__(self) -> Iterator[Hashable]:
        """Over `keys()` of the default scope as they are now. May block, before the first."""
        return iter(self.keys())

    def __len__(self) -> int:
        """Entries stored, without those of searches; those in the tier too. Takes no lock."""
        self.storage.check_process()
        tier = self.storage.tier
        return self.account.entries + (0 if tier is None else tier.entries_below(self.account))

    def _read(
        self, key: Hashable, scope: Scope | None, deadline: Deadline, use: Callable[[Entry], R], *, quiet: bool = True
    ) -> R | None:
        """What `use` makes of the entry of `key`, which is kept alive meanwhile; None on a miss.

        One that is in the tier moves up where there is room, unless `quiet`.
        """
        ledger, tier = self.ledger, self.storage.tier
        hold = Hold("read", [])
        lower = None if tier is None else Hold("read", [])
        try:
            hashes = [hash(key) if type(key) in PLAIN else hash_of(key)]
            found_in = self.default_scope if scope is None else self._scope(scope)
            number = hashes[0] % len(found_in.shards)  # as `locate`, with a call less: a read makes few
            located = Located([found_in], [found_in.entries[number]], (found_in.shards[number],))
            looked_up = located, [key], hashes, {found_in: found_in.generation}, deadline
            (entry,) = retain(self.storage, *looked_up, hold=hold, quiet=quiet, lower=lower)
            if entry is not None and lower is not None and lower.entries and not quiet:
                assert tier is not None
                entry = tier.move_up(self, entry, hold, deadline) or entry
            return None if entry is None else use(entry)
        finally:
            try:
                ledger.release(hold)
                if tier is not None and lower is not None:
                    tier.ledger.release(lower)
            except BaseException:  # nothing happens the second time
                ledger.abandoned.append(hold)
                if lower is not None:
                    ledger.abandoned.append(lower)
                raise

    def pin(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> Pin:
        """A handle that keeps the entry of `key` from being evicted until it is closed (leaving its `with`). May block.

        The entry can still be replaced, popped or cleared; the pin then keeps what it pinned.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        deadline = self.storage.enter(timeout, self.account)
        hold = Hold("pin", [], pinning=True)
        tier = self.storage.tier
        lower = None if tier is None else Hold("pin", [], pinning=True)
        try:
            hashes, found_in = [hash_of(key)], self._scope(scope)
            looked_up = found_in.locate(hashes), [key], hashes, {found_in: found_in.generation}, deadline
            (entry,) = retain(self.storage, *looked_up, hold=hold, quiet=True, lower=lower)
            if entry is None:
                raise KeyNotFoundError(f"{self.name} has no entry for {shown(key)} to pin")
            if tier is not None and lower is not None and lower.entries:
                made = tier.move_up(self, entry, hold, deadline, pins=1)
                if made is None:
                    return Pin(self, entry, lower, tier.ledger)
                tier.ledger.release(lower)
                entry = made
            return Pin(self, entry, hold)
        except BaseException:
            if tier is not None and lower is not None:
                tier.ledger.abandoned.append(lower)
            try:
                self.storage.ledger.release(hold)
            except BaseException:
                self.storage.ledger.abandoned.append(hold)
                raise
            raise

    def count_misses(self, number: int) -> None:
        """Count rows that missed."""
        if number:
            self.storage.check_call()
            with gate.lock, self.storage.ledger.mutex:
                self.account.counters.miss_count += number

    def gather(
        self,
        keys: Sequence[Hashable],
        *,
        scope: Scope | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> Batch:
        """Read many entries at once into one padded batch, which `commit` extends. May block.

        Args:
            keys: one for each row; the same key may come twice.
            scope: where they are looked up.
            room: free columns after the longest row; up to the window if left out.
            out: the buffer to gather into, the caller's: contiguous `[2 * layers, batch, heads, columns, head_dim]`.
                Its columns after the newest tokens become zeros or stay as they are.
            stream: as in `get`. The stream has to come after every earlier use of `out`.

        Raises:
            InvalidArgumentError: no keys, too much room, or an `out` that does not fit.
            WaitTimeoutError: a shard was not free in time.
            StreamCaptureError: the stream is being captured into a graph.
        """
        if stream is not None:
            with self.storage.clock.using(stream):
                return self.gather(keys, scope=scope, room=room, out=out, timeout=timeout)
        deadline = self.storage.enter(timeout, self.account)
        keys = check_keys(keys)
        found_in = self._scope(scope)
        generation = found_in.generation
        hold = Hold("batch", [])
        lower = None if self.storage.tier is None else Hold("read", [])
        try:
            hashes = list(map(hash, keys))
            located = found_in.locate(hashes)
            looked_up = located, keys, hashes, {found_in: generation}, deadline
            entries = retain(self.storage, *looked_up, hold=hold, lower=lower)
            self.count_misses(entries.count(None))
            if lower is not None:
                held = hold, lower
                return _opened_in_both(self, found_in, generation, held, entries, deadline, open_batch, room, out)
            return open_batch(self, found_in, generation, hold, entries, room, out)
        except BaseException:
            if lower is not None:
                self.storage.ledger.abandoned.append(lower)
            try:
                self.storage.ledger.release(hold)
            except BaseException:
                self.storage.ledger.abandoned.append(hold)
                raise
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
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store a copy of `kv`, one row, under `key`; replaces an entry of that key. May block.

        Args:
            key: any hashable.
            kv: one row of 1 to `max_tokens` tokens in the pool's dtype, on its device or on another one; the current
                streams have to come after what made it. It may be dropped when this returns, and what is in host memory
                may be written to.
            side: anything, stored with the entry; leaves with it.
            priority: for the priority policy; the lowest goes first.
            stream: as in `get`.

        Returns True, or False with nothing stored if the scope was cleared, or its version bumped, meanwhile.

        Raises:
            InvalidArgumentError, InvalidTypeError: an argument that cannot work; the pool is unchanged.
            WaitTimeoutError: no room (everything is pinned or reserved), or a shard not free, in time.
            StreamCaptureError: the stream is being captured into a graph.
        """
        if stream is not None:
            with self.storage.clock.using(stream):
                return self.put(key, kv, side=side, priority=priority, scope=scope, timeout=timeout)
        deadline = self.storage.enter(timeout, self.account)
        if type(key) not in PLAIN:
            hash_of(key)
        found_in = self.default_scope if scope is None else self._scope(scope)
        return put_row(self, found_in, key, kv, side, priority, deadline)

    def put_many(
        self,
        keys: Sequence[Hashable],
        kv: KeysValues,
        *,
        sides: Sequence[object] | None = None,
        priorities: Sequence[float] | None = None,
        scope: Scope | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store every row of `kv` under the key of the same position; all become visible at once, or none.

        A key that comes twice gets the last of its rows. Replacing more tokens at once than the storage has headroom
        (`headroom_tokens`) may evict others, and what is about to be replaced. Otherwise as `put`.

        Raises:
            CapacityError: more rows or tokens than the pool holds at all.
        """
        with self.storage.clock.using(stream):
            deadline = self.storage.enter(timeout, self.account)
            return put_rows(self, self._scope(scope), keys, kv, sides, priorities, deadline)

    def commit(
        self,
        keys: Sequence[Hashable],
        batch: Batch,
        *,
        rows: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        overflow: Overflow | None = None,
        sides: Sequence[object] | None = None,
        priorities: Sequence[float] | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store what was appended to a batch of this pool, sharing the slots of what was gathered. May block.

        Args:
            keys: one for each committed row.
            batch: an open batch, with tokens appended unless `lengths` are all 0. It closes when every row has been
                committed.
            rows: which rows, in the order of `keys`; all that are left if not given.
            lengths: new tokens of each committed row, in the order of `keys`, of the columns appended to all of them: a
                row that ended early has its first `lengths[i]`. All of them if not given. With 0 a row that hit is
                stored once more, sharing every slot. A row that missed needs no `fill` then: what was appended to it
                is all it holds, 1 token at least.
            overflow: what happens to rows that outgrow the window; an error if left out.
            sides, priorities: as in `put`, one for each row.
            stream: as in `get`; it is ordered after what went through the batch's methods on other streams.

        Returns True, or False with nothing stored if the scope was cleared, or its version bumped, since the gather.

        Raises:
            WindowOverflowError: a row grew too long for `overflow`. ClosedError: the batch is closed.
            Otherwise as `put_many`.
        """
        if stream is not None:
            with self.storage.clock.using(stream):
                return self.commit(
                    keys,
                    batch,
                    rows=rows,
                    lengths=lengths,
                    overflow=overflow,
                    sides=sides,
                    priorities=priorities,
                    timeout=timeout,
                )
        deadline = self.storage.enter(timeout, self.account)
        checked = self.storage.checked_overflow(overflow)
        return commit_batch(self, batch, keys, rows, lengths, checked, sides, priorities, deadline)

    def pop(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """Remove the entry of `key` and return it; None on a miss. May block. See `get` for `to` and `stream`."""
        if stream is not None:
            with self.storage.clock.using(stream):
                return self.pop(key, scope=scope, timeout=timeout, to=to)
        deadline = self.storage.enter(timeout, self.account)

        def taken(entry: Entry) -> tuple[KeysValues, bool]:
            # Copied before it is removed: if the copy fails, the pool is as it was.
            owner = self.storage.tier if entry.scope.above is not None else None
            return copy_out(self, entry, to), remove(owner or self, entry.scope, entry, deadline)

        while (found := self._read(key, scope, deadline, taken)) is not None:
            kv, removed = found
            if removed:
                return kv
        return None

    def discard(self, key: Hashable, *, scope: Scope | None = None) -> None:
        """Have the next operation remove the entry that `key` has now, if it has one. Never blocks, takes no lock.

        This is what finalisers, `weakref` callbacks and signal handlers may call, at any point of any thread: they may
        run inside a critical section of the thread they interrupt, where `pop` raises `ReentrantCallError`. An entry
        that is stored under the key afterwards stays. Nothing happens in a pool that is closed, or a scope dropped.

        Raises:
            InvalidTypeError: `key` is not hashable. WrongProcessError.
        """
        self.storage.check_process()
        hash_of(key)
        discard(self, self._own_scope(scope), key)

    # One computation for each missing key ----------------------------------------------------------------------------

    def get_or_compute(
        self,
        key: Hashable,
        compute: Callable[[], KeysValues],
        *,
        side: object = None,
        priority: float = 0.0,
        scope: Scope | None = None,
        timeout: float | None = None,
    ) -> KeysValues:
        """The entry of `key`, computed and stored if it is missing: once, however many callers miss it together.

        Every caller gets a private copy of the one result, whether the pool kept it or not. If `compute` raises, every
        waiter hears the same error, and nothing is remembered of it: a copy of its own (type, `args`, attributes),
        whose `__cause__` is the error as it was raised; an error of a class that cannot be copied is the one object for
        all. If it is cut off (`KeyboardInterrupt`, a cancelled task), the first to wake computes instead. May block;
        runs `compute` with no lock held.

        Args:
            compute: gives one row; called in the calling thread. It may use the pool, but not ask for `key` itself.
            side, priority, scope: as in `put`.
            timeout: seconds to wait for another caller's computation.

        Raises:
            WaitTimeoutError: another caller's computation was not over in time.
            RecursiveComputationError: called from inside the computation of this very key, or of one that the present
                computation of this key waits for, perhaps through others.
            ClosedError: the pool was closed meanwhile.
            Exception: whatever `compute`, or storing its result, raised.
        """
        deadline = self.storage.enter(timeout, self.account)
        hash_of(key)
        check_compute(compute)
        within = self._scope(scope)
        found = self.get(key, scope=within, timeout=deadline.seconds)
        while found is None:
            # Read anew for every attempt: a caller that takes an abandoned computation over computes for the present
            # generation.
            joined, mine = claim(self, within, key, within.generation, side, priority)
            if mine:
                return self._compute_here(joined, key, within, compute)
            wait_in_thread(joined.flight, deadline, self.name)
            if joined.late and joined.flight.state is FlightState.DONE:
                found = self.peek(key, scope=within, timeout=deadline.left())
            else:
                found = outcome(joined, self.storage.clock, self.name)
        return found

    def _compute_here(
        self, joined: Claim, key: Hashable, scope: Scope, compute: Callable[[], KeysValues]
    ) -> KeysValues:
        """Compute a claimed key in the calling thread, and end its flight in whatever way that ends."""
        with joined, joined.computing(), heard_by_all(joined):
            # Another flight may have ended between the caller's lookup and its claim.
            joined.flight.settling = True
            kv = self.peek(key, scope=scope)
            joined.flight.settling = kv is not None
            if kv is None:
                kv = compute()
                if inspect.isawaitable(kv):
                    if inspect.iscoroutine(kv):
                        kv.close()
                    raise InvalidTypeError("compute must return a KeysValues, got an awaitable: await the async pool's")
                joined.fulfil(kv)
            else:
                joined.pass_on(kv)
        result = outcome(joined, self.storage.clock, self.name)
        assert result is not None, joined.flight.state is FlightState.DONE
        return result

    def try_claim(
        self, key: Hashable, *, side: object = None, priority: float = 0.0, scope: Scope | None = None
    ) -> Claim:
        """Who computes a missing key, for callers that must not wait: the claim's `mine` says whether the caller does.

        A claim that is `mine` is a duty: `fulfil`, `fail` or `abandon` it (leaving its `with`, or dropping it,
        abandons it). Does not look whether the key is stored.

        Raises:
            RecursiveComputationError, ClosedError: as `get_or_compute`.
        """
        # Not `_enter`: what was dropped unclosed may need a shard to be released, and this must not wait.
        self.storage.check_call()
        self.check_open()
        hash_of(key)
        found_in = self._scope(scope)
        return claim(self, found_in, key, found_in.generation, side, priority)[0]

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, side: SideCodec | None = None, timeout: float | None = None) -> Saved:
        """Write every entry of every scope, as they are at one moment, into one file. May block.

        Other threads go on meanwhile; entries of open searches are not saved. The file is written beside `path` and
        renamed when it is complete and on the disk: until then an older one is as it was. See `docs/snapshots.md`.

        Args:
            path: of the file.
            side: makes bytes of side data and back, with `encode` and `decode`; needed where there are any.
            timeout: seconds to wait for the locks. Copying and writing take as long as they take.

        Raises:
            SnapshotContentError: a key, a scope's name or side data cannot be in a file.
            SnapshotWriteError: the system said no: a full disk, say.
            ImportError: safetensors is not installed.
            WaitTimeoutError, ClosedError.
        """
        deadline = self.storage.enter(timeout, self.account)
        return save_pools(self.storage, {ALONE: self}, path, side, deadline)

    def load(
        self,
        path: str | PathLike[str],
        *,
        side: SideCodec | None = None,
        on_mismatch: str = "error",
        replace: bool = False,
        overflow: Overflow | None = None,
        timeout: float | None = None,
    ) -> Loaded:
        """Store the entries of a file that a pool's `save` wrote; all become visible at once, or none. May block.

        Slots that they share in the file are shared here, and the order in which they are evicted is the same. What the
        pool has under other keys stays. See `docs/snapshots.md`.

        Args:
            path: of the file.
            side: as in `save`, the same.
            on_mismatch: "error" where the file's dtype is another, or its entries do not fit; "convert" to round to the
                dtype of this pool, and to leave out what is too long, and the oldest of what is too much.
            replace: whether everything that the pool has goes in the same moment.
            overflow: the policy that entries were committed with whose tokens are corrected on reading.
            timeout: seconds to wait for locks and room.

        Raises:
            SnapshotDamagedError, SnapshotVersionError: the file cannot be read.
            SnapshotMismatchError: it does not go into this pool.
            OSError: there is no such file. ImportError: safetensors is not installed.
            WaitTimeoutError, ClosedError: as `put_many`.
        """
        return load_pools(
            {ALONE: self},
            self.name,
            path,
            side=side,
            on_mismatch=on_mismatch,
            replace=replace,
            overflow=overflow,
            timeout=timeout,
        )


def read_from_pool(pool: KVPool, key: Hashable, copied: Callable[[Entry], R]) -> R | None:
    """As `KVPool.get`, of a copy that `copied` makes of the entry; None on a miss."""
    found = pool._read(key, None, pool.storage.enter(None, pool.account), copied, quiet=False)
    if found is None:
        pool.count_misses(1)
    return found


def gather_part_of_pool(pool: KVPool, keys: Sequence[Hashable] | None, rows: int, *, counts: bool = True) -> Part:
    """As `KVPool.gather`, of rows that are copied together with others'; `rows` that miss where there are no keys.

    `counts`: whether they are requests in the statistics, and no requests that were counted before.
    """
    deadline = pool.storage.enter(None, pool.account)
    scope = pool._scope(None)
    generation = scope.generation
    hold = Hold("batch", [])
    lower = None if pool.storage.tier is None else Hold("read", [])
    try:
        entries: list[Entry | None] = [None] * rows
        if keys is None:
            with gate.lock, pool.ledger.mutex:
                pool.ledger.extend(hold, [])
        else:
            keys = check_keys(keys)
            hashes = list(map(hash, keys))
            located = scope.locate(hashes)
            looked_up = located, keys, hashes, {scope: generation}, deadline
            entries = retain(pool.storage, *looked_up, hold=hold, quiet=not counts, lower=lower)
            if counts:
                pool.count_misses(entries.count(None))
            if lower is not None:
                return _opened_in_both(pool, scope, generation, (hold, lower), entries, deadline, open_part)
        return open_part(pool, scope, generation, hold, entries)
    except BaseException:
        if lower is not None:
            pool.ledger.abandoned.append(lower)
        try:
            pool.ledger.release(hold)
        except BaseException:
            pool.ledger.abandoned.append(hold)
            raise
        raise


def _opened_in_both(
    pool: KVPool,
    scope: Scope,
    generation: Generation,
    holds: tuple[Hold, Hold],
    entries: list[Entry | None],
    deadline: Deadline,
    opened: Callable[..., B],
    *how: object,
) -> B:
    """What `opened` makes of entries of which some may be in the tier; they move up where there is room.

    Where it raises, the caller releases both of the `holds`.
    """
    hold, lower = holds
    tier = pool.storage.tier
    assert tier is not None
    move_up_each(tier, [pool] * len(entries), entries, hold, deadline)
    batch = opened(pool, scope, generation, hold, entries, *how)
    try:
        release_both(lower)
    except Exception:  # no memory, no frames: the next operation does it
        pool.storage.ledger.abandoned.append(lower)
    return batch
