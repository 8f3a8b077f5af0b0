"""Loops beside threads: what runs on a loop's own thread, several loops at once, and how loops and programs end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch

from concurrent_kv import AsyncKVPool, KeysValues, KVPool
from concurrent_kv.aio.offload import INLINE_WAIT_SECONDS
from tests.async_support import LOOPS, SeenPool, run_on, shards_held
from tests.flight_support import counted_waiters
from tests.support import append, assert_same, stacked, tokens
from tests.threading_support import JOIN_SECONDS, Background

ROOT = Path(__file__).resolve().parent.parent


async def every_operation(aio: AsyncKVPool) -> None:
    """Reads, writes and computations of one key after another."""
    await aio.put("a", tokens(1, 3))
    await aio.put_many(["a", "b"], stacked(tokens(1, 3), tokens(2, 3)))
    for read in (aio.get, aio.peek, aio.side, aio.contains):
        await read("a")
    batch = await aio.gather(["a", "b"])
    append(batch, [3, 4])
    await aio.commit(["c", "d"], batch)
    (await aio.pin("a")).close()
    await aio.pop("b")
    await aio.get_or_compute("e", lambda: tokens(5, 3))
    await aio.pop("e")
    await aio.clear()


@pytest.mark.parametrize("loop", LOOPS)
def test_no_task_waits_for_a_shard_on_its_loops_thread_while_threads_write(loop: str) -> None:
    pool = SeenPool(64)
    aio = AsyncKVPool(pool)
    over = threading.Event()

    def write(number: int) -> None:
        while not over.is_set():
            pool.put(f"of thread {number}", tokens(number, 3))

    writers = [Background(lambda number=number: write(number)) for number in range(8)]  # type: ignore[misc]

    async def main() -> int:
        for _ in range(10):
            await every_operation(aio)
        return threading.get_ident()

    try:
        thread = run_on(loop, main)
    finally:
        over.set()
        for writer in writers:
            writer.result()
    assert pool.seen_locks.longest_wait[thread] <= INLINE_WAIT_SECONDS
    pool.check_integrity()


@pytest.mark.parametrize("loop", LOOPS)
def test_no_task_waits_on_its_loops_thread_for_a_shard_that_somebody_keeps(loop: str) -> None:
    pool = SeenPool()
    aio = AsyncKVPool(pool)
    pool.put("a", tokens(1, 3))
    pool.put("b", tokens(2, 3))
    batch = pool.gather(["a", "b"])
    append(batch, [3, 4])
    pool.seen_locks.longest_wait.clear()
    operations: list[Callable[[], object]] = [
        lambda: aio.get("a"),
        lambda: aio.put("a", tokens(1, 2)),
        lambda: aio.gather(["a"]),
        lambda: aio.commit(["c", "d"], batch),
        lambda: aio.pop("b"),
        lambda: aio.pin("a"),
        lambda: aio.clear(aio.scope("scope")),
        lambda: aio.get_or_compute("x", lambda: tokens(1, 2)),
    ]

    async def main() -> int:
        with shards_held(pool) as let_go:
            async with anyio.create_task_group() as group:
                for operation in operations:
                    group.start_soon(operation)  # type: ignore[arg-type]
                while aio.offload_stats().worker_count < len(operations):
                    await anyio.lowlevel.checkpoint()  # the loop goes on
                let_go()
        return threading.get_ident()

    thread = run_on(loop, main)
    assert pool.seen_locks.longest_wait[thread] <= INLINE_WAIT_SECONDS


@pytest.mark.parametrize("loop", LOOPS)
def test_large_copies_are_never_made_on_a_loops_thread(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SeenPool()
    aio = AsyncKVPool(pool, inline_bytes=pool.layout.bytes_per_entry - 1)
    copy = KeysValues.copy

    def seen(self: KeysValues, device: torch.device | None = None) -> KeysValues:
        pool.seen.copied_in.add(threading.get_ident())
        return copy(self, device)

    monkeypatch.setattr(KeysValues, "copy", seen)

    async def main() -> int:
        await every_operation(aio)
        claim = aio.try_claim("f")
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "f", lambda: tokens(5, 3))  # waits, and copies what it gets
            await anyio.to_thread.run_sync(waiters.wait_for, 1)
            await aio.fulfil(claim, tokens(6, 3))
        return threading.get_ident()

    with counted_waiters() as waiters:
        thread = run_on(loop, main)
    assert thread not in pool.seen.copied_in
    assert pool.seen.copied_in


@pytest.mark.parametrize("loop", LOOPS)
def test_small_copies_are_made_where_they_are_asked_for(loop: str) -> None:
    pool = SeenPool()
    aio = AsyncKVPool(pool)

    async def main() -> int:
        await aio.put("a", tokens(1, 3))
        await aio.get("a")
        return threading.get_ident()

    assert pool.seen.copied_in <= {run_on(loop, main)}
    assert aio.offload_stats().worker_count == 0


def test_two_loops_in_two_threads_use_one_pool(pool: KVPool) -> None:
    aio = AsyncKVPool(pool, max_workers=2, inline_bytes=0)  # everything in workers, of each loop its own
    start = threading.Barrier(len(LOOPS))

    def of(loop: str) -> None:
        async def main() -> None:
            async with anyio.create_task_group() as group:
                for number in range(8):
                    group.start_soon(work, number)

        async def work(number: int) -> None:
            for round_ in range(5):
                await aio.put((loop, number % 2), tokens(round_, 3))
                assert await aio.get_or_compute((loop, "x"), lambda: tokens(1, 2)) is not None

        start.wait(JOIN_SECONDS)
        run_on(loop, main)

    for thread in [Background(lambda loop=loop: of(loop)) for loop in LOOPS]:  # type: ignore[misc]
        thread.result()
    assert pool.check_integrity().handles == 0


def test_a_facade_outlives_its_loops(pool: KVPool) -> None:
    aio = AsyncKVPool(pool, inline_bytes=0)
    for number, loop in enumerate([*LOOPS, *LOOPS]):
        run_on(loop, aio.put, "key", tokens(number, 3))
        assert_same(run_on(loop, aio.get, "key"), tokens(number, 3))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_thread_hands_a_result_into_a_loop_and_a_loop_hands_one_to_a_thread(pool: KVPool, loop: str) -> None:
    """Through the pool itself: who waits for a key gets it, whoever fulfils the claim to it."""
    aio = AsyncKVPool(pool)
    to_task, to_thread = pool.try_claim("for the task"), pool.try_claim("for the thread")

    def compute_nothing() -> KeysValues:
        raise AssertionError("the result was to come from elsewhere")

    def thread() -> KeysValues:
        waiters.wait_for(1)  # the task waits
        to_task.fulfil(tokens(1, 3))
        return pool.get_or_compute("for the thread", compute_nothing)

    async def main() -> KeysValues:
        got = await aio.get_or_compute("for the task", compute_nothing)
        await aio.fulfil(to_thread, tokens(2, 3))
        return got

    with counted_waiters() as waiters:
        other = Background(thread)
        assert_same(run_on(loop, main), tokens(1, 3))
        assert_same(other.result(), tokens(2, 3))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_worker_thread_can_call_back_into_its_loop(pool: KVPool, loop: str) -> None:
    aio = AsyncKVPool(pool)

    def in_a_worker() -> KeysValues:
        anyio.from_thread.run(aio.put, "parent", tokens(1, 2))
        parent = anyio.from_thread.run(aio.get, "parent")
        assert parent is not None
        return parent

    async def main() -> None:
        assert_same(await aio.get_or_compute("child", in_a_worker), tokens(1, 2))

    run_on(loop, main)


def test_inside_asyncio_the_facade_needs_no_anyio_around_it(pool: KVPool) -> None:
    aio = AsyncKVPool(pool)

    async def main() -> None:
        results = await asyncio.gather(*(aio.get_or_compute("key", lambda: tokens(1, 2)) for _ in range(5)))
        for result in results:
            assert_same(result, tokens(1, 2))

    asyncio.run(main())
    assert pool.stats().insert_count == 1


WORK_IN_THE_AIR = """
    import sys
    import threading

    import anyio

    from concurrent_kv import AsyncKVPool, KVPool
    from concurrent_kv.locks.deadline import Deadline
    from tests.support import HANG_SECONDS, LAYOUT, tokens

    pool = KVPool(LAYOUT, 4, wait_timeout=2.0)
    aio = AsyncKVPool(pool, inline_bytes=0)
    held, begun, leave = threading.Event(), threading.Event(), threading.Event()
    claim = pool.try_claim("claimed")

    def hold():
        with pool.storage.locks.write(range(pool.storage.locks.count), Deadline(5.0)):
            held.set()
            leave.wait(HANG_SECONDS)

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get_or_compute, "claimed", lambda: tokens(1, 2))
            group.start_soon(aio.get, "key")  # waits for a shard in a worker
            while aio.offload_stats().worker_count < 2:
                await anyio.sleep(0)
            begun.set()
            await anyio.sleep_forever()

    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(HANG_SECONDS)
    loop = threading.Thread(target=lambda: anyio.run(main, backend=sys.argv[1]), daemon=True)
    loop.start()
    threading.Thread(target=lambda: pool.get("key"), daemon=True).start()
    assert begun.wait(HANG_SECONDS)
"""


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_interpreter_shuts_down_with_work_in_the_air(backend: str) -> None:
    program = textwrap.dedent(WORK_IN_THE_AIR)
    done = subprocess.run(
        [sys.executable, "-c", program, backend], cwd=ROOT, capture_output=True, text=True, timeout=JOIN_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
