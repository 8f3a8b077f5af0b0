"""`LeafQueue`: leaves that wait for a call of the model, whose they are, and when it is time for the next call.

A call begins when as many leaves wait as fit one, or all workers wait, or the first leaf has waited long enough; and
not more calls at once than the evaluator allows. Who finds that it is time takes the leaves and makes the call: a
caller, in its own thread or task, or the evaluator's thread. Nothing here waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..errors import ClosedError
from ..flights.error_copies import copy_of
from ..locks.gate import gate
from ..pool.handle import Handle
from .leaves import Leaf
from .stats import CallTimes, EvaluatorCounters, EvaluatorStats

__all__ = ["Group", "LeafQueue", "Row", "Ticket", "Worker"]


class Row:
    """One leaf on its way. Whoever took it settles it; `output`, `error` and `settled` are its then."""

    __slots__ = ("error", "leaf", "output", "settled", "since", "ticket")

    def __init__(self, leaf: Leaf[Any], ticket: Ticket, since: float) -> None:
        self.leaf = leaf
        self.ticket = ticket
        self.since = since
        self.output: Any = None
        self.error: Exception | None = None
        self.settled = False

    def succeed(self, output: Any) -> None:
        """It has been evaluated."""
        self.output, self.settled = output, True

    def fail(self, error: Exception) -> None:
        """It cannot be; each leaf has an error of its own."""
        self.error, self.settled = copy_of(error), True


class Ticket:
    """What one caller handed in together, and waits for.

    Attributes:
        wake: has the caller look again; set by the caller before it looks. Called from any thread, and from finalisers.
        worker: whether the caller counts as a worker, which others wait for.
        left: rows that are not settled. queued: rows that no call has taken.
        is_over: all rows are settled, or the caller has withdrawn.
    """

    __slots__ = ("is_over", "left", "queued", "rows", "wake", "worker")

    def __init__(self, leaves: Sequence[Leaf[Any]], wake: Callable[[], object], *, worker: bool) -> None:
        now = time.monotonic()
        self.rows = [Row(leaf, self, now) for leaf in leaves]
        self.wake = wake
        self.worker = worker
        self.left = self.queued = len(self.rows)
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

    def outcomes(self) -> list[Any]:
        """The output of each leaf, or its error, not raised."""
        return [row.output if row.error is None else row.error for row in self.rows]


class Group:
    """The rows of one call."""

    __slots__ = ("counted", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.counted = False  # among the calls under way


class Worker(Handle):
    """Someone who hands leaves in again and again: calls wait for all who are registered. Leaving its `with` ends that.

    One thread or task at a time may use it.
    """

    instead_of_copy = "register another with evaluator.worker()"

    _joined = False

    def __init__(self, queue: LeafQueue) -> None:
        self._queue = queue
        queue.join()
        self._joined = True

    @property
    def registered(self) -> bool:
        """Whether calls wait for it."""
        return self._joined

    def close(self) -> None:
        """Calls wait for it no longer. Nothing happens the second time."""
        if self._joined:
            self._joined = False
            self._queue.leave()

    def __del__(self) -> None:
        if self._joined:
            self._joined = False
            self._queue.leave_unlocked()


class LeafQueue:
    """See above.

    Args:
        max_rows: leaves of a call.
        max_wait_seconds: that a leaf waits for others.
        parallel_calls: under way at once.
    """

    def __init__(self, *, max_rows: int, max_wait_seconds: float, parallel_calls: int) -> None:
        self._max_rows = max_rows
        self._max_wait = max_wait_seconds
        self._parallel = parallel_calls
        self._lock = threading.Lock()
        self._rows: deque[Row] = deque()
        self._running = 0
        self._workers = 0
        self._waiting_workers = 0  # whose tickets are not over
        self._queued_workers = 0  # of them, those that have rows here
        self._gone: deque[None] = deque()  # one for each worker that was dropped; appended to without the lock
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
            if self.closed:
                raise ClosedError("this evaluator is closed")
            self._rows += ticket.rows
            if ticket.worker:
                self._waiting_workers += 1
                self._queued_workers += 1
        if self.listener is not None:
            self.listener()

    def withdraw(self, ticket: Ticket) -> None:
        """Take out what no call has taken yet: its caller waits no longer."""
        with gate.lock, self._lock:
            if ticket.is_over:
                return
            self._take_out(ticket)
            first = self._first()
        self._wake(first)

    def take(self, group: Group) -> bool:
        """Take the rows of the next call, if it is time for one. What has been taken is the group's, come what may."""
        with gate.lock, self._lock:
            if not self._is_due():
                return False
            self._running += 1
            group.counted = True
            self._take(group.rows)
            return True

    def finish(self, group: Group, times: CallTimes, rows: int) -> None:
        """A call is over: settled rows are their callers', the others wait again.

        Args:
            rows: leaves that the model had.
        """
        over: list[Ticket] = []
        with gate.lock, self._lock:
            if group.counted:
                self._running -= 1
                group.counted = False
            self._finish(group.rows, over)
            self._counters.add(rows, times)
            first = self._first()
        for ticket in over:
            ticket.wake()
        self._wake(first)

    def seconds_until_due(self) -> float | None:
        """How long the first leaf may still wait for others; None where nothing but a wake-up says when to look."""
        with gate.lock, self._lock:
            if not self._rows or self._running >= self._parallel:
                return None
            return max(0.0, self._rows[0].since + self._max_wait - time.monotonic())

    @property
    def waiting_rows(self) -> int:
        """Leaves that no call has taken. Takes no lock."""
        return len(self._rows)

    def close(self) -> None:
        """Let no more in; who waits hears `ClosedError`, but for leaves of a call under way."""
        over: list[Ticket] = []
        with gate.lock, self._lock:
            self.closed = True
            rows, self._rows = list(self._rows), deque()
            self._fail(rows, over)
        for ticket in over:
            ticket.wake()
        if self.listener is not None:
            self.listener()

    def stats(self) -> EvaluatorStats:
        """What was counted so far."""
        with gate.lock, self._lock:
            return self._counters.snapshot()

    # Workers -------------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """One worker more."""
        with gate.lock, self._lock:
            self._workers += 1

    def leave(self) -> None:
        """One worker less: the others may be all that there are."""
        with gate.lock, self._lock:
            self._workers -= 1
            first = self._first()
        self._wake(first)

    def leave_unlocked(self) -> None:
        """As `leave`, for finalisers: takes no lock."""
        self._gone.append(None)
        with suppress(IndexError):  # nobody waits
            self._rows[0].ticket.wake()
        if self.listener is not None:
            self.listener()

    # Under the lock ------------------------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        while self._gone:
            self._gone.popleft()
            self._workers -= 1
        if not self._rows or self._running >= self._parallel:
            return False
        if len(self._rows) >= self._max_rows:
            return True
        # As many as take part in each of the calls that may be under way at once; or nobody is left who could come.
        if self._queued_workers * self._parallel >= self._workers or self._waiting_workers >= self._workers:
            return True
        return time.monotonic() - self._rows[0].since >= self._max_wait

    def _take(self, taken: list[Row]) -> None:
        now, waiting = time.monotonic(), self._rows
        for _ in range(min(len(waiting), self._max_rows)):
            row = waiting[0]
            taken.append(row)  # first: what is cut off here is in both, and `_finish` leaves it in one
            waiting.popleft()
            row.ticket.queued -= 1
            if not row.ticket.queued:
                self._no_longer_queued(row.ticket)
            self._counters.wait_seconds += now - row.since

    def _finish(self, rows: list[Row], over: list[Ticket]) -> None:
        back: list[Row] = []
        for row in rows:
            ticket = row.ticket
            if ticket.is_over:  # withdrawn
                continue
            if row.settled:
                ticket.left -= 1
                self._counters.failed_rows += row.error is not None
                if not ticket.left:
                    self._end(ticket)
                    over.append(ticket)
            elif self.closed:
                self._fail([row], over)
            elif row not in self._rows:
                if not ticket.queued and ticket.worker:
                    self._queued_workers += 1
                ticket.queued += 1
                back.append(row)
        self._rows.extendleft(reversed(back))
        rows.clear()

    def _fail(self, rows: list[Row], over: list[Ticket]) -> None:
        for row in rows:
            ticket = row.ticket
            row.fail(ClosedError("this evaluator was closed while leaves waited for it"))
            ticket.left -= 1
            if not ticket.left and not ticket.is_over:
                self._end(ticket)
                over.append(ticket)

    def _take_out(self, ticket: Ticket) -> None:
        self._rows = deque([row for row in self._rows if row.ticket is not ticket])
        if ticket.queued:
            self._no_longer_queued(ticket)
        self._end(ticket)

    def _no_longer_queued(self, ticket: Ticket) -> None:
        ticket.queued = 0
        if ticket.worker:
            self._queued_workers -= 1

    def _end(self, ticket: Ticket) -> None:
        ticket.is_over = True
        if ticket.worker:
            self._waiting_workers -= 1

    def _first(self) -> Ticket | None:
        """Whose the first leaf is: who looks whether it is time."""
        return self._rows[0].ticket if self._rows else None

    def _wake(self, first: Ticket | None) -> None:
        if first is None:
            return
        if self.listener is not None:
            self.listener()
        else:
            first.wake()
