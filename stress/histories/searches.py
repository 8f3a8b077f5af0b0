"""A search that several threads share, with the operations of a pool: what is its own is always a hit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from concurrent_kv import Batch, DropOldest, KeyNotFoundError, KeysValues, KVCacheManager, Search
from concurrent_kv.pool.handle import Handle
from stress.content import BrokenPromiseError
from stress.histories.recording import BOUND_SECONDS

__all__ = ["ROOT", "SearchCalls", "new_manager"]

ROOT = "root"
WINDOW = 4
OVERFLOW = DropOldest(WINDOW, 1)  # the root is dropped when a child is full


def new_manager(entries: int) -> KVCacheManager:
    """One environment with a root of one token, and room for a search of so many entries."""
    config = {
        "num_layers": 1,
        "num_heads": 1,
        "embed_dim": 2,
        "context_length": WINDOW,
        "num_simulations": entries,
        "max_cache_size": entries + 1,
        "device": "cpu",
    }
    manager = KVCacheManager(config, 1, shards=2, wait_timeout=BOUND_SECONDS / 2)
    manager.set_init_cache(0, ROOT, KeysValues.from_packed(torch.zeros(2, 1, 1, 1, 2)))
    return manager


class Rows(Handle):
    """A batch without the root's token, which the shorter rows begin with."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.hits, self.data, self.end = batch.hits, batch.data, batch.end
        self.lengths = [
            length - (bool(length) and not self.data[0, row, 0, self.end - length, 0])
            for row, length in enumerate(batch.lengths)
        ]

    def row(self, number: int) -> KeysValues:
        """A copy of one row."""
        columns = slice(self.end - self.lengths[number], self.end)
        return KeysValues.from_packed(self.data[:, number : number + 1, :, columns].clone())

    def close(self) -> None:
        self._batch.close()


class SearchCalls:
    """The calls of a recorder, as calls of a search: a value is a child of the root, which every child shares."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def put(self, key: int, row: KeysValues) -> bool:
        return self.put_many([key], row)

    def put_many(self, keys: Sequence[int], rows: KeysValues) -> bool:
        """Children of the root; all at once."""
        with self._search.gather([ROOT] * len(keys), [0] * len(keys)) as batch:
            if not all(batch.hits):
                raise BrokenPromiseError("a root that the search had gathered before was a miss")
            batch.append(0, rows.keys[0], rows.values[0])
            self._search.commit(keys, batch, overflow=OVERFLOW)
        return True

    def get(self, key: int) -> KeysValues | None:
        with self.gather([key]) as batch:
            return batch.row(0) if batch.hits[0] else None

    def gather(self, keys: Sequence[int]) -> Rows:
        return Rows(self._search.gather(keys, [0] * len(keys)))

    def release(self, key: int) -> bool:
        """Whether it was there."""
        try:
            self._search.release([key])
        except KeyNotFoundError:
            return False
        return True

    def clear(self) -> None:
        """The root moves on, and nothing of the tree stays; it stays gathered."""
        self._search.keep([ROOT])
