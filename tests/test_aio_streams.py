"""Tasks of one event loop on several streams: each operation works in the stream of its own caller."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import anyio
import pytest
import torch

from concurrent_kv import AsyncKVPool, KeysValues, KVPool, WaitTimeoutError
from tests.async_support import LOOPS, run_on
from tests.simulated.backend import SimStreams, layout_on
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.support import HANG_SECONDS

Operation = Callable[[SimGPU, AsyncKVPool], Awaitable[object]]


def row(gpu: SimGPU, number: float) -> KeysValues:
    return KeysValues.from_packed(torch.full((2, 1, 1, 2, 1), float(number)).to(gpu.devices[0]))


async def _gather(gpu: SimGPU, pool: AsyncKVPool) -> None:
    (await pool.gather(["a"])).close()


async def _claim(gpu: SimGPU, pool: AsyncKVPool) -> None:
    with pool.try_claim("c") as claim:
        await pool.fulfil(claim, row(gpu, 3))


async def _compute(gpu: SimGPU, pool: AsyncKVPool) -> None:
    async def compute() -> KeysValues:
        await anyio.lowlevel.checkpoint()
        with gpu.use(gpu.stream(1)):
            return row(gpu, 4)

    await pool.get_or_compute("d", compute)


OPERATIONS: dict[str, Operation] = {
    "put": lambda gpu, pool: pool.put("b", row(gpu, 2)),
    "put_many": lambda gpu, pool: pool.put_many(["b"], row(gpu, 2)),
    "get": lambda gpu, pool: pool.get("a"),
    "peek": lambda gpu, pool: pool.peek("a"),
    "pop": lambda gpu, pool: pool.pop("a"),
    "gather": _gather,
    "fulfil": _claim,
    "get_or_compute": _compute,
    "get_or_compute in a worker": lambda gpu, pool: pool.get_or_compute("d", lambda: row(gpu, 4)),
}


async def beside_another_task(gpu: SimGPU, pool: AsyncKVPool, operation: Operation) -> None:
    """Run an operation in stream 1, while another task makes stream 2 current at every chance."""
    over = False

    async def disturb() -> None:
        while not over:
            with gpu.use(gpu.stream(2)):
                await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(disturb)
        await anyio.lowlevel.checkpoint()
        with gpu.use(gpu.stream(1)):
            await operation(gpu, pool)
        over = True


def streams_of(gpu: SimGPU, operation: Operation, loop: str, inline: bool) -> set[str]:
    """The streams in which an operation worked."""
    pool = KVPool(layout_on(gpu), 4)
    pool.put("a", row(gpu, 1))
    gpu.queues.run_until(lambda: gpu.queues.idle)
    del gpu.queues.ran[:]
    aio = AsyncKVPool(pool, inline_entries=64 if inline else 0)
    run_on(loop, beside_another_task, gpu, aio, operation)
    gpu.queues.run_until(lambda: gpu.queues.idle)
    copied = {ran.partition(":")[0] for ran in gpu.queues.ran}
    pool.check_integrity()
    pool.close()
    return copied


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "worker"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_works_in_the_stream_of_its_caller_whatever_other_tasks_do(
    gpu: SimGPU, operation: str, loop: str, inline: bool
) -> None:
    assert streams_of(gpu, OPERATIONS[operation], loop, inline) == {"1"}


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "worker"])
def test_fault_of_looking_the_stream_up_after_the_hop_shows(
    gpu: SimGPU, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WhateverIsCurrent(AbstractContextManager[None]):
        def __enter__(self) -> None:
            gpu.__enter__()  # type: ignore[no-untyped-call]

        def __exit__(self, *error: Any) -> None:
            gpu.__exit__(*error)  # type: ignore[no-untyped-call]

    for module in ("aio.offload", "aio.pool"):
        monkeypatch.setattr(f"concurrent_kv.{module}.current_streams", WhateverIsCurrent)
    assert streams_of(gpu, OPERATIONS["get"], "asyncio", inline) != {"1"}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_named_stream_is_used_in_a_worker_too(gpu: SimGPU, loop: str) -> None:
    stream: Any = gpu.stream(3)
    assert streams_of(gpu, lambda gpu, pool: pool.get("a", stream=stream), loop, inline=False) == {"3"}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_read_to_the_host_is_made_in_a_worker(gpu: SimGPU, loop: str) -> None:
    pool = KVPool(layout_on(gpu), 4)
    pool.put("a", row(gpu, 5))
    aio = AsyncKVPool(pool)

    async def main() -> KeysValues | None:
        return await aio.get("a", to="cpu")

    found = run_on(loop, main)
    assert found.keys.ravel().tolist() == [5.0, 5.0]
    assert aio.offload_stats().worker_count == 1
    pool.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_task_that_waits_for_a_batch_holds_no_loop(gpu: SimGPU, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another task lets the device go on."""
    pool = KVPool(layout_on(gpu), 4)
    pool.put("a", row(gpu, 5))
    go_on = threading.Event()

    def synchronize(self: SimStreams, event: Any, seconds: float, is_over: object) -> bool:
        assert go_on.wait(HANG_SECONDS)
        gpu.queues.run_until(lambda: event.place.reached)
        return True

    seen: list[float] = []

    async def main() -> None:
        batch = await AsyncKVPool(pool).gather(["a"])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for, batch)
            await anyio.sleep(0)
            assert not seen
            go_on.set()
        batch.close()

    async def wait_for(batch: Any) -> None:
        await batch.ready()
        seen.extend(gpu.read(batch.data)[0, 0, 0, :2, 0].tolist())

    with monkeypatch.context() as patch:
        patch.setattr(SimStreams, "synchronize", synchronize)
        run_on(loop, main)
    assert seen == [5.0, 5.0]
    pool.close()


def test_a_batch_that_is_not_ready_in_time_says_so(gpu: SimGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KVPool(layout_on(gpu), 4)
    pool.put("a", row(gpu, 5))
    with pool.gather(["a"]) as batch, monkeypatch.context() as patch:
        patch.setattr(SimStreams, "synchronize", lambda self, event, seconds, is_over: False)
        with pytest.raises(WaitTimeoutError, match=r"within 0\.5 s"):
            batch.synchronize(0.5)
    pool.close()
