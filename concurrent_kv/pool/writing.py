"""The write half of the protocol: reserve all slots or none, copy with no lock held, publish all or nothing."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..books.entries import new_entries, occupy, row_of
from ..books.index import find_in, find_places, take_away
from ..books.ledger import wake
from ..books.records import EXEMPT, HELD, Entry, Generation, Grant, Located, Scope, Scopes, parts_below
from ..device.streams import NO_TICKS, Ticks, merge
from ..locks.deadline import Deadline
from ..locks.gate import gate
from .plan import WritePlan
from .room import cancel, check_budget, make_room, reserve, unpublish
from .storage import Domain, KVStorage

__all__ = ["generation_for", "write"]


OVER = Generation(-1, -1)  # of what a tier has of a key that is written anew: no scope's


def generation_for(scope: Scope, deadline: Deadline) -> Generation:
    """The generation that a write is for: the present one, or that of its task's first attempt.

    What a task stores was made for the weights of its call, however many attempts it takes.
    """
    task_time = deadline.task_time
    if task_time is None:
        return scope.generation
    if task_time.generation is None:
        task_time.generation = scope.generation
    generation: Generation = task_time.generation
    return generation


def write(domain: Domain, scope: Scope | Scopes, generation: Generation, plan: WritePlan, deadline: Deadline) -> bool:
    """Store what `plan` says, all of it or nothing.

    Returns False, with nothing stored, if `scope` was cleared or its version bumped since `generation`.

    Raises:
        CapacityError: it can never fit.
        WaitTimeoutError: no room, or a shard not free, before the deadline.
        ClosedError: the pool is closed; SearchEndedError: the search is over.
    """
    storage, ledger = domain.storage, domain.ledger
    clock = storage.clock
    located = scope.locate(plan.hashes)
    entries: list[Entry] = []
    grant = reserve(domain, scope, generation, plan, located, deadline)
    if grant is None:
        with gate.lock, ledger.mutex:
            domain.counters.stale_write_count += len(plan.keys)
        return False
    # Nothing that needs memory from here to the `try`.
    used = grant.ticks
    try:
        written = NO_TICKS
        if plan.source is not None:
            if clock.backend is None:
                _copy(storage, plan.source, plan, grant)
            else:
                stream = clock.current()
                clock.order_after(stream, merge(grant.ticks, storage.zeroed))
                temporaries: tuple[Tensor, ...] = (plan.source,)
                if plan.difference is not None:
                    temporaries += (plan.difference,)
                try:
                    temporaries += _copy(storage, plan.source, plan, grant)
                finally:
                    written = clock.stamp(stream, temporaries)
                    used = merge(used, written)
        if plan.shared_writes:
            written = merge(written, plan.shared_writes)
        shape = plan.shape
        of_each = (shape.lengths, plan.sides, plan.priorities, plan.hashes, plan.corrections)
        if isinstance(scope, Scopes):
            entries = plan.entries_in(scope, written)
        else:
            entries = new_entries(plan.keys, scope, generation, *of_each, written)
        while True:
            missing = _publish(domain, scope, generation, entries, plan, located, grant, deadline)
            if missing is None:
                break
            make_room(domain, *missing, deadline, plan.since)
            grant.entries, grant.slots = missing
        if grant.spent:
            return True
        cancel(domain, scope, grant, used)  # its epoch or version is over
        return False
    except BaseException:
        try:
            cancel(domain, scope, grant, used)
        except BaseException:
            # What cannot be undone here, where memory or frames are short, is undone by the next operation.
            ledger.abandoned.append(partial(_cancel_later, domain, scope, grant, used))
        raise


def _cancel_later(domain: Domain, scope: Scope | Scopes, grant: Grant, used: Ticks, deadline: Deadline) -> None:
    cancel(domain, scope, grant, used)


def _copy(storage: KVStorage, source: Tensor, plan: WritePlan, grant: Grant) -> tuple[Tensor, ...]:
    """Copy a plan's tokens into the slots taken for them; returns what has to live until that is done."""
    shape = plan.shape
    if plan.fill is not None:
        plan.fill(grant.taken)
        return ()
    block = shape.block if type(grant.taken) is range else None
    if plan.parts is not None:
        return storage.tensor.scatter_parts(*plan.parts, shape.rows, shape.columns, grant.taken, block)
    added = plan.difference, plan.runs
    return storage.tensor.scatter(source, shape.rows, shape.columns, grant.taken, *added, block, plan.memory)


# Publication ------------------------------------------------------------


def _publish(
    domain: Domain,
    scope: Scope | Scopes,
    generation: Generation,
    entries: list[Entry],
    plan: WritePlan,
    located: Located,
    grant: Grant,
    deadline: Deadline,
) -> tuple[int, int] | None:
    """Make all entries visible together, and spend the grant; or none, where the scope's epoch or version is over.

    Or none where there is no room, as what they would have replaced, or shared slots with, has left the pool meanwhile:
    then it returns how many entries and slots are missing.
    """
    ledger, budget = domain.ledger, scope.budget
    dead: list[Entry] = []
    dead_in_tier: list[Entry] = []
    with gate.lock, domain.locks.write(located.shards, deadline):
        if deadline.caller is not None:
            deadline.check(domain.name)
        ended = None if scope.ended is None else scope.why_ended()
        if ended is not None:
            raise ended
        if domain.account.closed or domain.storage.closed or (budget is not None and budget.ended is not None):
            domain.check_open()
        # Under the shards' write locks: a clear that raises the epoch from here on will sweep what is published here.
        if scope.generation is not generation:
            with gate.lock, ledger.mutex:
                domain.counters.stale_write_count += len(entries)
            return None
        in_tier = None if scope.below is None else _find_in_tier(located, plan)
        cells, replaced, old, added = find_places(located.parts, plan.keys, plan.hashes)
        try:
            if in_tier is not None:
                # Before the new ones are there: cut off in between, it leaves no old value that could be read again.
                _set_generations(in_tier)
            with gate.lock, ledger.mutex:
                missing = _admit(domain, scope, entries, cells, replaced, plan, old, grant)
                if missing is None:
                    if isinstance(scope, Scopes):
                        try:
                            scope.renew()
                        except Exception:  # no memory, no frames; what was written is current a little later
                            ledger.abandoned.append(partial(ledger.again, [scope.renew]))
                    if old:
                        try:
                            dead = unpublish(domain, old, told=True)
                        except Exception:  # no memory, no frames; what was written is there
                            again = partial(unpublish, domain, old, told=True)
                            ledger.abandoned.append(partial(ledger.again, [again]))
                    if plan.uses_batch:
                        leave = partial(plan.leave_batch, ledger, ends=plan.ends_batch)
                        try:
                            dead += leave()
                        except Exception:  # no memory, no frames; nothing happens the second time
                            ledger.abandoned.append(partial(ledger.again, [leave]))
                # Where it did not fit, others may: it keeps nothing while it waits for all that it needs.
                waiters = ledger.take_waiters() if ledger.waiters else []
        finally:
            if not grant.spent:
                take_away(added)
            if in_tier is not None:
                _drop_from_tier(domain, in_tier, dead_in_tier, is_over=grant.spent)
    if waiters:
        wake(waiters)
    del dead, dead_in_tier, in_tier, old, replaced, cells
    return missing


def _find_in_tier(located: Located, plan: WritePlan) -> list[tuple[Entry, Generation]]:
    """What the tier has of a plan's keys, and of which generation. The shards held."""
    found = filter(None, find_in(parts_below(located.scopes, plan.hashes), plan.keys, plan.hashes))
    return [(entry, entry.generation) for entry in found]


def _set_generations(entries: list[tuple[Entry, Generation]], over: Generation | None = OVER) -> None:
    """Have entries of the tier be misses, or with None be what they were. The shards held."""
    for entry, before in entries:
        entry.generation = before if over is None else over


def _drop_from_tier(
    domain: Domain, entries: list[tuple[Entry, Generation]], dead: list[Entry], *, is_over: bool
) -> None:
    """Take what was written anew out of the tier, or leave it there where nothing was written. The shards held."""
    tier = domain.storage.tier
    if not is_over:
        _set_generations(entries, None)
    elif entries and tier is not None:
        try:
            tier.drop([entry for entry, _ in entries], dead)
        except Exception:  # no memory, no frames: they are misses, and go as the oldest of the tier or with a clear
            return


def _admit(
    domain: Domain,
    scope: Scope | Scopes,
    entries: list[Entry],
    cells: list[list[Entry]],
    replaced: list[Entry | None],
    plan: WritePlan,
    old: list[Entry],
    grant: Grant,
) -> tuple[int, int] | None:
    """Count the new entries in, name the slots, and put the entries into their places; `unpublish` then takes the old.

    The grant is spent then; whatever is raised before that, nothing has changed. Or, where it would exceed the quota,
    take the grant's place in it back and return how much the write needs. Mutex and shards held.
    """
    ledger, budget = domain.ledger, scope.budget
    counters = (domain.account if budget is None else budget).counters
    place = HELD if budget is None else EXEMPT
    counted = counters.insert_count + len(entries) - len(old), counters.replace_count + len(old)
    if budget is not None:
        is_beyond = grant.borrowed or budget.entries - len(old) > budget.max_entries
        plan.make(ledger, entries, grant.taken)
        if is_beyond:
            try:
                check_budget(domain, budget, grant, old)
            except BaseException:
                ledger.leave(list(map(row_of, entries)))  # the slots stay the grant's
                raise
    else:
        needed = _count(domain, entries, plan, old, grant)
        if needed is not None:
            return needed
    # First: what is cut off after this is lost until repair, and no slots of entries that are found are given back.
    grant.spent = True
    if budget is not None:
        ledger.grants -= 1
    try:
        try:
            occupy(cells, entries, replaced, place)
        except (MemoryError, RecursionError):
            occupy(cells, entries, replaced, place)  # less than `make` took
    except Exception:
        grant.spent = False
        if budget is not None:
            ledger.grants += 1
        raise
    counters.insert_count, counters.replace_count = counted
    return None


def _count(
    domain: Domain, entries: list[Entry], plan: WritePlan, old: list[Entry], grant: Grant
) -> tuple[int, int] | None:
    """Count entries in, with the account, the policy and the slots; or say what is missing. Mutex held.

    The old ones are counted out once they have left their places: nothing in the index is ever not counted.
    """
    ledger, account = domain.ledger, domain.account
    uses, policy = account.uses, account.policy
    pending = account.pending_entries - grant.entries, account.pending_slots - grant.slots
    entries_before, slots_before = account.entries, uses.used
    done, needed = [1], (0, 0)  # steps that `_uncount` undoes
    error: Exception | None = None
    # First: what is cut off here is lost until repair, and not given back twice, which would let too many in.
    grant.entries = grant.slots = 0
    account.pending_entries, account.pending_slots = pending
    rows = plan.make(ledger, entries, grant.taken)
    try:
        uses.add(rows)
        done[0] = 2
        account.entries += len(entries)
        entries_over = account.entries + account.pending_entries + account.reserved_entries - account.max_entries
        slots_over = uses.used + account.pending_slots + account.reserved_slots - account.max_slots
        freed = uses.exclusive(list(map(row_of, old))) if entries_over > 0 or slots_over > 0 else 0
        if entries_over <= len(old) and slots_over <= freed:
            done[0] = 3
            for entry in old:
                if entry.place is HELD:
                    policy.remove(entry)
            for entry in entries:
                policy.add(entry)
            return None
        needed = max(0, len(entries) - len(old)), max(0, uses.used - slots_before - freed)
    except Exception as raised:
        error = raised
    account.entries = entries_before
    try:
        _uncount(domain, old, entries, rows, done)
    except Exception as raised:  # no memory, no frames
        error = error or raised  # and no other attempt, whose rows would be undone later
        ledger.abandoned.append(partial(ledger.again, [partial(_uncount, domain, old, entries, rows, done)]))
    if error is None:
        return needed
    try:
        raise error
    finally:
        del error  # it names this frame


def _uncount(domain: Domain, old: list[Entry], entries: list[Entry], rows: list[int], done: list[int]) -> None:
    """Undo the steps of `_count` that are `done`, the last first; what fails is undone by another call. Mutex held."""
    while done[0]:
        if done[0] == 3:
            domain.ledger.candidates.exchange_back(domain.account, old, entries)
        elif done[0] == 2:
            domain.account.uses.remove(rows)
        else:
            domain.ledger.tables.leave(rows)  # the slots stay the grant's
        done[0] -= 1
