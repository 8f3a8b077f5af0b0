"""A cancelled call leaves the pool as if it had been made, or not at all, wherever it was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from concurrent_kv import AsyncKVPool, AsyncSearch, KVPool
from tests.async_operations import OPERATIONS, World
from tests.async_support import always_in_workers, join_workers, run_on, shards_held
from tests.cancelling import WAYS, state_after, states_when_cancelled
from tests.support import assert_same, tokens
from tests.threading_support import JOIN_SECONDS

TO_THE_END = {"search.close", "pool's close", "manager's close"}


@pytest.fixture(params=["inline", "worker"], autouse=True)
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    with always_in_workers() if request.param == "worker" else nullcontext():
        yield request.param


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_cancelled_at_any_checkpoint_it_was_made_or_not(name: str, way: str) -> None:
    operation = OPERATIONS[name]
    untouched, made = state_after("asyncio", None), state_after("asyncio", operation)
    states = states_when_cancelled(operation, way, [untouched, made])
    assert states, "an operation without a checkpoint"
    for n, state in enumerate(states, start=1):
        if name in TO_THE_END:
            assert state == made, f"cancelled at checkpoint {n}: not made"
        else:
            assert state in (untouched, made), f"cancelled at checkpoint {n}: {difference(state, untouched, made)}"


def difference(state: dict[str, object], untouched: dict[str, object], made: dict[str, object]) -> str:
    return "; ".join(
        f"{name} is {value!r}, not {untouched[name]!r} or {made[name]!r}"
        for name, value in state.items()
        if value not in (untouched[name], made[name])
    )


@pytest.mark.parametrize("name", ["put", "commit", "pop", "gather", "pin", "search.gather", "search.commit"])
def test_an_operation_that_wait_for_cuts_off_while_it_waits_for_a_shard_is_not_made(name: str) -> None:
    untouched, world = state_after("asyncio", None), World()

    async def main() -> None:
        await world.prepare()
        with shards_held(world.pool.sync) as let_go:
            before = world.aio.offload_stats().worker_count
            work = asyncio.ensure_future(asyncio.wait_for(OPERATIONS[name](world), JOIN_SECONDS))
            while world.aio.offload_stats().worker_count == before:
                await asyncio.sleep(0)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            let_go()

    run_on("asyncio", main)
    join_workers()
    assert world.state() == untouched
    world.end()


def test_a_wait_for_that_times_out_leaves_nothing_behind(pool: KVPool) -> None:
    aio = AsyncKVPool(pool)

    async def main() -> None:
        with shards_held(pool), pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(aio.put("key", tokens(1, 3)), 0.01)

    asyncio.run(main())
    join_workers()
    assert pool.get("key") is None
    assert pool.check_integrity().handles == 0


@pytest.mark.parametrize("way", WAYS)
def test_the_end_of_a_search_is_reached_however_its_body_is_cancelled(way: str) -> None:
    """Also where the cancellation comes at any checkpoint of the end itself."""
    loop, cancelling = WAYS[way]
    n, reached = 1, True
    while reached:
        world = World()
        closed: list[bool] = []

        async def main(world: World, n: int, closed: list[bool]) -> bool:
            await world.prepare()
            opened: list[AsyncSearch] = []

            async def body() -> None:
                search = world.aio.search([1], entries=2)
                try:
                    async with search:
                        opened.append(search)
                        await search.gather(["b"], [1])
                finally:
                    closed.extend(search.closed for search in opened)

            reached, _ = await cancelling(body(), n)
            return reached

        reached = run_on(loop, main, world, n, closed)
        join_workers()
        assert all(closed), f"cancelled at checkpoint {n}: the search is still open"
        world.state()
        world.end()
        n += 1
    assert n > 3


def test_what_asyncios_cancel_left_undone_can_be_done_again(pool: KVPool) -> None:
    aio = AsyncKVPool(pool)

    async def main() -> None:
        task = asyncio.ensure_future(aio.put("key", tokens(1, 3)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await aio.put("key", tokens(2, 3))

    asyncio.run(main())
    join_workers()
    assert_same(pool.get("key"), tokens(2, 3))
