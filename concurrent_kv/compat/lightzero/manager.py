"""`LightZeroKVCacheManager`: the interface of the manager on LightZero's main branch, over a `KVCacheManager`."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import Any

from ..._checks import positive_int
from ...locks.numbers import Numbers
from ...manager import KVCacheManager
from ...pool.pool import KVPool
from .containers import LightZeroKeysValues, from_lightzero, to_lightzero
from .settings import setting
from .views import KeyIndex, entries_of

__all__ = ["LightZeroKVCacheManager", "LightZeroPool"]

logger = logging.getLogger("concurrent_kv")

DEFAULT_SIMULATIONS = 50  # what LightZero assumes where its configuration does not say


class LightZeroPool:
    """One pool with LightZero's containers going in and coming out; thread-safe like the pool under it.

    Attributes:
        pool: the `KVPool` under it.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

    def get(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of the entry of `cache_key`, or None. May block."""
        found = self.pool.get(cache_key)
        return None if found is None else to_lightzero(found, self.pool.layout)

    def set(self, cache_key: Hashable, kv_cache: Any) -> bool:
        """Store a copy of LightZero's container, one row of some tokens; False if cleared meanwhile. May block."""
        return self.pool.put(cache_key, from_lightzero(kv_cache))

    def clear(self) -> None:
        """Remove every entry. May block."""
        self.pool.clear()

    @property
    def _key_to_index(self) -> KeyIndex:
        """The keys stored just now; `.keys()`, `in`, `len()`. May block."""
        return KeyIndex(lambda: entries_of(self.pool, self.pool.default_scope), self.pool.clear)

    @property
    def pool_size(self) -> int:
        """Entries that it holds at most."""
        return self.pool.account.max_entries

    def __len__(self) -> int:
        return len(self.pool)

    def __repr__(self) -> str:
        return f"<LightZeroPool {self.pool.name!r}: {len(self)} of {self.pool_size} entries>"


class LightZeroKVCacheManager:
    """What LightZero's main branch calls on its own `KVCacheManager`: change one import and keep the rest.

    `from concurrent_kv.compat.lightzero import LightZeroKVCacheManager as KVCacheManager`

    Args:
        config: the world model's configuration: `num_layers`, `num_heads`, `embed_dim`, `context_length`, `device`;
            `game_segment_length` (entries of each init pool) and `num_simulations` where it has them.
        env_num: environments.
        enable_stats: count hits, misses and the rest.
        clear_recur_log_freq: log the statistics at every N-th `clear_recur_cache()`; never if 0.
        clear_all_log_freq: the same for `clear_all()`.
        settings: anything else that `KVCacheManager` takes.

    Attributes:
        manager: the `KVCacheManager` under it, for searches and everything else.

    Raises:
        InvalidArgumentError, InvalidTypeError: a setting is missing or impossible; by name.
    """

    def __init__(
        self,
        config: Any,
        env_num: int,
        enable_stats: bool = True,
        clear_recur_log_freq: int = 1000,
        clear_all_log_freq: int = 100,
        **settings: Any,
    ) -> None:
        self.config = config
        self.env_num = env_num = positive_int("env_num", env_num)
        self.enable_stats = enable_stats
        self.clear_recur_log_freq = positive_int("clear_recur_log_freq", clear_recur_log_freq, minimum=0)
        self.clear_all_log_freq = positive_int("clear_all_log_freq", clear_all_log_freq, minimum=0)
        self._recur_clears, self._all_clears = Numbers(1), Numbers(1)
        simulations = setting(config, "num_simulations", DEFAULT_SIMULATIONS)
        names = ("num_layers", "num_heads", "embed_dim", "context_length", "device", "dtype")
        known = {name: value for name in names if (value := setting(config, name)) is not None}
        # LightZero sizes its pools by environments and simulations, whatever `env_num` and `max_cache_size` say.
        known |= {"num_simulations": simulations, "max_cache_size": env_num * (simulations + 1)}
        entries = setting(config, "game_segment_length")
        if entries is not None:
            settings.setdefault("init_entries", int(entries))
        self.manager = KVCacheManager(known, env_num, enable_stats, **settings)
        self.init_pools = [LightZeroPool(pool) for pool in self.manager.init_pools]
        self.recur_pool = LightZeroPool(self.manager.recur_pool)
        self.wm_pool = LightZeroPool(self.manager.wm_pool)

    # Entries ---------------------------------------------------------------------------------------------------------

    def set_init_cache(self, env_id: int, cache_key: Hashable, kv_cache: Any) -> bool:
        """Store a root of an environment; see `LightZeroPool.set`."""
        return self.manager.set_init_cache(env_id, cache_key, from_lightzero(kv_cache))

    def get_init_cache(self, env_id: int, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of a root of an environment, or None. May block."""
        found = self.manager.get_init_cache(env_id, cache_key)
        return None if found is None else to_lightzero(found, self.manager.layout)

    def set_recur_cache(self, cache_key: Hashable, kv_cache: Any) -> bool:
        """Store an entry of the recurrent pool; see `LightZeroPool.set`."""
        return self.recur_pool.set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of an entry of the recurrent pool, or None. May block."""
        return self.recur_pool.get(cache_key)

    def set_wm_cache(self, cache_key: Hashable, kv_cache: Any) -> bool:
        """Store an entry of the world-model pool; see `LightZeroPool.set`."""
        return self.wm_pool.set(cache_key, kv_cache)

    def get_wm_cache(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of an entry of the world-model pool, or None. May block."""
        return self.wm_pool.get(cache_key)

    def hierarchical_get(self, env_id: int, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy from the environment's init pool, else from the recurrent pool, or None. May block."""
        found = self.manager.hierarchical_get(env_id, cache_key)
        return None if found is None else to_lightzero(found, self.manager.layout)

    # Clears ----------------------------------------------------------------------------------------------------------

    def clear_all(self) -> None:
        """Clear every pool, and the two lists. May block."""
        self._log("clear_all", next(self._all_clears), self.clear_all_log_freq)
        self.manager.clear_all()

    def clear_init_caches(self) -> None:
        """Clear every environment's init pool. May block."""
        self.manager.clear_init_caches()

    def clear_recur_cache(self) -> None:
        """Clear the recurrent pool. May block."""
        self._log("clear_recur_cache", next(self._recur_clears), self.clear_recur_log_freq)
        self.manager.clear_recur_cache()

    def _log(self, what: str, number: int, frequency: int) -> None:
        # Before anything is cleared: the line shows what is about to go.
        if frequency and number % frequency == 0:
            total = self.manager.get_stats_summary().total
            logger.info(
                "%s: %s %d: %d entries, hit rate %.4f of %d requests, %d evictions",
                self.manager.name,
                what,
                number,
                total.entries,
                total.hit_rate,
                total.request_count,
                total.eviction_count,
            )

    # Statistics ------------------------------------------------------------------------------------------------------

    def get_stats_summary(self) -> dict[str, Any]:
        """Numbers by pool: `stats_enabled`, and where it is True `init_pools`, `recur_pool` and `wm_pool`."""
        if not self.enable_stats:
            return {"stats_enabled": False}
        pools = {name: stats.as_dict() for name, stats in self.manager.get_stats_summary().pools.items()}
        return {
            "stats_enabled": True,
            "init_pools": {f"env_{env_id}": pools[f"init[{env_id}]"] for env_id in range(self.env_num)},
            "recur_pool": pools["recur"],
            "wm_pool": pools["wm"],
        }

    def reset_stats(self) -> None:
        """Start every count from zero."""
        self.manager.reset_stats()

    # The caller's lists, which nothing here reads ------------------------------------------------------------------

    @property
    def keys_values_wm_list(self) -> list[Any]:
        """The caller's list of world-model caches; assigning copies the items, `clear_all()` empties it."""
        return self.manager.keys_values_wm_list

    @keys_values_wm_list.setter
    def keys_values_wm_list(self, items: Iterable[Any]) -> None:
        self.manager.keys_values_wm_list = items

    @property
    def keys_values_wm_size_list(self) -> list[int]:
        """The caller's list of their sizes; assigning copies the items, `clear_all()` empties it."""
        return self.manager.keys_values_wm_size_list

    @keys_values_wm_size_list.setter
    def keys_values_wm_size_list(self, items: Iterable[int]) -> None:
        self.manager.keys_values_wm_size_list = items

    def __repr__(self) -> str:
        return f"<LightZeroKVCacheManager over {self.manager!r}>"
