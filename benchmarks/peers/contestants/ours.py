"""This library, through what it promises to its users and nothing else: the inside may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers.contestants.base import Contestant, EntryStore, SearchStore, UnfitError
from benchmarks.peers.shapes import Shape, Trees, difference_of, root_of
from concurrent_kv import (
    DropAndCorrect,
    DropLazily,
    DropOldest,
    KeysValues,
    KVCacheManager,
    KVLayout,
    KVPool,
    PositionSteps,
)

__all__ = ["Ours"]


def layout_of(shape: Shape) -> KVLayout:
    return KVLayout(shape.layers, shape.heads, shape.head_dim, shape.window)


def overflow_of(shape: Shape, *, lazily: bool) -> Any:
    """The policy that drops as the others do."""
    if not shape.absolute:
        return DropOldest(shape.limit, shape.dropped)
    packed = difference_of(shape)
    difference = torch.stack([packed[: shape.layers], packed[shape.layers :]], 1)
    if lazily:
        return DropLazily(shape.limit, shape.dropped, PositionSteps(layout_of(shape), shape.dropped, difference))
    return DropAndCorrect(shape.limit, shape.dropped, difference, layout_of(shape))


class OurSearch(SearchStore):
    def __init__(
        self, shape: Shape, trees: Trees, manager: KVCacheManager, first_env: int, overflow: Any, tokens: int | None
    ):
        self._manager, self._overflow, self._tokens = manager, overflow, tokens
        self._envs = range(first_env, first_env + trees.rows)
        self._room = trees.step_tokens
        self.shape = shape

    def open(self) -> None:
        self._search = self._manager.search(self._envs, overflow=self._overflow, tokens=self._tokens)

    def gather(self, keys: Sequence[int]) -> None:
        self._batch = self._search.gather(keys, self._envs, room=self._room)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._batch.append(layer, keys, values)

    def tokens(self) -> Tensor:
        return self._batch.data.narrow(3, 0, self._batch.end)

    def commit(self, keys: Sequence[int]) -> None:
        self._search.commit(keys, self._batch)

    def close(self) -> None:
        self._search.close()

    def kv_bytes(self) -> int:
        return int(self._manager.recur_pool.stats().bytes_in_use)

    def allocated_bytes(self) -> int | None:
        return self._manager.allocation().nbytes

    def destroy(self) -> None:
        self._manager.check_integrity()
        self._manager.close()


class OurEntries(EntryStore):
    def __init__(self, shape: Shape, capacity: int) -> None:
        self._pool = KVPool(layout_of(shape), capacity)

    def prepared(self, kv: Tensor) -> Any:
        return KeysValues.from_packed(kv.unsqueeze(1))

    def put(self, key: int, kv: Any) -> None:
        self._pool.put(key, kv)

    def get(self, key: int) -> Any:
        return self._pool.get(key)

    def tensor_of(self, found: Any) -> Tensor:
        return torch.cat([found.keys, found.values])[:, 0]

    def fill(self, keys: Sequence[int], kv: Tensor) -> None:
        at_once = 1000
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            rows = kv.unsqueeze(1).expand(-1, len(some), -1, -1, -1)
            self._pool.put_many(some, KeysValues.from_packed(rows))

    def destroy(self) -> None:
        self._pool.check_integrity()
        self._pool.close()


Drops = Literal["at once", "lazily"]


class Ours(Contestant):
    """This library.

    Args:
        drops: whether tokens that stay in a window with absolute positions are corrected at once, or on reading.
    """

    shares = True

    def __init__(self, name: str, about: str, drops: Drops = "at once") -> None:
        self.name, self.about, self._drops = name, about, drops

    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        lazily = self._drops == "lazily"
        if lazily and not shape.absolute:
            raise UnfitError("is ours with rotary positions")
        overflow = overflow_of(shape, lazily=lazily)
        # A child takes its new tokens alone, unless all that stay are corrected at once.
        new = trees.rows * trees.step_tokens
        copies = not lazily and any(stored > new for stored in trees.stored_tokens(shape))
        tokens = None if copies else trees.rows * shape.window + trees.nodes * trees.step_tokens
        stores: list[SearchStore] = []
        manager = None
        for number in range(count):
            if manager is None or apart:
                manager = self._manager(shape, trees, 1 if apart else count, tokens)
            first_env = 0 if apart else number * trees.rows
            stores.append(OurSearch(shape, trees, manager, first_env, overflow, tokens))
        return stores

    @staticmethod
    def _manager(shape: Shape, trees: Trees, searches: int, tokens: int | None) -> KVCacheManager:
        envs = searches * trees.rows
        config = {
            "num_layers": shape.layers,
            "num_heads": shape.heads,
            "embed_dim": shape.heads * shape.head_dim,
            "context_length": shape.window,
            "num_simulations": trees.steps,
            "max_cache_size": envs * (trees.steps + 1),
            "device": "cpu",
        }
        manager = KVCacheManager(
            config, envs, init_entries=2, recur_slots=None if tokens is None else searches * tokens
        )
        for env in range(envs):
            row = env % trees.rows
            kv = root_of(shape, row, trees.root_tokens)
            manager.set_init_cache(env, row, KeysValues.from_packed(kv.unsqueeze(1)))
        return manager

    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        if self._drops == "lazily":
            raise UnfitError("is ours where nothing is dropped")
        return OurEntries(shape, capacity)
