"""`LeafQueue`: leaves that wait for a call of the model, whose they are, and when it is time for the next call.

A call begins when as many leaves wait as fit one, or all workers wait, or the first leaf has waited long enough; and
not more calls at once than the evaluator allows. Who finds that it is time takes the leaves and makes the call: a
caller, in its own thread or task, or the evaluator's thread. Nothing here waits.

Who takes part is kept in sets, not in numbers: what an asynchronous exception has cut off is done once more, and counts
nothing twice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count, islice
from typing import Any

from ..errors import ClosedError
from ..flights.error_copies import copy_of
from ..locks.gate import gate
from ..pool.handle import Handle
from .leaves import Leaf
from .stats import CallTimes, EvaluatorCounters, EvaluatorStats

__all__ = ["Group", "LeafQueue", "Row", "Ticket", "Worker"]

# So often whoever waits looks by itself: it may have been left to one who looks no more, such as a task whose loop has
# stopped, and whoever should have woken it may have been cut off just before.
LOOK_SECONDS = 1.0


class Row:
    """One leaf on its way. Whoever took it settles it; `output`, `error` and `settled` are its then."""

    __slots__ = ("error", "leaf", "output", "settled", "ticket")

    def __init__(self, leaf: Leaf[Any], ticket: Ticket) -> None:
        self.leaf = leaf
        self.ticket = ticket
        self.output: Any = None
        self.error: Exception | None = None
        self.settled = False

    def succeed(self, output: Any) -> None:
        """It has been evaluated."""
        self.output, self.settled = output, True

    def fail(self, error: Exception) -> None:
        """It cannot be, for a reason of its own."""
        self.error, self.settled = error, True

    def fail_with_others(self, error: Exception) -> None:
        """It cannot be, nor can others: each hears a copy, whose cause says where the error comes from."""
        made = copy_of(error)
        if made is not error:
            made.__cause__ = error
        self.fail(made)


class Ticket:
    """What one caller handed in together, and waits for.

    Attributes:
        wake: has the caller look again; set by the caller before it looks. Called from any thread, and from finalisers.
        worker: whether the caller counts as a worker, which others wait for.
        since: when it was made.
        number: its place in the order of arrival.
        is_over: all rows are settled, or the caller has withdrawn.
    """

    __slots__ = ("is_over", "number", "rows", "since", "wake", "worker")

    def __init__(self, leaves: Sequence[Leaf[Any]], wake: Callable[[], object], *, worker: bool) -> None:
        self.rows = [Row(leaf, self) for leaf in leaves]
        self.wake = wake
        self.worker = worker
        self.since = time.monotonic()
        self.number = -1
        self.is_over = not self.rows

    def outputs(self) -> list[Any]:
        """Those of its leaves; the first error is raised."""
        for row in self.rows:
            if row.error is not None:
                error, row.error = row.error, None  # the frames that it comes through must not keep it
                try:
                    raise error
                finally:
                    del error
        return [row.output for row in self.rows]


class Group:
    """The rows of one call, while there are any.

    Attributes:
        caller: what whoever makes the call waits for itself; None for the evaluator's thread.
    """

    __slots__ = ("_claims", "caller", "rows")

    def __init__(self, caller: Ticket | None = None) -> None:
        self.caller = caller
        self.rows: list[Row] = []
        self._claims: list[str] = []  # in the order of their coming

    def claim(self, who: str) -> bool:
        """Whether it is for `who` to end it: a task, or the worker that it was handed to and that began. No lock."""
        self._claims.append(who)
        return self._claims[0] == who


class Worker(Handle):
    """Someone who hands leaves in again and again: calls wait for all who are registered. Leaving its `with` ends that.

    One thread or task at a time may use it.
    """

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
        self._groups: set[Group] = set()  # of the calls under way
        self._workers: set[object] = set()  # their seats
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

    def take(self, group: Group) -> bool:
        """Take the rows of the next call, if it is time for one. What has been taken is the group's, come what may."""
        over: list[Ticket] = []
        with gate.lock, self._lock:
            if self.closed:  # by a finaliser, which takes no lock
                self._fail_all(over)
            due = self._is_due()
            if due:
                self._take(group)
            looks = self._who_looks() if due else None
        _wake_all(over)
        if looks is not None:
            self._wake(looks)
        return due

    def finish(self, group: Group, times: CallTimes, rows: int) -> None:
        """A call is over: settled rows are their callers', the others wait again. Nothing happens the second time.

        Args:
            rows: leaves that the model had.
        """
        self._check_process()
        with gate.lock, self._lock:
            if group in self._groups:
                self._groups.discard(group)
                self._counters.add(rows, times)
            self._finish(group.rows)
            looks = self._who_looks()
        _wake_all({row.ticket for row in group.rows if row.ticket.is_over})
        self._wake(looks)
        group.rows.clear()  # last: what is cut off before this is done again

    def part(self, group: Group | None, ticket: Ticket | None = None) -> None:
        """Nobody makes the call of a group any more, nor waits for a ticket. Nothing happens the second time."""
        if group is not None and group.rows:
            self.finish(group, CallTimes(), 0)
        if ticket is not None:
            if not ticket.is_over:
                self._withdraw(ticket)
            ticket.rows.clear()  # a circle otherwise, which would keep what was handed in until it is collected

    def seconds_until_due(self) -> float:
        """How long to wait for a wake-up before looking again: until the first leaf has waited for others long enough.

        Never long: see `LOOK_SECONDS`.
        """
        with gate.lock, self._lock:
            if not self._rows or len(self._groups) >= self._parallel:
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
        if self.listener is not None:
            self.listener()

    def close_unlocked(self) -> None:
        """As `close`, for finalisers: takes no lock."""
        self.closed = True
        self.wake_unlocked()

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
            raise ClosedError("this evaluator is closed")

    def _is_due(self) -> bool:
        while self.gone:
            self._workers.discard(self.gone[0])
            self.gone.popleft()
        if not self._rows or len(self._groups) >= self._parallel:
            return False
        if len(self._rows) >= self._max_rows:
            return True
        # As many as take part in each of the calls that may be under way at once; or nobody is left who could come.
        workers = len(self._workers)
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
        over = [
            ticket
            for ticket in {row.ticket for row in rows}
            if not ticket.is_over and all(row.settled for row in ticket.rows)
        ]
        for ticket in over:
            self._counters.failed_rows += sum([row.error is not None for row in ticket.rows])
            self._end(ticket)
        return over

    def _end(self, ticket: Ticket) -> None:
        self._waiting.discard(ticket)
        ticket.is_over = True  # last: its caller looks without the lock

    def _take_out(self, ticket: Ticket) -> None:
        self._rows = deque([row for row in self._rows if row.ticket is not ticket])
        self._queued.discard(ticket)
        self._end(ticket)

    def _who_looks(self) -> Ticket | None:
        """Who is to look whether it is time for a call: whose leaf was the first, of callers that make no call now."""
        if len(self._groups) >= self._parallel:
            return None  # whoever ends one of the calls has someone look
        busy = {group.caller for group in self._groups}
        return next((row.ticket for row in self._rows if row.ticket not in busy), None)

    # Outside -------------------------------------------------------------------------------------------------------

    def _withdraw(self, ticket: Ticket) -> None:
        """Take out what no call has taken yet: its caller waits no longer."""
        with gate.lock, self._lock:
            if ticket.is_over:
                return
            self._take_out(ticket)
            looks = self._who_looks()
        self._wake(looks)

    def _wake(self, looks: Ticket | None) -> None:
        if looks is None:
            return
        if self.listener is not None:
            self.listener()
        else:
            looks.wake()

    def wake_unlocked(self) -> None:
        """Have all who wait look, and the evaluator's threads: for finalisers, takes no lock."""
        _wake_all({row.ticket for row in self._rows.copy()})
        if self.listener is not None:
            self.listener()


def _fail_closed(rows: Sequence[Row]) -> None:
    for row in rows:
        row.fail(ClosedError("this evaluator was closed while leaves waited for it"))


def _wake_all(tickets: Iterable[Ticket]) -> None:
    for ticket in tickets:
        ticket.wake()
