"""The read half of the protocol: look entries up and retain them under their shards, copy with no lock held."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..books.entries import Described, count_hits, describe
from ..books.index import find_in
from ..books.ledger import Ledger
from ..books.records import Entry, Generation, Hold, Located, Scope
from ..books.tables import Tables, in_columns
from ..device.buffers import new_buffer
from ..device.layout import device_of
from ..device.modes import plain_torch_state
from ..device.positions import Correction, PositionSteps, PositionTable
from ..device.streams import NO_TICKS, Ticks, merge
from ..device.tensors import SlotTensor
from ..errors import ClosedError
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..model.kv import KeysValues, whole_row
from .storage import Domain, KVStorage

__all__ = [
    "can_find_unheld",
    "copy_out",
    "copy_unheld",
    "fill_rows",
    "find_unheld",
    "gather_entries",
    "gather_together",
    "in_pools",
    "reads_unheld",
    "retain",
]

NOTHING: frozenset[Correction] = frozenset([None])


def retain(
    storage: KVStorage,
    located: Located,
    keys: list[Hashable],
    hashes: list[int],
    generations: dict[Scope, Generation],
    deadline: Deadline,
    *,
    hold: Hold,
    quiet: bool = False,
    lower: Hold | None = None,
) -> list[Entry | None]:
    """Look keys up and add what was found to `hold`, atomically with respect to every write of those keys.

    An entry whose epoch or version is not its scope's counts as absent; while a pool is being closed nothing does, and
    `ClosedError` is raised where something is not there any more. Every hit is noted with the policy and the
    statistics of its account unless `quiet`. (Misses are counted by the caller, who knows where else it will look.)

    Args:
        located: where the keys belong.
        hashes: of the keys.
        generations: of the scopes, read once at the start of the operation.
        lower: what is found in the tier instead joins this hold, of the tier's ledger; left out, nothing is looked up
            there.
    """
    ledger = storage.ledger
    with gate.lock, storage.locks.read(located.shards, deadline):
        found = find_in(located.parts, keys, hashes, generations)
        hits = list(filter(None, found))
        if None in found:
            # Under the shard: what a close has swept from here, no operation removed.
            _check_open(storage, located.scopes)
            if lower is not None and storage.tier is not None:
                storage.tier.look_up(located.scopes, keys, hashes, generations, found, lower, quiet=quiet)
        if hits or not quiet:
            with gate.lock, ledger.mutex:
                ledger.extend(hold, hits)
                if not quiet:
                    count_hits(hits)
    return found


def _check_open(storage: KVStorage, scopes: list[Scope]) -> None:
    """Raise `ClosedError` if a pool that is looked into is closed, or is being closed, or its scope is dropped."""
    for scope in scopes:
        if storage.closed or scope.account.closed:
            raise ClosedError(f"{scope.account.name} is closed")
        ended = scope.why_ended()
        if ended is not None:
            raise ended


def gather_entries(
    domain: Domain,
    entries: list[Entry | None],
    out: Tensor,
    end: int,
    ready: Ticks = NO_TICKS,
    described: Described | None = None,
    *,
    whole: bool = True,
) -> Ticks:
    """Copy retained entries into `out`, one row each (None: zeros), the newest tokens before column `end`.

    `described` is what `describe` gave, where the caller has it; unless `whole`, columns from `end` on may
    stay as they are. One gather, in the caller's stream, after the writes of everything that it reads and after
    `ready`, the earlier uses of `out`. Returns the ticks of the read, which the caller stamps on the entries. No lock
    is held.
    """
    if described is None:
        described = describe(entries, None)
    storage = domain.storage
    clock = storage.clock
    if clock.backend is None:
        if storage.corrects_lazily:
            _gather(storage, domain.ledger.tables, described, out, end, [], whole)
        else:
            rows, _, _, _ = described
            storage.tensor.gather(domain.ledger.tables, rows, end, out, whole=whole)
        return NO_TICKS
    present = [entry for entry in entries if entry is not None]
    stream = clock.current()
    ticks = merge(ready, storage.zeroed)
    for entry in present:
        if entry.written is not NO_TICKS:
            ticks = merge(ticks, entry.written)
    clock.order_after(stream, ticks)
    temporaries: list[Tensor] = []
    try:
        _gather(storage, domain.ledger.tables, described, out, end, temporaries, whole)
    finally:
        read = clock.stamp(stream, (*temporaries, out))
        if read:
            with gate.lock, domain.ledger.mutex:
                domain.ledger.stamp_reads(present, read)
    return read


def gather_together(
    storage: KVStorage,
    parts: Sequence[tuple[Ledger, Sequence[Entry | None], Described]],
    out: Tensor,
    end: int,
    ready: Ticks = NO_TICKS,
    *,
    whole: bool = True,
) -> Ticks:
    """As `gather_entries`, of entries of several ledgers of a storage: rows of each after those of the one before."""
    clock, tensor = storage.clock, storage.tensor
    stream, temporaries = None, list[Tensor]()
    present = [(ledger, list(filter(None, in_part))) for ledger, in_part, _ in parts]
    if clock.backend is not None:
        stream, ticks = clock.current(), merge(ready, storage.zeroed)
        for _, entries in present:
            for entry in entries:
                ticks = merge(ticks, entry.written)
        clock.order_after(stream, ticks)
    try:
        if not storage.corrects_lazily:
            tables = [(ledger.tables, described[0]) for ledger, _, described in parts]
            temporaries += tensor.gather_together(tables, end, out, whole=whole)
        else:
            first = 0
            for ledger, _, described in parts:
                number = len(described[0])
                rows = new_buffer(storage.layout, number, out.shape[3])
                temporaries.append(rows)
                _gather(storage, ledger.tables, described, rows, end, temporaries, True)
                with plain_torch_state(out):
                    out[:, first : first + number].copy_(rows)
                first += number
    finally:
        read = NO_TICKS if clock.backend is None else clock.stamp(stream, (*temporaries, out))
        if read:
            for ledger, entries in present:
                with gate.lock, ledger.mutex:
                    ledger.stamp_reads(entries, read)
    return read


def in_pools(entries: Sequence[Entry | None]) -> list[Entry | None]:
    """Entries that are gathered: those in the tier count as misses, and `fill_rows` fills their rows."""
    return [None if entry is None or entry.scope.above is not None else entry for entry in entries]


def fill_rows(
    storage: KVStorage, rows: Sequence[tuple[int, Tensor]], out: Tensor, end: int, read: Ticks, first_row: int = 0
) -> Ticks:
    """Copy tokens of their own into rows of `out` that were gathered as misses; returns `read`, and the ticks of it."""
    clock = storage.clock
    stream = None if clock.backend is None else clock.current()
    try:
        with plain_torch_state(out):
            for row, tokens in rows:
                at = first_row + row
                out[:, at : at + 1, :, end - tokens.shape[3] : end].copy_(tokens)
    finally:
        if stream is not None:
            read = merge(read, clock.stamp(stream, [out, *[tokens for _, tokens in rows]]))
    return read


def _gather(
    storage: KVStorage,
    tables: Tables,
    described: Described,
    out: Tensor,
    end: int,
    temporaries: list[Tensor],
    whole: bool,
) -> None:
    """The copy itself; what has to live until it is done joins `temporaries` as soon as it is used."""
    tensor = storage.tensor
    rows, _, corrections, _ = described
    owed = {*corrections} - NOTHING
    if len(owed) == 1:
        (steps,) = owed
        if isinstance(steps, PositionSteps) and tensor.gather_stepwise(
            tables, rows, end, out, corrections, steps, whole=whole
        ):
            return
    temporaries += tensor.gather(tables, rows, end, out, whole=whole)
    for correction in owed:
        assert correction is not None
        concerned = [row for row, other in enumerate(corrections) if other is correction]
        with plain_torch_state(out):
            temporaries += (correction.rows, *_correct(tensor, tables, rows, out, end, concerned, correction))


def _correct(
    tensor: SlotTensor,
    tables: Tables,
    rows: list[int],
    out: Tensor,
    end: int,
    concerned: Sequence[int],
    correction: PositionTable | PositionSteps,
) -> tuple[Tensor, ...]:
    """Add what tokens that moved since they were written are owed; what moved nothing gets zeros added."""
    table = in_columns(tables, rows, end, out.shape[3])
    lengths = np.count_nonzero(table, axis=1)
    positions = np.arange(table.shape[1], dtype=np.int64)[None, :] - (end - lengths)[:, None]
    moves = np.zeros(len(table), dtype=bool)
    moves[list(concerned)] = True
    valid = (table > 0) & moves[:, None]
    written_at = np.frombuffer(tables.positions(table.ravel()), dtype=np.int32).reshape(table.shape)
    moved = np.where(valid, written_at - positions, 0)
    if not moved.any():
        return ()
    positions = np.where(valid, positions, 0)
    if isinstance(correction, PositionSteps):
        return tensor.correct_stepwise(out, moved, positions, correction)
    return tensor.correct(out, moved, positions, correction)


def copy_out(domain: Domain, entry: Entry, to: torch.device | str | None = None) -> KeysValues:
    """A private copy of one retained entry, on the device `to` (that of the slots if left out)."""
    storage = domain.storage
    target = None if to is None else device_of(to, "to")
    if entry.scope.above is not None:
        assert storage.tier is not None
        out = storage.tier.read(entry)
    else:
        if storage.clock.backend is not None:
            storage.clock.current()  # before anything is allocated, which a capture would take into its graph
        length = entry.length
        out = new_buffer(storage.layout, 1, length)
        if storage.clock.backend is None and entry.correction is None:  # nothing to wait for, and nothing owed
            storage.tensor.gather(domain.ledger.tables, [entry.row], length, out)
        else:
            gather_entries(domain, [entry], out, length)
    found = whole_row(out)
    if target is None:
        return found
    with plain_torch_state():
        return found.to(target)


def reads_unheld(storage: KVStorage) -> bool:
    """Whether `copy_unheld` can read entries of a storage: in host memory, by compiled code, in no streams."""
    return storage.tensor.is_compiled and storage.clock.backend is None


def can_find_unheld(scope: Scope, key_hash: int) -> bool:
    """Whether one look finds a key of this hash: not where other keys have it too, whose list a writer may change."""
    parts = scope.entries
    return not parts[key_hash % len(parts)].extra


def find_unheld(domain: Domain, scope: Scope, key: Hashable, key_hash: int) -> Entry | None:
    """The entry that a key has just now, for `copy_unheld`; None on a miss, which is counted. Takes no shard."""
    parts = scope.entries
    entry = parts[key_hash % len(parts)].get(key, key_hash)  # compiled code would need the shard
    if entry is not None and entry.generation is scope.generation:
        return entry
    _check_open(domain.storage, [scope])  # after the look, for what a close has swept
    with gate.lock, domain.ledger.mutex:
        domain.counters.miss_count += 1
    return None


def copy_unheld(domain: Domain, entry: Entry, out: Tensor) -> bool:
    """Copy an entry of a pool that was just found into `out`, a row of a window, and count the hit; if it still lives.

    No lock is held and no reference taken. An entry without references is dead for good, and only then are its slots
    free: one that has some after the copy has had these slots since it was found. Another thread may have replaced or
    removed it meanwhile: it was current when it was found. Where it is dead, whatever was copied is worth nothing, and
    False is returned. An entry that is owed corrections is not copied either.
    """
    if entry.correction is not None:
        return False
    try:
        domain.storage.tensor.gather(domain.ledger.tables, [entry.row], entry.length, out)
    except IndexError:  # it has no row in the tables any more
        return False
    with gate.lock, domain.ledger.mutex:
        if not entry.refs:
            return False
        count_hits([entry])
    return True
