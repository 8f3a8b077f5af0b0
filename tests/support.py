"""What the tests share: a small layout, keys and values whose numbers say where they belong, and comparisons."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from concurrent_kv import Batch, KeysValues, KVCacheManager, KVLayout, KVPool, KVStorage
from concurrent_kv.books.ledger import Ledger
from concurrent_kv.books.records import Entry, Scope
from concurrent_kv.books.tables import Tables, new_tables
from concurrent_kv.locks.sharded import ShardedRWLock
from concurrent_kv.native import in_python, native
from concurrent_kv.pool.storage import PoolState
from concurrent_kv.search.state import SearchState

LAYOUT = KVLayout(num_layers=2, num_heads=2, head_dim=3, max_tokens=8)
WINDOW = LAYOUT.max_tokens
POLICIES = ("fifo", "lru", "priority", "clock", "s3fifo")
CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "embed_dim": 6,
    "context_length": WINDOW,
    "num_simulations": 4,
    "max_cache_size": 64,
    "device": "cpu",
}
# What only a hang takes so long, on however loaded a machine: for every wait that is to end long before.
HANG_SECONDS = 120.0
UNITS = 128  # numbers of one token, at most
TOKENS = 16  # token indices, at most
# The modules that choose between compiled loops and others at each call.
NATIVE_USERS = (
    "_checks",
    "books.entries",
    "books.index",
    "books.slots",
    "books.tables",
    "device.appends",
    "device.tensors",
    "locks.gate",
    "locks.shards",
    "model.hashing",
)
LOOPS = ("torch",) if native is None else ("torch", "compiled")  # that this build of the package has
# Classes of shard locks, of which a storage has the last where its loops are compiled.
LOCKS: tuple[Any, ...] = (ShardedRWLock,) if native is None else (ShardedRWLock, native.ShardLocks)


def layout(**changes: Any) -> KVLayout:
    """The small layout with some sizes changed."""
    return replace(LAYOUT, **changes)


def config(**changes: Any) -> dict[str, Any]:
    """The small configuration with some settings changed."""
    return {**CONFIG, **changes}


# Keys and values -----------------------------------------------------------------------------------------------------


def tokens(value: int, length: int, *, first: int = 0, layout: KVLayout = LAYOUT) -> KeysValues:
    """One row of `length` tokens; every number says `value`, the token's index, and its layer, head and place."""
    shape = (2 * layout.num_layers, 1, layout.num_heads, 1, layout.head_dim)
    assert first + length <= TOKENS
    unit = torch.arange(torch.Size(shape).numel()).view(shape) % UNITS
    index = torch.arange(first, first + length).view(1, 1, 1, length, 1)
    return KeysValues.from_packed(((value * TOKENS + index) * UNITS + unit).to(layout.dtype))


def joined(*parts: KeysValues) -> KeysValues:
    """One row: the tokens of several one-row sequences after each other."""
    return KeysValues.from_packed(torch.cat([packed(part) for part in parts], dim=3))


def child_of(parent: KeysValues, value: int, count: int = 2) -> KeysValues:
    """`parent` and the tokens that `append(batch, [value], count)` adds to it."""
    return joined(parent, tokens(value, count, first=parent.end))


def stacked(*rows: KeysValues) -> KeysValues:
    """A batch of one-row sequences, left-padded with NaN, which must never be stored."""
    end = max(row.end for row in rows)
    first = packed(rows[0])
    out = first.new_full((first.shape[0], len(rows), first.shape[2], end, first.shape[4]), float("nan"))
    for number, row in enumerate(rows):
        out[:, number, :, end - row.end :] = packed(row)[:, 0]
    return KeysValues.from_packed(out, [row.end for row in rows], end)


def packed(kv: KeysValues) -> Tensor:
    """All layers' keys, then all values, of one row: `[2 * layers, 1, heads, tokens, head_dim]`."""
    return torch.cat([kv.keys, kv.values])[:, :, :, kv.end - kv.lengths[0] : kv.end]


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals itself and -0.0 differs from 0.0."""
    return tensor.detach().contiguous().view(torch.uint8)


def assert_same(actual: KeysValues | None, expected: KeysValues) -> None:
    """Both hold the same valid tokens, bit for bit and in the same dtype."""
    assert actual is not None, "expected an entry, got a miss"
    assert actual.lengths == expected.lengths
    assert actual.keys.dtype == expected.keys.dtype
    for row in range(expected.batch_size):
        found, wanted = packed(actual.row(row)), packed(expected.row(row))
        assert torch.equal(bits(found), bits(wanted)), f"row {row} differs"


# Batches -------------------------------------------------------------------------------------------------------------


def append(batch: Batch, values: Sequence[int], count: int = 2) -> None:
    """Append `count` tokens to every row of a batch, in every layer, as a model would."""
    lengths = batch.lengths
    layers = batch.keys.shape[0]
    made = [
        packed(tokens(value, count, first=lengths[row], layout=_layout_of(batch))) for row, value in enumerate(values)
    ]
    new = torch.cat(made, dim=1)
    for layer in range(layers):
        batch.append(layer, new[layer], new[layers + layer])


def _layout_of(batch: Batch) -> KVLayout:
    rows, _, heads, _, head_dim = batch.data.shape
    return KVLayout(rows // 2, heads, head_dim, WINDOW, batch.data.dtype)


def row_of(batch: Batch, row: int) -> KeysValues:
    """The valid tokens of one row of a batch, copied."""
    columns = slice(batch.end - batch.lengths[row], batch.end)
    return KeysValues.from_packed(batch.data[:, row : row + 1, :, columns].clone())


def store(pool: KVPool, *entries: tuple[Any, KeysValues]) -> None:
    """Put (key, kv) pairs, each by itself, in order."""
    for key, kv in entries:
        assert pool.put(key, kv)


class Incomparable:
    """A key that hashes like another and cannot be compared with it."""

    def __init__(self, like: object) -> None:
        self._hash = hash(like)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        raise KeyError("incomparable")


# Loops over tokens and slots -----------------------------------------------------------------------------------------


@contextmanager
def loops_of(kind: str) -> Iterator[None]:
    """What is made inside uses these of `LOOPS`: those of numpy and torch, or the compiled ones."""
    with pytest.MonkeyPatch.context() as patch:
        choose_loops(patch, kind)
        yield


def choose_loops(patch: pytest.MonkeyPatch, kind: str) -> None:
    """Have every module use these of `LOOPS`."""
    for user in NATIVE_USERS:
        patch.setattr(f"concurrent_kv.{user}.native", native if kind == "compiled" else None)
    modules = [module for name, module in sys.modules.items() if name.startswith(("concurrent_kv.", "tests."))]
    for name, in_torch in in_python.items():
        either = {"torch": in_torch, "compiled": getattr(native, name, in_torch)}
        for module in modules:
            if module is not native and vars(module).get(name) in either.values():
                patch.setattr(module, name, either[kind])


# Counting ------------------------------------------------------------------------------------------------------------


def slots_in_use(owner: KVPool | KVCacheManager | KVStorage) -> int:
    """Slots of the whole storage that some entry names."""
    storage = owner if isinstance(owner, KVStorage) else owner.storage
    of_searches = [search.slots_in_use for pool in storage.pools for search in pool.searches]
    return storage.ledger.slots.in_use + sum(of_searches)


class OperatorCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every operator call that torch dispatches, views included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def __len__(self) -> int:
        return len(self.names)


def slots_named(ledger: Ledger, entry: Entry) -> list[int]:
    """The slots of an entry's tokens, the oldest first."""
    named: list[int] = np.frombuffer(ledger.tables.slots_of(entry.row), dtype=np.int64).tolist()
    return named


def tables_of(rows: list[list[int]], num_slots: int, window: int, positions: list[list[int]] | None = None) -> Tables:
    """Tables whose rows 1, 2 and on name these slots, of which none is shared by way of a page."""
    tables = new_tables(num_slots, window)
    for row, slots in enumerate(rows, 1):
        at = np.arange(len(slots)) if positions is None else np.array(positions[row - 1], dtype=np.int64)
        (made,), _ = tables.enter([0], [0], [len(slots)], np.array(slots, dtype=np.int64), at)
        assert made == row
    return tables


def snapshot(storage: KVStorage) -> dict[str, Any]:
    """Everything a failed call must leave as it was: entries with their bytes, fill, free slots, handles."""
    entries = {}
    ledgers = ledgers_of(storage)
    with storage.ledger.mutex:
        for pool in storage.pools:
            for scope, ledger in scopes_of(pool):
                for entry in [entry for part in scope.entries for entry in part.values()]:
                    table = torch.tensor(slots_named(ledger, entry))
                    stored = b"" if storage.closed else bits(storage.tensor.data[:, table]).numpy().tobytes()
                    where = (pool.name, scope.name, entry.key)
                    entries[where] = (entry.length, entry.generation, entry.side, entry.refs, entry.pins, stored)
    fills = {
        pool.name: {
            name: number
            for name, number in cast(KVPool, pool).stats().as_dict().items()
            if "wait" not in name and name not in ("hit_count", "miss_count", "request_count", "hit_rate", "miss_rate")
        }
        for pool in storage.pools
    }
    return {
        "entries": entries,
        "fills": fills,
        "free": [sorted(ledger.slots.free_slots().tolist()) for ledger in ledgers],
        "handles": sum(not hold.released for ledger in ledgers for hold in ledger.holds),
    }


def searches_of(storage: KVStorage) -> list[SearchState]:
    """Those that are open, in the order of their opening."""
    searches = [cast(SearchState, search) for pool in storage.pools for search in pool.searches]
    return sorted(searches, key=lambda search: search.scope.number)


def ledgers_of(storage: KVStorage) -> list[Ledger]:
    """The storage's, and those of open searches."""
    return [storage.ledger, *(search.ledger for search in searches_of(storage))]


def scopes_of(pool: PoolState) -> list[tuple[Scope, Ledger]]:
    """Its scopes and those of its open searches, with the ledgers of their entries."""
    searches = [cast(SearchState, search) for search in pool.searches]
    own = [(scope, pool.ledger) for scope in pool.account.scopes.values()]
    return own + [(search.scope, search.ledger) for search in searches]
