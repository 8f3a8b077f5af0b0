"""`AsyncKVPool`: a pool for tasks."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._checks import check_compute, check_seconds, hash_of, list_or_none, listed, numbers_or_none
from ..books.allocation import Allocation
from ..books.integrity import IntegrityReport, RepairReport
from ..books.records import Scope
from ..books.stats import PoolStats, TierStats
from ..device.cuda import current_streams
from ..flights.table import Claim, FlightState
from ..flights.waiting import outcome
from ..locks.deadline import Deadline, WaitElsewhere
from ..model.kv import KeysValues
from ..model.overflow import Overflow
from ..never_copied import NeverCopied
from ..pool.batch import Batch
from ..pool.loading import claim, heard_by_all
from ..pool.pin import Pin
from ..pool.pool import KVPool
from ..pool.restoring import Loaded
from ..pool.saving import Saved
from ..snapshots.contents import SideCodec
from .awaiting import forget, gives_awaitables, remember
from .offload import (
    INLINE_BYTES,
    INLINE_ENTRIES,
    INLINE_WAIT_SECONDS,
    MAX_WORKERS,
    Offload,
    OffloadStats,
    wait_in_task,
)
from .places import has_ended_here

__all__ = ["AsyncKVPool"]

T = TypeVar("T")


class AsyncKVPool(NeverCopied):
    """A `KVPool` for tasks; the same pool may be used by threads at the same time.

    Args:
        pool: the pool.
        offload: where its operations run; made of the others if left out.
        inline_wait_seconds: how long an operation may wait for a lock on the loop's own thread.
        inline_bytes: the largest copy made on the loop's own thread.
        inline_entries: the most entries that an operation there looks up, stores or removes.
        max_workers: worker threads of each event loop for operations, and as many for sync computations (those that
            wait for another computation do not count).

    Attributes:
        sync: the pool itself, for threads, and for a `Leaf`.
    """

    instead_of_copy = "one serves any number of tasks and loops; or make another around the same pool"

    def __init__(
        self,
        pool: KVPool,
        *,
        offload: Offload | None = None,
        inline_wait_seconds: float = INLINE_WAIT_SECONDS,
        inline_bytes: int = INLINE_BYTES,
        inline_entries: int = INLINE_ENTRIES,
        max_workers: int = MAX_WORKERS,
    ) -> None:
        self.sync = pool
        self._offload = offload or Offload(
            pool.storage,
            inline_wait_seconds=inline_wait_seconds,
            inline_bytes=inline_bytes,
            inline_entries=inline_entries,
            max_workers=max_workers,
        )
        self._entry_bytes = pool.layout.bytes_per_entry
        self._on_device = pool.layout.device.type != "cpu"  # a copy to the host has to wait for it

    async def get(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """See `KVPool.get`."""
        return await self._offload.run(
            lambda seconds: self.sync.get(key, scope=scope, timeout=seconds, to=to, stream=stream),
            self._entry_bytes,
            timeout=timeout,
            waits_for_device=to is not None and self._on_device,
        )

    async def peek(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """See `KVPool.peek`."""
        return await self._offload.run(
            lambda seconds: self.sync.peek(key, scope=scope, timeout=seconds, to=to, stream=stream),
            self._entry_bytes,
            timeout=timeout,
            waits_for_device=to is not None and self._on_device,
        )

    def _comes_from_device(self, kv: object) -> bool:
        """Whether `kv` has to be copied to the host first, and the device waited for."""
        return not self._on_device and isinstance(kv, KeysValues) and not kv.keys.is_cpu

    async def side(
        self, key: Hashable, default: object = None, *, scope: Scope | None = None, timeout: float | None = None
    ) -> object:
        """See `KVPool.side`."""
        return await self._offload.run(
            lambda seconds: self.sync.side(key, default, scope=scope, timeout=seconds), timeout=timeout
        )

    async def contains(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> bool:
        """Whether `key` is stored; `in` cannot be awaited."""
        return await self._offload.run(
            lambda seconds: self.sync.contains(key, scope=scope, timeout=seconds), timeout=timeout
        )

    async def put(
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
        """See `KVPool.put`. `kv` must not be written to until this returns."""
        return await self._offload.run(
            lambda seconds: self.sync.put(
                key, kv, side=side, priority=priority, scope=scope, timeout=seconds, stream=stream
            ),
            self._entry_bytes,
            timeout=timeout,
            waits_for_device=self._comes_from_device(kv),
        )

    async def put_many(
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
        """See `KVPool.put_many`. `kv` must not be written to until this returns."""
        keys = listed(keys)
        sides, priorities = list_or_none("sides", sides), list_or_none("priorities", priorities)
        return await self._offload.run(
            lambda seconds: self.sync.put_many(
                keys, kv, sides=sides, priorities=priorities, scope=scope, timeout=seconds, stream=stream
            ),
            len(keys) * self._entry_bytes,
            len(keys),
            timeout=timeout,
            waits_for_device=self._comes_from_device(kv),
        )

    async def gather(
        self,
        keys: Sequence[Hashable],
        *,
        scope: Scope | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> Batch:
        """See `KVPool.gather`. After asyncio's own `cancel()`, `out` may still be written to for a moment."""
        keys = listed(keys)
        return await self._offload.run(
            lambda seconds: self.sync.gather(keys, scope=scope, room=room, out=out, timeout=seconds, stream=stream),
            len(keys) * self._entry_bytes,
            len(keys),
            timeout=timeout,
            undo=Batch.abandon,
        )

    async def commit(
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
        """See `KVPool.commit`."""
        keys = listed(keys)
        rows, lengths = list_or_none("rows", rows), numbers_or_none("lengths", lengths)
        sides, priorities = list_or_none("sides", sides), list_or_none("priorities", priorities)
        return await self._offload.run(
            lambda seconds: self.sync.commit(
                keys,
                batch,
                rows=rows,
                lengths=lengths,
                overflow=overflow,
                sides=sides,
                priorities=priorities,
                timeout=seconds,
                stream=stream,
            ),
            len(keys) * self._entry_bytes,
            len(keys),
            timeout=timeout,
        )

    async def pop(
        self,
        key: Hashable,
        *,
        scope: Scope | None = None,
        timeout: float | None = None,
        to: torch.device | str | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """See `KVPool.pop`."""
        return await self._offload.run(
            lambda seconds: self.sync.pop(key, scope=scope, timeout=seconds, to=to, stream=stream),
            self._entry_bytes,
            timeout=timeout,
            waits_for_device=to is not None and self._on_device,
        )

    def discard(self, key: Hashable, *, scope: Scope | None = None) -> None:
        """See `KVPool.discard`; it never waits."""
        self.sync.discard(key, scope=scope)

    async def pin(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> Pin:
        """See `KVPool.pin`; the pin itself is released without waiting."""
        return await self._offload.run(
            lambda seconds: self.sync.pin(key, scope=scope, timeout=seconds), timeout=timeout, undo=Pin.abandon
        )

    async def clear(self, scope: Scope | None = None, *, timeout: float | None = None) -> None:
        """See `KVPool.clear`; always in a worker thread, as it may have much to sweep."""
        await self._offload.in_worker_whole(partial(self.sync.clear, scope, timeout=timeout), timeout)

    async def drop_scope(self, scope: Scope | Hashable, *, timeout: float | None = None) -> int:
        """See `KVPool.drop_scope`; always in a worker thread, as it may have much to sweep."""
        return await self._offload.in_worker_whole(partial(self.sync.drop_scope, scope, timeout=timeout), timeout)

    async def bump_version(self, *, timeout: float | None = None) -> None:
        """See `KVPool.bump_version`; always in a worker thread."""
        await self._offload.in_worker_whole(partial(self.sync.bump_version, timeout=timeout), timeout)

    async def save(
        self, path: str | PathLike[str], *, side: SideCodec | None = None, timeout: float | None = None
    ) -> Saved:
        """See `KVPool.save`; always in a worker thread."""
        return await self._offload.in_worker_whole(partial(self.sync.save, path, side=side, timeout=timeout), timeout)

    async def load(
        self,
        path: str | PathLike[str],
        *,
        side: SideCodec | None = None,
        on_mismatch: str = "error",
        replace: bool = False,
        overflow: Overflow | None = None,
        timeout: float | None = None,
    ) -> Loaded:
        """See `KVPool.load`; always in a worker thread."""
        operation = partial(
            self.sync.load,
            path,
            side=side,
            on_mismatch=on_mismatch,
            replace=replace,
            overflow=overflow,
            timeout=timeout,
        )
        return await self._offload.in_worker_whole(operation, timeout)

    # One computation for each missing key ----------------------------------------------------------------------------

    async def get_or_compute(
        self,
        key: Hashable,
        compute: Callable[[], KeysValues] | Callable[[], Awaitable[KeysValues]],
        *,
        side: object = None,
        priority: float = 0.0,
        scope: Scope | None = None,
        timeout: float | None = None,
    ) -> KeysValues:
        """See `KVPool.get_or_compute`; threads, asyncio tasks and trio tasks may wait for the same computation.

        Args:
            compute: an async function, awaited in the calling task; or a function, called in a worker thread, which
                runs to its end: a scope that is cancelled waits for it, and its result counts. asyncio's own `cancel()`
                does not wait, and the result is then dropped. A function that returns an awaitable (a lambda around an
                async function) is called in a worker once; from then on in the calling task, where it must not block.
        """
        pool = self.sync
        hash_of(key)
        check_compute(compute)
        deadline = Deadline(pool.storage.wait_timeout if timeout is None else check_seconds("timeout", timeout))
        streams = current_streams()  # those of the caller, whatever other tasks do while this one waits
        found = await self._offload.run(
            lambda seconds: pool.get(key, scope=scope, timeout=seconds),
            self._entry_bytes,
            timeout=timeout,
            streams=streams,
        )
        flown_in = scope or pool.default_scope
        while found is None:
            joined, mine = claim(pool, flown_in, key, flown_in.generation, side, priority)
            if mine:
                joined.flight.loop_ended = has_ended_here()
                return await self._compute(joined, key, scope, compute, deadline, streams)
            await wait_in_task(joined.flight, deadline, pool.name)
            if joined.late and joined.flight.state is FlightState.DONE:
                found = await self._peek(key, scope, streams, deadline.left())
            else:
                found = await self._outcome(joined, streams)
        return found

    async def _compute(
        self,
        joined: Claim,
        key: Hashable,
        scope: Scope | None,
        compute: Callable[[], KeysValues] | Callable[[], Awaitable[KeysValues]],
        deadline: Deadline,
        streams: AbstractContextManager[object],
    ) -> KeysValues:
        with joined, joined.computing():
            with heard_by_all(joined):
                # Another flight may have ended between the caller's lookup and its claim.
                joined.flight.settling = True
                kv = await self._peek(key, scope, streams, None)
                joined.flight.settling = kv is not None
                if kv is not None:
                    await self._offload.copy(partial(joined.pass_on, kv), self._entry_bytes, streams)
                elif gives_awaitables(compute):
                    made = compute()
                    if inspect.isawaitable(made):
                        made = await made
                    else:
                        forget(compute)
                    await self._fulfil(joined, made, None, streams)
            if not joined.over:
                # That no worker was free in time is not heard by all: others may have more of it.
                deliver = partial(_fulfil_here, joined, compute, joined.flight.loop_ended)
                around = partial(heard_by_all, joined)
                computing = partial(_compute_here, joined, compute)
                begun = await self._offload.compute(computing, deliver, around, deadline, streams)
                if begun is not None:
                    with heard_by_all(joined):
                        await self._fulfil(joined, await begun, None, streams)
        result = await self._outcome(joined, streams)
        assert result is not None
        return result

    async def _peek(
        self, key: Hashable, scope: Scope | None, streams: AbstractContextManager[object], timeout: float | None
    ) -> KeysValues | None:
        return await self._offload.run(
            lambda seconds: self.sync.peek(key, scope=scope, timeout=seconds),
            self._entry_bytes,
            timeout=timeout,
            streams=streams,
        )

    async def _outcome(self, joined: Claim, streams: AbstractContextManager[object]) -> KeysValues | None:
        """See `outcome`."""
        copied_bytes = self._entry_bytes if joined.flight.state is FlightState.DONE else 0
        taking = partial(outcome, joined, self.sync.storage.clock, self.sync.name)
        return await self._offload.copy(taking, copied_bytes, streams)

    def try_claim(
        self, key: Hashable, *, side: object = None, priority: float = 0.0, scope: Scope | None = None
    ) -> Claim:
        """See `KVPool.try_claim`; it never blocks. (`await pool.fulfil(claim, kv)` does what `claim.fulfil` does.)"""
        return self.sync.try_claim(key, side=side, priority=priority, scope=scope)

    async def fulfil(self, claim: Claim, kv: KeysValues, *, timeout: float | None = None) -> bool:
        """See `Claim.fulfil`. If it is cancelled, the claim is still open, or was fulfilled."""
        return await self._fulfil(claim, kv, timeout, None)

    async def _fulfil(
        self, claim: Claim, kv: KeysValues, timeout: float | None, streams: AbstractContextManager[object] | None
    ) -> bool:
        return await self._offload.run(
            lambda seconds: claim.fulfil(kv, timeout=seconds),
            self._entry_bytes,
            timeout=timeout,
            waits_for_device=self._comes_from_device(kv),
            streams=streams,
        )

    # State ---------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """See `KVPool.version`."""
        return self.sync.version

    def tier_stats(self) -> TierStats | None:
        """See `KVPool.tier_stats`."""
        return self.sync.tier_stats()

    def stats(self) -> PoolStats:
        """See `KVPool.stats`; it never waits."""
        return self.sync.stats()

    def lifetime_stats(self) -> PoolStats:
        """See `KVPool.lifetime_stats`; it never waits."""
        return self.sync.lifetime_stats()

    def offload_stats(self) -> OffloadStats:
        """How many operations ran inline, and how many in worker threads."""
        return self._offload.stats()

    def reset_stats(self) -> None:
        """See `KVPool.reset_stats`; it never waits."""
        self.sync.reset_stats()

    def scope(self, name: Hashable) -> Scope:
        """See `KVPool.scope`; it never waits."""
        return self.sync.scope(name)

    def scopes(self) -> tuple[Scope, ...]:
        """See `KVPool.scopes`; it never waits."""
        return self.sync.scopes()

    def allocation(self) -> Allocation:
        """See `KVPool.allocation`; it never waits."""
        return self.sync.allocation()

    async def check_integrity(self) -> IntegrityReport:
        """See `KVPool.check_integrity`."""
        return await self._offload.in_worker_whole(self.sync.check_integrity)

    async def repair(self) -> RepairReport:
        """See `KVPool.repair`."""
        return await self._offload.in_worker_whole(self.sync.repair)

    async def keys(self, *, scope: Scope | None = None, timeout: float | None = None) -> list[Hashable]:
        """See `KVPool.keys`."""
        return await self._offload.run(
            lambda seconds: self.sync.keys(scope=scope, timeout=seconds), entries=len(self.sync), timeout=timeout
        )

    async def __aiter__(self) -> AsyncIterator[Hashable]:
        """See `KVPool.__iter__`."""
        for key in await self.keys():
            yield key

    def __len__(self) -> int:
        return len(self.sync)

    async def close(self, *, timeout: float | None = None) -> None:
        """See `KVPool.close`; finished also when the task is cancelled meanwhile."""
        await self._offload.to_the_end(partial(self.sync.close, timeout=timeout))

    async def __aenter__(self) -> AsyncKVPool:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _compute_here(claim: Claim, compute: Callable[[], Any]) -> Any:
    """Compute in a worker, which ends the flight whatever becomes of the loop."""
    claim.flight.loop_ended = None
    return compute()


def _fulfil_here(
    claim: Claim, compute: Callable[[], Any], loop_ended: Callable[[], bool] | None, made: Any, seconds: float
) -> Awaitable[KeysValues] | None:
    """Fulfil a claim in the worker that computed: a waiter must not need a loop that may have ended meanwhile.

    Returns what a function only began to compute, for the loop to await: the flight then ends with that loop again.
    """
    if inspect.isawaitable(made):
        remember(compute)
        claim.flight.loop_ended = loop_ended
        return made
    try:
        # Whose loop has ended has no task that could wait for room in its stead.
        claim.fulfil(made, timeout=float(seconds) if loop_ended is not None and loop_ended() else seconds)
    except WaitElsewhere:
        claim.flight.loop_ended = loop_ended
        raise
    return None
