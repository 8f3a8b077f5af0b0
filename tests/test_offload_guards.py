"""Each guard of the facade taken out: what the guard makes harmless then goes wrong, every time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from concurrent_kv import (
    AsyncKVPool,
    KeysValues,
    KVPool,
    RecursiveComputationError,
    WaitTimeoutError,
)
from concurrent_kv.aio import offload
from concurrent_kv.aio import pool as aio_pool
from concurrent_kv.aio.offload import INLINE_WAIT_SECONDS, Offload
from concurrent_kv.flights.table import Claim, Flight, Waker
from concurrent_kv.flights.waiting import wait_in_thread
from concurrent_kv.locks.deadline import Deadline
from tests.async_support import LOOPS, SeenPool, run_on, shards_held
from tests.flight_support import counted_waiters
from tests.guards import patience, shown_by
from tests.support import LAYOUT, tokens
from tests.threading_support import JOIN_SECONDS, Background

# --- where an operation runs -----------------------------------------------------------------------------------------


def whether_a_loop_waits_for_a_shard_on_its_own_thread() -> object:
    pool = SeenPool()
    pool.storage.wait_timeout = patience()
    aio = AsyncKVPool(pool)
    ended: list[object] = []

    async def get() -> None:
        with suppress(WaitTimeoutError):
            await aio.get("key")
        ended.append(None)

    async def main() -> int:
        with shards_held(pool) as let_go:
            async with anyio.create_task_group() as group:
                group.start_soon(get)
                while not ended and not aio.offload_stats().worker_count:
                    await anyio.lowlevel.checkpoint()
                let_go()
        return threading.get_ident()

    return pool.seen_locks.longest_wait[run_on("asyncio", main)] > INLINE_WAIT_SECONDS


def waiting_inline_for_as_long_as_it_takes(patch: pytest.MonkeyPatch) -> None:
    init = Offload.__init__

    def unbounded(self: Offload, *arguments: Any, **settings: Any) -> None:
        init(self, *arguments, **{**settings, "inline_wait_seconds": JOIN_SECONDS})

    patch.setattr(Offload, "__init__", unbounded)


def test_an_inline_wait_without_a_bound_would_hold_the_loop_for_a_shard() -> None:
    shown_by(whether_a_loop_waits_for_a_shard_on_its_own_thread, False, waiting_inline_for_as_long_as_it_takes)


def whether_a_large_copy_is_made_on_the_loops_thread() -> object:
    pool = SeenPool()
    aio = AsyncKVPool(pool, inline_bytes=pool.layout.bytes_per_entry - 1)

    async def main() -> int:
        await aio.put("key", tokens(1, 3))
        await aio.get("key")
        return threading.get_ident()

    return run_on("asyncio", main) in pool.seen.copied_in


def copying_whatever_it_costs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Offload, "_is_small", lambda self, *size: True)


def test_without_a_bound_on_its_bytes_a_copy_would_hold_the_loop() -> None:
    shown_by(whether_a_large_copy_is_made_on_the_loops_thread, False, copying_whatever_it_costs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_copy_of_any_size_is_issued_to_a_gpu_on_the_loops_thread(device: str) -> None:
    storage: Any = SimpleNamespace(
        name="pool",
        layout=SimpleNamespace(device=torch.device(device)),
        ledger=SimpleNamespace(abandoned=[]),
        wait_timeout=1.0,
    )
    runs = Offload(storage, inline_wait_seconds=0.0, inline_bytes=1, inline_entries=1, max_workers=1)

    async def main() -> bool:
        def issue(timeout: float) -> int:
            return threading.get_ident()

        return await runs.run(issue, copied_bytes=10**12) == threading.get_ident()

    assert run_on("trio", main) == (device == "cuda")


# --- limiters ---------------------------------------------------------------------------------------------------------


class VarOfAllLoops:
    """In place of `anyio.lowlevel.RunVar`: the same value in every event loop."""

    def __init__(self, name: str) -> None:
        self._values: list[Any] = []

    def get(self) -> Any:
        if not self._values:
            raise LookupError
        return self._values[0]

    def set(self, value: Any) -> None:
        self._values.append(value)


def two_loops_with_one_facade() -> object:
    aio = AsyncKVPool(KVPool(LAYOUT, 4, wait_timeout=patience()), max_workers=1, inline_bytes=0)
    try:
        return [run_on(loop, aio.put, loop, tokens(1, 2)) for loop in ("asyncio", "trio")]
    except Exception as error:  # of whatever kind: one loop's primitives were used in another
        return error


def one_limiter_for_all_loops(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(anyio.lowlevel, "RunVar", VarOfAllLoops)


def test_a_limiter_that_two_loops_share_would_break_the_second() -> None:
    shown_by(two_loops_with_one_facade, [True, True], one_limiter_for_all_loops)


def whether_a_task_can_store_what_a_computation_waits_for() -> object:
    """It holds the one worker for computations; the task reads and stores through workers."""
    pool = KVPool(LAYOUT, 4, wait_timeout=JOIN_SECONDS)
    aio = AsyncKVPool(pool, max_workers=1, inline_bytes=0)
    begun, stored = threading.Event(), threading.Event()
    in_time: list[bool] = []

    def waits() -> KeysValues:
        begun.set()
        in_time.append(stored.wait(patience()))
        return tokens(1, 2)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "key", waits)
            while not begun.is_set():
                await anyio.lowlevel.checkpoint()
            await aio.put("other", tokens(2, 2))
            stored.set()

    run_on("asyncio", main)
    return in_time


def computing_among_the_operations(patch: pytest.MonkeyPatch) -> None:
    init = Offload.__init__

    def with_one_limiter(self: Offload, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self._computing_limiter = self._limiter

    patch.setattr(Offload, "__init__", with_one_limiter)


def test_computations_among_the_operations_would_keep_the_workers_that_they_wait_for() -> None:
    shown_by(
        whether_a_task_can_store_what_a_computation_waits_for,
        [True],
        computing_among_the_operations,
    )


facades: list[AsyncKVPool] = []  # the last is the one at work


def workers_of_tasks_that_wait() -> int:
    pool = KVPool(LAYOUT, 4, wait_timeout=JOIN_SECONDS)
    aio = AsyncKVPool(pool)
    facades.append(aio)

    async def main() -> int:
        claim = aio.try_claim("key")
        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(aio.get_or_compute, "key", lambda: tokens(9, 2))
            await anyio.to_thread.run_sync(waiters.wait_for, 3)
            workers = aio.offload_stats().worker_count
            claim.fulfil(tokens(1, 2))
        return workers

    with counted_waiters() as waiters:
        return int(run_on("trio", main))


def waiting_in_a_worker(patch: pytest.MonkeyPatch) -> None:
    async def parked(flight: Flight, deadline: Deadline, name: str) -> None:
        await facades[-1]._offload.in_worker(lambda: wait_in_thread(flight, deadline, name))

    patch.setattr(aio_pool, "wait_in_task", parked)


def test_a_task_that_waited_in_a_worker_would_park_it() -> None:
    shown_by(workers_of_tasks_that_wait, 0, waiting_in_a_worker)


# --- asking for one's own key, and waking -----------------------------------------------------------------------------


def by_its_worker(pool: KVPool, aio: AsyncKVPool) -> Callable[[], Any]:
    return lambda: pool.get_or_compute("key", lambda: tokens(1, 2))


def by_a_worker_of_its_own(pool: KVPool, aio: AsyncKVPool) -> Callable[[], Any]:
    async def compute() -> KeysValues:
        return await anyio.to_thread.run_sync(lambda: pool.get_or_compute("key", lambda: tokens(1, 2)))

    return compute


def by_a_thread_of_asyncio(pool: KVPool, aio: AsyncKVPool) -> Callable[[], Any]:
    async def compute() -> KeysValues:
        return await asyncio.to_thread(lambda: pool.get_or_compute("key", lambda: tokens(1, 2)))

    return compute


def by_itself(pool: KVPool, aio: AsyncKVPool) -> Callable[[], Any]:
    async def compute() -> KeysValues:
        return await aio.get_or_compute("key", lambda: tokens(1, 2))

    return compute


def by_a_task_of_its_own(pool: KVPool, aio: AsyncKVPool) -> Callable[[], Any]:
    async def compute() -> KeysValues:
        return await asyncio.ensure_future(aio.get_or_compute("key", lambda: tokens(1, 2)))

    return compute


Asking = Callable[[KVPool, AsyncKVPool], Callable[[], Any]]


def answer_to_who_asks_for_what_it_computes(asking: Asking) -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=patience())
    aio = AsyncKVPool(pool)
    return run_on("asyncio", aio.get_or_compute, "key", asking(pool, aio)) is not None


def without_knowing_what_is_being_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Claim, "computing", lambda self: nullcontext())


@pytest.mark.parametrize(
    "asking", [by_its_worker, by_a_worker_of_its_own, by_a_thread_of_asyncio, by_itself, by_a_task_of_its_own]
)
def test_a_computation_that_is_not_known_as_such_would_wait_for_itself_also_through_threads(asking: Asking) -> None:
    shown_by(
        lambda: answer_to_who_asks_for_what_it_computes(asking),
        RecursiveComputationError,
        without_knowing_what_is_being_computed,
    )


def what_others_hear_when_the_loop_of_a_waiter_has_ended(loop: str) -> object:
    pool = KVPool(LAYOUT, 4, wait_timeout=patience())
    aio = AsyncKVPool(pool)
    claim = pool.try_claim("key")
    kept: list[Waker] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "key", lambda: tokens(9, 2))
            await anyio.to_thread.run_sync(waiters.wait_for, 1)
            kept.extend(claim.flight.wakers)
            group.cancel_scope.cancel()

    with counted_waiters() as waiters:
        run_on(loop, main)
        claim.flight.wakers.extend(kept)  # as one that is about to be woken while its loop ends
        other = Background(lambda: pool.get_or_compute("key", lambda: tokens(9, 2)).lengths)
        waiters.wait_for(1)
        try:
            claim.fulfil(tokens(1, 3))
        except RuntimeError as error:  # of the loop that has ended
            return type(error)
        return other.result()


def minding_loops_that_have_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(offload, "suppress", lambda *errors: nullcontext())


@pytest.mark.parametrize("loop", LOOPS)
def test_who_minded_that_a_loop_has_ended_would_not_wake_the_others(loop: str) -> None:
    shown_by(lambda: what_others_hear_when_the_loop_of_a_waiter_has_ended(loop), (3,), minding_loops_that_have_ended)
