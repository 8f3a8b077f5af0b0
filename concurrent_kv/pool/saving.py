"""Pools into a file: what is stored at one moment is retained, numbered and written, while other threads go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from ..books.records import Entry, Hold, Scope
from ..device.positions import PositionSteps, PositionTable
from ..device.streams import Ticks, merge
from ..errors import InvalidTypeError, SnapshotContentError, shown
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..snapshots.contents import OWED_NOTHING, Contents, Numbers, OwedMark, PoolContents, SideCodec
from ..snapshots.form import new_checksum, require_safetensors
from ..snapshots.keys import UnfitKeyError, encoded
from ..snapshots.reading import CHUNK_BYTES, path_of
from ..snapshots.writing import write_file
from .storage import KVStorage, PoolState

__all__ = ["Saved", "mark_of", "save_pools"]


class Saved(NamedTuple):
    """What a snapshot has: entries, slots (one that several entries share is one), and the bytes of the file."""

    entries: int
    slots: int
    nbytes: int


class _Moment(NamedTuple):
    """A pool at one moment."""

    pool: PoolState
    entries: list[Entry]  # the next victim first
    scopes: list[Scope]
    default: Scope
    version: int


def save_pools(
    storage: KVStorage,
    pools: Mapping[str, PoolState],
    path: object,
    side: SideCodec | None,
    deadline: Deadline,
) -> Saved:
    """Write pools of one storage, by their roles, into one file; see `KVPool.save`."""
    require_safetensors()
    name = path_of(path)
    check_codec(side)
    storage.clock.current()  # before anything is allocated, which a capture would take into its graph
    holds = [Hold("read", [])]
    try:
        moments = _retained(storage, pools, holds[0], deadline)
        written = storage.zeroed
        for entry in holds[0].entries:
            written = merge(written, entry.written)
        contents, slots = _described(storage, moments, name, side)
        _part_hold(storage, holds, moments, contents)
        nbytes = write_file(name, contents, _chunks(storage, slots, holds, written))
        return Saved(contents.entries, contents.slots, nbytes)
    finally:
        for hold in holds:
            _release(storage, hold)


def check_codec(side: object) -> None:
    """Raise unless it is a codec of side data, or None."""
    if side is not None and not (callable(getattr(side, "encode", None)) and callable(getattr(side, "decode", None))):
        raise InvalidTypeError(
            f"side must have encode(side) -> bytes and decode(bytes) -> side, got {type(side).__name__}"
        )


def _release(storage: KVStorage, hold: Hold) -> None:
    try:
        storage.ledger.release(hold)
    except BaseException:
        storage.ledger.abandoned.append(hold)
        raise


# The moment ----------------------------------------------------------------------------------------------------------


def _retained(storage: KVStorage, pools: Mapping[str, PoolState], hold: Hold, deadline: Deadline) -> dict[str, _Moment]:
    """What the pools hold at one moment, all of which joins `hold`."""
    ledger = storage.ledger
    with gate.lock, storage.locks.read(range(storage.locks.count), deadline):
        deadline.check(storage.name)
        for_all = _published(pools)
        with gate.lock, ledger.mutex:
            return _moments_of(pools, for_all, hold)


def _published(pools: Mapping[str, PoolState]) -> dict[str, list[Entry]]:
    """The current entries of each pool, in the order of their keys' first writes in each shard. All shards held."""
    found = {}
    for role, pool in pools.items():
        pool.check_open()
        found[role] = [
            entry
            for scope in list(pool.account.scopes.values())
            if scope.ended is None
            for part in scope.entries
            for entry in part.values()
            if entry.generation is scope.generation
        ]
    return found


def _moments_of(pools: Mapping[str, PoolState], published: dict[str, list[Entry]], hold: Hold) -> dict[str, _Moment]:
    """The pools as they are, all entries retained by `hold`. Mutex held."""
    moments = {role: _moment_of(pool, published[role]) for role, pool in pools.items()}
    ledger = next(iter(pools.values())).ledger
    ledger.extend(hold, [entry for moment in moments.values() for entry in moment.entries])
    return moments


def _moment_of(pool: PoolState, published: list[Entry]) -> _Moment:
    """A pool as it is. Mutex held."""
    account = pool.account
    entries = pool.ledger.candidates.in_order(account, published)
    scopes = list(dict.fromkeys(entry.scope for entry in entries))
    default = next(iter(account.scopes.values()))
    return _Moment(pool, entries, scopes, default, default.version)


# Its description -----------------------------------------------------------------------------------------------------


def _described(
    storage: KVStorage, moments: Mapping[str, _Moment], path: str, side: SideCodec | None
) -> tuple[Contents, Numbers]:
    """What a file says of the retained entries; and their slots, in the order of the file's."""
    tables = storage.ledger.tables
    entries = [entry for moment in moments.values() for entry in moment.entries]
    named = np.frombuffer(tables.slots_of_all([entry.row for entry in entries]), dtype=np.int64)
    # The slots of what is evicted next come first in the file, and are soonest free for others.
    distinct, firsts, places = np.unique(named, return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    slots, numbered = distinct[order], numbers[places]
    positions = np.frombuffer(tables.positions(slots), dtype=np.int32).astype(np.int64)
    marks: dict[PositionTable | PositionSteps, int] = {}
    contents = Contents(storage.layout, [], positions)
    at = 0
    for role, moment in moments.items():
        lengths = np.array([entry.length for entry in moment.entries], dtype=np.int64)
        contents.pools.append(
            _pool_contents(role, moment, path, side, marks, lengths, numbered[at : (at := at + int(lengths.sum()))])
        )
    contents.marks = [mark_of(table) for table in marks]
    return contents, slots


def _pool_contents(
    role: str,
    moment: _Moment,
    path: str,
    side: SideCodec | None,
    marks: dict[PositionTable | PositionSteps, int],
    lengths: Numbers,
    tables: Numbers,
) -> PoolContents:
    account, entries = moment.pool.account, moment.entries
    scope_number = {scope: number for number, scope in enumerate(moment.scopes)}
    owed = [
        OWED_NOTHING if entry.correction is None else marks.setdefault(entry.correction, len(marks))
        for entry in entries
    ]
    for scope in moment.scopes:
        if scope is not moment.default:
            _check_fit(scope.name, f"the name of a scope of {account.name}", path)
    for entry in entries:
        _check_fit(entry.index_key, f"a key of {account.name}", path)
    return PoolContents(
        role,
        account.max_entries,
        account.max_slots,
        type(getattr(account.policy, "policy", account.policy)).__name__,
        moment.version,
        [None if scope is moment.default else (scope.name,) for scope in moment.scopes],
        [scope_number[entry.scope] for entry in entries],
        [entry.index_key for entry in entries],
        [entry.priority for entry in entries],
        owed,
        [None if entry.side is None else _encoded_side(entry, side, path) for entry in entries],
        lengths,
        tables,
    )


def _check_fit(key: object, what: str, path: str) -> None:
    try:
        encoded(key)
    except UnfitKeyError as error:
        raise SnapshotContentError(
            f"{what} cannot be in a file, {shown(key)}: {error}; an int, str, bytes, float, bool, None, numpy scalar "
            "or a tuple of those can",
            path=path,
        ) from None


def _encoded_side(entry: Entry, side: SideCodec | None, path: str) -> bytes:
    kind = type(entry.side).__name__
    if side is None:
        raise SnapshotContentError(
            f"the side data of {shown(entry.index_key)}, of the type {kind}, need side=, a codec that makes "
            "bytes of them",
            path=path,
        )
    data = side.encode(entry.side)
    if not isinstance(data, bytes):
        raise InvalidTypeError(
            f"side.encode() must return bytes, got {type(data).__name__} for the {kind} of {shown(entry.index_key)}"
        )
    return data


def mark_of(table: PositionTable | PositionSteps) -> OwedMark:
    """Tells a table of corrections from any other, on whatever device."""
    rows = table.rows.detach().contiguous().cpu()
    data = rows.view(-1).view(torch.uint8).numpy().data
    count = table.count if isinstance(table, PositionSteps) else 0
    return OwedMark(type(table).__name__, count, new_checksum(data).hexdigest())


# The tokens ----------------------------------------------------------------------------------------------------------


def _per_chunk(storage: KVStorage) -> int:
    return max(1, CHUNK_BYTES // storage.layout.bytes_per_token)


def _part_hold(storage: KVStorage, holds: list[Hold], moments: Mapping[str, _Moment], contents: Contents) -> None:
    """Have a hold for each chunk, of the entries that are written with it, in the stead of the one for all."""
    whole = holds[0]
    if not whole.entries:
        return
    last = [np.maximum.reduceat(pool.tables, pool.ends() - pool.lengths) for pool in contents.pools if pool.keys]
    chunk_of = (np.concatenate(last) // _per_chunk(storage)).tolist()
    by_chunk = [Hold("read", []) for _ in range(-(-contents.slots // _per_chunk(storage)))]
    entries: list[list[Entry]] = [[] for _ in by_chunk]
    ordered = [entry for moment in moments.values() for entry in moment.entries]
    for entry, chunk in zip(ordered, chunk_of, strict=True):
        entries[chunk].append(entry)
    holds[:] = [*by_chunk, whole]  # first: what is cut off after this is released all the same
    for hold, of_chunk in zip(by_chunk, entries, strict=True):
        with gate.lock, storage.ledger.mutex:
            storage.ledger.extend(hold, of_chunk)
    _release(storage, whole)
    # No name of an entry outlives its hold from here on.
    for moment in moments.values():
        moment.entries.clear()


def _chunks(storage: KVStorage, slots: Numbers, holds: list[Hold], written: Ticks) -> Iterator[memoryview]:
    """The bytes of all tokens, after their writes; the entries that are written whole are let go of on the way."""
    clock = storage.clock
    step = _per_chunk(storage)
    for number, begin in enumerate(range(0, len(slots), step)):
        if clock.backend is not None:
            clock.order_after(clock.current(), written)
        # Complete when it returns: no later writer of these slots has to wait for it.
        tokens = storage.tensor.read_slots(slots[begin : begin + step])
        yield tokens.view(-1).view(torch.uint8).numpy().data
        _release(storage, holds[number])
