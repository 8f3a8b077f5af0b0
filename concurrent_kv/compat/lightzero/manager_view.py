"""`ManagerView`: what LightZero's policies do with the main branch's manager, where an attachment is in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ...pool.pool import KVPool
from .attachment import Attachment
from .manager import LightZeroStats
from .views import KeyIndex, init_views, recur_view

__all__ = ["ManagerView", "PoolView"]


class PoolView:
    """A pool of an attached model: to clear and to look at."""

    def __init__(self, pool: KVPool, keys: KeyIndex, clear: Callable[[], None]) -> None:
        self.pool_size = pool.account.max_entries
        self.stats = LightZeroStats(pool)
        self._key_to_index = keys
        self._clear = clear

    def clear(self) -> None:
        """Remove every entry. May block."""
        self._clear()

    def __len__(self) -> int:
        return len(self._key_to_index)


class ManagerView:
    """An attached model's `kv_cache_manager`: entries go in and out by searches alone."""

    def __init__(self, kv: Attachment) -> None:
        self._kv = kv

    @property
    def init_pools(self) -> list[PoolView]:
        """Each environment's roots."""
        pools = [self._kv.manager.init_pools[env_id] for env_id in self._kv.env_ids]
        return [PoolView(pool, keys, keys.clear) for pool, keys in zip(pools, init_views(self._kv), strict=True)]

    @property
    def recur_pool(self) -> PoolView:
        """The nodes of the calling thread's search."""
        keys = recur_view(self._kv)
        return PoolView(self._kv.manager.recur_pool, keys, keys.clear)

    def clear_recur_cache(self) -> None:
        """Release the nodes of the calling thread's search. May block."""
        self._kv.forget_nodes()

    def clear_init_caches(self) -> None:
        """Clear every environment's roots. May block."""
        for pool in self.init_pools:
            pool.clear()

    def clear_all(self) -> None:
        """Clear every pool, and end the calling thread's search. May block."""
        self._kv.clear()

    def get_stats_summary(self) -> dict[str, Any]:
        """The counts of the pools in words."""
        return {
            "stats_enabled": self._kv.manager.stats_enabled,
            "init_pools": {f"env_{row}": str(pool.stats) for row, pool in enumerate(self.init_pools)},
            "recur_pool": str(self.recur_pool.stats),
        }

    def reset_stats(self) -> None:
        """Start every count from zero."""
        self._kv.manager.reset_stats()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"an attached world model's kv_cache_manager has no {name}: its entries are those of "
            "attachment_of(world_model).manager, and go in and out by searches"
        )
