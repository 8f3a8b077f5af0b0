"""`LeafQueue`: leaves that wait for a call of the model, whose they are, and when it is time for the next call.

A call begins when as many leaves wait as fit one, or all workers wait, or the first leaf has waited long enough; and
not more calls at once than the evaluator allows. The caller that finds that it is time takes the leaves and makes the
call, in its own thread or task; or a thread of the evaluator's does. Walks whose leaf has been evaluated are work of
the same kind: the caller that takes them leads each to its next leaf, all before the next call. Nothing here waits.

Tickets, workers and walks are kept in sets, not counted: what an asynchronous exception has cut off is done once more,
and counts nothing twice. In between other callers may have gone on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count, islice
from typing import TypeVar

from ..errors import ClosedError
from ..locks.gate import gate
from ..pool.handle import Handle
from .stats import CallTimes, EvaluatorCounters, EvaluatorStats
from .tickets import Row, Run, Ticket, Walker

__all__ = ["Group", "LeafQueue", "Worker"]

T = TypeVar("T")

# Callers that wait look by themselves this often: the next call may have been left to a caller that looks no more, such
# as a task whose loop has stopped, or the thread that should have woken them may have been cut off just before.
LOOK_SECONDS = 1.0

# So often a finaliser looks at what threads with the lock may be changing: it must not wait for them without end.
LOOKS_WITHOUT_LOCK = 1000


class Group:
    """What one caller, or thread of the evaluator's, has taken to do: the rows of a call, or walks to be led on.

    Attributes:
        caller: what the caller that does it waits for itself; None for the evaluator's thread.
    """

    __slots__ = ("_claims", "caller", "rows", "walkers")

    def __init__(self, caller: Ticket | Run | None = None) -> None:
        self.caller = caller
        self.rows: list[Row] = []
        self.walkers: list[Walker] = []
        self._claims: list[str] = []  # in the order of their coming

    def claim(self, who: str) -> bool:
        """Whether it is for `who` to end it: a task, or the worker that it was handed to and that began. No lock."""
        self._claims.append(who)
        return self._claims[0] == who


class Worker(Handle):
    """Someone who hands leaves in again and again: calls wait for all who are registered. Leaving its `with` ends that.

    One thread or task at a time may use it.
    """

    _internal = frozenset(("registered", "seat"))

    instead_of_copy = "register another with evaluator.worker()"

    _joined = False

    def __init__(self, queue: LeafQueue) -> None:
        self._queue = queue
        self._seat = object()
        self._joined = True  # first: what is cut off after this leaves when it is dropped
        queue.join(self._seat)

    @property
    def registered(self) -> bool:
        """Whether calls wait for it."""
        return self._joined

    @property
    def seat(self) -> object:
        """What stands for it in the queue."""
        return self._seat

    def close(self) -> None:
        """Calls wait for it no longer. Nothing happens the second time."""
        if self._joined:
            self._queue.leave(self._seat)
            self._joined = False

    def __del__(self) -> None:
        if self._joined:
            self._queue.gone.append(self._seat)  # here: an exception could arrive where another function begins
            self._queue.wake_unlocked()


class LeafQueue:
    """See above.

    Args:
        max_rows: leaves of a call.
        max_wait_seconds: that a leaf waits for others.
        parallel_calls: under way at once.
        check_process: raises in a forked child, where no thread releases the lock.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_wait_seconds: float,
        parallel_calls: int,
        check_process: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_rows = max_rows
        self._max_wait = max_wait_seconds
        self._parallel = parallel_calls
        self._check_process = check_process
        self._lock = threading.Lock()
        self._rows: deque[Row] = deque()  # in order of arrival, those of a ticket together
        self._numbers = count()
        self._groups: set[Group] = set()  # of the calls under way, and of walks that are being led on
        self._ready: dict[Walker, None] = {}  # to be led on, in this order; a set otherwise
        self._workers: set[object] = set()  # their seats; of walks, these themselves
        # Runs of workers by their seat: their walks, until all have ended, count in the workers' place.
        self._away: dict[object, Run] = {}
        self._waiting: set[Ticket] = set()  # of workers, that are not over
        self._queued: set[Ticket] = set()  # of them, those that have rows here
        self.gone: deque[object] = deque()  # seats of workers that were dropped; appended to without the lock
        self._counters = EvaluatorCounters()
        self.closed = False
        self.listener: Callable[[], object] | None = None  # who makes the calls, instead of callers

    # Callers -------------------------------------------------------------------------------------------------------

    def add(self, ticket: Ticket) -> None:
        """Have the leaves of a ticket wait.

        Raises:
            ClosedError: the evaluator is closed.
        """
        with gate.lock, self._lock:
            self._check_open()
            ticket.number = next(self._numbers)
            if ticket.worker:
                self._waiting.add(ticket)
                self._queued.add(ticket)
            self._rows += ticket.rows
        if self.listener is not None:
            self.listener()

    def start(self, run: Run) -> None:
        """Have the walks of a run be led on. Each counts as a worker until it is over.

        Raises:
            ClosedError: the evaluator is closed.
        """
        self._check_process()
        with gate.lock, self._lock:
            self._check_open()
            self._away[run.seat] = run
            self._workers.update(run.walkers)
            self._ready.update(dict.fromkeys(run.walkers))
        if self.listener is not None:
            self.listener()

    def take(self, group: Group) -> bool:
        """Take what is to be done now: walks that can be led on, or the rows of a call, if it is time for one.

        What has been taken is the group's, come what may.
        """
        over: list[Ticket] = []
        with gate.lock, self._lock:
            if self.closed:  # by a finaliser, which takes no lock
                self._fail_all(over)
            self._note_gone()
            due = self._has_walks()
            if due:
                self._take_walks(group)
            else:
                due = self._is_due()
                if due:
                    self._take(group)
            looks = self._who_looks() if due else None
        _wake_all(over)
        if looks is not None:
            self._wake(looks)
        return due

    def finish(self, group: Group, times: CallTimes, rows: int = 0) -> None:
        """What was taken has been done: settled rows are their callers', walks wait for their leaves.

        What was not done waits again, and walks whose callers have left are closed. Nothing happens the second time. A
        caller that waits for its run still has to look next: no other is told to.

        Args:
            rows: leaves that the model had.
        """
        self._check_process()
        with gate.lock, self._lock:
            if group in self._groups:
                self._counters.add(rows, times)
            self._end_group(group)
            stays = isinstance(group.caller, Run) and group.caller.is_waited_for
            looks = None if stays else self._who_looks()
        _wake_all({row.ticket for row in group.rows if row.ticket.is_over and row.ticket.walker is None})
        self._wake(looks)
        for walker in group.walkers:
            if walker.leader is group:  # it has to end
                walker.end_unheard()
        _wake_all({walker.run for walker in group.walkers if walker.is_over and walker.run.is_over} - {group.caller})
        group.rows.clear()  # last: what is cut off before this is done again
        group.walkers.clear()

    def part(self, group: Group | None, ticket: Ticket | None = None) -> None:
        """A caller gives up what its group has taken, which waits again, and leaves its ticket.

        Nothing happens the second time.
        """
        if gate.is_inside:  # a task's frames, say, that the garbage collector ends
            self._part_later(group, ticket)
            return
        if group is not None and (group.rows or group.walkers):
            self.finish(group, CallTimes())
        if ticket is not None:
            if not ticket.is_over:
                self._withdraw(ticket)
            ticket.rows.clear()  # a circle otherwise, which would keep what was handed in until it is collected

    def leave_run(self, run: Run) -> None:
        """The caller of a run leaves it: its walks are closed, those that are being led on just now by their leaders.

        Raises what a walk raises when it is closed, after all have been. The second time only what was left is done.
        """
        self._check_process()
        if gate.is_inside:
            self._part_later(run)
            return
        with gate.lock, self._lock:
            idle = self._abandon(run)
            self._bring_back(run)
            looks = self._who_looks()
        self._wake(looks)
        _close_all(idle)
        run.clear()

    def _part_later(self, *gone: Group | Ticket | Run | None) -> None:
        self.gone += [each for each in gone if each is not None]
        for each in gone:
            if isinstance(each, Group):  # what it had waits again as soon as any caller looks
                _wake_all({row.ticket.caller for row in each.rows})
                _wake_all({walker.run for walker in each.walkers})
        self.wake_unlocked()

    def seconds_until_due(self) -> float:
        """How long to wait for a wake-up before looking again: until the first leaf has waited for others long enough.

        Never long: see `LOOK_SECONDS`.
        """
        with gate.lock, self._lock:
            if len(self._groups) >= self._parallel or not self._rows:
                return LOOK_SECONDS
            left = self._rows[0].ticket.since + self._max_wait - time.monotonic()
            return min(max(0.0, left), LOOK_SECONDS)

    @property
    def waiting_rows(self) -> int:
        """Leaves that no call has taken. Takes no lock."""
        return len(self._rows)

    def close(self) -> None:
        """Let no more in; who waits hears `ClosedError`, but for leaves of a call under way.

        Inside a critical section of the calling thread (in a finaliser, say) those who wait are left to find out.
        """
        self._check_process()
        if gate.is_inside:
            self.close_unlocked()
            return
        over: list[Ticket] = []
        with gate.lock, self._lock:
            self.closed = True
            self._fail_all(over)
        _wake_all(over)
        self.wake_unlocked()

    def close_unlocked(self) -> None:
        """As `close`, for finalisers: takes no lock."""
        self.closed = True
        self.wake_unlocked()

    @property
    def counters(self) -> EvaluatorCounters:
        """What it counts, under its lock."""
        return self._counters

    def stats(self) -> EvaluatorStats:
        """What was counted so far. Takes no lock inside a critical section, and may be a moment old there."""
        self._check_process()
        if gate.is_inside:
            return self._counters.snapshot()
        with gate.lock, self._lock:
            return self._counters.snapshot()

    # Workers -------------------------------------------------------------------------------------------------------

    def join(self, seat: object) -> None:
        """One worker more.

        Raises:
            ClosedError: the evaluator is closed.
        """
        self._check_process()
        gate.check("this evaluator")
        with gate.lock, self._lock:
            self._check_open()
            self._workers.add(seat)

    def leave(self, seat: object) -> None:
        """One worker less: the others may be all that there are. Nothing happens the second time."""
        self._check_process()
        if gate.is_inside:
            self.gone.append(seat)
            self.wake_unlocked()
            return
        with gate.lock, self._lock:
            self._workers.discard(seat)
            looks = self._who_looks()
        self._wake(looks)

    # Under the lock ------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this evaluator is closed; make another")

    def _note_gone(self) -> None:
        while self.gone:
            gone = self.gone[0]
            if isinstance(gone, Group):
                self._end_group(gone)
                for walker in gone.walkers:
                    if walker.leader is gone:  # it has to end
                        self._ready[walker] = None
            elif isinstance(gone, Run):
                self._bring_back(gone)
                for walker in self._abandon(gone):
                    self._ready[walker] = None  # the caller that takes it closes it
            elif isinstance(gone, Ticket):
                self._take_out(gone)
            else:
                self._workers.discard(gone)
            self.gone.popleft()

    def _end_group(self, group: Group) -> None:
        self._groups.discard(group)
        self._finish(group.rows)
        self._place(group)

    def _has_walks(self) -> bool:
        return bool(self._ready) and len(self._groups) < self._parallel

    def _take_walks(self, group: Group) -> None:
        # As many as take part in each of the calls that may be under way at once.
        share = max(1, -(-self._count_workers() // self._parallel))
        group.walkers += islice(self._ready, share)  # first, as in `_take`
        self._groups.add(group)
        for walker in group.walkers:
            walker.leader = group
            self._ready.pop(walker, None)

    def _place(self, group: Group) -> None:
        """Walks that were led on, or should have been, wait: for their leaf, or to be led on.

        Those that have to end stay with their leader, which closes them without the lock.
        """
        for walker in group.walkers:
            if walker.leader is not group:
                continue  # that was done before
            if walker.has_to_end:
                self._drop(walker)
                continue
            if walker.is_over:
                self._workers.discard(walker)
                if walker.run.is_over:  # here: its caller may look much later, and others call meanwhile
                    self._bring_back(walker.run)
                if walker.run.is_abandoned:
                    walker.error = None  # which no caller raises: a circle otherwise
            elif walker.ticket is None or walker.ticket.is_over:
                self._ready[walker] = None
            else:  # where the evaluator is closed, too: the caller that looks next fails it
                self._place_ticket(walker.ticket)
            walker.leader = None

    def _place_ticket(self, ticket: Ticket) -> None:
        (row,) = ticket.rows
        if ticket.number >= 0 and (row in self._rows or any(row in group.rows for group in self._groups)):
            return
        ticket.number = next(self._numbers)
        self._waiting.add(ticket)
        self._queued.add(ticket)
        self._rows.append(row)

    def _abandon(self, run: Run) -> list[Walker]:
        """Take out the walks of a run that are not being led on: they are the caller's, to be closed."""
        run.is_abandoned = True
        idle = [walker for walker in run.walkers if not walker.is_over and walker.leader is None]
        for walker in idle:
            self._drop(walker)
        return idle

    def _bring_back(self, run: Run) -> None:
        """The worker that a run is of counts again, unless it has begun another meanwhile."""
        if self._away.get(run.seat) is run:
            del self._away[run.seat]

    def _count_workers(self) -> int:
        return len(self._workers) - len(self._workers & self._away.keys())

    def _drop(self, walker: Walker) -> None:
        """It counts no more, and waits for nothing: it is to be closed."""
        self._workers.discard(walker)
        if walker.ticket is not None:
            self._take_out(walker.ticket)
        self._ready.pop(walker, None)

    def _is_due(self) -> bool:
        if not self._rows or len(self._groups) >= self._parallel:
            return False
        if len(self._rows) >= self._max_rows:
            return True
        # As many as take part in each of the calls that may be under way at once; or nobody is left who could come.
        workers = self._count_workers()
        if len(self._queued) * self._parallel >= workers or len(self._waiting) >= workers:
            return True
        return time.monotonic() >= self._rows[0].ticket.since + self._max_wait

    def _take(self, group: Group) -> None:
        number, now = min(len(self._rows), self._max_rows), time.monotonic()
        group.rows += islice(self._rows, number)  # first: what is cut off here is in both, and is put back once
        self._groups.add(group)
        for _ in range(number):
            self._rows.popleft()
        still = self._rows[0].ticket if self._rows else None
        self._queued.difference_update([row.ticket for row in group.rows if row.ticket is not still])
        self._counters.wait_seconds += sum([now - row.ticket.since for row in group.rows])

    def _finish(self, rows: list[Row]) -> None:
        back = [row for row in rows if not row.settled and not row.ticket.is_over]
        if back:  # but for those that another took before this one, cut off as it took them, gave them up
            taken = {row for group in self._groups for row in group.rows}
            back = [row for row in back if row not in taken]
        if self.closed:
            _fail_closed(back)
        elif back:
            self._put_back(back)
        self._end_settled(rows)

    def _put_back(self, back: list[Row]) -> None:
        waiting = {*back, *self._rows}
        tickets = sorted({row.ticket for row in waiting}, key=lambda ticket: ticket.number)
        self._queued.update([ticket for ticket in tickets if ticket.worker])
        self._rows = deque([row for ticket in tickets for row in ticket.rows if row in waiting])

    def _fail_all(self, over: list[Ticket]) -> None:
        rows = list(self._rows)
        _fail_closed(rows)
        over += self._end_settled(rows)
        self._queued.clear()
        self._rows.clear()  # last: what is cut off before this is done again

    def _end_settled(self, rows: Sequence[Row]) -> list[Ticket]:
        tickets = dict.fromkeys([row.ticket for row in rows])  # in order of arrival
        over = [ticket for ticket in tickets if not ticket.is_over and all(row.settled for row in ticket.rows)]
        for ticket in over:
            self._counters.failed_rows += sum([row.error is not None for row in ticket.rows])
            self._end(ticket)
        for ticket in tickets:  # those too that were over: what was cut off after that is done once more
            if ticket.is_over:
                self._resume(ticket)
        return over

    def _resume(self, ticket: Ticket) -> None:
        """The walk that waits for a ticket, if one does, can be led on."""
        walker = ticket.walker
        if walker is None or walker.ticket is not ticket or walker.leader is not None or walker.run.is_abandoned:
            return
        self._ready[walker] = None

    def _end(self, ticket: Ticket) -> None:
        self._waiting.discard(ticket)
        ticket.is_over = True  # last: its caller looks without the lock

    def _take_out(self, ticket: Ticket) -> None:
        self._rows = deque([row for row in self._rows if row.ticket is not ticket])
        self._queued.discard(ticket)
        self._end(ticket)

    def _who_looks(self) -> Ticket | Run | None:
        """Who is to look whether there is something to do: of callers that do nothing now, who has waited longest."""
        if len(self._groups) >= self._parallel or not (self._rows or self._ready):
            return None  # whoever ends one of the calls has someone look
        busy = {group.caller for group in self._groups}
        runs = (walker.run for walker in self._ready if not walker.run.is_abandoned)
        callers = chain(runs, (row.ticket.caller for row in self._rows))
        return next((caller for caller in callers if caller not in busy), None)

    # Outside -------------------------------------------------------------------------------------------------------

    def _withdraw(self, ticket: Ticket) -> None:
        """Take out what no call has taken yet: its caller waits no longer."""
        with gate.lock, self._lock:
            if ticket.is_over:
                return
            self._take_out(ticket)
            looks = self._who_looks()
        self._wake(looks)

    def _wake(self, looks: Ticket | Run | None) -> None:
        if looks is None:
            return
        if self.listener is not None:
            self.listener()
        if self.listener is None or self.closed:  # then the evaluator's threads end, and callers lead their walks on
            looks.wake()

    def wake_unlocked(self) -> None:
        """Have all who wait look, and the evaluator's threads: for finalisers, takes no lock."""
        _wake_all({row.ticket.caller for row in _all_of(self._rows)})
        _wake_all({walker.run for walker in _all_of(self._ready)})
        if self.listener is not None:
            self.listener()


def _close_all(walkers: Sequence[Walker]) -> None:
    """Close each, and raise what the first of them raised then."""
    for number, walker in enumerate(walkers):
        try:
            walker.end()
        except Exception:
            for other in walkers[number + 1 :]:
                other.end_unheard()
            raise


def _fail_closed(rows: Sequence[Row]) -> None:
    for row in rows:
        row.fail(ClosedError("this evaluator was closed while leaves waited for it"))


def _all_of(changing: Iterable[T]) -> list[T]:
    """What is in a collection of the queue, without its lock."""
    for _ in range(LOOKS_WITHOUT_LOCK):
        try:
            return [*changing]
        except RuntimeError:  # without the GIL, a thread that has the lock changes it meanwhile
            continue
    return []  # those in it look by themselves, a little later


def _wake_all(callers: Iterable[Ticket | Run]) -> None:
    for caller in callers:
        caller.wake()
