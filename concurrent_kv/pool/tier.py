"""`HostTier`: room in host memory, and on a disk, beneath the pools of a storage; how entries move down, and up again.

An entry is in the pool's index or in the tier's, and each move is one step under the write lock of the key's shard.
`docs/tiers.md` says what is promised, and why that holds.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .._checks import positive_int
from ..books.entries import Described
from ..books.eviction import LRU
from ..books.index import Index, find_in
from ..books.integrity import IntegrityReport, Problem, compare, compare_accounts, recount_of, scopes_of
from ..books.ledger import Ledger, wake
from ..books.records import CLAIMED, HELD, NO_PLACE, PINNED, Account, Entry, Generation, Hold, Scope, parts_below
from ..books.stats import TierStats
from ..books.tables import slots_of_row, weights_of
from ..device.host_slots import HostSlots
from ..device.layout import KVLayout
from ..device.paged_slots import PagedSlots
from ..device.slot_numbers import SlotArray, as_array
from ..device.streams import NO_TICKS, Ticks, merge
from ..errors import InvalidArgumentError, InvalidTypeError, WaitTimeoutError, shown
from ..locks.deadline import Deadline, NotOnLoopError, caller
from ..locks.gate import gate
from .clearing import take_out
from .room import evict_next, unpublish
from .storage import MOST_SLOTS, Domain, KVStorage, LowerTier

__all__ = [
    "DiskTier",
    "HostTier",
    "Tier",
    "check_tier",
    "disk_bytes",
    "move_up_each",
    "put_beneath",
    "release_both",
    "tier_bytes",
    "tier_of",
]

logger = logging.getLogger("concurrent_kv")

QUIET_SECONDS = 10.0  # between two warnings of entries that are dropped
SHARD_SECONDS = 0.02  # that a read waits for a shard to move an entry up; the tier has it anyway


@dataclass(frozen=True)
class DiskTier:
    """A file on a disk, for `behind=` of a `HostTier`: what that has no memory for.

    The file has no name, and is gone when the pool is closed or the process ends, however it ends: a crash leaves
    nothing behind, and a later process begins with an empty tier. (What is to be there again is for `save` and `load`.)
    Needs a system with `os.preadv`: Linux, or macOS from 11 on.

    Args:
        path: a folder that can be written to, on the disk that is to have the file.
        max_bytes: what the file takes on the disk, from when the pool is made: what the tokens of the whole tier take,
            as those in host memory have their place in it, too.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that cannot work, by name.
    """

    path: str | os.PathLike[str]
    max_bytes: int

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise InvalidTypeError(f"path must be a str or a path, got {type(self.path).__name__}")
        positive_int("max_bytes", self.max_bytes)
        if not hasattr(os, "preadv"):
            raise InvalidArgumentError("a DiskTier needs a system that has os.preadv, which this one has not")


@dataclass(frozen=True)
class HostTier:
    """A tier in host memory, for `tier=` of a pool or a manager. Allocated whole, when that is made.

    Args:
        max_bytes: the most that its tokens take; one full window at least.
        pinned: whether the memory is page-locked, so that copies from and to a GPU run by themselves; it is, where the
            pool is on a GPU, if left out. On a CPU it makes no difference.
        behind: a `DiskTier`, for what has no room in the memory any more; it is lost if left out.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that cannot work, by name.
    """

    max_bytes: int
    pinned: bool | None = None
    behind: DiskTier | None = None

    def __post_init__(self) -> None:
        positive_int("max_bytes", self.max_bytes)
        if self.pinned is not None and type(self.pinned) is not bool:
            raise InvalidTypeError(f"pinned must be True, False or None, got {shown(self.pinned)}")
        if self.behind is None:
            return
        if not isinstance(self.behind, DiskTier):
            raise InvalidTypeError(f"behind must be a DiskTier or None, got {type(self.behind).__name__}")
        if self.behind.max_bytes <= self.max_bytes:
            raise InvalidArgumentError(
                f"max_bytes of the DiskTier must be more than the {self.max_bytes} of the memory before it, as what is "
                f"there has its place in the file too, got {self.behind.max_bytes}"
            )

    def slots(self, layout: KVLayout) -> int:
        """How many tokens the tier has room for, in memory or on the disk."""
        slots = self.memory_slots(layout)
        if self.behind is not None:
            slots = self.behind.max_bytes // layout.bytes_per_token
        if slots > MOST_SLOTS:
            raise InvalidArgumentError(
                f"max_bytes of a tier must be at most {MOST_SLOTS * layout.bytes_per_token:,}, which is {MOST_SLOTS:,} "
                f"tokens of {layout.bytes_per_token} bytes, got room for {slots:,}"
            )
        return slots

    def memory_slots(self, layout: KVLayout) -> int:
        """How many tokens fit into its memory at once, or an error if that is less than a window."""
        slots = self.max_bytes // layout.bytes_per_token
        if slots < layout.max_tokens:
            raise InvalidArgumentError(
                f"max_bytes of a tier must be room for one window of {layout.max_tokens} tokens, "
                f"{layout.bytes_per_entry} bytes, got {self.max_bytes}"
            )
        return slots


def tier_of(tier: object) -> HostTier | None:
    """`tier` if it is one, or None."""
    if tier is not None and not isinstance(tier, HostTier):
        hint = "; HostTier(max_bytes, behind=DiskTier(...)) has both" if isinstance(tier, DiskTier) else ""
        raise InvalidTypeError(f"tier must be a HostTier or None, got {type(tier).__name__}{hint}")
    return tier


def tier_bytes(tier: object, layout: KVLayout) -> int:
    """Bytes of host memory that a tier takes; 0 for None."""
    checked = tier_of(tier)
    if checked is None:
        return 0
    checked.slots(layout)
    return (checked.memory_slots(layout) + 1) * layout.bytes_per_token


def disk_bytes(tier: object, layout: KVLayout) -> int:
    """Bytes that the file behind a tier takes; 0 without one."""
    checked = tier_of(tier)
    return 0 if checked is None or checked.behind is None else checked.slots(layout) * layout.bytes_per_token


def put_beneath(storage: KVStorage, tier: HostTier) -> None:
    """Have a tier beneath a storage, over which no pool was made yet."""
    made = Tier(storage, tier)
    with gate.lock, storage.ledger.mutex:
        if storage.pools or storage.tier is not None:
            raise InvalidArgumentError(f"tier must be put beneath {storage.name} once, before its first pool is made")
        storage.ledger.copies = np.zeros(storage.ledger.num_slots + 1, dtype=np.int64)
        storage.tier = made


class _Way:
    """An entry on its way: the new one in the other ledger, and what has to be copied for it.

    Attributes:
        made: the new entry, with its slots, of which the index has a reference already.
        source, target: slots that are copied, and those that they are copied to.
        shares: whether the other ledger had some of the tokens already.
        spent: whether it has arrived, or perhaps: what is cut off then is for repair, and no slot is given back.
    """

    spent = False

    def __init__(self, made: Entry, source: SlotArray, target: SlotArray, shares: bool) -> None:
        self.made = made
        self.source = source
        self.target = target
        self.shares = shares


class Tier(LowerTier):
    """The tier beneath a storage: slots, books and an account of its own, and its scopes beside those of the pools.

    Args:
        storage: whose pools' entries move down; its lock shards guard the tier's index too.
        settings: how large it is, and in which memory.
    """

    def __init__(self, storage: KVStorage, settings: HostTier) -> None:
        layout = storage.layout
        ledger = storage.ledger.beneath(settings.slots(layout))
        account = Account(
            f"{storage.name}'s tier", sys.maxsize, ledger.num_slots, ledger.tables, LRU(capacity=ledger.num_slots)
        )
        super().__init__(storage, account, ledger, storage.locks, storage.tensor.buffers)
        on_gpu = storage.clock.backend is not None
        pinned = on_gpu and settings.pinned is not False
        self.host: HostSlots | PagedSlots
        if settings.behind is None:
            self.host = HostSlots(layout, ledger.num_slots, pinned=pinned)
        else:
            self.host = PagedSlots(
                layout,
                ledger.num_slots,
                settings.memory_slots(layout),
                _folder_of(settings.behind),
                storage.clock,
                storage.wait_timeout,
                self._are_named,
                pinned=pinned,
                lock=ledger.lock_factory(),
            )
        ledger.copies = np.zeros(ledger.num_slots + 1, dtype=np.int64)
        # Of all copies so far into the tier, and out of it: what shares slots with earlier ones comes after those.
        self._stored: Ticks = NO_TICKS  # under the tier's mutex
        self._raised: Ticks = NO_TICKS
        self._quiet_until = 0.0  # of the log, in seconds of the monotonic clock

    def _are_named(self, slots: SlotArray) -> npt.NDArray[np.bool_]:
        with gate.lock, self.ledger.mutex:
            return weights_of(self.ledger.tables, slots) > 0

    # Scopes --------------------------------------------------------------------------------------------------------

    def add_scope(self, scope: Scope) -> None:
        """See `LowerTier`. The storage's mutex held."""
        below = Scope(self.account, scope.name, scope.shards)
        below.above, below.generation = scope, scope.generation
        with gate.lock, self.ledger.mutex:
            self.account.scopes[scope.number] = below
        scope.below = below

    def forget_scope(self, scope: Scope) -> None:
        """See `LowerTier`."""
        with gate.lock, self.ledger.mutex:
            self.account.scopes.pop(scope.number, None)

    # Both ways -----------------------------------------------------------------------------------------------------

    def _copy(
        self, ledger: Ledger, entry: Entry, way: _Way, copy: Callable[[], tuple[Tensor, ...]], written: Ticks
    ) -> None:
        """Copy what a move has to, in the caller's stream: after `written`, and every earlier use of the slots taken.

        `ledger` is that of the entry, which is read.
        """
        if not len(way.source):
            return
        clock, made = self.storage.clock, way.made
        if clock.backend is None:
            copy()
            return
        stream = clock.current()
        clock.order_after(stream, merge(made.ticks, written))
        temporaries: tuple[Tensor, ...] = ()
        try:
            temporaries = copy()
        finally:
            done = clock.stamp(stream, temporaries)
            made.written = merge(made.written, done)
            made.ticks = merge(made.ticks, done)
            with gate.lock, ledger.mutex:
                ledger.stamp_reads([entry], done)

    # Down ----------------------------------------------------------------------------------------------------------

    def move_down(self, pool: Domain, victim: Entry, deadline: Deadline) -> bool:
        """See `LowerTier`. Never waits for room, and fails only as the eviction itself would."""
        below = victim.scope.below
        if victim.correction is not None or below is None:
            return False
        if deadline.on_loop and self.host.may_block_to_store(victim.length):
            deadline.leave_loop(self.name)
        hold = Hold("read", [])
        try:
            made = _copy_of(victim, below)
            with gate.lock, pool.ledger.mutex:
                if _is_over(victim):
                    return True
                pool.ledger.extend(hold, [victim])
            way = self._room_for(pool, victim, made, deadline)
            if isinstance(way, bool):
                return way
            is_over = False
            try:
                self._copy_down(pool, victim, way)
                self._publish_down(pool, victim, way, deadline)
                is_over = True
            except WaitTimeoutError:  # the victim's shard is busy
                raise
            except Exception as error:  # the device, memory, a disk: the victim goes as without a tier
                self._log_drop(error)
            finally:
                if not way.spent:
                    # Made here: where this fails too, the next operation does it.
                    cancel = partial(self.ledger.again, [partial(self.ledger.let_go, [way.made])])
                    try:
                        cancel(Deadline(0.0))
                    except Exception:
                        self.ledger.abandoned.append(cancel)
            return is_over
        finally:
            try:
                pool.ledger.release(hold)
            except BaseException:
                pool.ledger.abandoned.append(hold)
                raise

    def _log_drop(self, error: Exception) -> None:
        """Say that an entry is dropped; not for each of many, and not where the storage is being closed."""
        now = time.monotonic()
        if not self.storage.closed and now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            logger.warning("%s: an entry could not be copied, and is dropped", self.name, exc_info=error)

    def _room_for(self, pool: Domain, victim: Entry, made: Entry, deadline: Deadline) -> _Way | bool:
        """Room in the tier for a victim; its oldest go for it. False if it cannot be had, True if it is not wanted."""
        while True:
            with gate.lock, pool.ledger.mutex, self.ledger.mutex:
                if _is_over(victim):
                    return True
                way = _enter(pool.ledger, self.ledger, victim, made)
                if way is not None and way.shares:
                    made.written = self._stored
            if way is not None:
                return way
            if not evict_next(self, deadline):
                return False

    def _copy_down(self, pool: Domain, victim: Entry, way: _Way) -> None:
        store = partial(self.host.store, self.storage.tensor, way.source, way.target)
        self._copy(pool.ledger, victim, way, store, victim.written)

    def _publish_down(self, pool: Domain, victim: Entry, way: _Way, deadline: Deadline) -> None:
        """The move itself, or nothing if the victim is none any more."""
        scope, ledger = victim.scope, pool.ledger
        part = scope.part_of(victim.key_hash)
        dead: list[Entry] = []
        over: list[Entry] = []
        below = way.made.scope
        with gate.lock, self.locks.write((scope.shards[part],), deadline):
            # A write of the key left these, where it had no memory to take them out. One of two would hide the other.
            over += below.entries[part].chosen_of(victim.key_hash, lambda old: old.generation is not below.generation)
            if over:
                take_out(self, below.entries[part], over, dead)
            with gate.lock, ledger.mutex, self.ledger.mutex:
                dead += self._exchange_down(pool, victim, way, part)
        # Who waits for the room is woken when the caller lets go of the victim, which is when its slots are free.
        del dead, over

    def _exchange_down(self, pool: Domain, victim: Entry, way: _Way, part: int) -> list[Entry]:
        """The step itself; returns what may die. Mutex and shards held."""
        scope, ledger = victim.scope, pool.ledger
        dead: list[Entry] = []
        if _is_over(victim) or not scope.entries[part].holds(victim):
            return dead
        # What a clear or the end of its scope is about to sweep is swept here: the tier comes after the pool.
        stored = merge(self._stored, way.made.written)
        self._admit(self, way, part, scope.entries[part], victim)
        self._stored = stored
        counters = pool.account.counters
        counters.eviction_count += 1
        counters.move_down_count += 1
        try:
            _note_copies(ledger, self.ledger, way)
        except Exception:
            dead = []  # no memory, no frames: the two are not known to be the same
        try:
            dead = unpublish(pool, [victim])
        except Exception:
            ledger.abandoned.append(partial(ledger.again, [partial(unpublish, pool, [victim])]))
        return dead

    @staticmethod
    def _admit(domain: Domain, way: _Way, part: int, leaving: Index[Entry], entry: Entry) -> None:
        """Have what was made in its own index, and `entry` no longer in `leaving`. Mutex and shards held.

        All of it, or nothing where it raises. What is cut off from outside, perhaps after the effect, is for repair.
        """
        account, made = domain.account, way.made
        account.uses.add([made.row])
        try:
            account.policy.add(made)
            try:
                way.spent = True
                if not leaving.move(entry, made, made.scope.entries[part]):
                    raise LookupError("an entry that was there is not")
            except Exception:
                way.spent = False
                try:
                    account.policy.remove(made)
                except Exception:  # no memory, no frames: a little later
                    domain.ledger.abandoned.append(partial(domain.ledger.again, [partial(account.policy.remove, made)]))
                raise
        except Exception:
            rows = [made.row]
            try:
                account.uses.remove(rows)
            except Exception:  # as above
                domain.ledger.abandoned.append(partial(domain.ledger.again, [partial(account.uses.remove, rows)]))
            raise
        made.place = HELD
        account.entries += 1

    # Up ------------------------------------------------------------------------------------------------------------

    def move_up(self, pool: Domain, entry: Entry, hold: Hold, deadline: Deadline, *, pins: int = 0) -> Entry | None:
        """See `LowerTier`. Evicts nothing, and waits for no room."""
        scope = entry.scope.above
        if scope is None:
            return None
        made = _copy_of(entry, scope)
        way = self._free_room_for(pool, entry, made, pins)
        if way is None:
            return None
        try:
            self._copy_up(entry, way)
            if self._publish_up(pool, entry, way, hold, deadline, pins):
                return made
        except WaitTimeoutError:  # the shard is busy
            return None
        finally:
            if not way.spent:
                cancel = partial(pool.ledger.again, [partial(_give_back, pool.account, pool.ledger, made)])
                try:
                    cancel(Deadline(0.0))
                except Exception:  # no memory, no frames: the next operation does it
                    pool.ledger.abandoned.append(cancel)
        return None

    def _free_room_for(self, pool: Domain, entry: Entry, made: Entry, pins: int) -> _Way | None:
        """Free room in the pool, that no operation waits for."""
        account, ledger = pool.account, pool.ledger
        with gate.lock, ledger.mutex, self.ledger.mutex:
            # A shared token may leave the quota meanwhile: room for all of them.
            if len(account.turns) or entry.place is NO_PLACE or not account.fits(1, entry.length):
                return None
            if entry.pins > pins:
                return None
            pending = account.pending_entries + 1, account.pending_slots + entry.length
            way = _enter(self.ledger, ledger, entry, made)
            if way is not None:
                account.pending_entries, account.pending_slots = pending
                if way.shares:
                    made.written = merge(entry.written, self._raised)
            return way

    def _copy_up(self, entry: Entry, way: _Way) -> None:
        restore = partial(self.host.restore, way.source, self.storage.tensor, way.target)
        self._copy(self.ledger, entry, way, restore, merge(entry.written, self.storage.zeroed))

    def _publish_up(self, pool: Domain, entry: Entry, way: _Way, hold: Hold, deadline: Deadline, pins: int) -> bool:
        """The move itself; False, with nothing changed, if the tier's entry is not the one of its key any more."""
        below, made, ledger = entry.scope, way.made, pool.ledger
        scope, account = made.scope, pool.account
        part = below.part_of(entry.key_hash)
        dead: list[Entry] = []
        waiters: list[Any] = []
        soon = deadline.part(SHARD_SECONDS)
        with gate.lock, self.locks.write((below.shards[part],), soon), ledger.mutex, self.ledger.mutex:
            if (
                entry.pins > pins
                or scope.ended is not None
                or entry.generation is not scope.generation
                or not below.entries[part].holds(entry)
            ):
                return False
            raised = merge(self._raised, made.written)
            ledger.extend(hold, [made])
            try:
                self._admit(pool, way, part, below.entries[part], entry)
            except Exception:
                hold.entries.remove(made)
                made.refs -= 1
                made.pins -= hold.pinning
                raise
            self._raised = raised
            account.pending_entries -= 1
            account.pending_slots -= entry.length
            account.counters.move_up_count += 1
            self.account.counters.removal_count += 1
            try:
                _note_copies(self.ledger, ledger, way)
            except Exception:
                dead = []  # no memory, no frames: the two are not known to be the same
            try:
                dead = unpublish(self, [entry])
            except Exception:
                again = partial(self.ledger.again, [partial(unpublish, self, [entry])])
                self.ledger.abandoned.append(again)
            # Who found nothing to evict while the room was taken can evict this.
            waiters = ledger.take_waiters()
        wake(waiters)
        del dead
        return True

    # Reading ---------------------------------------------------------------------------------------------------------

    def look_up(
        self,
        scopes: list[Scope],
        keys: list[Hashable],
        hashes: list[int],
        generations: dict[Scope, Generation],
        found: list[Entry | None],
        hold: Hold,
        *,
        quiet: bool,
    ) -> None:
        """See `LowerTier`. The shards held."""
        rows = [row for row, entry in enumerate(found) if entry is None and scopes[row].below is not None]
        below = parts_below([scopes[row] for row in rows], [hashes[row] for row in rows])
        in_tier = find_in(below, [keys[row] for row in rows], [hashes[row] for row in rows])
        hits: list[Entry] = []
        counted: dict[Account, int] = {}
        for row, entry in zip(rows, in_tier, strict=True):
            scope = scopes[row]
            if entry is not None and entry.generation is generations[scope]:
                found[row] = entry
                hits.append(entry)
                counted[scope.account] = counted.get(scope.account, 0) + 1
        if not hits:
            return
        with gate.lock, self.ledger.mutex:
            self.leave_loop_to_read(hits)
            self.ledger.extend(hold, hits)
            if not quiet:
                self._touch(hits)
        if not quiet:
            with gate.lock, self.storage.ledger.mutex:
                _count_hits(counted)

    def leave_loop_to_read(self, entries: Sequence[Entry]) -> None:
        """See `LowerTier`. Mutex held."""
        runs_for = caller.get()
        if runs_for is None or runs_for.steps_on_loop is None:
            return
        for entry in entries:
            if self.host.may_block_to_load(slots_of_row(self.ledger.tables, entry.row)):
                raise NotOnLoopError(f"{self.name}: what is on a disk is read by a worker")

    def _touch(self, entries: list[Entry]) -> None:
        """Note hits with the policy. Mutex held."""
        for entry in entries:
            if entry.place is HELD:
                self.account.policy.touch(entry)

    def read(self, entry: Entry) -> Tensor:
        """See `LowerTier`."""
        slots = slots_of_row(self.ledger.tables, entry.row).copy()
        clock = self.storage.clock
        if clock.backend is None:
            return self.host.load(slots)[0]
        stream = clock.current()
        clock.order_after(stream, entry.written)
        temporaries: tuple[Tensor, ...] = ()
        try:
            row, temporaries = self.host.load(slots)
        finally:
            read = clock.stamp(stream, temporaries)
            with gate.lock, self.ledger.mutex:
                self.ledger.stamp_reads([entry], read)
        return row

    def read_rows(self, entries: Sequence[Entry | None], described: Described) -> list[tuple[int, Tensor]]:
        """See `LowerTier`."""
        found: list[tuple[int, Tensor]] = []
        read: dict[Entry, Tensor] = {}
        for row, entry in enumerate(entries):
            if entry is not None and entry.scope.above is not None:
                if entry not in read:
                    read[entry] = self.read(entry)
                described[0][row] = 0
                found.append((row, read[entry]))
        return found

    # Removing --------------------------------------------------------------------------------------------------------

    def drop(self, entries: Sequence[Entry], dead: list[Entry]) -> None:
        """See `LowerTier`. The shards held."""
        for entry in entries:
            index = entry.scope.entries[entry.scope.part_of(entry.key_hash)]
            take_out(self, index, [entry], dead)

    def free(self) -> None:
        """See `LowerTier`."""
        self.host.free()

    # State -----------------------------------------------------------------------------------------------------------

    def entries_below(self, account: Account) -> int:
        """How many entries of a pool it has. Takes no lock."""
        scopes = tuple(account.scopes.values())
        return sum(len(part) for scope in scopes if scope.below is not None for part in scope.below.entries)

    def stats(self) -> TierStats:
        """One moment of it."""
        ledger, per_slot, host = self.ledger, self.layout.bytes_per_token, self.host
        memory_slots, written, read = ledger.num_slots, 0, 0
        if isinstance(host, PagedSlots):
            memory_slots, written, read = host.num_frames, host.written_count, host.read_count
        with gate.lock, ledger.mutex_for_numbers():
            used, counters = self.account.slots, self.account.counters
            return TierStats(
                entries=self.account.entries,
                slots_in_use=used,
                max_slots=ledger.num_slots,
                bytes_in_use=used * per_slot,
                max_bytes=ledger.num_slots * per_slot,
                shared_slots=ledger.tables.shared,
                eviction_count=counters.eviction_count,
                removal_count=counters.removal_count,
                memory_slots=memory_slots,
                disk_written_count=written,
                disk_read_count=read,
            )


def _folder_of(tier: DiskTier) -> str:
    """Where it has its file, or an error if none can be written there."""
    folder = os.fspath(tier.path)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidArgumentError(f"path must be a folder that can be written to, got {folder!r}")
    return folder


def _is_over(victim: Entry) -> bool:
    """Whether a claimed victim is none any more: it is pinned, and set aside, or has left the index. Mutex held."""
    if victim.pins and victim.place is CLAIMED:
        victim.place = PINNED
    return victim.place is not CLAIMED


def _copy_of(entry: Entry, scope: Scope) -> Entry:
    """What an entry becomes in another scope: of the same write, in another ledger."""
    made = Entry(
        entry.key, scope, entry.generation, entry.length, entry.side, entry.priority, entry.key_hash, entry.correction
    )
    made.index_key = entry.index_key
    line = getattr(entry, "line", None)
    if line is None:
        line = entry.line = object()
    made.line = line
    return made


def _enter(ledger: Ledger, other: Ledger, entry: Entry, made: Entry) -> _Way | None:
    """Slots in another ledger for an entry: those that have its tokens already, and free ones. Both mutexes held.

    None, with nothing changed, where too few are free.
    """
    copies, back = ledger.copies, other.copies
    assert copies is not None
    assert back is not None
    slots = slots_of_row(ledger.tables, entry.row)
    there = copies[slots]
    missing = (there == 0) | (back[there] != slots)
    source = slots[missing]
    taken = other.slots.allocate(len(source))
    if taken is None:
        return None
    try:
        target = as_array(taken.slots).copy()
        there[missing] = target
        positions = np.frombuffer(ledger.tables.positions(slots), dtype=np.int32).astype(np.int64)
        way = _Way(made, source, target, len(source) < len(slots))
        other.make([made], [0], [0], [len(slots)], there, positions)
    except Exception:
        other.slots.give_back(taken.slots, taken.ticks)
        raise
    made.ticks = taken.ticks
    return way


def _note_copies(ledger: Ledger, other: Ledger, way: _Way) -> None:
    """Note which slots have the same bytes from now on. Both mutexes held."""
    if ledger.copies is not None and other.copies is not None:
        ledger.copies.put(way.source, way.target)
        other.copies.put(way.target, way.source)


def _give_back(account: Account, ledger: Ledger, made: Entry) -> list[Entry]:
    """Give back what was taken in a pool for an entry that is not published; returns it. Mutex held."""
    dead = ledger.let_go([made])
    account.pending_entries -= 1
    account.pending_slots -= made.length
    return dead


def _count_hits(counted: dict[Account, int]) -> None:
    """Note hits that were found in the tier. The storage's mutex held."""
    for account, number in counted.items():
        account.counters.hit_count += number
        account.counters.tier_hit_count += number


def release_both(*holds: Hold) -> None:
    """Release holds of the storage's ledger and of its tier's, as far as they were registered.

    Where it raises, the caller leaves all of them to the next operation: nothing happens the second time.
    """
    for hold in holds:
        hold(Deadline(0.0))


def move_up_each(
    tier: LowerTier, pools: Sequence[Domain], entries: list[Entry | None], hold: Hold, deadline: Deadline
) -> None:
    """Have those of some entries that are in the tier in their pools again, as far as there is room.

    `entries` has what they are there, which `hold` holds too.
    """
    moved: dict[Entry, Entry | None] = {}
    for row, entry in enumerate(entries):
        if entry is None or entry.scope.above is None:
            continue
        if entry not in moved:
            moved[entry] = tier.move_up(pools[row], entry, hold, deadline)
        entries[row] = moved[entry] or entry


def check_tier(tier: LowerTier) -> tuple[list[Problem], IntegrityReport]:
    """What contradicts a recount of a tier, and what it counted. All locks held."""
    recount = recount_of(tier.ledger, scopes_of([tier.account]))
    problems, report = compare(tier.ledger, recount)
    problems += compare_accounts(tier.ledger, recount)
    return problems, report
