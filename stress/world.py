"""What is stressed: one manager, the key spaces in its pools, and what is known of every key."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from concurrent_kv import KVCacheManager, KVPool, Scope
from stress.access import Access
from stress.content import BrokenPromiseError, Content, Token
from stress.faults.keys import CollidingKey
from stress.possible import Barrier, Before, KeyLedger
from stress.profiles import Profile
from stress.workloads import TOKENS_PER_STEP, Workload, overflow_of

__all__ = ["Settings", "Space", "World"]

ROOT_KEYS = 3  # of each environment
GROUPS = 3  # of each space
GROUP_KEYS = 3
CHILDREN, GROUPED = 2_000, 4_000  # where their key numbers begin
LONGEST_WRITTEN = 8  # tokens of an entry that is put; commits make longer ones


@dataclass(frozen=True)
class Settings:
    """One run of one profile.

    Attributes:
        bound_seconds: what an operation may take; the pools' own limit on every wait is a half of it.
        faults: names of what goes wrong on purpose.
    """

    profile: Profile
    workload: Workload
    seconds: float = 10.0
    backend: str = "asyncio"
    policy: str = "fifo"
    shards: int = 16
    seed: int = 0
    positions: str | None = None  # the workload's own if None
    faults: frozenset[str] = frozenset()
    bound_seconds: float = 20.0


@dataclass
class Space:
    """The keys of one scope of one pool, and what may be read of them."""

    name: str
    number: int
    pool: KVPool
    scope: Scope
    env: int | None  # whose init pool it is; None elsewhere
    above: Sequence[Barrier]
    plain: list[KeyLedger] = field(default_factory=list)
    children: list[KeyLedger] = field(default_factory=list)
    groups: list[KeyLedger] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cleared = Barrier()

    def ledgers(self, kind: str, count: int) -> list[KeyLedger]:
        return [KeyLedger(f"{self.name} {kind} {number}", (self.cleared, *self.above)) for number in range(count)]

    def calls(self, access: Access) -> Any:
        """Awaited calls of its pool."""
        return access.pool(self.pool)


class World:
    """A manager for a workload and a profile. `close()` ends it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        profile, workload = settings.profile, settings.workload
        self.layout = workload.layout
        self.content = Content(self.layout)
        self.positions = settings.positions or workload.positions
        self.overflow = overflow_of(self.layout, self.positions)
        self.simulations = profile.simulations or workload.simulations
        self.envs = min(profile.envs, workload.envs)
        self.longest_written = min(LONGEST_WRITTEN, self.layout.max_tokens - TOKENS_PER_STEP)
        self.search_entries, self.search_tokens = self._size_of_search()
        self.manager = KVCacheManager(
            {
                "num_layers": workload.layers,
                "num_heads": workload.heads,
                "embed_dim": workload.embed_dim,
                "context_length": workload.window,
                "num_simulations": self.simulations,
                "max_cache_size": max(profile.room * self.search_entries, workload.envs * (self.simulations + 1)),
                "device": "cpu",
            },
            workload.envs,
            init_entries=ROOT_KEYS + 1,
            recur_slots=profile.room * self.search_tokens,
            wm_entries=profile.capacity,
            policy=settings.policy,
            shards=settings.shards,
            wait_timeout=settings.bound_seconds / 2,
        )
        self.everything = Barrier()  # version bumps, and clears of all pools
        self.pool_cleared = Barrier()
        shared = self.manager.wm_pool
        scopes = [shared.default_scope, shared.scope("a"), shared.scope("b")]
        self.spaces = [
            Space(str(scope.name), number, shared, scope, None, (self.pool_cleared, self.everything))
            for number, scope in enumerate(scopes, 1)
        ]
        for space in self.spaces:
            space.plain = space.ledgers("key", profile.keys)
            space.children = space.ledgers("child", max(1, profile.keys // 2))
            space.groups = space.ledgers("group", GROUPS)
        self.init_cleared = Barrier()
        self.root_spaces = [
            Space(pool.name, 100 + env, pool, pool.default_scope, env, (self.init_cleared, self.everything))
            for env, pool in enumerate(self.manager.init_pools)
        ]
        for space in self.root_spaces:
            space.plain = space.ledgers("root", ROOT_KEYS)
        stored = sum(len(space.plain) + len(space.children) + GROUPS * GROUP_KEYS for space in self.spaces)
        self.never_evicts = stored <= profile.capacity
        self._search_lock = threading.Lock()
        self._searches = 0

    def _size_of_search(self) -> tuple[int, int]:
        """Entries and slots that a search reserves."""
        window, entries = self.layout.max_tokens, self.envs * (self.simulations + 2)
        longest = self.longest_written + TOKENS_PER_STEP * (self.simulations + 1)
        if self.positions == "absolute" and longest >= self.overflow.limit:
            return entries, entries * window  # rows that were corrected share nothing
        return entries, self.envs * (window + TOKENS_PER_STEP * (self.simulations + 2))

    # Keys and what stands there ------------------------------------------------------------------------------------

    def key(self, kind: str, number: int) -> Hashable:
        """The key object of a key's number."""
        return CollidingKey(kind, number) if "collisions" in self.settings.faults else (kind, number)

    def plain(self, key: int, space: int, version: int, writer: int) -> list[Token]:
        """The tokens of an entry that is put: its version says how many."""
        return [Token(key, space, version, writer, place) for place in range(1 + version % self.longest_written)]

    def grown(self, tokens: Sequence[Token], new: Sequence[Token]) -> list[Token]:
        """The tokens of a row after a commit."""
        row = [*tokens, *new]
        if len(row) < self.overflow.limit:
            return row
        moves = {"rotary": 0, "absolute": 1, "lazy": self.overflow.count}[self.positions]
        return [token._replace(moves=token.moves + moves) for token in row[self.overflow.count :]]

    def next_search(self) -> int:
        """A number for a search, below 2 ** 32."""
        with self._search_lock:
            self._searches += 1
            return self._searches

    # Checks ----------------------------------------------------------------------------------------------------------

    def check_plain(self, space: Space, key: int, tokens: Sequence[Token], before: Before) -> Token:
        """Raise unless `tokens` are those of one version of that key that the read may have returned."""
        first = tokens[0]
        if list(tokens) != self.plain(first.key, first.scope, first.version, first.writer):
            raise BrokenPromiseError(f"{space.name}: an entry of several writes: {list(tokens)}")
        self.check_own(space, key, first)
        space.plain[key].check(first.version, before)
        return first

    def check_own(self, space: Space, key: int, token: Token) -> None:
        """Raise unless a token says that it is of that key and space."""
        if (token.key, token.scope) != (key, space.number):
            raise BrokenPromiseError(f"{space.name}: asked for key {key} of space {space.number}, read {token}")

    def check_miss(self, space: Space, ledger: KeyLedger, before: Before) -> bool:
        """Raise if an entry was lost; returns whether anything could be checked."""
        if space.env is not None or not self.never_evicts:
            return False
        ledger.check_miss(before)
        return True

    def any_space(self, rng: Random) -> Space:
        """One of the spaces of the shared pool."""
        return rng.choice(self.spaces)

    def close(self) -> None:
        """End every search and free the storage."""
        self.manager.close()
