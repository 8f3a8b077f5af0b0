"""Many histories, one after the other, each checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random

import anyio

from concurrent_kv import AsyncKVPool, KVPool
from concurrent_kv.aio.offload import INLINE_BYTES
from stress.content import BrokenPromiseError
from stress.histories.checker import Call, check
from stress.histories.models import Pool, per_key, split_clears, unexplained_refusals
from stress.histories.programs import IN_SEARCHES, Shape, random_programs
from stress.histories.recording import Crew, Recorder, eager_switching, new_pool, run_tasks, wait_for
from stress.histories.searches import ROOT, SearchCalls, new_manager

__all__ = ["check_history", "histories_of_both", "histories_of_searches", "histories_of_tasks", "histories_of_threads"]

CHECK_EVERY = 100  # histories; then the books are recounted


def check_history(calls: Sequence[Call], shape: Shape) -> None:
    """Raise `BrokenPromiseError` unless some order of the calls explains them all.

    Every key by itself; and all keys together, where a clear is one call for each key, as that is what it promises.
    """
    if refused := unexplained_refusals(calls):
        raise BrokenPromiseError(f"{refused[0]}, and nothing was being cleared")
    for key, of_key in per_key(calls).items():
        verdict = check(of_key, Pool(1, evicting=shape.evicting))
        if not verdict.linearizable:
            raise BrokenPromiseError(f"key {key} by itself is {verdict}")
    verdict = check(split_clears(calls), Pool(shape.keys, evicting=shape.evicting))
    if not verdict.linearizable:
        raise BrokenPromiseError(f"the keys together are {verdict}")


def histories_of_threads(
    count: int, shape: Shape, *, processes: int = 3, seed: int = 0, pool: KVPool | None = None
) -> int:
    """Run and check so many histories of threads; returns the number of calls."""
    rng, crew = Random(seed), Crew(processes)
    pool = pool or new_pool(shape, seed=seed)
    calls = 0
    try:
        with eager_switching():
            for number in range(count):
                recorder = Recorder(pool)
                programs = random_programs(rng, processes, shape)
                crew.begin([partial(recorder.run_in_thread, f"thread {n}", each) for n, each in enumerate(programs)])
                crew.wait()
                calls += len(recorder.calls)
                _finish(pool, recorder, shape, number)
    finally:
        crew.close()
    pool.close()
    return calls


def histories_of_searches(count: int, *, processes: int = 3, seed: int = 0) -> int:
    """As `histories_of_threads`, of threads that share one search: what is its own is always a hit."""
    shape = Shape(weights=IN_SEARCHES)
    rng, crew = Random(seed), Crew(processes)
    most = shape.keys * processes * shape.operations
    calls = 0
    with new_manager(most) as manager, eager_switching():
        try:
            for number in range(count):
                with manager.search([0]) as search:
                    search.gather([ROOT], [0]).close()
                    recorder = Recorder(SearchCalls(search))
                    programs = random_programs(rng, processes, shape)
                    crew.begin(
                        [partial(recorder.run_in_thread, f"thread {n}", each) for n, each in enumerate(programs)]
                    )
                    crew.wait()
                    check_history(recorder.calls, shape)
                calls += len(recorder.calls)
                if number % CHECK_EVERY == 0:
                    manager.check_integrity()
        finally:
            crew.close()
    return calls


def histories_of_tasks(
    count: int, shape: Shape, *, backend: str, inline: bool, processes: int = 3, seed: int = 0
) -> int:
    """As `histories_of_threads`, of tasks of one event loop; `inline`: on the loop's own thread where they can."""

    async def run() -> int:
        pool = new_pool(shape, seed=seed)
        facade = AsyncKVPool(pool, inline_bytes=INLINE_BYTES if inline else 0)
        rng, calls = Random(seed), 0
        for number in range(count):
            recorder = Recorder(pool)
            await run_tasks(recorder, facade, random_programs(rng, processes, shape))
            calls += len(recorder.calls)
            _finish(pool, recorder, shape, number)
        await facade.close()
        return calls

    with eager_switching():
        return anyio.run(run, backend=backend)


def histories_of_both(
    count: int, shape: Shape, *, backend: str, threads: int = 2, tasks: int = 2, seed: int = 0
) -> int:
    """As `histories_of_threads`, of threads and tasks that use one pool together."""

    async def run() -> int:
        pool, crew = new_pool(shape, seed=seed), Crew(threads)
        facades = [AsyncKVPool(pool), AsyncKVPool(pool, inline_bytes=0)]
        rng, calls = Random(seed), 0
        try:
            for number in range(count):
                recorder = Recorder(pool)
                programs = random_programs(rng, threads + tasks, shape)
                crew.begin([partial(recorder.run_in_thread, f"thread {n}", programs[n]) for n in range(threads)])
                await run_tasks(recorder, facades[number % 2], programs[threads:])
                await wait_for(crew)
                calls += len(recorder.calls)
                _finish(pool, recorder, shape, number)
        finally:
            crew.close()
        pool.close()
        return calls

    with eager_switching():
        return anyio.run(run, backend=backend)


def _finish(pool: KVPool, recorder: Recorder, shape: Shape, number: int) -> None:
    """Check one history and empty the pool for the next."""
    check_history(recorder.calls, shape)
    if number % CHECK_EVERY == 0:
        pool.check_integrity()
    pool.clear()
