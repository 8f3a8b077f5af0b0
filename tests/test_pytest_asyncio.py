"""The facade as users of pytest-asyncio test with it: on the loop that the plugin makes."""

from __future__ import annotations

import asyncio

import pytest

from concurrent_kv import AsyncKVCacheManager, KeysValues
from tests.support import assert_same, config, tokens


@pytest.mark.asyncio
async def test_what_a_task_stores_another_reads() -> None:
    async with AsyncKVCacheManager(config=config(), env_num=1) as manager:
        assert await manager.set_init_cache(0, "root", tokens(1, 2))
        found = await asyncio.create_task(manager.get_init_cache(0, "root"))
        assert_same(found, tokens(1, 2))
        await manager.check_integrity()


@pytest.mark.asyncio
async def test_gathered_tasks_that_miss_one_key_compute_it_once() -> None:
    computed = 0

    async def compute() -> KeysValues:
        nonlocal computed
        computed += 1
        await asyncio.sleep(0)
        return tokens(7, 2)

    async with AsyncKVCacheManager(config=config(), env_num=1) as manager:
        results = await asyncio.gather(*(manager.recur_pool.get_or_compute("key", compute) for _ in range(10)))
        for result in results:
            assert_same(result, tokens(7, 2))
    assert computed == 1


@pytest.mark.asyncio
async def test_a_gathered_batch_is_ready_at_once_on_a_cpu() -> None:
    async with AsyncKVCacheManager(config=config(), env_num=1) as manager:
        await manager.set_recur_cache("key", tokens(1, 2))
        with await manager.recur_pool.gather(["key"]) as batch:
            await batch.ready()
            assert batch.lengths == (2,)
