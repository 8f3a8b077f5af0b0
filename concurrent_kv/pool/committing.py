"""From checked arguments to writes: rows put whole, batches opened, and what a model appended to them committed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from torch import Tensor

from .._checks import check_keys, check_priorities, check_sides, last_of_each, positive_int
from ..books.entries import describe
from ..books.ledger import Ledger, wake
from ..books.records import Entry, Generation, Hold, Scope
from ..device.stream_uses import StreamUses
from ..device.streams import NO_TICKS, Ticks
from ..device.tensor_checks import check_tensor
from ..errors import InvalidArgumentError, InvalidTypeError
from ..locks.deadline import Deadline
from ..locks.gate import gate
from ..model.kv import KeysValues, check_fits
from ..model.overflow import Overflow
from .batch import Batch
from .plan import WritePlan, plan_commit, plan_put
from .reading import fill_rows, gather_entries, in_pools
from .storage import Domain, KVStorage, PoolState
from .writing import generation_for, write

__all__ = ["commit_batch", "open_batch", "put_row", "put_rows"]


def open_batch(
    domain: Domain,
    scope: Scope,
    generation: Generation,
    hold: Hold,
    entries: list[Entry | None],
    room: int | None,
    out: Tensor | None,
) -> Batch:
    """Copy retained entries into one padded buffer. `scope` is where the batch can be committed."""
    storage = domain.storage
    clock = storage.clock
    # Before anything is allocated, which a capture would take into its graph.
    stream = None if clock.backend is None else clock.current()
    described = describe(entries, scope)
    tier_rows = [] if storage.tier is None else storage.tier.read_rows(entries, described)
    _, lengths, _, _ = described
    longest, window = max(lengths), storage.layout.max_tokens
    if room is not None and (type(room) is not int or not 0 <= room <= window - longest):
        room = _checked_room(room, longest, window)
    # A batch of misses only still needs columns to be filled and appended to.
    columns = window if room is None else max(1, longest + room)
    ready: Ticks = NO_TICKS
    own = out is None
    if out is None:
        data, ready = domain.buffers.take(len(entries), columns)
        if ready:  # used before, perhaps allocated on another stream
            clock.protect(data)
    else:
        data = _check_out(storage, out, len(entries), longest + (room or 0))
    gathered = in_pools(entries) if tier_rows else entries
    read = gather_entries(domain, gathered, data, longest, ready, described, whole=own)
    if tier_rows:
        read = fill_rows(storage, tier_rows, data, longest, read)
    uses = StreamUses(clock, stream, read) if read else None
    return Batch(domain, scope, generation, hold, entries, described, data, longest, own, uses)


def _checked_room(room: object, longest: int, window: int) -> int:
    """`room` as a number of columns that a row of `longest` tokens has in the window, or an error that says why not."""
    checked = positive_int("room", room, minimum=0)
    if longest + checked > window:
        raise InvalidArgumentError(
            f"room must be at most {window - longest}: the longest row has {longest} of the window's {window} "
            f"tokens, got {checked}"
        )
    return checked


def _check_out(storage: KVStorage, out: Tensor, batch: int, needed: int) -> Tensor:
    layout = storage.layout
    shape = check_tensor("out", out).shape
    columns = shape[3] if len(shape) == 5 else 0
    expected = (2 * layout.num_layers, batch, layout.num_heads, columns, layout.head_dim)
    if shape != expected or columns > layout.max_tokens:
        raise InvalidArgumentError(
            f"out must have the shape [2 * layers={expected[0]}, batch={batch}, heads={expected[2]}, columns up to "
            f"{layout.max_tokens}, head_dim={expected[4]}], got {tuple(shape)}"
        )
    if columns < needed:
        raise InvalidArgumentError(f"out must have at least {needed} columns, got {columns}")
    if out.dtype != layout.dtype or out.device != layout.device:
        raise InvalidArgumentError(f"out must be {layout.dtype} on {layout.device}, got {out.dtype} on {out.device}")
    if not out.is_contiguous():
        raise InvalidArgumentError(f"out must be contiguous, got strides {out.stride()}")
    if out.requires_grad:
        raise InvalidArgumentError("out must not require gradients: a gather writes into it")
    return out


def put_row(
    pool: PoolState, scope: Scope, key: Hashable, kv: KeysValues, side: object, priority: float, deadline: Deadline
) -> bool:
    """Store `kv`, one row, under a checked `key`; see `KVPool.put`."""
    if pool.storage.clock.backend is not None:
        pool.storage.clock.current()  # before anything is copied, which a capture would take into its graph
    kv = check_fits(kv, pool.layout, rows=1)
    ranks = [priority]
    if type(priority) is not float or priority != priority:
        ranks = check_priorities(ranks, 1)
    generation = scope.generation if deadline.task_time is None else generation_for(scope, deadline)
    return write(pool, scope, generation, plan_put(pool.storage, [key], kv, (0,), [side], ranks), deadline)


def put_rows(
    pool: PoolState,
    scope: Scope,
    keys: Sequence[Hashable],
    kv: KeysValues,
    sides: Sequence[object] | None,
    priorities: Sequence[float] | None,
    deadline: Deadline,
) -> bool:
    """Store every row of `kv` under the key of the same position; see `KVPool.put_many`."""
    keys = check_keys(keys)
    pool.storage.clock.current()  # before anything is copied, which a capture would take into its graph
    kv = check_fits(kv, pool.layout, rows=len(keys))
    sides, priorities = check_sides(sides, len(keys)), check_priorities(priorities, len(keys))
    generation = generation_for(scope, deadline)
    last = last_of_each(keys)
    plan = plan_put(
        pool.storage,
        [keys[row] for row in last],
        kv,
        last,
        [sides[row] for row in last],
        [priorities[row] for row in last],
    )
    return write(pool, scope, generation, plan, deadline)


def commit_batch(
    domain: Domain,
    batch: Batch,
    keys: Sequence[Hashable],
    rows: Sequence[int] | None,
    lengths: Sequence[int] | None,
    overflow: Overflow,
    sides: Sequence[object] | None,
    priorities: Sequence[float] | None,
    deadline: Deadline,
) -> bool:
    """Store the new tokens of `rows` of a batch under `keys`, by a checked policy; see `KVPool.commit`."""
    if not isinstance(batch, Batch):
        raise InvalidTypeError(f"batch must be a Batch, got {type(batch).__name__}")
    scope = batch.scope
    if scope.account is not domain.account:
        raise InvalidArgumentError(
            f"batch was gathered for {scope.account.name}, and cannot be committed to {domain.name}"
        )
    keys = check_keys(keys)
    if batch.hold.released:
        raise batch.why_closed()
    count = len(keys)
    committed, new = batch.committable(rows, lengths)
    if count != len(committed):
        raise InvalidArgumentError(f"keys must have one key for each of {len(committed)} rows, got {count}")
    items: list[object] = [None] * count if sides is None else check_sides(sides, count)
    ranks = [0.0] * count if priorities is None else check_priorities(priorities, count)
    ledger = domain.ledger
    going = committed
    if len(set(keys)) < count:
        last = last_of_each(keys)
        keys, going = [keys[i] for i in last], [committed[i] for i in last]
        items, ranks = [items[i] for i in last], [ranks[i] for i in last]
        new = new if isinstance(new, int) else tuple([new[i] for i in last])
    plan = plan_commit(domain.storage, ledger.tables, batch, new, keys, going, overflow, items, ranks)
    plan.ends_batch = rows is None or len(batch.pending_rows()) == count
    try:
        if domain.storage.clock.backend is not None:
            batch.use_here()
        stored = write(domain, scope, batch.generation, plan, deadline)
        if plan.uses_batch:  # nothing was published, or there were no frames
            _leave_batch(ledger, plan, batch, ends=plan.ends_batch)
    except BaseException:
        if plan.uses_batch:
            try:
                _leave_batch(ledger, plan, batch, ends=False)
            except Exception:  # no memory, no frames
                ledger.abandoned.append(partial(ledger.again, [partial(plan.leave_batch, ledger, ends=False)]))
        raise
    batch.end_rows(committed, ended=plan.ended_batch)
    return stored


def _leave_batch(ledger: Ledger, plan: WritePlan, batch: Batch, *, ends: bool) -> None:
    with gate.lock, ledger.mutex:
        dead = plan.leave_batch(ledger, ends=ends)
        # Of a batch that stays open nothing goes. Tasks that wait with theirs would wake each other without end: each
        # leaves its batch whenever it finds no room, to use it again in its next attempt.
        waiters = ledger.take_waiters() if batch.hold.released else []
    wake(waiters)
    del dead
