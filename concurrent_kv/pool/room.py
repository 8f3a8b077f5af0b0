"""Room for a write: slots and quota taken together, from what is free, else from victims, else after a bounded wait."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..books.entries import displace, row_of
from ..books.index import find_in
from ..books.ledger import Ledger, wake
from ..books.records import (
    CLAIMED,
    HELD,
    NO_PLACE,
    PINNED,
    Account,
    Budget,
    Entry,
    Generation,
    Grant,
    Located,
    Scope,
    Scopes,
)
from ..books.turns import EVICTIONS_BEFORE_QUEUE, Turn
from ..device.slot_numbers import SlotArray
from ..device.streams import NO_TICKS, Ticks
from ..errors import CapacityError, IntegrityError, WaitTimeoutError
from ..locks.deadline import Deadline, TaskTime, WaitElsewhere
from ..locks.gate import gate

if TYPE_CHECKING:  # without torch, the books and the room of a pool can be imported alone
    from .plan import WritePlan
    from .storage import Domain

__all__ = [
    "Queued",
    "cancel",
    "check_budget",
    "evict_next",
    "make_room",
    "reserve",
    "reserve_budget",
    "unpublish",
]

NO_SLOTS = range(0)
NO_POSITIONS: SlotArray = np.empty(0, dtype=np.int64)
VICTIMS_PER_HOLD = 64  # candidates looked at in one hold of the mutex
DRAIN_SECONDS = 0.02  # a thread that waits for room looks so often whether what was dropped can be released by now


def reserve(
    domain: Domain,
    scope: Scope | Scopes,
    generation: Generation,
    plan: WritePlan,
    located: Located,
    deadline: Deadline,
) -> Grant | None:
    """All the slots a plan needs, and its place in the account (or in its search's budget), or nothing.

    None where `generation` is over: nothing has to go, or is waited for, for what will not be stored. From here on the
    plan uses its batch.
    """
    budget, ledger = scope.budget, domain.ledger
    if budget is not None:
        entries, slots = len(plan.keys), plan.num_slots
        with gate.lock, ledger.mutex:
            # Sooner than where it is published, which looks again: nothing is taken, or copied, in vain.
            if scope.ended is not None or budget.ended is not None or domain.storage.closed:
                domain.check_open()
            if plan.batch is not None:
                if not ledger.use(plan.batch.hold):
                    raise plan.batch.why_closed()
                plan.uses_batch = True
            if budget.entries + entries <= budget.max_entries:
                grant = _allocate_from_budget(ledger, budget, entries, slots)
                if grant is not None:
                    return grant
        look_up_freed = partial(_freed_by, domain, scope, plan, located, deadline)
        return _take_from_budget(domain, budget, plan, look_up_freed, deadline)
    if plan.batch is not None:
        with gate.lock, ledger.mutex:
            if not ledger.use(plan.batch.hold):
                raise plan.batch.why_closed()
            plan.uses_batch = True
    if scope.generation is not generation:
        domain.check_open()
        ended = scope.why_ended()
        if ended is not None:
            raise ended
        return None
    account = domain.account
    if len(plan.keys) > account.max_entries or sum(plan.shape.lengths) > account.max_slots:
        account.check_size(domain.name, len(plan.keys), plan.slots_together(ledger.tables))
    freed = _freed_by(domain, scope, plan, located, deadline)
    entries = len(plan.keys) - freed[0]
    slots = max(0, plan.num_slots + plan.foreign_slots - freed[1])
    if deadline.task_time is not None and deadline.task_time.short is not None:
        # Else a task's attempts would take the slots, find the same missing again, and wake each other by giving back.
        entries, slots = map(max, (entries, slots), deadline.task_time.short)
    # A pure replacement evicts nothing, however full the storage is: its own old entry will make the room. Nor does it
    # queue: it takes nothing that others wait for.
    # (Not where that can never be: the headroom is for a few windows at a time.)
    may_evict = entries > 0 or slots > 0 or plan.num_slots > domain.storage.headroom_slots
    of = len(plan.keys), plan.num_slots
    return _take(domain, entries, slots, plan.num_slots, deadline, plan.since, of=of, may_evict=may_evict)


def _freed_by(
    domain: Domain, scope: Scope | Scopes, plan: WritePlan, located: Located, deadline: Deadline
) -> tuple[int, int]:
    """Entries and slots that go when a plan's keys are replaced."""
    replaced = _present(plan, located)
    if not replaced:
        return 0, 0
    with gate.lock, domain.ledger.mutex:
        freed = _freed_of(domain, scope, plan, replaced)
    if freed is None:  # another writer replaced one of them since
        with gate.lock, domain.locks.read(located.shards, deadline):
            replaced = _present(plan, located)
            with gate.lock, domain.ledger.mutex:
                freed = _freed_of(domain, scope, plan, replaced)
    if freed is None:
        raise IntegrityError((f"{domain.name} has an entry in its index that is not published",))
    return freed


def _present(plan: WritePlan, located: Located) -> list[Entry]:
    """The entries that a plan's keys have, just now where their shards are not held."""
    return list(filter(None, find_in(located.parts, plan.keys, plan.hashes)))


def _freed_of(domain: Domain, scope: Scope | Scopes, plan: WritePlan, replaced: list[Entry]) -> tuple[int, int] | None:
    """How many entries these are, and their slots that no others name; None unless all are published. Mutex held.

    Of a search, whose own alone can make up for what it lacks: nor what `plan` makes of them.
    """
    rows = [entry.row for entry in replaced if entry.refs and entry.place is not NO_PLACE]
    if len(rows) != len(replaced):
        return None
    if scope.budget is None:
        return len(rows), domain.account.uses.exclusive(rows)
    domain.check_open()  # one that has ended has no rows any more
    ledger = domain.ledger
    staying = ledger.tables.enter(*plan.kept_rows(), range(0), NO_POSITIONS)[0]
    try:
        return len(rows), ledger.tables.exclusive(rows)
    finally:
        ledger.leave(staying)


def _take(
    pool: Domain,
    entries: int,
    slots: int,
    num_slots: int,
    deadline: Deadline,
    since: float | None,
    *,
    of: tuple[int, int],
    may_evict: bool = True,
) -> Grant:
    """Take a place for `entries` and `slots` in the account, and `num_slots` slots; evict or wait until both are there.

    In the turn of an operation that came at `since`, with the `deadline` if None, and stores as many entries and slots
    as `of` says. One that may not evict does not queue.
    """
    ledger, account = pool.ledger, pool.account
    turn = None if deadline.task_time is None else _kept_turn(pool, deadline.task_time)
    if turn is None and may_evict:
        turn = Turn(deadline.started if since is None else since)
    try:
        while True:
            with gate.lock, ledger.mutex:
                if account.closed or pool.storage.closed:
                    pool.check_open()
                queues = turn if may_evict else None
                if (queues is None or account.turns.is_first(queues)) and account.fits(entries, slots):
                    grant = Grant(entries, slots, NO_SLOTS, NO_TICKS)  # made before anything is taken
                    pending = account.pending_entries + entries, account.pending_slots + slots
                    taken = ledger.slots.allocate(num_slots)
                    if taken is not None:
                        # Nothing that needs memory from here on.
                        grant.taken, grant.ticks = taken.slots, taken.ticks
                        account.pending_entries, account.pending_slots = pending
                        return grant
                if queues is not None:
                    queues.stalled = not account.can_ever_fit(entries, slots)
                    victim, waiter = _next_for(pool, queues, want_slots=account.fits(entries, 0))
                else:
                    victim, waiter = None, ledger.waiter()
            try:
                _evict_or_wait(pool, victim, waiter, deadline, of, turn, need=(entries, slots), wanted=num_slots)
            except BaseException:
                if victim is not None:
                    ledger.abandoned.append(partial(ledger.again, [partial(ledger.candidates.give_back, victim)]))
                raise
            del victim  # here, where no lock is held: it may be the last to name the entry
    except WaitTimeoutError:
        if turn is not None:
            _keep_turn(pool, turn, deadline)
        raise
    finally:
        if turn is not None and turn.joined:
            try:
                if not _is_kept(turn, deadline):
                    _leave(pool, turn)
            except Exception:  # no memory, no frames: what was taken is the caller's all the same
                ledger.abandoned.append(partial(ledger.again, [partial(account.turns.leave, turn)]))


def _take_from_budget(
    domain: Domain,
    budget: Budget,
    plan: WritePlan,
    look_up_freed: Callable[[], tuple[int, int]],
    deadline: Deadline,
) -> Grant:
    """Take what a search reserved; beyond that, what the pool has or can evict, or an error that says what would do."""
    ledger, pool = domain.ledger, domain.pool
    count, slots = len(plan.keys), plan.num_slots
    freed, looked, tried = (0, 0), False, False
    while True:
        if _beyond(ledger, budget, plan, (0, 0)) != (0, 0):
            # What the write replaces makes up for what is missing; looked up only then.
            freed = look_up_freed()
        with gate.lock, ledger.mutex:
            domain.check_open()  # as in `reserve`
            short = _beyond(ledger, budget, plan, freed)
            if short != (0, 0):
                _extend(domain, budget, *short)
                short = _beyond(ledger, budget, plan, freed)
            if short == (0, 0):
                borrowed = max(0, slots - ledger.slots.free_count)
                if not borrowed or ledger.borrow(borrowed):
                    grant = _allocate_from_budget(ledger, budget, count, slots)
                    if grant is not None:
                        grant.borrowed = borrowed
                        return grant
            lacking = slots - ledger.slots.free_count
        if short != (0, 0) and freed == (0, 0) and not looked:
            looked = True  # another thread took what was left meanwhile
            continue
        with gate.lock, pool.ledger.mutex:
            if short != (0, 0) and not pool.account.can_ever_fit(*short):
                raise _budget_error(domain, budget, *short)
            tried = not tried
            if tried and pool.account.fits(*short) and pool.ledger.slots.free_count >= lacking:
                continue  # it has come meanwhile, and woken nobody
            # Ahead of the queue: an operation that waits there may wait for what this search holds.
            victim, waiter = _victim_or_waiter(pool, want_slots=not short[0])
        try:
            if waiter is not None:
                _wait_for_both(domain, waiter, lambda: _beyond(ledger, budget, plan, freed) != short)  # noqa: B023
            _evict_or_wait(
                pool, victim, waiter, deadline, (count, slots), beside=ledger, need=short, wanted=max(0, lacking)
            )
        except BaseException:
            if victim is not None:
                candidates = pool.ledger.candidates
                pool.ledger.abandoned.append(partial(pool.ledger.again, [partial(candidates.give_back, victim)]))
            raise
        finally:
            if waiter is not None and not _is_waited_for(waiter, deadline):
                with gate.lock, ledger.mutex:
                    ledger.forget_waiter(waiter)
        del victim  # as in `_take`


def _allocate_from_budget(ledger: Ledger, budget: Budget, entries: int, slots: int) -> Grant | None:
    """Free slots of a search's, and places in its budget; None, and nothing, if it has no so many slots. Mutex held."""
    grant = Grant(entries, slots, NO_SLOTS, NO_TICKS)  # made before anything is taken
    stored, grants = budget.entries + entries, ledger.grants + 1
    taken = ledger.slots.allocate(slots)
    if taken is None:
        return None
    # Nothing that needs memory from here on.
    grant.taken, grant.ticks = taken.slots, taken.ticks
    budget.entries, ledger.grants = stored, grants
    return grant


def _wait_for_both(domain: Domain, waiter: Any, has_changed: Callable[[], bool]) -> None:
    """Have a waiter for room of the storage woken by what its search frees, too; at once, if something has changed."""
    ledger = domain.ledger
    with gate.lock, ledger.mutex:
        domain.check_open()  # its end wakes those that are noted by then
        ledger.waiters.append(waiter)
        changed = has_changed()
    if changed:
        waiter.set()


def _beyond(ledger: Ledger, budget: Budget, plan: WritePlan, freed: tuple[int, int]) -> tuple[int, int]:
    """Entries and slots by which a plan exceeds what a search has left, once what it replaces is gone.

    What is owed counts, but not where the plan needs no slot.
    """
    entries = budget.entries + len(plan.keys) - freed[0] - budget.max_entries
    slots = plan.num_slots - freed[1] - ledger.left if plan.num_slots else 0
    return max(0, entries), max(0, slots)


def _extend(domain: Domain, budget: Budget, entries: int, slots: int) -> None:
    """Grow a search's budget beyond what it reserved, if its pool has room just now. The search's mutex held."""
    account, ledger, storage = domain.account, domain.ledger, domain.storage
    own = min(slots, ledger.borrowed)  # which are there already
    with gate.lock, storage.ledger.mutex:
        if not account.fits(entries, slots):
            return
        reserved = account.reserved_entries + entries, account.reserved_slots + slots
        most = budget.max_entries + entries, budget.max_slots + slots
        borrowed = ledger.borrowed - own
        runs = storage.ledger.slots.part(slots - own) if slots > own else []
        if runs is None:
            return
        # No call of Python's from here to the last, so that no asynchronous exception parts what belongs together; and
        # nothing that needs memory.
        account.reserved_entries, account.reserved_slots = reserved
        budget.max_entries, budget.max_slots = most
        ledger.borrowed = borrowed
        try:
            ledger.slots.add(runs)
        except Exception:  # no memory, no frames: they are there a little later
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.slots.add, runs)]))


def check_budget(domain: Domain, budget: Budget, grant: Grant, old: list[Entry]) -> None:
    """Raise `CapacityError` unless a search has room for what it writes, once `old` are gone. Its mutex held.

    Less may go than when the room was taken: a key was released meanwhile, or another entry shares its slots. What is
    written has its rows already.
    """
    ledger = domain.ledger
    entries = max(0, budget.entries - len(old) - budget.max_entries)
    slots = 0
    if grant.borrowed:
        going = ledger.tables.exclusive(list(map(row_of, old)))
        left = ledger.left + grant.borrowed
        slots = max(0, grant.borrowed - going - max(0, left))
    if entries or slots:
        before = budget.max_entries, budget.max_slots
        _extend(domain, budget, entries, slots)
        if (budget.max_entries, budget.max_slots) == before:
            raise _budget_error(domain, budget, entries, slots)


def _budget_error(domain: Domain, budget: Budget, entries: int, slots: int) -> CapacityError:
    account = domain.account
    need_entries, need_slots = budget.max_entries + entries, budget.max_slots + slots
    other_entries = account.reserved_entries - budget.max_entries
    other_slots = account.reserved_slots - budget.max_slots
    others = f", of which other searches reserved {other_entries} and {other_slots}"
    room = account.that_holds(other_entries + need_entries, other_slots + need_slots)
    return CapacityError(
        f"the search reserved {budget.max_entries} entries and {budget.max_slots} slots in {domain.name} and "
        f"needs {entries} entries and {slots} slots more; the pool holds at most {account.max_entries} entries and "
        f"{account.max_slots} slots{others if other_entries or other_slots else ''}; open the search with "
        f"entries={need_entries} and tokens={need_slots}{f', where {room} makes the room' if room else ''}",
        required_entries=need_entries,
        required_slots=need_slots,
    )


def make_room(pool: Domain, entries: int, slots: int, deadline: Deadline, since: float | None = None) -> None:
    """Count `entries` and `slots` more as pending in the pool's account, evicting or waiting until they fit.

    In the turn of an operation that came at `since`, with the `deadline` if left out.
    """
    try:
        _take(pool, entries, slots, 0, deadline, since, of=(entries, slots))
    except WaitElsewhere:
        assert deadline.task_time is not None
        deadline.task_time.short = entries, slots
        raise


def reserve_budget(pool: Domain, entries: int, slots: int, deadline: Deadline) -> Budget:
    """Set room aside for a search, evicting what no search owns; or an error that says which capacity would do.

    Returns its budget, with its slots.
    """
    ledger, account = pool.ledger, pool.account
    kept = None if deadline.task_time is None else _kept_turn(pool, deadline.task_time)
    budget, turn = Budget(account, entries, slots), kept or Turn(deadline.started, reserves=True)
    try:
        while True:
            with gate.lock, ledger.mutex:
                pool.check_open()
                if entries > account.max_entries or slots > account.max_slots:
                    break  # no waiting will help
                if account.turns.is_first(turn) and account.fits(entries, slots):
                    reserved = account.reserved_entries + entries, account.reserved_slots + slots
                    budget.runs = ledger.slots.part(slots)
                    if budget.runs is not None:
                        account.reserved_entries, account.reserved_slots = reserved
                        return budget
                turn.stalled = not account.can_ever_fit(entries, slots)
                account.turns.join(turn, ledger.stir)  # as it needs room for many: others take none of it from here on
                if turn.stalled:
                    victim, waiter = None, ledger.waiter()
                else:
                    victim, waiter = _next_for(pool, turn, want_slots=account.fits(entries, 0))
            if victim is not None:
                try:
                    _evict(pool, victim, deadline)
                except BaseException:
                    ledger.abandoned.append(partial(ledger.again, [partial(ledger.candidates.give_back, victim)]))
                    raise
            elif waiter is None:
                deadline.step(pool.name, VICTIMS_PER_HOLD)
            else:
                _wait(pool, waiter, deadline, partial(_cannot_reserve, pool, entries, slots), turn)
            del victim  # as in `_take`
    except WaitTimeoutError:
        _keep_turn(pool, turn, deadline)
        raise
    finally:
        if turn.joined:
            try:
                if not _is_kept(turn, deadline):
                    _leave(pool, turn)
            except Exception:  # no memory, no frames: what was taken is the caller's all the same
                ledger.abandoned.append(partial(ledger.again, [partial(account.turns.leave, turn)]))
    raise _cannot_reserve(pool, entries, slots)


def _cannot_reserve(pool: Domain, entries: int, slots: int) -> CapacityError:
    """What a search hears for which so much cannot be set aside."""
    ledger, account = pool.ledger, pool.account
    with gate.lock, ledger.mutex:
        reserved_entries, reserved_slots = account.reserved_entries, account.reserved_slots
        need_entries, need_slots = reserved_entries + entries, reserved_slots + slots
        if account.can_ever_fit(entries, slots):
            # Everything that could be evicted was; what is left is pinned or held.
            need_entries += account.entries + account.pending_entries
            need_slots += account.slots + account.pending_slots
        headroom = _more_headroom(pool, slots) if account.fits(entries, slots) else ""
    taken = [
        f"{number_entries} and {number_slots} are {how}"
        for number_entries, number_slots, how in (
            (reserved_entries, reserved_slots, "reserved by other searches"),
            (
                need_entries - entries - reserved_entries,
                need_slots - slots - reserved_slots,
                "pinned, held or being written",
            ),
        )
        if number_entries or number_slots
    ]
    enough = headroom or account.that_holds(need_entries, need_slots) or "closing what is held"
    waiting = "a longer timeout= for those to close, " if reserved_entries or reserved_slots else ""
    of_which = f", of which {' and '.join(taken)}" if taken else ""
    return CapacityError(
        f"{pool.name} cannot set {entries} entries and {slots} slots aside for this search: it holds at most "
        f"{account.max_entries} entries and {account.max_slots} slots{of_which}; {enough} would do, or {waiting}a "
        "search with fewer environments, or smaller entries= and tokens=",
        required_entries=need_entries,
        required_slots=need_slots,
    )


class Queued:
    """An operation between two attempts of its task: its turn in the queue, if it is in it, and what wakes the task.

    Attributes:
        turn: stays joined.
        waiter: the event that is set at the next release; None while it is not waited for.
        at_most: seconds after which an attempt may get further without a release; None if it cannot.
        in_vain: gives what the task hears when its time is over.
    """

    __slots__ = ("_beside", "_pool", "at_most", "in_vain", "turn", "waiter")

    def __init__(
        self,
        pool: Domain,
        turn: Turn | None,
        waiter: Any = None,
        at_most: float | None = None,
        in_vain: Callable[[], Exception] | None = None,
        beside: Ledger | None = None,
    ) -> None:
        self.turn = turn if turn is not None and turn.joined else None
        self.waiter = waiter
        self.at_most = at_most
        self.in_vain = in_vain
        self._pool = pool
        self._beside = beside

    def needs_loop(self, loop_ended: Callable[[], bool] | None) -> None:
        """Have the queue know that nobody goes on with the turn once `loop_ended()`."""
        if self.turn is not None:
            self.turn.loop_ended = loop_ended

    def is_of(self, pool: Domain) -> bool:
        """Whether it is a queue of that pool's."""
        return self._pool.account is pool.account

    def look(self) -> bool:
        """Whether another attempt may get further. Where others are before it, it waits for the next release instead.

        So a release costs every task that waits a look, and only the first an attempt.
        """
        pool, turn = self._pool, self.turn
        self._forget_beside()
        with gate.lock, pool.ledger.mutex:
            pool.ledger.forget_waiter(self.waiter)
            self.waiter = None
            closed = pool.account.closed or pool.storage.closed  # which the next attempt says
            if turn is None or closed or pool.account.turns.is_first(turn):
                return True
            self.waiter, self.at_most = pool.ledger.waiter(), None
        return False

    def leave(self) -> None:
        """Take turn and waiter away: the operation is over, or its task cancelled. Nothing happens the second time."""
        pool, ledger = self._pool, self._pool.ledger
        if self.turn is None and self.waiter is None:
            return
        try:
            # The task's finaliser may come here, inside a critical section, or in a forked child.
            pool.storage.check_call()
            self._forget_beside()
            with gate.lock, ledger.mutex:
                ledger.forget_waiter(self.waiter)
                self.waiter = None
                turn, self.turn = self.turn, None
                if turn is not None:
                    pool.account.turns.leave(turn)
                waiters = ledger.take_waiters() if turn is not None else []
            wake(waiters)
        except Exception:  # or no memory, no frames
            self.drop()

    def drop(self) -> None:
        """As `leave`, where no lock may be taken: in a finaliser, or a thread that finds the task's loop ended."""
        self.turn = None  # the queue's reference of it is weak
        waiter, self.waiter = self.waiter, None
        for ledger in (self._pool.ledger, self._beside):
            if waiter is not None and ledger is not None:
                ledger.abandon(partial(ledger.again, [partial(ledger.forget_waiter, waiter)]))

    def _forget_beside(self) -> None:
        if self._beside is not None:
            with gate.lock, self._beside.mutex:
                self._beside.forget_waiter(self.waiter)


def _kept_turn(pool: Domain, task_time: TaskTime) -> Turn | None:
    """The turn that its task's last attempt left in the pool's queue, which goes on with this one."""
    queued: Queued | None = task_time.queued
    if queued is None or not queued.is_of(pool):
        return None
    task_time.queued = None
    return queued.turn


def _keep_turn(pool: Domain, turn: Turn, deadline: Deadline) -> None:
    """Leave the turn of an attempt that gives up on its loop's thread for the one that goes on in a worker."""
    if turn.joined and deadline.on_loop and deadline.hands_over:
        assert deadline.task_time is not None
        deadline.task_time.queued = Queued(pool, turn)


def _is_kept(turn: Turn, deadline: Deadline) -> bool:
    task_time = deadline.task_time
    return task_time is not None and task_time.queued is not None and task_time.queued.turn is turn


def _is_waited_for(waiter: Any, deadline: Deadline) -> bool:
    task_time = deadline.task_time
    return task_time is not None and task_time.queued is not None and task_time.queued.waiter is waiter


def _next_for(pool: Domain, turn: Turn, *, want_slots: bool) -> tuple[Entry | None, Any]:
    """As `_victim_or_waiter`, for an operation in its turn: it waits while another is before it. Mutex held."""
    turns, ledger = pool.account.turns, pool.ledger
    if not turns.is_first(turn):
        turns.join(turn, ledger.stir)
        return None, ledger.waiter()
    found = _victim_or_waiter(pool, want_slots=want_slots)
    victim, waiter = found
    try:
        turn.evicted += victim is not None
        if waiter is not None or turn.evicted > EVICTIONS_BEFORE_QUEUE:
            turns.join(turn, ledger.stir)
    except BaseException:
        if victim is not None:
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.candidates.give_back, victim)]))
        raise
    return found


def _leave(pool: Domain, turn: Turn) -> None:
    """Let the next in the queue have what is free."""
    ledger = pool.ledger
    with gate.lock, ledger.mutex:
        pool.account.turns.leave(turn)
        waiters = ledger.take_waiters()
    wake(waiters)


def _victim_or_waiter(pool: Domain, *, want_slots: bool) -> tuple[Entry | None, Any]:
    """A claimed victim, or an event that is set at the next release, or neither: look again. Mutex held."""
    ledger = pool.ledger
    for _ in range(VICTIMS_PER_HOLD):
        victim = pool.account.policy.pop_victim()
        if victim is None:
            if want_slots or not ledger.candidates.return_shared(pool.account, VICTIMS_PER_HOLD):
                return None, ledger.waiter()
            continue
        try:
            victim.place = CLAIMED
            if not ledger.candidates.set_aside(victim, want_slots=want_slots):
                return victim, None
        except BaseException:
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.candidates.give_back, victim)]))
            raise
    return None, None


def evict_next(domain: Domain, deadline: Deadline) -> bool:
    """Evict the next entry whose end frees slots; False if there is none. Waits for a shard, and not for room."""
    ledger = domain.ledger
    with gate.lock, ledger.mutex:
        victim, waiter = _victim_or_waiter(domain, want_slots=True)
        if waiter is not None:
            ledger.forget_waiter(waiter)
    if victim is not None:
        try:
            _evict(domain, victim, deadline)
        except BaseException:
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.candidates.give_back, victim)]))
            raise
    return waiter is None


def _evict_or_wait(
    pool: Domain,
    victim: Entry | None,
    waiter: Any,
    deadline: Deadline,
    of: tuple[int, int],
    turn: Turn | None = None,
    beside: Ledger | None = None,
    *,
    need: tuple[int, int] = (0, 0),
    wanted: int = 0,
) -> None:
    """Make room in one way or the other for `of` entries and slots; `WaitTimeoutError` where the time is over.

    For the error: of these, `need` is what the account has to have room for, and `wanted` the slots of the storage.
    """
    if victim is not None:
        _evict(pool, victim, deadline)
    elif waiter is None:
        deadline.step(pool.name, VICTIMS_PER_HOLD)  # so many were looked at in vain
    else:
        in_vain = partial(_no_room, pool, of, deadline.seconds, turn, need, wanted)
        _wait(pool, waiter, deadline, in_vain, turn, beside)


def _no_room(
    pool: Domain, of: tuple[int, int], seconds: float, turn: Turn | None, need: tuple[int, int], wanted: int
) -> WaitTimeoutError:
    """What a write of `of` entries and slots hears that waited in vain; `need` and `wanted` as in `_evict_or_wait`."""
    ledger, account, (entries, slots) = pool.ledger, pool.account, of
    with gate.lock, ledger.mutex:
        headroom = _more_headroom(pool, wanted) if account.fits(*need) else ""
    why = f"nothing can be evicted (pinned, or held by open batches){_room_beside_pins(account, entries, slots)}"
    if turn is not None and not account.turns.is_first(turn):
        why = "writes that came earlier wait for more room than is free (a search that opens, say)"
    elif not account.can_ever_fit(entries, slots):
        why = "that comes back when these close"
    elif headroom:
        why = (
            f"the headroom of {pool.storage.headroom_slots} slots is held by searches, batches and pins that have "
            f"entries which were replaced or evicted since; {headroom} would do, or closing some of them"
        )
    return WaitTimeoutError(
        f"{pool.name}: no room for {entries} entries and {slots} slots within {seconds:g} s: of "
        f"{account.max_entries} entries and {account.max_slots} slots, {account.entries} and {account.slots} are "
        f"stored, {account.reserved_entries} and {account.reserved_slots} reserved by searches, and {why}"
        f"{_room_beside_searches(account, entries, slots)}"
    )


def _more_headroom(pool: Domain, wanted: int) -> str:
    """The argument with which the storage would have `wanted` slots free now; nothing where it has. Mutex held."""
    storage = pool.storage
    missing = wanted - pool.ledger.slots.free_count
    return f"{storage.headroom_argument}={storage.headroom_slots + missing}" if missing > 0 else ""


def _room_beside_pins(account: Account, entries: int, slots: int) -> str:
    """What would do for a write where nothing of the pool can be evicted; nothing where its quotas are not short."""
    stored = account.entries + account.reserved_entries, account.slots + account.reserved_slots
    room = account.that_holds(stored[0] + entries, stored[1] + slots)
    return f"; closing some of these, or {room}, would do" if room else ""


def _room_beside_searches(account: Account, entries: int, slots: int) -> str:
    """What would do for a write that open searches leave no room for; nothing where it is not they."""
    if account.can_ever_fit(entries, slots):
        return ""
    room = account.that_holds(account.reserved_entries + entries, account.reserved_slots + slots)
    return f"; {room} leaves room beside the open searches"


def _wait(
    pool: Domain,
    waiter: Any,
    deadline: Deadline,
    in_vain: Callable[[], Exception],
    turn: Turn | None = None,
    beside: Ledger | None = None,
) -> None:
    """Wait for a release, first of all of what was dropped without being closed; raises `in_vain()` if none comes.

    The waiter is noted in the ledger of the pool, and in that of a search where it is `beside`.

    Raises:
        WaitElsewhere: the wait is the task's. The turn and the waiter stay where they are, so that it misses nothing.
    """
    ledger, task_time = pool.ledger, deadline.task_time
    at_most = None
    try:
        hands_over = deadline.hands_over
        if ledger.abandoned:
            deadline.leave_loop(pool.name)
            # Looked at after the waiter was registered, so that what is dropped from here on wakes it.
            if pool.storage.drain_abandoned(deadline.part(0.0 if hands_over else DRAIN_SECONDS)):
                return
            at_most = DRAIN_SECONDS  # its shard is busy, and leaving a shard wakes no waiter
        if hands_over:
            assert task_time is not None
            task_time.began = deadline.started
            task_time.queued = Queued(pool, turn, waiter, at_most, in_vain, beside)
            task_time.queued.needs_loop(task_time.loop_ended)
            raise WaitElsewhere(f"{pool.name}: the task of this operation waits for room", task_time.queued)
        heard = deadline.wait_on(waiter, at_most) or (at_most is not None and deadline.left() > 0)
        if not heard or deadline.cancelled:
            raise in_vain()
    finally:
        if not _is_waited_for(waiter, deadline):
            with gate.lock, ledger.mutex:
                ledger.forget_waiter(waiter)


def _evict(pool: Domain, victim: Entry, deadline: Deadline) -> None:
    """Take a claimed victim out of the index, if it is still there and no pin has it; into a tier, if there is one."""
    ledger, scope = pool.ledger, victim.scope
    dead: list[Entry] = []
    waiters: list[Any] = []
    try:
        deadline.step(pool.name)  # a long entry may take the room of many short ones, a search that of a pool
        part = scope.part_of(victim.key_hash)
        if scope.below is not None:
            tier = pool.storage.tier
            if tier is not None and tier.move_down(pool, victim, deadline):
                return
        with gate.lock, pool.locks.write((scope.shards[part],), deadline), ledger.mutex:
            if victim.pins:
                if victim.place is CLAIMED:  # or it was removed meanwhile, and is no candidate any more
                    victim.place = PINNED
                return
            if not scope.entries[part].remove(victim):
                return
            try:
                dead = unpublish(pool, [victim])
            except Exception:
                ledger.abandoned.append(partial(ledger.again, [partial(unpublish, pool, [victim])]))
                raise
            pool.account.counters.eviction_count += 1
            pool.account.counters.tier_drop_count += scope.below is not None
            waiters = ledger.take_waiters()
    except BaseException:
        with gate.lock, ledger.mutex:
            ledger.candidates.give_back(victim)
            waiters = ledger.take_waiters()  # a thread may have found no victim because this one was claimed
        wake(waiters)
        raise
    wake(waiters)
    del dead


def unpublish(domain: Domain, entries: list[Entry], *, told: bool = False) -> list[Entry]:
    """Books of entries that left the index: account, the index's reference, and the policy unless it was told before.

    Returns the dead. Where it raises it can be done again: what takes effect once comes last. Mutex held.
    """
    ledger = domain.ledger
    if not entries:
        return []
    account, budget = domain.account, entries[0].scope.budget
    if budget is None:
        for entry in entries:
            if not (told and entry.place is HELD):
                ledger.candidates.withdraw(entry)
            entry.place = NO_PLACE
        rows, left = list(map(row_of, entries)), account.entries - len(entries)
        account.uses.remove(rows)
        account.entries = left
        try:
            return ledger.let_go(entries)
        except Exception:  # no memory, no frames: they die a little later
            ledger.abandoned.append(partial(ledger.again, [partial(ledger.let_go, entries)]))
            return []
    displace(entries)
    left = budget.entries - len(entries)
    dead = ledger.let_go(entries)
    budget.entries = left
    return dead


def cancel(domain: Domain, scope: Scope | Scopes, grant: Grant, used: Ticks) -> None:
    """Give back what a write took and did not publish."""
    ledger, account, budget = domain.ledger, domain.account, scope.budget
    dead: list[Entry] = []
    with gate.lock, ledger.mutex:
        if not grant.spent:
            if budget is None:
                left = account.pending_entries - grant.entries, account.pending_slots - grant.slots
            else:
                left = budget.entries - grant.entries, ledger.grants - 1
            grant.spent = True
            try:
                ledger.give_back(grant.taken, used)
            except Exception:
                grant.spent = False
                raise
            # Nothing that needs memory from here to the next comment.
            if budget is None:
                account.pending_entries, account.pending_slots = left
            else:
                budget.entries, ledger.grants = left
                dead = ledger.look_idle()
        # Also where it was done before: who did it may have failed before it woke anyone.
        waiters = ledger.take_waiters()
    wake(waiters)
    del dead
