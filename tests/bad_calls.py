"""The stage of the tables of bad calls: pools, batches and searches in mid-use, and what must not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch

from concurrent_kv import KeysValues, KVCacheError, KVCacheManager, KVPool
from tests.support import LAYOUT, WINDOW, append, bits, config, snapshot, stacked, tokens

META = KeysValues(torch.zeros(2, 1, 2, 3, 3, device="meta"), torch.zeros(2, 1, 2, 3, 3, device="meta"))
SHAPE = (4, 2, 2, WINDOW, 3)  # of an `out` for two rows


class Bad(NamedTuple):
    """A call, the exact exception it must end in, and the argument (or words) that its message must name."""

    name: str
    call: Callable[[Stage], object]
    error: type[KVCacheError]
    says: str


class Stage:
    """What bad calls are made on: everything holds something, nothing is closed but what says so."""

    def __init__(self) -> None:
        self.pool = KVPool(LAYOUT, 4, wait_timeout=1.0)
        self.pool.put_many(["a", "b"], stacked(tokens(1, 3), tokens(2, 5)), sides=["A", "B"])
        self.batch = self.pool.gather(["a", "missing"])
        self.ready = self.pool.gather(["a", "b", "missing"])
        append(self.ready, [3, 4, 5])
        self.uneven = self.pool.gather(["a"])
        self.uneven.append(0, torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
        self.done = self.pool.gather(["a"])
        append(self.done, [6])
        self.pool.commit(["c"], self.done)
        self.other = KVPool(LAYOUT, 4, name="other")
        self.other.put("a", tokens(1, 2))
        self.foreign = self.other.gather(["a"])
        append(self.foreign, [3])
        self.closed = KVPool(LAYOUT, 4, name="closed")
        self.closed.close()
        self.manager = KVCacheManager(config(), 2, wait_timeout=1.0)
        for env_id in (0, 1):
            self.manager.set_init_cache(env_id, "root", tokens(env_id, 3))
        self.search = self.manager.search([0], entries=4, tokens=16)
        self.next = self.manager.search([1], entries=4, tokens=16)
        first = self.search.gather(["root"], [0])
        append(first, [7])
        self.search.commit(["child"], first)
        self.leaf = self.search.gather(["child", "root"], [0, 0])
        append(self.leaf, [8, 9])
        self.ended = self.manager.search([0], entries=1, tokens=8)
        self.ended.close()
        self.batches = (self.batch, self.ready, self.uneven, self.leaf, self.foreign)

    def state(self) -> object:
        """Everything a failed call must leave as it was."""
        storages = [pool.storage for pool in (self.pool, self.other, self.manager.recur_pool)]
        return (
            [snapshot(storage) for storage in storages],
            [pool.name for storage in storages for pool in storage.pools],
            [
                (batch.closed, batch.lengths, batch.room, batch.pending_rows(), bits(batch.data).numpy().tobytes())
                for batch in self.batches
            ],
        )

    def close(self) -> None:
        """Everything must still be sound, while things are open and when they are closed."""
        for owner in (self.pool, self.other, self.manager):
            owner.check_integrity()
        for batch in self.batches:
            batch.close()
        for owner in (self.pool, self.other, self.manager):
            owner.close()
            owner.check_integrity()


def check(bad: Bad) -> None:
    """The call fails as stated and changes nothing."""
    stage = Stage()
    before = stage.state()
    caught: BaseException | None = None
    try:
        bad.call(stage)
    except Exception as error:
        caught = error
    assert type(caught) is bad.error, f"expected {bad.error.__name__}, got {caught!r}"
    assert bad.says in str(caught), f"{bad.says!r} is not in {str(caught)!r}"
    assert stage.state() == before
    stage.close()


def table(bad_calls: list[Bad]) -> Any:
    """`parametrize` over a table, with its names as ids, which must be unique."""
    names = [bad.name for bad in bad_calls]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return pytest.mark.parametrize("bad", bad_calls, ids=names)


def with_each(name: str, says: str, values: Mapping[str, tuple[type[KVCacheError], Any]], call: Any) -> list[Bad]:
    """One bad call for each bad value of one argument: `call(stage, value)`."""
    return [
        Bad(f"{name}={label}", lambda stage, value=value: call(stage, value), error, says)  # type: ignore[misc]
        for label, (error, value) in values.items()
    ]
