"""`AsyncKVPool`: a pool for tasks."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor

from ..arguments import check_keys, hash_of, list_or_none
from ..batch import Batch
from ..entry import Scope
from ..flights import Claim, Flight, FlightState, outcome
from ..integrity import IntegrityReport, RepairReport
from ..kv import KeysValues
from ..loading import claim
from ..locks import Deadline
from ..overflow import Overflow
from ..pin import Pin
from ..pool import KVPool
from ..stats import PoolStats
from ..storage import check_seconds
from .offload import (
    INLINE_BYTES,
    INLINE_ENTRIES,
    INLINE_WAIT_SECONDS,
    MAX_WORKERS,
    Offload,
    OffloadStats,
    wait_in_task,
)

__all__ = ["AsyncKVPool"]


class AsyncKVPool:
    """A `KVPool` for tasks; the same pool may be used by threads at the same time.

    Args:
        pool: the pool.
        offload: where its operations run; made of the others if left out.
        inline_wait_seconds: how long an operation may wait for a lock on the loop's own thread.
        inline_bytes: the largest copy made on the loop's own thread.
        inline_entries: the most entries that an operation there looks up, stores or removes.
        max_workers: worker threads of each event loop for operations, and as many for sync computations (those that
            wait for another computation do not count).
    """

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

    async def get(
        self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None
    ) -> KeysValues | None:
        """See `KVPool.get`."""
        return await self._offload.run(self.sync.get, key, copied_bytes=self._entry_bytes, scope=scope, timeout=timeout)

    async def peek(
        self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None
    ) -> KeysValues | None:
        """See `KVPool.peek`."""
        return await self._offload.run(
            self.sync.peek, key, copied_bytes=self._entry_bytes, scope=scope, timeout=timeout
        )

    async def side(
        self, key: Hashable, default: object = None, *, scope: Scope | None = None, timeout: float | None = None
    ) -> object:
        """See `KVPool.side`."""
        return await self._offload.run(self.sync.side, key, default, scope=scope, timeout=timeout)

    async def contains(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> bool:
        """Whether `key` is stored; `in` cannot be awaited."""
        return await self._offload.run(self.sync.contains, key, scope=scope, timeout=timeout)

    async def put(
        self,
        key: Hashable,
        kv: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        scope: Scope | None = None,
        timeout: float | None = None,
    ) -> bool:
        """See `KVPool.put`. `kv` must not be written to until this returns."""
        return await self._offload.run(
            self.sync.put,
            key,
            kv,
            copied_bytes=self._entry_bytes,
            side=side,
            priority=priority,
            scope=scope,
            timeout=timeout,
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
    ) -> bool:
        """See `KVPool.put_many`. `kv` must not be written to until this returns."""
        keys = check_keys(keys)
        return await self._offload.run(
            self.sync.put_many,
            keys,
            kv,
            copied_bytes=len(keys) * self._entry_bytes,
            entries=len(keys),
            sides=list_or_none("sides", sides),
            priorities=list_or_none("priorities", priorities),
            scope=scope,
            timeout=timeout,
        )

    async def gather(
        self,
        keys: Sequence[Hashable],
        *,
        scope: Scope | None = None,
        room: int | None = None,
        out: Tensor | None = None,
        timeout: float | None = None,
    ) -> Batch:
        """See `KVPool.gather`. After asyncio's own `cancel()`, `out` may still be written to for a moment."""
        keys = check_keys(keys)
        return await self._offload.run(
            self.sync.gather,
            keys,
            copied_bytes=len(keys) * self._entry_bytes,
            entries=len(keys),
            undo=Batch.abandon,
            scope=scope,
            room=room,
            out=out,
            timeout=timeout,
        )

    async def commit(
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
        """See `KVPool.commit`."""
        keys = check_keys(keys)
        return await self._offload.run(
            self.sync.commit,
            keys,
            batch,
            copied_bytes=len(keys) * self._entry_bytes,
            entries=len(keys),
            rows=list_or_none("rows", rows),
            overflow=overflow,
            sides=list_or_none("sides", sides),
            priorities=list_or_none("priorities", priorities),
            timeout=timeout,
        )

    async def pop(
        self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None
    ) -> KeysValues | None:
        """See `KVPool.pop`."""
        return await self._offload.run(self.sync.pop, key, copied_bytes=self._entry_bytes, scope=scope, timeout=timeout)

    async def pin(self, key: Hashable, *, scope: Scope | None = None, timeout: float | None = None) -> Pin:
        """See `KVPool.pin`; the pin itself is released without waiting."""
        return await self._offload.run(self.sync.pin, key, undo=Pin.abandon, scope=scope, timeout=timeout)

    async def clear(self, scope: Scope | None = None, *, timeout: float | None = None) -> None:
        """See `KVPool.clear`; always in a worker thread, as it may have much to sweep."""
        await self._offload.in_worker_whole(partial(self.sync.clear, scope, timeout=timeout))

    async def bump_version(self, *, timeout: float | None = None) -> None:
        """See `KVPool.bump_version`; always in a worker thread."""
        await self._offload.in_worker_whole(partial(self.sync.bump_version, timeout=timeout))

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
            compute: an async function, awaited in the calling task; or a function, called in a worker thread.
        """
        pool = self.sync
        hash_of(key)
        deadline = Deadline(pool.storage.wait_timeout if timeout is None else check_seconds("timeout", timeout))
        found = await self.get(key, scope=scope)
        flown_in = scope or pool.default_scope
        while found is None:
            joined, mine = claim(pool, flown_in, key, flown_in.generation, side, priority)
            if mine:
                return await self._compute(joined, key, scope, compute)
            await wait_in_task(joined.flight, deadline, pool.name)
            if joined.late and joined.flight.state is FlightState.DONE:
                found = await self.peek(key, scope=scope)
            else:
                found = await self._outcome(joined.flight)
        return found

    async def _compute(
        self,
        joined: Claim,
        key: Hashable,
        scope: Scope | None,
        compute: Callable[[], KeysValues] | Callable[[], Awaitable[KeysValues]],
    ) -> KeysValues:
        with joined, joined.computing():
            try:
                # Another flight may have ended between the caller's lookup and its claim.
                joined.flight.settling = True
                kv = await self.peek(key, scope=scope)
                if kv is None:
                    joined.flight.settling = False
                    made: Any = (
                        compute() if inspect.iscoroutinefunction(compute) else await self._offload.compute(compute)
                    )
                    kv = await made if inspect.isawaitable(made) else made
                    await self.fulfil(joined, kv)
                else:
                    await self._offload.copy(partial(joined.pass_on, kv), self._entry_bytes)
            except Exception as error:
                if not joined.over:
                    joined.fail(error)
                raise
        result = await self._outcome(joined.flight)
        assert result is not None
        return result

    async def _outcome(self, flight: Flight) -> KeysValues | None:
        """See `outcome`."""
        copied_bytes = self._entry_bytes if flight.state is FlightState.DONE else 0
        return await self._offload.copy(partial(outcome, flight, self.sync.storage.clock, self.sync.name), copied_bytes)

    def try_claim(
        self, key: Hashable, *, side: object = None, priority: float = 0.0, scope: Scope | None = None
    ) -> Claim:
        """See `KVPool.try_claim`; it never blocks. (`await pool.fulfil(claim, kv)` does what `claim.fulfil` does.)"""
        return self.sync.try_claim(key, side=side, priority=priority, scope=scope)

    async def fulfil(self, claim: Claim, kv: KeysValues, *, timeout: float | None = None) -> bool:
        """See `Claim.fulfil`. If it is cancelled, the claim is still open, or was fulfilled."""
        return await self._offload.run(claim.fulfil, kv, copied_bytes=self._entry_bytes, timeout=timeout)

    # State ---------------------------------------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """See `KVPool.stats`; it never waits."""
        return self.sync.stats()

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

    async def check_integrity(self) -> IntegrityReport:
        """See `KVPool.check_integrity`."""
        return await self._offload.in_worker_whole(self.sync.check_integrity)

    async def repair(self) -> RepairReport:
        """See `KVPool.repair`."""
        return await self._offload.in_worker_whole(self.sync.repair)

    async def keys(self, *, scope: Scope | None = None, timeout: float | None = None) -> list[Hashable]:
        """See `KVPool.keys`."""
        return await self._offload.run(self.sync.keys, entries=len(self.sync), scope=scope, timeout=timeout)

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
