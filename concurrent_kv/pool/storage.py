"""`KVStorage`: what the pools of one manager share: slots, books, locks, stream clock, and the way into operations."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol
from weakref import ref

from torch import Tensor

from .._checks import check_seconds, positive_int
from ..books.entries import Described
from ..books.integrity import IntegrityReport, Problem, RepairReport
from ..books.ledger import Ledger, wake
from ..books.records import Account, Budget, Entry, Generation, Hold, Scope
from ..books.stats import Counters
from ..device.buffers import FreeBuffers
from ..device.cuda import backend_for
from ..device.layout import KVLayout
from ..device.modes import plain_torch_state
from ..device.slot_numbers import SlotArray
from ..device.streams import StreamBackend, StreamClock, Ticks
from ..device.tensors import SlotTensor
from ..errors import ClosedError, InvalidArgumentError, WaitTimeoutError, WrongProcessError
from ..flights.table import FlightTable
from ..locks.deadline import Deadline, TaskTime
from ..locks.gate import gate
from ..locks.shards import ShardLocks, new_locks
from ..locks.signal import Signal
from ..model.overflow import Overflow, RaiseOnOverflow, check_overflow
from ..never_copied import NeverCopied

__all__ = ["Domain", "KVStorage", "LowerTier", "OpenSearch", "PoolState", "SearchCheck"]

logger = logging.getLogger("concurrent_kv")

MOST_SLOTS = 2**31 - 2  # their numbers are int32 in the tables, and there is a slot 0


_forks = 0  # between this process and the first one that imported this module


def _note_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class KVStorage(NeverCopied):
    """Token slots with their allocator, locks and stream clock. A manager has one; a `KVPool` made alone has its own.

    Args:
        layout: shapes, dtype and device of every entry.
        num_slots: slots of all pools over it together.
        headroom_slots: more slots on top, so that a write that replaces an entry needs no other entry to leave first.
        shards: lock shards, shared by the pools.
        wait_timeout: seconds that an operation waits at most, unless its own `timeout` says otherwise.
        name: what messages call it.
        lock_factory, event_factory, locks, search_locks, tensor, backend: replaceable parts, for schedulers and
            simulated devices; `search_locks` makes the one shard of a search.
    """

    _internal = frozenset(
        (
            "check_call",
            "check_process",
            "checked_overflow",
            "drain_abandoned",
            "enter",
            "enter_quietly",
            "zero_slot_is_zero",
        )
    )

    instead_of_copy = "share the one object between pools; in another process make one there"

    def __init__(
        self,
        layout: KVLayout,
        num_slots: int,
        *,
        headroom_slots: int,
        shards: int = 16,
        wait_timeout: float = 10.0,
        name: str = "storage",
        lock_factory: Callable[[], Any] = threading.Lock,
        event_factory: Callable[[], Any] = Signal,
        locks: ShardLocks | None = None,
        search_locks: Callable[[], ShardLocks] | None = None,
        tensor: SlotTensor | None = None,
        backend: StreamBackend | None = None,
    ) -> None:
        total = positive_int("num_slots", num_slots) + positive_int("headroom_slots", headroom_slots, minimum=0)
        if total > MOST_SLOTS:
            raise InvalidArgumentError(
                f"num_slots and headroom_slots together must be at most {MOST_SLOTS:,}, got {total:,} "
                f"({total * layout.bytes_per_token:,} bytes)"
            )
        self.layout = layout
        self.name = name
        self.headroom_slots = headroom_slots
        self.headroom_argument = "headroom_slots"  # what it was given by, for errors that say what would do
        self.wait_timeout = check_seconds("wait_timeout", wait_timeout)
        self.locks = locks or new_locks(positive_int("shards", shards), name=name, lock_factory=lock_factory)
        self.ledger = Ledger(total, layout.max_tokens, lock_factory=lock_factory, event_factory=event_factory)
        self.search_locks = search_locks or partial(
            new_locks, 1, name=name, lock_factory=lock_factory, contention=self.locks.contention
        )
        self.clock = StreamClock(backend or backend_for(layout.device), lock_factory)
        stream = self.clock.current()  # before anything is allocated, which a capture would take into its graph
        self.tensor = tensor or SlotTensor(layout, total, compiled=self.clock.backend is None)
        self.clock.share(self.tensor.data)
        # Zeroing the slots was a write like any other: the first use of a slot, on whatever stream, waits for it.
        self.zeroed = self.clock.stamp(stream)
        self.closed = False
        self.tier: LowerTier | None = None  # beneath its pools; set once, before the first of them is made
        self.corrects_lazily = False  # whether an entry may need corrections on reading; never again False
        self.no_overflow = RaiseOnOverflow(layout.max_tokens + 1)  # where no policy was given
        self._checked_overflow: Callable[[], Overflow | None] = lambda: None  # a weak reference: it has tensors
        self.pools: list[PoolState] = []
        self._pid, self._forks = os.getpid(), _forks

    def enter(self, timeout: float | None = None, account: Account | None = None) -> Deadline:
        """Begin an operation: checks the process and that all is open, drains what finalisers left.

        Not on an event loop's own thread, though: a search that was dropped may have thousands of entries.

        Args:
            timeout: seconds that it waits at most; `wait_timeout` if left out.
            account: that of the pool it is for.

        Raises:
            ClosedError: the storage or the pool is closed.
            WrongProcessError: this process is not the one that made the storage.
            ReentrantCallError: the calling thread is inside a critical section.
        """
        if self._forks != _forks:
            self.check_process()
        if gate.holds():
            gate.check(self.name)
        if self.closed:
            raise ClosedError(f"{self.name} is closed")
        if account is not None and account.closed:
            raise ClosedError(f"{account.name} is closed")
        if timeout is None:
            timeout = self.wait_timeout
        elif type(timeout) is not TaskTime:  # which was checked, and is more than its seconds
            timeout = check_seconds("timeout", timeout)
        deadline = Deadline(timeout)
        if self.ledger.abandoned and not deadline.on_loop:
            # Without a wait: a shard that is busy would cost this operation the time for its own.
            self.drain_abandoned(deadline.part(0.0))
        return deadline

    def enter_quietly(self, timeout: float | None = None) -> Deadline:
        """Begin a check or a close: as `enter`, on a closed storage too."""
        self.check_call()
        deadline = Deadline(self.wait_timeout if timeout is None else check_seconds("timeout", timeout))
        self.drain_abandoned(deadline)
        return deadline

    def close(self, timeout: float | None = None) -> None:
        """Free the slots once the device is done with them; every operation from now on fails with `ClosedError`.

        Raises:
            WaitTimeoutError: it still ran after `timeout` seconds; closing again finishes.
        """
        self.check_call()
        if self.tensor.freed:
            return
        seconds = self.wait_timeout if timeout is None else check_seconds("timeout", timeout)
        with gate.lock, self.ledger.mutex:
            self.closed = True
            waiters = self.ledger.take_waiters()
        wake(waiters)
        for pool in tuple(self.pools):
            pool.flights.close()
        if not self.clock.synchronize(self.clock.everything(), seconds):
            raise WaitTimeoutError(f"{self.name}: the device still used the slots after {seconds:g} s; close again")
        self.clock.drop_shared()
        self.tensor.free()
        if self.tier is not None:
            self.tier.free()

    def zero_slot_is_zero(self) -> bool:
        """Whether the slot that serves all padding is still zeros. Waits for the device."""
        stream = self.clock.current()
        self.clock.order_after(stream, self.zeroed)
        with plain_torch_state():
            return not bool(self.tensor.data[:, 0].any())

    def checked_overflow(self, overflow: Overflow | None) -> Overflow:
        """The policy, or what happens without; raises unless it is one for pools of the layout."""
        if overflow is None:
            return self.no_overflow
        if self._checked_overflow() is not overflow:
            check_overflow(overflow, self.layout)
            if overflow.corrects_lazily:
                self.corrects_lazily = True
            self._checked_overflow = ref(overflow)
        return overflow

    def check_process(self) -> None:
        """Raise `WrongProcessError` in any process but the one that made the storage.

        Before the first lock: another thread may have held it when the process was forked, and none will release it.
        """
        if self._forks != _forks:
            raise WrongProcessError(
                f"{self.name} belongs to process {self._pid} and was used in process {os.getpid()}: "
                "its locks and its memory do not survive a fork; make a new one in the child"
            )

    def check_call(self) -> None:
        """Raise `WrongProcessError` or `ReentrantCallError` where the calling thread must not take a lock."""
        self.check_process()
        gate.check(self.name)

    def drain_abandoned(self, deadline: Deadline) -> bool:
        """Release what was dropped without being closed, as far as its shards get free in time.

        Returns whether anything was released.
        """
        self.check_process()
        abandoned = self.ledger.abandoned
        released = False
        for _ in range(len(abandoned)):  # what cannot be done here, for want of memory or of frames, comes back
            # Taken off the queue when it is released, which can be done twice, and not before: an exception may arrive
            # in between.
            try:
                release = abandoned[0]
            except IndexError:  # another thread was faster
                break
            try:
                release(deadline)
                released = True
            except (WaitTimeoutError, MemoryError, RecursionError, SystemError):
                # Not this operation's business: the next one tries again, the others first. (CPython says SystemError
                # where there was no memory for a call.)
                logger.debug("%s: something dropped without being closed could not be released yet", self.name)
                abandoned.append(release)
            except Exception:
                # Of a key that can no longer be compared, say. The operation that came by has nothing to do with it.
                logger.warning("%s: something that was discarded could not be removed", self.name, exc_info=True)
            _take_off(abandoned, release)
        return released


class Domain:
    """Where operations work: a pool, over the ledger and the locks of its storage, or an open search, over its own.

    Attributes:
        account: who pays; of a search, its pool's, of which it has set its budget aside.
        ledger: the books of its entries.
        locks: the locks of its keys' shards.
        buffers: for its gathers.
    """

    _internal: ClassVar[frozenset[str]] = frozenset(("check_open", "counters", "pool"))

    def __init__(
        self, storage: KVStorage, account: Account, ledger: Ledger, locks: ShardLocks, buffers: FreeBuffers
    ) -> None:
        self.storage = storage
        self.layout = storage.layout
        self.account = account
        self.name = account.name
        self.ledger = ledger
        self.locks = locks
        self.buffers = buffers

    @property
    def pool(self) -> PoolState:
        """The pool itself, or that of the search; a tier, which is beneath all pools of its storage, has none."""
        raise NotImplementedError

    @property
    def counters(self) -> Counters:
        """What it counts."""
        return self.account.counters

    def check_open(self) -> None:
        """Raise `ClosedError` if the pool or its storage is closed, or the search has ended."""
        if self.account.closed or self.storage.closed:
            raise ClosedError(f"{self.name} is closed")


class LowerTier(Domain, ABC):
    """What the pools of a storage know of the tier beneath them: where entries go that are evicted from the pools."""

    @abstractmethod
    def add_scope(self, scope: Scope) -> None:
        """Have a place for what moves down from a pool's scope. The storage's mutex held."""

    @abstractmethod
    def forget_scope(self, scope: Scope) -> None:
        """Have none any more: the scope was dropped."""

    @abstractmethod
    def move_down(self, pool: Domain, victim: Entry, deadline: Deadline) -> bool:
        """Have a claimed victim in the tier instead of in its pool; False if it is where it was."""

    @abstractmethod
    def move_up(self, pool: Domain, entry: Entry, hold: Hold, deadline: Deadline, *, pins: int = 0) -> Entry | None:
        """Have an entry of the tier in its pool again, if that has free room just now; it joins `hold` then.

        The caller keeps `entry`, and pins it so many times.
        """

    @abstractmethod
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
        """Look up what is missing in `found`; what is there joins `hold`, of the tier's ledger. The shards held."""

    @abstractmethod
    def leave_loop_to_read(self, entries: Sequence[Entry]) -> None:
        """Raise `NotOnLoopError` on an event loop's own thread where entries are on a disk. The tier's mutex held."""

    @abstractmethod
    def drop(self, entries: Sequence[Entry], dead: list[Entry]) -> None:
        """Take entries of one scope out that are written anew; the dead join `dead`. The shards held."""

    @abstractmethod
    def read(self, entry: Entry) -> Tensor:
        """The tokens of an entry that the caller keeps: `[2 * layers, 1, heads, tokens, head_dim]`, its own."""

    @abstractmethod
    def read_rows(self, entries: Sequence[Entry | None], described: Described) -> list[tuple[int, Tensor]]:
        """The tokens of those that are in the tier, by row; `described` says of them then that no slot has them."""

    @abstractmethod
    def entries_below(self, account: Account) -> int:
        """How many entries of a pool it has. Takes no lock."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back; the storage was closed, and nothing uses it."""


class SearchCheck(NamedTuple):
    """What a recount of a search's books found."""

    problems: list[Problem]
    report: IntegrityReport
    slots: SlotArray  # those that it has, once for each place that says so


class OpenSearch(Protocol):
    """What a pool knows of an open search, which has books of its own."""

    scope: Scope
    budget: Budget

    @property
    def slots_in_use(self) -> int:
        """Slots of what it has reserved that are not free. Takes no lock."""

    @property
    def shared_slots(self) -> int:
        """Slots that several of its entries and roots name. Takes no lock."""

    def end(self, reason: str, deadline: Deadline) -> None:
        """Release everything that it holds."""

    def check(self, deadline: Deadline) -> SearchCheck:
        """Compare its books with a recount."""

    def mend(self, deadline: Deadline, used: Ticks, kept: list[object]) -> tuple[RepairReport, SlotArray]:
        """Set every count of its books as a recount finds it; or, if nobody will end it any more, note its end.

        Returns also the slots that it has then, none of which is free. What dies joins `kept`; `used` is what may
        still be read or written.
        """

    def top_up(self) -> None:
        """Take free slots of the storage until it has what it has reserved."""


class PoolState(Domain):
    """What the protocol needs to know of a pool: its storage, its account, and its computations under way."""

    def __init__(self, storage: KVStorage, account: Account) -> None:
        super().__init__(storage, account, storage.ledger, storage.locks, storage.tensor.buffers)
        # The account's own, each the same for good: an attribute, because a call under the mutex may fail.
        self.policy = account.policy
        self.searches: set[OpenSearch] = set()  # under the mutex
        self.flights = FlightTable(account.name, check_process=storage.check_process)

    @property
    def pool(self) -> PoolState:
        """Itself."""
        return self

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.account.closed


def _take_off(abandoned: deque[Callable[[Deadline], object]], release: Callable[[Deadline], object]) -> None:
    with suppress(ValueError):  # another thread released it at the same time
        abandoned.remove(release)
