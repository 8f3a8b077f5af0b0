"""Every operation of the facade, on every kind of loop: what the sync one gives, inline or in a worker thread."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import anyio
import pytest

from concurrent_kv import (
    AsyncKVCacheManager,
    AsyncKVPool,
    AsyncSearch,
    ClosedError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheManager,
    KVPool,
    Search,
    SearchEndedError,
    WaitTimeoutError,
)
from tests.async_support import ON_EVERY_LOOP, always_in_workers, shards_held
from tests.conftest import MakeManager, MakePool
from tests.support import HANG_SECONDS, append, assert_same, child_of, config, row_of, stacked, tokens

pytestmark = ON_EVERY_LOOP


@pytest.fixture(params=["inline", "worker"], autouse=True)
def where(request: pytest.FixtureRequest) -> Iterator[str]:
    with always_in_workers() if request.param == "worker" else nullcontext():
        yield request.param


@pytest.fixture
def aio(pool: KVPool) -> AsyncKVPool:
    return AsyncKVPool(pool)


def ran(before: tuple[int, int], after: tuple[int, int], where: str) -> None:
    """One more operation ran inline, or one more in a worker."""
    inline, worker = (new - old for old, new in zip(before, after, strict=True))
    assert (inline, worker) == ((1, 0) if where == "inline" else (0, 1))


def counts(aio: AsyncKVPool | AsyncKVCacheManager) -> tuple[int, int]:
    stats = aio.offload_stats()
    return stats.inline_count, stats.worker_count


# --- pools ----------------------------------------------------------------------------------------------------------


async def test_an_entry_is_put_read_and_popped_as_in_the_sync_pool(aio: AsyncKVPool, where: str) -> None:
    before = counts(aio)
    assert await aio.put("key", tokens(1, 3), side="side", priority=2.0)
    ran(before, counts(aio), where)
    for read in (aio.get, aio.peek, aio.pop):
        before = counts(aio)
        assert_same(await read("key"), tokens(1, 3))
        ran(before, counts(aio), where)
    assert await aio.get("key") is None
    assert len(aio) == 0


async def test_side_data_and_presence_can_be_asked_for(aio: AsyncKVPool, where: str) -> None:
    await aio.put("key", tokens(1, 3), side="side")
    before = counts(aio)
    assert await aio.side("key") == "side"
    ran(before, counts(aio), where)
    assert await aio.side("other", "default") == "default"
    assert await aio.contains("key")
    assert not await aio.contains("other")


async def test_many_entries_are_put_gathered_and_extended(aio: AsyncKVPool, where: str) -> None:
    parents = [tokens(1, 3), tokens(2, 2)]
    before = counts(aio)
    assert await aio.put_many(["a", "b"], stacked(*parents), sides=["x", "y"], priorities=[1, 2])
    ran(before, counts(aio), where)
    before = counts(aio)
    batch = await aio.gather(iter(["a", "b", "c"]), room=2)  # type: ignore[arg-type]
    ran(before, counts(aio), where)
    assert batch.hits == (True, True, False)
    assert batch.side == ("x", "y", None)
    assert_same(row_of(batch, 0), parents[0])
    batch.fill(2, tokens(3, 1))
    append(batch, [4, 5, 6])
    before = counts(aio)
    assert await aio.commit(["d", "e", "f"], batch)
    ran(before, counts(aio), where)
    assert batch.closed
    assert_same(await aio.get("e"), child_of(parents[1], 5))


async def test_a_pin_keeps_its_entry(make_pool: MakePool, where: str) -> None:
    aio = AsyncKVPool(make_pool(1))
    await aio.put("key", tokens(1, 3))
    before = counts(aio)
    with await aio.pin("key") as pin:
        ran(before, counts(aio), where)
        with pytest.raises(WaitTimeoutError):
            await aio.put("other", tokens(2, 3), timeout=0.01)
        assert_same(pin.get(), tokens(1, 3))
    assert await aio.put("other", tokens(2, 3))
    with pytest.raises(KeyNotFoundError):
        await aio.pin("key")


async def test_clears_and_bumps_work_on_scopes_and_run_in_workers(aio: AsyncKVPool) -> None:
    scope = aio.scope("scope")
    assert scope in aio.scopes()
    await aio.put("key", tokens(1, 3))
    await aio.put("key", tokens(2, 3), scope=scope)
    before = counts(aio)
    await aio.clear(scope)
    ran(before, counts(aio), "worker")
    assert await aio.get("key", scope=scope) is None
    assert_same(await aio.get("key"), tokens(1, 3))
    await aio.bump_version()
    assert await aio.get("key") is None


async def test_state_is_that_of_the_sync_pool(aio: AsyncKVPool) -> None:
    await aio.put("key", tokens(1, 3))
    assert await aio.get("key") is not None
    assert aio.stats() == aio.sync.stats()
    assert aio.stats().hit_count == 1
    aio.reset_stats()
    assert aio.stats().hit_count == 0
    assert await aio.check_integrity() == aio.sync.check_integrity()
    assert (await aio.repair()).slots == 0


async def test_errors_are_those_of_the_sync_pool(aio: AsyncKVPool) -> None:
    with pytest.raises(InvalidTypeError, match="hashable"):
        await aio.get([])  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="keys"):
        await aio.gather(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="keys"):
        await aio.gather([])
    with pytest.raises(InvalidTypeError, match="keys"):
        await aio.put_many("ab", stacked(tokens(1, 2), tokens(2, 2)))
    with pytest.raises(InvalidArgumentError, match="timeout"):
        await aio.get("key", timeout=-1)
    with pytest.raises(InvalidTypeError, match="timeout"):
        await aio.get_or_compute("key", lambda: tokens(1, 2), timeout="long")  # type: ignore[arg-type]


async def test_leaving_the_with_closes_the_pool(make_pool: MakePool) -> None:
    async with AsyncKVPool(make_pool()) as aio:
        await aio.put("key", tokens(1, 3))
    with pytest.raises(ClosedError):
        await aio.get("key")
    await aio.close()


async def test_the_thresholds_can_be_set_and_are_checked(pool: KVPool) -> None:
    for settings in ({"inline_wait_seconds": -1.0}, {"inline_bytes": -1}, {"max_workers": 0}):
        with pytest.raises(InvalidArgumentError, match=next(iter(settings))):
            AsyncKVPool(pool, **settings)
    aio = AsyncKVPool(pool, inline_bytes=pool.layout.bytes_per_entry - 1)
    await aio.put("key", tokens(1, 1))
    assert counts(aio) == (0, 1)


async def test_what_has_to_wait_for_a_shard_goes_on_in_a_worker(pool: KVPool, where: str) -> None:
    aio = AsyncKVPool(pool)
    await aio.put("key", tokens(1, 3))
    before = counts(aio)
    with shards_held(pool) as let_go:
        async with anyio.create_task_group() as group:
            group.start_soon(aio.get, "key")
            while counts(aio)[1] == before[1]:
                await anyio.lowlevel.checkpoint()
            let_go()
    ran(before, counts(aio), "worker")


async def test_a_wait_past_its_limit_is_an_error_that_names_the_shard(pool: KVPool) -> None:
    aio = AsyncKVPool(pool)
    with shards_held(pool), pytest.raises(WaitTimeoutError, match=r"pool: shard \d+ was not free"):
        await aio.get("key", timeout=0.01)


# --- managers and searches ------------------------------------------------------------------------------------------


async def test_the_manager_keeps_roles_and_environments_apart(manager: KVCacheManager) -> None:
    aio = AsyncKVCacheManager(manager)
    await aio.set_init_cache(0, "key", tokens(1, 3))
    await aio.set_init_cache(1, "key", tokens(2, 3))
    await aio.set_recur_cache("key", tokens(3, 3))
    await aio.set_wm_cache("key", tokens(4, 3))
    assert_same(await aio.get_init_cache(0, "key"), tokens(1, 3))
    assert_same(await aio.get_init_cache(1, "key"), tokens(2, 3))
    assert_same(await aio.get_recur_cache("key"), tokens(3, 3))
    assert_same(await aio.get_wm_cache("key"), tokens(4, 3))
    assert_same(await aio.hierarchical_get(1, "key"), tokens(2, 3))
    assert_same(await aio.hierarchical_get(1, "key", order=["wm", "init"]), tokens(4, 3))
    assert aio.get_stats_summary() == manager.get_stats_summary()
    assert aio.allocation() == manager.allocation()
    aio.step()
    aio.reset_stats()
    for wrong in (-1, 2, True, "0"):
        with pytest.raises(InvalidArgumentError, match="env_id"):
            await aio.get_init_cache(wrong, "key")  # type: ignore[arg-type]


async def test_the_managers_clears_reach_what_they_name(manager: KVCacheManager) -> None:
    aio = AsyncKVCacheManager(manager)

    async def stored() -> list[bool]:
        found = [await aio.get_init_cache(0, "key"), await aio.get_recur_cache("key"), await aio.get_wm_cache("key")]
        return [kv is not None for kv in found]

    async def refill() -> None:
        await aio.set_init_cache(0, "key", tokens(1, 3))
        await aio.set_recur_cache("key", tokens(2, 3))
        await aio.set_wm_cache("key", tokens(3, 3))

    for clear, left in (
        (aio.clear_init_caches, [False, True, True]),
        (aio.clear_recur_cache, [True, False, True]),
        (aio.clear_all, [False, False, False]),
        (aio.bump_version, [False, False, False]),
    ):
        await refill()
        await clear()
        assert await stored() == left
    assert (await aio.check_integrity()).entries == 0
    assert (await aio.repair()).entries == 0


async def test_a_manager_can_be_made_by_the_facade(make_manager: MakeManager) -> None:
    async with AsyncKVCacheManager(config=config(), env_num=2, wait_timeout=HANG_SECONDS) as aio:
        await aio.set_wm_cache("key", tokens(1, 3))
        assert_same(aio.sync.get_wm_cache("key"), tokens(1, 3))
    with pytest.raises(ClosedError):
        await aio.get_wm_cache("key")


async def test_a_search_gathers_commits_promotes_keeps_and_releases(manager: KVCacheManager, where: str) -> None:
    aio = AsyncKVCacheManager(manager)
    root = tokens(1, 3)
    await aio.set_init_cache(1, "root", root, side="side")
    before = counts(aio)
    async with aio.search([1]) as search:
        ran(before, counts(aio), where)
        assert search.env_ids == (1,)
        batch = await search.gather(["root"], [1])
        append(batch, [2])
        await search.commit(["child"], batch, sides=["child's side"])
        assert await search.contains("child")
        assert len(search) == len(search.sync) == 1
        batch = await search.gather(["child"], [1])
        append(batch, [3])
        await search.commit(["grandchild"], batch)
        assert await search.promote("child", 1)
        assert_same(await aio.get_init_cache(1, "child"), child_of(root, 2))
        assert await aio.init_pools[1].side("child") == "child's side"
        assert await search.promote("child", 1, as_key="root", side=None)
        assert await aio.init_pools[1].side("root", "default") is None
        await search.release({"child"})
        with pytest.raises(KeyNotFoundError):
            await search.release(["child"])
        assert await search.keep(set()) == 1
        assert not search.closed
    assert search.closed
    with pytest.raises(SearchEndedError):
        await search.gather(["root"], [1])
    assert manager.check_integrity().handles == 0


async def test_a_search_is_open_from_its_entering_and_entered_once(manager: KVCacheManager) -> None:
    aio = AsyncKVCacheManager(manager)
    search = aio.search([0])
    with pytest.raises(ClosedError, match="async with"):
        await search.gather(["root"], [0])
    async with search:
        with pytest.raises(ClosedError, match="entered before"):
            await search.__aenter__()
    with pytest.raises(InvalidTypeError, match="env_ids"):
        aio.search(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="env_ids"):
        async with aio.search([7]):
            raise AssertionError("entered")


async def test_a_search_closes_when_its_body_raises(manager: KVCacheManager) -> None:
    aio = AsyncKVCacheManager(manager)
    batches = []

    async def body() -> None:
        async with aio.search([0]) as search:
            batches.append(await search.gather(["root"], [0]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert batches[0].closed
    assert manager.check_integrity().handles == 0


@pytest.mark.parametrize(
    ("facade", "sync"), [(AsyncKVPool, KVPool), (AsyncSearch, Search), (AsyncKVCacheManager, KVCacheManager)]
)
async def test_the_facade_has_every_public_operation_of_the_sync_class_with_its_arguments(
    facade: type, sync: type
) -> None:
    plain_attributes = {"init_pools", "keys_values_wm_list", "keys_values_wm_size_list"}
    differing = plain_attributes if facade is AsyncKVCacheManager else set()
    for name, operation in inspect.getmembers(sync, inspect.isfunction):
        if name.startswith("_") or name in differing:
            continue
        here: Callable[..., object] = getattr(facade, name)
        wanted, has = inspect.signature(operation).parameters, inspect.signature(here).parameters
        missing = set(wanted) - set(has) - {"count_miss"}
        assert not missing, f"{facade.__name__}.{name} lacks {missing}"
        for argument, parameter in has.items():
            if argument in wanted and argument != "self":
                assert parameter.default is wanted[argument].default or parameter.default == wanted[argument].default, (
                    f"{facade.__name__}.{name}({argument})"
                )
