"""`LightZeroKVCacheManager`: the interface of the manager on LightZero's main branch, over a `KVCacheManager`."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from functools import partial
from typing import Any

from ..._checks import hash_of, positive_int
from ...books.records import Entry
from ...device.buffers import new_buffer
from ...locks.gate import gate
from ...locks.numbers import Numbers
from ...manager import KVCacheManager
from ...pool.pool import KVPool, read_from_pool
from ...pool.reading import can_find_unheld, copy_unheld, find_unheld, gather_entries, reads_unheld
from ...pool.storage import Domain
from .containers import LightZeroKeysValues, row_of_lightzero
from .settings import setting
from .views import KeyIndex, entries_of
from .write_buffer import WriteBuffer

__all__ = ["LightZeroKVCacheManager", "LightZeroPool", "LightZeroStats"]

logger = logging.getLogger("concurrent_kv")

# What LightZero assumes where its configuration does not say, and how it sizes its pools.
DEFAULT_SIMULATIONS, DEFAULT_MOST, LEAST_ROOTS = 50, 5000, 256

ROWS_TOGETHER = 32  # new nodes that one write stores; a window each is allocated for them


class LightZeroStats:
    """The counts of one pool, under the main branch's names: always those of now.

    Args:
        pool: whose they are.
        buffer: of rows that are set and not stored yet, if it has one.
    """

    def __init__(self, pool: KVPool, buffer: WriteBuffer | None = None) -> None:
        self._counted = pool
        self._buffer = buffer

    @property
    def _pool(self) -> KVPool:
        _store_rows(self._buffer)
        return self._counted

    @property
    def hits(self) -> int:
        """Entries asked for and found."""
        return self._pool.stats().hit_count

    @property
    def misses(self) -> int:
        """Entries asked for and not found."""
        return self._pool.stats().miss_count

    @property
    def evictions(self) -> int:
        """Entries that gave way to others."""
        return self._pool.stats().eviction_count

    @property
    def total_queries(self) -> int:
        """Entries asked for."""
        return self._pool.stats().request_count

    @property
    def hit_rate(self) -> float:
        """Hits by queries; 0.0 where nothing was asked for."""
        stats = self._pool.stats()
        return stats.hit_count / stats.request_count if stats.request_count else 0.0

    @property
    def miss_rate(self) -> float:
        """What is left of 1.0 by `hit_rate`; 1.0 where nothing was asked for."""
        return 1.0 - self.hit_rate

    def reset(self) -> None:
        """Start every count of this pool from zero."""
        self._pool.reset_stats()

    def __repr__(self) -> str:
        stats = self._pool.stats()
        rate = stats.hit_count / stats.request_count if stats.request_count else 0.0
        return (
            f"CacheStats(hits={stats.hit_count}, misses={stats.miss_count}, evictions={stats.eviction_count}, "
            f"hit_rate={rate:.2%})"
        )


def _store_rows(buffer: WriteBuffer | None) -> None:
    """Store the rows that wait, before counts are looked at; later, inside a critical section of the calling thread."""
    if buffer is not None and not gate.is_inside:
        buffer.store()


def _window(domain: Domain, entry: Entry) -> LightZeroKeysValues:
    """A private copy of a retained entry as LightZero's container: with zeros in the window's columns behind it."""
    storage, length = domain.storage, entry.length
    if storage.clock.backend is not None:
        storage.clock.current()  # before anything is allocated, which a capture would take into its graph
    packed = new_buffer(storage.layout, 1, storage.layout.max_tokens)
    if storage.clock.backend is None and entry.correction is None:  # nothing to wait for, and nothing owed
        storage.tensor.gather(domain.ledger.tables, [entry.row], length, packed)
    else:
        gather_entries(domain, [entry], packed, length)
    return LightZeroKeysValues.private(packed, length)


class LightZeroPool:
    """One pool with LightZero's containers going in and coming out; thread-safe like the pool under it.

    Args:
        pool: the `KVPool` under it.
        name: what the main branch calls it.
        enable_stats: whether it counts.
        buffer: of its manager's rows that are set and not stored yet; None where every row is stored at once.
        has_rows: whether they are this pool's.

    Attributes:
        name: what the main branch calls it.
        enable_stats: whether it counts.
        stats: its counts; None where it does not count.
    """

    def __init__(
        self,
        pool: KVPool,
        name: str,
        enable_stats: bool = True,
        buffer: WriteBuffer | None = None,
        *,
        has_rows: bool = False,
    ) -> None:
        self._pool = pool
        self._buffer, self._of_this = buffer, buffer if has_rows else None
        self.name = name
        self.enable_stats = enable_stats
        self.stats = LightZeroStats(pool, self._of_this) if enable_stats else None

    @property
    def pool(self) -> KVPool:
        """The `KVPool` under it. May block."""
        _store_rows(self._of_this)
        return self._pool

    def get(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of the entry of `cache_key`, or None. May block."""
        pool, key_hash = self._pool, hash_of(cache_key)
        storage = pool.storage
        storage.check_call()
        pool.check_open()
        if self._buffer is not None and not self._buffer.is_next and can_find_unheld(pool.default_scope, key_hash):
            found = None if self._of_this is None else self._of_this.get(cache_key)
            if found is not None:
                return found
            entry = find_unheld(pool, pool.default_scope, cache_key, key_hash)
            if entry is None:
                return None
            packed = new_buffer(storage.layout, 1, storage.layout.max_tokens)
            if copy_unheld(pool, entry, packed):
                return LightZeroKeysValues.private(packed, entry.length)
        return read_from_pool(pool, cache_key, partial(_window, pool))

    def set(self, cache_key: Hashable, kv_cache: Any) -> int:
        """Store a copy of LightZero's container, one row of some tokens. May block.

        Returns what `_key_to_index` has for it as long as it is there.
        """
        key_hash = hash_of(cache_key)
        if self._of_this is None or not self._of_this.add(cache_key, key_hash, kv_cache):
            self._pool.put(cache_key, row_of_lightzero(kv_cache))
        return key_hash

    def clear(self) -> None:
        """Remove every entry. May block."""
        self._pool.clear()

    @property
    def _key_to_index(self) -> KeyIndex:
        """The keys stored just now; `.keys()`, `in`, `len()`. May block."""
        return KeyIndex(lambda: entries_of(self._pool, self._pool.default_scope), self._pool.clear)

    @property
    def pool_size(self) -> int:
        """Entries that it holds at most."""
        return self._pool.account.max_entries

    def __len__(self) -> int:
        return len(self.pool)

    def __repr__(self) -> str:
        counts = "" if self.stats is None else f", {self.stats}"
        return f"<LightZeroPool {self.name!r}: {len(self)} of {self.pool_size} entries{counts}>"


class LightZeroKVCacheManager:
    """What LightZero's main branch calls on its own `KVCacheManager`: change one import and keep the rest.

    `from concurrent_kv.compat.lightzero import LightZeroKVCacheManager as KVCacheManager`

    A copy, deep, shallow or pickled, is a manager of its own with the same settings, and empty: what is stored belongs
    to the weights that computed it, and LightZero copies a model in order to give the copy others.

    Args:
        config: the world model's configuration: `num_layers`, `num_heads`, `embed_dim`, `context_length`, `device`;
            `num_simulations` and `max_cache_size`, by which the pools are sized, where it has them.
        env_num: environments.
        enable_stats: count hits, misses and the rest.
        clear_recur_log_freq: log the statistics at every N-th `clear_recur_cache()`; never if 0.
        clear_all_log_freq: the same for `clear_all()`.
        settings: anything else that `KVCacheManager` takes.

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
        self._settings = dict(settings)
        self.env_num = env_num = positive_int("env_num", env_num)
        self.enable_stats = enable_stats
        self.clear_recur_log_freq = positive_int("clear_recur_log_freq", clear_recur_log_freq, minimum=0)
        self.clear_all_log_freq = positive_int("clear_all_log_freq", clear_all_log_freq, minimum=0)
        self._recur_clears, self._all_clears = Numbers(1), Numbers(1)
        simulations = setting(config, "num_simulations", DEFAULT_SIMULATIONS)
        names = ("num_layers", "num_heads", "embed_dim", "context_length", "device", "dtype")
        known = {name: value for name in names if (value := setting(config, name)) is not None}
        # LightZero sizes this pool by environments and simulations alone. One more for each environment than it has, as
        # an attached model's search reserves.
        known |= {"num_simulations": simulations, "max_cache_size": env_num * (simulations + 1)}
        # A search may store a root for each of its simulations; the setting is a guard against too many.
        most = positive_int("config.max_cache_size", setting(config, "max_cache_size", DEFAULT_MOST))
        settings.setdefault("init_entries", min(most, max(LEAST_ROOTS, 2 * simulations)))
        self._manager = KVCacheManager(known, env_num, enable_stats, **settings)
        pools = self._manager
        of_nodes, has_tier = pools.recur_pool, pools.storage.tier is not None
        is_plain = reads_unheld(pools.storage) and not (has_tier or of_nodes.account.policy.observes_hits)
        self._buffer = WriteBuffer(of_nodes, ROWS_TOGETHER) if is_plain else None
        self.init_pools = [
            LightZeroPool(pool, f"init_env{env_id}", enable_stats, self._buffer)
            for env_id, pool in enumerate(pools.init_pools)
        ]
        self.recur_pool = LightZeroPool(of_nodes, "recurrent", enable_stats, self._buffer, has_rows=True)
        self.wm_pool = LightZeroPool(pools.wm_pool, "world_model", enable_stats, self._buffer)

    def __reduce__(self) -> tuple[Any, ...]:
        frequencies = (self.clear_recur_log_freq, self.clear_all_log_freq)
        return partial(type(self), **self._settings), (self.config, self.env_num, self.enable_stats, *frequencies)

    @property
    def manager(self) -> KVCacheManager:
        """The `KVCacheManager` under it, for searches and everything else. May block."""
        _store_rows(self._buffer)
        return self._manager

    # Entries ---------------------------------------------------------------------------------------------------------

    def set_init_cache(self, env_id: int, cache_key: Hashable, kv_cache: Any) -> int:
        """Store a root of an environment; see `LightZeroPool.set`."""
        return self._init_pool(env_id).set(cache_key, kv_cache)

    def get_init_cache(self, env_id: int, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of a root of an environment, or None. May block."""
        return self._init_pool(env_id).get(cache_key)

    def _init_pool(self, env_id: int) -> LightZeroPool:
        if type(env_id) is not int or not 0 <= env_id < self.env_num:
            self._manager._init_pool(env_id)  # says what it must be
        return self.init_pools[env_id]

    def set_recur_cache(self, cache_key: Hashable, kv_cache: Any) -> int:
        """Store an entry of the recurrent pool; see `LightZeroPool.set`."""
        return self.recur_pool.set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of an entry of the recurrent pool, or None. May block."""
        return self.recur_pool.get(cache_key)

    def set_wm_cache(self, cache_key: Hashable, kv_cache: Any) -> int:
        """Store an entry of the world-model pool; see `LightZeroPool.set`."""
        return self.wm_pool.set(cache_key, kv_cache)

    def get_wm_cache(self, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy of an entry of the world-model pool, or None. May block."""
        return self.wm_pool.get(cache_key)

    def hierarchical_get(self, env_id: int, cache_key: Hashable) -> LightZeroKeysValues | None:
        """A private copy from the environment's init pool, else from the recurrent pool, or None. May block.

        Each pool that is asked counts, as on the main branch.
        """
        found = self._init_pool(env_id).get(cache_key)
        return self.recur_pool.get(cache_key) if found is None else found

    # Clears ----------------------------------------------------------------------------------------------------------

    def clear_all(self) -> None:
        """Clear every pool, and the two lists. May block."""
        self._log("clear_all", next(self._all_clears), self.clear_all_log_freq)
        self._manager.clear_all()

    def clear_init_caches(self) -> None:
        """Clear every environment's init pool. May block."""
        self._manager.clear_init_caches()

    def clear_recur_cache(self) -> None:
        """Clear the recurrent pool. May block."""
        self._log("clear_recur_cache", next(self._recur_clears), self.clear_recur_log_freq)
        self._manager.clear_recur_cache()

    def _log(self, what: str, number: int, frequency: int) -> None:
        # Before anything is cleared: the line shows what is about to go.
        if frequency and number % frequency == 0:
            total = self.manager.get_stats_summary().total
            logger.info(
                "%s: %s %d: %d entries, %s, %d evictions",
                self._manager.name,
                what,
                number,
                total.entries,
                total.hits_in_words,
                total.eviction_count,
            )

    # Statistics ------------------------------------------------------------------------------------------------------

    def get_stats_summary(self) -> dict[str, Any]:
        """The counts of every pool in words: `stats_enabled`, and where it is True `init_pools` and the other two.

        In numbers: `stats` of each pool, and `manager.get_stats_summary()`.
        """
        if not self.enable_stats:
            return {"stats_enabled": False}
        return {
            "stats_enabled": True,
            "init_pools": {f"env_{env_id}": str(pool.stats) for env_id, pool in enumerate(self.init_pools)},
            "recur_pool": str(self.recur_pool.stats),
            "wm_pool": str(self.wm_pool.stats),
        }

    def reset_stats(self) -> None:
        """Start every count from zero."""
        self.manager.reset_stats()

    # The caller's lists, which nothing here reads ------------------------------------------------------------------

    @property
    def keys_values_wm_list(self) -> list[Any]:
        """The caller's list of world-model caches; assigning copies the items, `clear_all()` empties it."""
        return self._manager.keys_values_wm_list

    @keys_values_wm_list.setter
    def keys_values_wm_list(self, items: Iterable[Any]) -> None:
        self._manager.keys_values_wm_list = items

    @property
    def keys_values_wm_size_list(self) -> list[int]:
        """The caller's list of their sizes; assigning copies the items, `clear_all()` empties it."""
        return self._manager.keys_values_wm_size_list

    @keys_values_wm_size_list.setter
    def keys_values_wm_size_list(self, items: Iterable[int]) -> None:
        self._manager.keys_values_wm_size_list = items

    def __repr__(self) -> str:
        return f"<LightZeroKVCacheManager over {self._manager!r}>"
