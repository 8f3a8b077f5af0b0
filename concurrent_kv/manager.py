"""`KVCacheManager`: the pools of a world model by role, over one storage, and the searches over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ._checks import hash_of, positive_int, sequence_of
from .books.allocation import SHORT_WINDOW, Allocation, default_tokens, headroom_of
from .books.eviction import EvictionPolicy, PolicyFactory
from .books.integrity import IntegrityReport, RepairReport
from .books.records import Entry
from .books.size_arguments import SizeArguments
from .books.sizing import SizePlan, slots_of_tree
from .books.stats import NoCounters, PoolStats, StatsSummary, TierStats
from .device.layout import KVLayout
from .errors import InvalidArgumentError, shown
from .locks.gate import gate
from .locks.numbers import Numbers
from .model.config import ManagerConfig
from .model.kv import KeysValues
from .model.overflow import Overflow, check_overflow
from .pool.checking import check_integrity, repair
from .pool.core import bump_versions
from .pool.handle import Handle
from .pool.pool import KVPool
from .pool.restoring import Loaded, load_pools
from .pool.saving import Saved, save_pools
from .pool.storage import KVStorage
from .pool.tier import HostTier, disk_bytes, put_beneath, tier_bytes
from .search.search import LookupOrder, Search, open_search
from .snapshots.contents import SideCodec

if TYPE_CHECKING:
    import torch


__all__ = ["KVCacheManager", "pools_of"]

logger = logging.getLogger("concurrent_kv")


class KVCacheManager(Handle):
    """One storage, an init pool for each environment, a recurrent pool, a world-model pool, and searches over them.

    Thread-safe throughout. The roles are separate scopes: equal keys in different pools never meet, and a lookup names
    its pools and their order.

    Args:
        config: an EasyDict, a dict, a dataclass or any object with `num_layers`, `num_heads`, `embed_dim`,
            `context_length` (window in tokens), `num_simulations`, `max_cache_size` (entries of the recurrent pool) and
            `device`; `dtype` is optional. Or a language model's configuration, of Hugging Face's transformers, say: see
            `ManagerConfig`.
        env_num: environments; their ids are 0 to `env_num - 1`.
        enable_stats: count hits, misses and the rest. Where False, every count stays 0.
        init_entries: entries of each environment's init pool.
        init_tokens: tokens (slots) of each environment's init pool, one window at least; see below if left out.
        recur_slots: slots of the recurrent pool, one window at least; if left out, what one search over all
            environments reserves, `env_num * (num_simulations + 1)` entries. While such a search is open, nothing else
            fits: give more to use `set_recur_cache` beside it.
        wm_entries: entries of the world-model pool; `env_num` if left out.
        wm_tokens: tokens (slots) of the world-model pool, one window at least; see below if left out.
        policy: eviction policy of every pool, by name or factory; "fifo" is what LightZero does.
        shards: lock shards, shared by the pools.
        writers: writers that can replace entries of full pools at once without waiting for each other (headroom of one
            window each); 8 if left out, 1 where a window is more than 1,024 tokens.
        headroom_tokens: tokens (slots) that the storage has beyond the pools' quotas, one window at least. If left out
            `writers + env_num` windows, where a window is more than 1,024 tokens `writers` windows. A root that an open
            search keeps after it was replaced takes its tokens from these until the search closes.
        wait_timeout: seconds an operation waits at most.
        log_every_clears, log_every_steps: log the statistics at every N-th clear and at every N-th `step()`; never if
            left out.
        name: what messages call it.
        tier: a `HostTier`: host memory, one for all pools, that entries move down to where they are evicted; they are
            lost if left out.

    Attributes:
        recur_pool, wm_pool: the recurrent and the world-model pool, `KVPool`s as `init_pools` are.
        storage: what they share.
        config: the settings that were read.
        env_num, stats_enabled, name: as above.

    Raises:
        InvalidArgumentError, InvalidTypeError: a setting is missing, impossible or contradicts another; by name.

    Tokens that are left out, here and in `search()`, are full windows for every entry where a window is at most 1,024
    tokens. Where it is longer they are 1,024 tokens for every entry, and one window at least: entries can be as long as
    the window, but not all of them at once. Before anything is allocated, `plan()` says which sizes your searches need,
    and `allocation_for()` how much is allocated with these arguments.
    """

    instead_of_copy = "share the one object between threads; in another process make one there, and send entries"

    def __init__(
        self,
        config: object,
        env_num: int,
        enable_stats: bool = True,
        *,
        init_entries: int = 16,
        init_tokens: int | None = None,
        recur_slots: int | None = None,
        wm_entries: int | None = None,
        wm_tokens: int | None = None,
        policy: str | PolicyFactory[EvictionPolicy[Entry]] | None = "fifo",
        shards: int = 16,
        writers: int | None = None,
        headroom_tokens: int | None = None,
        wait_timeout: float = 10.0,
        log_every_clears: int | None = None,
        log_every_steps: int | None = None,
        name: str = "cache",
        tier: HostTier | None = None,
    ) -> None:
        if isinstance(policy, EvictionPolicy):
            raise InvalidArgumentError(
                f"policy must be a name or a factory, as every pool needs a policy of its own, got {shown(policy)}"
            )
        settings = ManagerConfig.read(config, env_num)
        layout = settings.layout
        self._allocation = allocation = self.allocation_for(
            settings,
            settings.env_num,
            init_entries=init_entries,
            init_tokens=init_tokens,
            recur_slots=recur_slots,
            wm_entries=wm_entries,
            wm_tokens=wm_tokens,
            writers=writers,
            headroom_tokens=headroom_tokens,
            tier=tier,
        )
        self.config = settings
        self.layout = layout
        self.env_num = settings.env_num
        self.stats_enabled = enable_stats
        self.name = name
        self._log_every_clears = (
            None if log_every_clears is None else positive_int("log_every_clears", log_every_clears)
        )
        self._log_every_steps = None if log_every_steps is None else positive_int("log_every_steps", log_every_steps)
        self.storage = KVStorage(
            layout,
            allocation.total_slots - allocation.headroom_slots,
            headroom_slots=allocation.headroom_slots,
            shards=shards,
            wait_timeout=wait_timeout,
            name=name,
        )
        self.storage.headroom_argument = "headroom_tokens"
        if tier is not None:
            put_beneath(self.storage, tier)

        def pool(role: str, arguments: SizeArguments, shard: int | None = None) -> KVPool:
            made = KVPool(
                layout,
                allocation.entries[role],
                max_slots=allocation.slots[role],
                policy=policy,
                name=f"{name}.{role}",
                storage=self.storage,
                scope_shards=None if shard is None else (shard % self.storage.locks.count,),
            )
            made.account.arguments = arguments
            if not enable_stats:
                made.account.counters = NoCounters()
            return made

        # One shard for each environment's pool: a gather over many environments takes few locks.
        of_roots = _size_arguments("init_entries", "init_tokens", init_tokens, layout.max_tokens)
        self._init_pools = tuple(pool(f"init[{env}]", of_roots, shard=env) for env in range(settings.env_num))
        self._init_pool_by_env: Mapping[Hashable, KVPool] = MappingProxyType(dict(enumerate(self._init_pools)))
        self.recur_pool = pool("recur", SizeArguments("config.max_cache_size", slots="recur_slots"))
        self.wm_pool = pool("wm", _size_arguments("wm_entries", "wm_tokens", wm_tokens, layout.max_tokens))
        self._search_numbers = Numbers()
        self._clears = Numbers(1)
        self._steps = Numbers(1)
        self._wm_list: list[object] = []
        self._wm_size_list: list[int] = []

    @classmethod
    def allocation_for(
        cls,
        config: object,
        env_num: int,
        enable_stats: bool = True,
        *,
        init_entries: int = 16,
        init_tokens: int | None = None,
        recur_slots: int | None = None,
        wm_entries: int | None = None,
        wm_tokens: int | None = None,
        writers: int | None = None,
        headroom_tokens: int | None = None,
        tier: HostTier | None = None,
        **others: Any,
    ) -> Allocation:
        """What a manager made with these arguments allocates, in slots and bytes; allocates nothing. Never blocks.

        Args:
            config, env_num, init_entries, init_tokens, recur_slots, wm_entries, wm_tokens, writers, headroom_tokens,
                tier: see the constructor.
            enable_stats, others: its other arguments; they change no size, and their values are not looked at.

        Raises:
            InvalidArgumentError, InvalidTypeError: a size that the constructor refuses too, by name.
            TypeError: an argument that the constructor does not have.
        """
        signature(cls).bind_partial(**others)
        settings = ManagerConfig.read(config, env_num)
        window = settings.layout.max_tokens
        roots = [f"init[{env}]" for env in range(settings.env_num)]
        init_entries = positive_int("init_entries", init_entries)
        wm_entries = settings.env_num if wm_entries is None else positive_int("wm_entries", wm_entries)
        search_tokens = default_tokens(settings.env_num * (settings.num_simulations + 1), window)

        def stated(name: str, tokens: int | None, default: int) -> int:
            return default if tokens is None else positive_int(name, tokens, minimum=window)

        entries = {**dict.fromkeys(roots, init_entries), "recur": settings.max_cache_size, "wm": wm_entries}
        slots = {
            **dict.fromkeys(roots, stated("init_tokens", init_tokens, default_tokens(init_entries, window))),
            "recur": stated("recur_slots", recur_slots, search_tokens),
            "wm": stated("wm_tokens", wm_tokens, default_tokens(wm_entries, window)),
        }
        # Beside the writers' windows, one for each environment: a root that a search keeps after it was replaced.
        headroom = headroom_of(headroom_tokens, writers, window, usual_writers=8, roots=settings.env_num)
        total = sum(slots.values()) + headroom
        per_slot, below = settings.layout.bytes_per_token, tier_bytes(tier, settings.layout)
        on_disk = disk_bytes(tier, settings.layout)
        return Allocation(entries, slots, headroom, total, per_slot, search_tokens, below, on_disk)

    @classmethod
    def plan(
        cls,
        config: object,
        env_num: int,
        *,
        simulations: int | None = None,
        step: int = 2,
        overflow: Overflow | None = None,
        searches: int = 1,
        trees: int | None = None,
        moves: int = 1,
        roots: int = 16,
        root_tokens: int | Iterable[int] | None = None,
        threads: int | None = None,
        wm_entries: int = 1,
    ) -> SizePlan:
        """The sizes that such searches need, so that none of them waits, evicts a root that is in use, or runs out.

        Allocates nothing, never blocks. `print` the result, make a manager of it by `KVCacheManager(**plan.arguments)`,
        and open each search by `manager.search(env_ids, **plan.reservation)`.

        Args:
            config: as the constructor's; its `max_cache_size` is not looked at, and need not be there.
            env_num: environments.
            simulations: nodes of a tree at most, its root apart; `config.num_simulations` if left out. Where a search
                goes on with a subtree (`keep`), the nodes that stay count too: see `moves`.
            step: new tokens of a node, at most.
            overflow: what commits do with rows that outgrow the window; None where none does.
            searches: searches that are open at once.
            trees: environments of one search; if left out, `env_num` by `searches`, rounded up.
            moves: for how many moves one search is used, `keep` between them. From the third on, entries that were
                released leave tokens behind which those below them share.
            roots: entries that each init pool keeps. 0 where each tree's root is an entry of its search instead, stored
                there whole or as what a model appended to a row that missed.
            root_tokens: tokens of a root at most, or the lengths that roots can have, (1, 3, 5) say. If left out what a
                commit leaves at most: `overflow.limit - 1` where it drops, otherwise the window. (For `DropAndCorrect`,
                what is stated is counted on: each node then gets `step` tokens exactly.)
            threads: threads or tasks that store roots at once; `searches` if left out.
            wm_entries: entries of the world-model pool. It has one at least.

        Not in it: what is put into the recurrent pool beside searches; pins, and batches of init pools that stay open
        while their entries are replaced; nodes that are filled instead of appended to their parents.

        Raises:
            InvalidArgumentError, InvalidTypeError: an argument that no search can have, by name.
        """
        if simulations is not None:
            simulations = positive_int("simulations", simulations)
        settings = ManagerConfig.read_for(config, env_num, simulations)
        window, nodes, env_num = settings.layout.max_tokens, settings.num_simulations, settings.env_num
        step, searches = positive_int("step", step), positive_int("searches", searches)
        threads = searches if threads is None else positive_int("threads", threads)
        trees = -(-env_num // searches) if trees is None else positive_int("trees", trees)
        if trees > env_num:
            raise InvalidArgumentError(f"trees must be at most env_num={env_num}, got {trees}")
        moves = positive_int("moves", moves)
        roots = positive_int("roots", roots, minimum=0)
        _check_step(step, overflow, settings.layout)
        lengths = _root_lengths(root_tokens, overflow, window)
        longest = max(lengths)

        of_tree = nodes * step
        if overflow is not None and overflow.corrects:
            # Longer rows get no child: what a drop leaves has to be below the limit.
            most = min(window, overflow.limit - 1 + overflow.count) - step
            if isinstance(root_tokens, Iterable):
                extended = [length for length in lengths if length <= most]
            else:  # a shorter root is a step, or several, before one of these
                extended = list(range(min(longest, most), 0, -1)[:step])
            of_tree = slots_of_tree(nodes, step, extended, overflow.limit, overflow.count)
        own_root = roots == 0
        of_tree += min(max(0, moves - 2) * step, window)  # of the path from the first root to the present one
        entries, tokens = trees * (nodes + own_root), trees * (of_tree + own_root * longest)
        sizes: dict[str, Any] = {
            "init_entries": max(1, roots),
            "init_tokens": max(window, roots * longest),
            "recur_slots": max(window, searches * tokens),
            "wm_entries": positive_int("wm_entries", wm_entries),
            "wm_tokens": default_tokens(wm_entries, window),
            # Of roots that searches hold and that were replaced or evicted, and of what is replaced just now.
            "headroom_tokens": max(window, 0 if own_root else (searches * trees + threads) * longest),
        }
        settings = replace(settings, max_cache_size=max(settings.max_cache_size, searches * entries))
        return SizePlan(
            config=settings,
            searches=searches,
            trees=trees,
            simulations=nodes,
            step=step,
            threads=threads,
            entries=entries,
            tokens=tokens,
            allocation=KVCacheManager.allocation_for(settings, env_num, **sizes),
            **sizes,
        )

    # Pools by role ---------------------------------------------------------------------------------------------------

    @property
    def init_pools(self) -> tuple[KVPool, ...]:
        """Each environment's pool of root entries, by environment id."""
        return self._init_pools

    def _init_pool(self, env_id: int) -> KVPool:
        hash_of(env_id, "env_id")
        if isinstance(env_id, bool) or env_id not in self._init_pool_by_env:
            raise InvalidArgumentError(f"env_id must be 0 to {self.env_num - 1}, got {shown(env_id)}")
        return self._init_pool_by_env[env_id]

    def set_init_cache(
        self,
        env_id: int,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store a root entry of an environment; see `KVPool.put`. May block."""
        return self._init_pool(env_id).put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    def get_init_cache(
        self, env_id: int, cache_key: Hashable, *, stream: torch.Stream | None = None
    ) -> KeysValues | None:
        """A private copy of a root entry of an environment, or None; see `KVPool.get`. May block."""
        return self._init_pool(env_id).get(cache_key, stream=stream)

    def set_recur_cache(
        self,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store an entry in the recurrent pool; see `KVPool.put`. May block."""
        return self.recur_pool.put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    def get_recur_cache(self, cache_key: Hashable, *, stream: torch.Stream | None = None) -> KeysValues | None:
        """A private copy of an entry of the recurrent pool, or None; see `KVPool.get`. May block."""
        return self.recur_pool.get(cache_key, stream=stream)

    def set_wm_cache(
        self,
        cache_key: Hashable,
        kv_cache: KeysValues,
        *,
        side: object = None,
        priority: float = 0.0,
        stream: torch.Stream | None = None,
    ) -> bool:
        """Store an entry in the world-model pool; see `KVPool.put`. May block."""
        return self.wm_pool.put(cache_key, kv_cache, side=side, priority=priority, stream=stream)

    def get_wm_cache(self, cache_key: Hashable, *, stream: torch.Stream | None = None) -> KeysValues | None:
        """A private copy of an entry of the world-model pool, or None; see `KVPool.get`. May block."""
        return self.wm_pool.get(cache_key, stream=stream)

    def hierarchical_get(
        self,
        env_id: int,
        cache_key: Hashable,
        *,
        order: Sequence[str] = ("init", "recur"),
        timeout: float | None = None,
        stream: torch.Stream | None = None,
    ) -> KeysValues | None:
        """A private copy from the first pool of `order` that has the key: "init" (the environment's), "recur", "wm".

        A hit counts in the pool that had it, a miss in the last one asked; `stream` as in `KVPool.get`. May block.
        """
        pools = {"init": self._init_pool(env_id), "recur": self.recur_pool, "wm": self.wm_pool}
        order = sequence_of("order", order, "'init', 'recur' and 'wm'")
        if not order or any(role not in tuple(pools) for role in order):
            raise InvalidArgumentError(f"order must name some of 'init', 'recur' and 'wm', got {shown(order)}")
        for number, role in enumerate(order, 1):
            found = pools[role].get(cache_key, timeout=timeout, count_miss=number == len(order), stream=stream)
            if found is not None:
                return found
        return None

    # Searches --------------------------------------------------------------------------------------------------------

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
    ) -> Search:
        """Open a search: a scope of its own in the recurrent pool, kept whole until it closes. May block.

        Args:
            env_ids: the environments that it is for.
            entries: entries to reserve; `num_simulations + 1` for each environment if left out.
            tokens: slots to reserve; if left out a full window for each entry, where a window is more than 1,024 tokens
                1,024 for each entry and one window at least. (With shared prefixes a child takes only its new tokens:
                `env * (window + 2 * simulations)` is enough for two tokens a step that never copy.)
            order: where parents are looked up first: "own_first" or "init_first".
            overflow: what commits do with rows that outgrow the window, unless they say otherwise.
            record_tree: whether it notes whose child each entry is, for `Search.tree()`. Where not, that costs nothing.
            timeout: seconds to wait for other searches to close, if their room is needed.

        Raises:
            CapacityError: the recurrent pool cannot set that much aside; says which capacity would do.
            InvalidArgumentError: an unknown environment, or one that comes twice.
        """
        deadline = self.storage.enter(timeout)
        return open_search(
            self.recur_pool,
            self._init_pool_by_env,
            env_ids,
            number=next(self._search_numbers),
            entries_per_env=self.config.num_simulations + 1,
            entries=entries,
            tokens=tokens,
            order=order,
            overflow=overflow,
            record_tree=record_tree,
            deadline=deadline,
        )

    # Clears, versions, end -------------------------------------------------------------------------------------------

    def clear_all(self) -> None:
        """Clear every pool, and the compatibility lists; open searches keep what they have. May block."""
        self._log_clear("clear_all")
        for pool in (*self._init_pools, self.recur_pool, self.wm_pool):
            pool.clear()
        self._wm_list.clear()
        self._wm_size_list.clear()

    def clear_init_caches(self) -> None:
        """Clear every environment's init pool. May block."""
        self._log_clear("clear_init_caches")
        for pool in self._init_pools:
            pool.clear()

    def clear_recur_cache(self) -> None:
        """Clear the recurrent pool; open searches keep what they have. May block."""
        self._log_clear("clear_recur_cache")
        self.recur_pool.clear()

    def bump_version(self) -> None:
        """State that the weights changed: every entry is a miss from now on, every open search ends. May block."""
        bump_versions((*self._init_pools, self.recur_pool, self.wm_pool), self.name, self.storage.enter())

    @property
    def version(self) -> int:
        """The weights version of its pools: how often `bump_version()` was called. Never blocks."""
        return self.recur_pool.version

    def close(self) -> None:
        """End every search, drop every entry and free the storage. Closing twice is fine. May block."""
        if not self.storage.closed:
            for pool in (self.recur_pool, self.wm_pool, *self._init_pools):
                pool.close()
        self.storage.close()

    # Files -----------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, side: SideCodec | None = None, timeout: float | None = None) -> Saved:
        """Write every pool, as they all are at one moment, into one file; see `KVPool.save`. May block.

        Entries of open searches are not saved: promote what should stay.
        """
        deadline = self.storage.enter(timeout)
        return save_pools(self.storage, pools_of(self), path, side, deadline)

    def load(
        self,
        path: str | PathLike[str],
        *,
        side: SideCodec | None = None,
        on_mismatch: str = "error",
        replace: bool = False,
        overflow: Overflow | None = None,
        timeout: float | None = None,
    ) -> Loaded:
        """Store the entries of a file that a manager's `save` wrote, pool after pool, each in one moment. May block.

        See `KVPool.load`. What does not fit into one of the pools is found before the first is written; with
        `on_mismatch="convert"` pools that this manager does not have are left out, too.
        """
        return load_pools(
            pools_of(self),
            self.name,
            path,
            side=side,
            on_mismatch=on_mismatch,
            replace=replace,
            overflow=overflow,
            timeout=timeout,
        )

    # State -----------------------------------------------------------------------------------------------------------

    def get_stats_summary(self) -> StatsSummary:
        """The statistics of every pool and their total, as numbers. Never waits for a shard."""
        self.storage.check_process()
        contention = self.storage.locks.contention.read()
        return self._summary(lambda pool: pool.stats_now(contention))

    def lifetime_stats(self) -> StatsSummary:
        """As `get_stats_summary`, with the counts since it was made, whatever was reset. Never waits for a shard."""
        self.storage.check_process()
        contention = self.storage.locks.contention.read_lifetime()
        return self._summary(lambda pool: pool.lifetime_now(contention))

    def _summary(self, stats_of: Callable[[KVPool], PoolStats]) -> StatsSummary:
        pools = pools_of(self)

        def stats_now() -> dict[str, PoolStats]:
            return dict(zip(pools, map(stats_of, pools.values()), strict=True))

        mutex = self.storage.ledger.mutex_for_numbers()
        with gate.lock, mutex:  # one hold: one moment of all of them
            stats = stats_now()
        return StatsSummary(stats, self.stats_enabled)

    def tier_stats(self) -> TierStats | None:
        """One moment of the tier beneath all pools; None without one. Never waits for a shard."""
        return self.recur_pool.tier_stats()

    def reset_stats(self) -> None:
        """Start every count from zero."""
        for pool in (*self._init_pools, self.recur_pool, self.wm_pool):
            pool.reset_stats()
        self.storage.locks.contention.reset()

    def step(self) -> None:
        """Note one environment step: with `log_every_steps=N`, every N-th logs the statistics."""
        self.storage.check_process()
        number = next(self._steps)
        if self._log_every_steps and number % self._log_every_steps == 0:
            self._log("step", number)

    def _log_clear(self, what: str) -> None:
        # Before anything is cleared: the line shows what is about to go.
        number = next(self._clears)
        if self._log_every_clears and number % self._log_every_clears == 0:
            self._log(what, number)

    def _log(self, what: str, number: int) -> None:
        total = self.get_stats_summary().total
        logger.info(
            "%s: %s %d: %d entries, %d slots, %s, %d evictions, %d stale writes",
            self.name,
            what,
            number,
            total.entries,
            total.slots_in_use,
            total.hits_in_words,
            total.eviction_count,
            total.stale_write_count,
        )

    def allocation(self) -> Allocation:
        """What was allocated when it was made: what `allocation_for()` says for its arguments. Never blocks."""
        return self._allocation

    def check_integrity(self) -> IntegrityReport:
        """Recount everything; call it when no operation is under way. Raises `IntegrityError` with what it finds."""
        return check_integrity(self.storage)

    def repair(self) -> RepairReport:
        """Rebuild the books after asynchronous exceptions; call it when no operation is under way."""
        return repair(self.storage)

    # Kept while code migrates: plain lists of the caller's, which nothing here reads -------------------------------

    @property
    def keys_values_wm_list(self) -> list[object]:
        """The caller's list of world-model caches; assigning copies the items, clearing empties it."""
        return self._wm_list

    @keys_values_wm_list.setter
    def keys_values_wm_list(self, items: Iterable[object]) -> None:
        self._wm_list[:] = items

    @property
    def keys_values_wm_size_list(self) -> list[int]:
        """The caller's list of their sizes; assigning copies the items, clearing empties it."""
        return self._wm_size_list

    @keys_values_wm_size_list.setter
    def keys_values_wm_size_list(self, items: Iterable[int]) -> None:
        self._wm_size_list[:] = items

    def __repr__(self) -> str:
        return f"<KVCacheManager {self.name!r}: {self.env_num} environments, {self.storage.tensor.nbytes} bytes>"


def _size_arguments(entries: str, slots: str, tokens: int | None, window: int) -> SizeArguments:
    """Whether it is the entries of a pool that bring its slots, or an argument `slots` of their own."""
    is_by_entries = tokens is None and window <= SHORT_WINDOW
    return SizeArguments(entries, slots=None if is_by_entries else slots, window=window)


def _check_step(step: int, overflow: Overflow | None, layout: KVLayout) -> None:
    """Raise unless nodes of `step` tokens can be committed with `overflow`."""
    check_overflow(overflow, layout)
    window = layout.max_tokens
    if step >= window:
        raise InvalidArgumentError(f"step must be below the window of {window}, which has a root too, got {step}")
    if overflow is None or not overflow.count:
        return
    most = min(overflow.count, window + 1 - overflow.limit)
    if step > most:
        raise InvalidArgumentError(
            f"step must be at most {most} in a window of {window} with overflow.limit={overflow.limit} and "
            f"overflow.count={overflow.count}: rows of limit - 1 tokens get step more, and drop no fewer; got {step}"
        )


def _root_lengths(root_tokens: int | Iterable[int] | None, overflow: Overflow | None, window: int) -> list[int]:
    """The lengths that roots may have, or of these the longest alone."""
    if root_tokens is None:
        root_tokens = overflow.limit - 1 if overflow is not None and overflow.count else window
    if isinstance(root_tokens, Iterable):
        lengths = [positive_int("root_tokens", length) for length in root_tokens]
        if not lengths:
            raise InvalidArgumentError("root_tokens must name at least one length, got none")
    else:
        lengths = [positive_int("root_tokens", root_tokens)]
    if max(lengths) > window:
        raise InvalidArgumentError(f"root_tokens must be at most the window of {window}, got {max(lengths)}")
    return lengths


def pools_of(manager: KVCacheManager) -> dict[str, KVPool]:
    """Its pools by their names without its own, as in files, statistics and metrics."""
    pools = (*manager.init_pools, manager.recur_pool, manager.wm_pool)
    return {pool.name.removeprefix(f"{manager.name}."): pool for pool in pools}
