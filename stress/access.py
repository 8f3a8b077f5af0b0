"""One way to call the cache for threads and for tasks: the same operations, awaited.

A thread's calls never suspend, so that `drive` runs a coroutine over them to its end in that thread.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from concurrent_kv import AsyncKVCacheManager, AsyncKVPool, Claim, KeysValues, KVCacheManager, KVPool, Search

__all__ = ["Access", "Awaited", "TaskAccess", "ThreadAccess", "drive"]

T = TypeVar("T")


class Awaited:
    """An object whose methods are awaited and run at once, in the calling thread."""

    def __init__(self, sync: Any) -> None:
        self.sync = sync

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        method = getattr(self.sync, name)

        async def call(*args: Any, **options: Any) -> Any:
            return method(*args, **options)

        return call


class Access(Protocol):
    """How an actor reaches the cache.

    Attributes:
        manager: awaited calls of the manager.
        is_task: whether calls may suspend.
    """

    manager: Any
    is_task: bool

    def pool(self, pool: KVPool) -> Any:
        """Awaited calls of a pool."""

    async def open_search(self, env_ids: Sequence[int], **options: Any) -> Any:
        """An open search, with `sync` for the real one."""

    async def fulfil(self, claim: Claim, pool: KVPool, kv: KeysValues) -> bool:
        """Fulfil a claim of a pool."""


class ThreadAccess:
    """Straight calls."""

    is_task = False

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager: Any = Awaited(manager)
        self._manager = manager

    def pool(self, pool: KVPool) -> Any:
        return Awaited(pool)

    async def open_search(self, env_ids: Sequence[int], **options: Any) -> Any:
        search: Search = self._manager.search(env_ids, **options)
        return Awaited(search)

    async def fulfil(self, claim: Claim, pool: KVPool, kv: KeysValues) -> bool:
        return claim.fulfil(kv)


class TaskAccess:
    """Calls through the async facade.

    Args:
        manager: the facade.
        others: pools of their own that are used as well.
    """

    is_task = True

    def __init__(self, manager: AsyncKVCacheManager, others: Sequence[KVPool] = ()) -> None:
        self.manager: Any = manager
        pools = [manager.wm_pool, manager.recur_pool, *manager.init_pools, *map(AsyncKVPool, others)]
        self._pools = {id(pool.sync): pool for pool in pools}

    def pool(self, pool: KVPool) -> Any:
        return self._pools[id(pool)]

    async def open_search(self, env_ids: Sequence[int], **options: Any) -> Any:
        return await self.manager.search(env_ids, **options).__aenter__()

    async def fulfil(self, claim: Claim, pool: KVPool, kv: KeysValues) -> bool:
        stored: bool = await self.pool(pool).fulfil(claim, kv)
        return stored


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        work.close()
    raise RuntimeError("a thread's operation waited for an event loop")
