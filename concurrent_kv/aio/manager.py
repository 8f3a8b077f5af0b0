"""`AsyncKVCacheManager`: a manager for tasks."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .._checks import check_env_ids, hash_of, sequence_of
from ..books.allocation import Allocation
from ..books.integrity import IntegrityReport, RepairReport
from ..books.stats import StatsSummary, TierStats
from ..errors import InvalidArgumentError, shown
from ..manager import KVCacheManager
from ..model.kv import KeysValues
from ..model.overflow import Overflow
from ..never_copied import NeverCopied
from ..pool.restoring import Loaded
from ..pool.saving import Saved
from ..search.search import LookupOrder
from ..snapshots.contents import SideCodec
from .offload import INLINE_BYTES, INLINE_ENTRIES, INLINE_WAIT_SECONDS, MAX_WORKERS, Offload, OffloadStats
from .pool import AsyncKVPool
from .search import AsyncSearch

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncKVCacheManager"]


class AsyncKVCacheManager(NeverCopied):
    """A `KVCacheManager` for tasks: made by it, or around one that threads use at the same time.

    Args:
        manager: the manager to share; made of `config`, `env_num` and `settings` if left out.
        config, env_num, settings: see `KVCacheManager`.
        inline_wait_seconds, inline_bytes, inline_entries, max_workers: see `AsyncKVPool`.

    Attributes:
        sync: the manager itself, for threads, and for an `Evaluator`.
        init_pools, recur_pool, wm_pool: facades of its pools, each with the pool itself as its `sync`.
    """

    instead_of_copy = "one serves any number of tasks and loops; or make another around the same manager"

    def __init__(
        self,
        manager: KVCacheManager | None = None,
        *,
        config: object = None,
        env_num: int = 1,
        inline_wait_seconds: float = INLINE_WAIT_SECONDS,
        inline_bytes: int = INLINE_BYTES,
        inline_entries: int = INLINE_ENTRIES,
        max_workers: int = MAX_WORKERS,
        **settings: Any,
    ) -> None:
        self.sync = manager if manager is not None else KVCacheManager(config, env_num, **settings)
        self._offload = Offload(
            self.sync.storage,
            inline_wait_seconds=inline_wait_seconds,
            inline_bytes=inline_bytes,
            inline_entries=inline_entries,
            max_workers=max_workers,
        )
        self.init_pools = tuple(AsyncKVPool(pool, offload=self._offload) for pool in self.sync.init_pools)
        self.recur_pool = AsyncKVPool(self.sync.recur_pool, offload=self._offload)
        self.wm_pool = AsyncKVPool(self.sync.wm_pool, offload=self._offload)

    async def set_init_cache(
        self,
        env_id: int,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """See `KVCacheManager.set_init_cache`."""
        return await self._init_pool(env_id).put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    async def get_init_cache(
        self, env_id: int, cache_key: Hashable, *, stream: torch.Stream | None = None
    ) -> KeysValues | None:
        """See `KVCacheManager.get_init_cache`."""
        return await self._init_pool(env_id).get(cache_key, stream=stream)

    def _init_pool(self, env_id: int) -> AsyncKVPool:
        pools = dict(enumerate(self.init_pools))
        hash_of(env_id, "env_id")
        if isinstance(env_id, bool) or env_id not in pools:
            raise InvalidArgumentError(f"env_id must be 0 to {len(pools) - 1}, got {shown(env_id)}")
        return pools[env_id]

    async def set_recur_cache(
        self,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """See `KVCacheManager.set_recur_cache`."""
        return await self.recur_pool.put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    async def get_recur_cache(self, cache_key: Hashable, *, stream: torch.Stream | None = None) -> KeysValues | None:
        """See `KVCacheManager.get_recur_cache`."""
        return await self.recur_pool.get(cache_key, stream=stream)

    async def set_wm_cache(
        self,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """See `KVCacheManager.set_wm_cache`."""
        return await self.wm_pool.put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    async def get_wm_cache(self, cache_key: Hashable, *, stream: torch.Stream | None = None) -> KeysValues | None:
        """See `KVCacheManager.get_wm_cache`."""
        return await self.wm_pool.get(cache_key, stream=stream)

    async def hierarchical_get(
        self,
        env_id: int,
        cache_key: Hashable,
        *,
        order: Sequence[str] = ("init", "recur"),
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """See `KVCacheManager.hierarchical_get`."""
        order = sequence_of("order", order, "'init', 'recur' and 'wm'")
        return await self._offload.run(
            lambda seconds: self.sync.hierarchical_get(env_id, cache_key, order=order, timeout=seconds, stream=stream),
            self.sync.layout.bytes_per_entry,
            timeout=timeout,
        )

    def search(
        self,
        env_ids: Iterable[int],
        *,
        entries: int | None = None,
        tokens: int | None = None,
        order: LookupOrder = "own_first",
        overflow: Overflow | None = None,
        record_tree: bool = False,
        timeout: float | None = None,
    ) -> AsyncSearch:
        """See `KVCacheManager.search`; it opens when the `async with` is entered."""
        opening = partial(
            self.sync.search,
            check_env_ids(env_ids),  # type: ignore[arg-type]  # the manager says which are its own
            entries=entries,
            tokens=tokens,
            order=order,
            overflow=overflow,
            record_tree=record_tree,
        )
        return AsyncSearch(opening, self._offload, timeout)

    async def clear_all(self) -> None:
        """See `KVCacheManager.clear_all`."""
        await self._offload.in_worker_whole(self.sync.clear_all)

    async def clear_init_caches(self) -> None:
        """See `KVCacheManager.clear_init_caches`."""
        await self._offload.in_worker_whole(self.sync.clear_init_caches)

    async def clear_recur_cache(self) -> None:
        """See `KVCacheManager.clear_recur_cache`."""
        await self._offload.in_worker_whole(self.sync.clear_recur_cache)

    async def bump_version(self) -> None:
        """See `KVCacheManager.bump_version`."""
        await self._offload.in_worker_whole(self.sync.bump_version)

    async def save(
        self, path: str | PathLike[str], *, side: SideCodec | None = None, timeout: float | None = None
    ) -> Saved:
        """See `KVCacheManager.save`; always in a worker thread."""
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
        """See `KVCacheManager.load`; always in a worker thread."""
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

    @property
    def version(self) -> int:
        """See `KVCacheManager.version`."""
        return self.sync.version

    def tier_stats(self) -> TierStats | None:
        """See `KVCacheManager.tier_stats`."""
        return self.sync.tier_stats()

    def get_stats_summary(self) -> StatsSummary:
        """See `KVCacheManager.get_stats_summary`; it never waits."""
        return self.sync.get_stats_summary()

    def lifetime_stats(self) -> StatsSummary:
        """See `KVCacheManager.lifetime_stats`; it never waits."""
        return self.sync.lifetime_stats()

    def offload_stats(self) -> OffloadStats:
        """How many operations ran inline, and how many in worker threads."""
        return self._offload.stats()

    async def check_integrity(self) -> IntegrityReport:
        """See `KVCacheManager.check_integrity`."""
        return await self._offload.in_worker_whole(self.sync.check_integrity)

    async def repair(self) -> RepairReport:
        """See `KVCacheManager.repair`."""
        return await self._offload.in_worker_whole(self.sync.repair)

    def reset_stats(self) -> None:
        """See `KVCacheManager.reset_stats`; it never waits."""
        self.sync.reset_stats()

    def step(self) -> None:
        """See `KVCacheManager.step`; it never waits."""
        self.sync.step()

    def allocation(self) -> Allocation:
        """See `KVCacheManager.allocation`; it never waits."""
        return self.sync.allocation()

    async def close(self) -> None:
        """See `KVCacheManager.close`; finished also when the task is cancelled meanwhile."""
        await self._offload.to_the_end(self.sync.close)

    async def __aenter__(self) -> AsyncKVCacheManager:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
