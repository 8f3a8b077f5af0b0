"""What callers of an evaluator wait for: the leaves that they handed in, or searches that hand in leaf after leaf.

`Row` is one leaf, `Ticket` what is handed in together. `Walker` is a walk on its way, a search written as a generator,
which whoever makes the calls leads from leaf to leaf; `Run` is all the walks that one caller waits for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any

from ..errors import KVCacheError, WaitTimeoutError
from ..flights.error_copies import copy_of
from .leaves import Leaf

__all__ = ["MOST_CALLS", "Row", "Run", "Ticket", "Walker"]

logger = logging.getLogger("concurrent_kv")

# So often a leaf is evaluated again because the weights changed meanwhile: its caller must not do so without end.
MOST_CALLS = 16


class Row:
    """One leaf on its way. Whoever took it settles it; `output`, `error` and `settled` are its then.

    Attributes:
        calls: of the model that it was in, and that ended by other weights than they began.
    """

    __slots__ = ("calls", "error", "leaf", "output", "settled", "ticket")

    def __init__(self, leaf: Leaf[Any], ticket: Ticket) -> None:
        self.leaf = leaf
        self.ticket = ticket
        self.calls = 0
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
        """It cannot be, nor can others: each hears a copy that says where the error comes from.

        An error of the library's own by the frames that it came through, any other as the copy's cause.
        """
        made = copy_of(error)
        if made is not error:
            if isinstance(error, KVCacheError):
                made.__traceback__ = error.__traceback__
                made.__cause__ = error.__cause__
            else:
                made.__cause__ = error
        self.fail(made)

    def wait_again(self) -> None:
        """The weights changed while it was evaluated: it goes into another call, unless it has been in many already."""
        self.calls += 1
        if self.calls == MOST_CALLS:
            self.fail(
                WaitTimeoutError(
                    f"the weights version was bumped during each of {MOST_CALLS} calls of the model for this leaf; "
                    "bump it less often than a call takes"
                )
            )


class Ticket:
    """What one caller handed in together, and waits for.

    Attributes:
        wake: has the caller look again; set by the caller before it looks. Called from any thread, and from finalisers.
        worker: whether the caller counts as a worker, which others wait for.
        since: when it was made.
        number: its place in the order of arrival.
        is_over: all rows are settled, or the caller has withdrawn.
        walker: the walk that waits for it, if one does.
    """

    __slots__ = ("is_over", "number", "rows", "since", "wake", "walker", "worker")

    def __init__(
        self, leaves: Sequence[Leaf[Any]], wake: Callable[[], object], *, worker: bool, walker: Walker | None = None
    ) -> None:
        self.rows = [Row(leaf, self) for leaf in leaves]
        self.wake = wake
        self.worker = worker
        self.walker = walker
        self.since = time.monotonic()
        self.number = -1
        self.is_over = not self.rows

    @property
    def caller(self) -> Ticket | Run:
        """What the caller waits for that is to look: this, or all that it runs together."""
        return self if self.walker is None else self.walker.run

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


class Walker:
    """A walk on its way: a search written as a generator that yields leaves and is sent their outputs.

    It waits for its leaf (`ticket`), or for a caller to lead it on, or is being led on by one, which alone touches
    the generator then.

    Attributes:
        run: with which it began.
        ticket: what it waits for; none before its first leaf, and while it is led on.
        waits_since: when it began to wait; infinity while it is led on, and when it is over.
        leader: the group that it is led on in; written under the queue's lock. None when it is not.
        is_over: it has ended; `result` or `error` say how.
    """

    __slots__ = ("_is_moving", "_steps", "error", "is_over", "leader", "result", "run", "ticket", "waits_since")

    def __init__(self, steps: Generator[Leaf[Any], Any, Any], run: Run) -> None:
        self._steps = steps
        self._is_moving = False
        self.run = run
        self.ticket: Ticket | None = None
        self.waits_since = time.monotonic()
        self.leader: object = None
        self.is_over = False
        self.result: Any = None
        self.error: Exception | None = None

    @property
    def has_to_end(self) -> bool:
        """Whether it must not be led on: its caller has left, or an asynchronous exception came while it was led on,
        and where it stands then is not known. For its leader, and where it has none."""
        return not self.is_over and (self.run.is_abandoned or self._is_moving)

    def lead_on(self, check: Callable[[Leaf[Any]], object]) -> None:
        """Let it make its next leaf, which then is its `ticket`; or end.

        Args:
            check: raises what is wrong with a leaf, which the walk hears.
        """
        if self.has_to_end:
            self.end_unheard()
            return
        self._is_moving = True
        self.waits_since = math.inf
        before, self.ticket = self.ticket, None
        try:
            leaf = self._next_leaf(before, check)
            ticket = Ticket([leaf], self.run.wake, worker=True, walker=self)
            self.waits_since = ticket.since
            self.ticket = ticket
        except StopIteration as stop:
            self.result, self.is_over = stop.value, True
        except Exception as error:
            with suppress(Exception):  # what it raises after its error is heard by no caller, least of all the leader
                self._steps.close()  # it has ended where it raised this, but for memory that was short afterwards
            self.error, self.is_over = error, True
        self._is_moving = False

    def _next_leaf(self, before: Ticket | None, check: Callable[[Leaf[Any]], object]) -> Leaf[Any]:
        if before is None:
            leaf = next(self._steps)
        else:
            (row,) = before.rows
            before.rows.clear()  # a circle otherwise
            error, row.error = row.error, None
            try:
                leaf = self._steps.send(row.output) if error is None else self._steps.throw(error)
            finally:
                del error  # the frames that it comes through must not keep it
        while True:
            try:
                check(leaf)
            except Exception as wrong:
                leaf = self._steps.throw(wrong)
            else:
                return leaf

    def end(self) -> None:
        """Close the generator, which must not be led on just now. Raises what it raises; the second time, nothing."""
        if self._is_moving:
            self.error = RuntimeError("the thread that led this search on was interrupted there")
        ticket, self.ticket = self.ticket, None
        if ticket is not None:
            ticket.rows.clear()  # a circle otherwise
        self._steps.close()
        self.is_over = True

    def end_unheard(self) -> None:
        """As `end`, where no caller of its own is there who could hear what it raises."""
        try:
            self.end()
        except Exception:
            logger.exception("a search raised when it was closed, and its caller has left")
            self.is_over = True


class Run:
    """The walks that one caller waits for.

    Attributes:
        wake: has the caller look again, as that of a ticket.
        seat: of the worker that the caller is; of its own where it is none.
        walkers: in the caller's order; none once the caller has left and they have ended.
        is_abandoned: the caller has left; written under the queue's lock.
    """

    __slots__ = ("is_abandoned", "seat", "wake", "walkers")

    def __init__(
        self,
        searches: Sequence[Generator[Leaf[Any], Any, Any]],
        wake: Callable[[], object],
        *,
        seat: object | None = None,
    ) -> None:
        self.wake = wake
        self.seat = self if seat is None else seat
        self.walkers = [Walker(steps, self) for steps in searches]
        self.is_abandoned = False

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return all(walker.is_over for walker in self.walkers)

    @property
    def is_waited_for(self) -> bool:
        """Whether the caller is there still, and looks again before it leaves."""
        return not (self.is_abandoned or self.is_over)

    @property
    def waits_since(self) -> float:
        """Since when the walk has waited that has waited longest; infinity where none waits."""
        return min([walker.waits_since for walker in self.walkers], default=math.inf)

    def results(self) -> list[Any]:
        """What the walks returned; the first error is raised."""
        for walker in self.walkers:
            if walker.error is not None:
                raise walker.error
        return [walker.result for walker in self.walkers]

    def clear(self) -> None:
        """Let go of the walks, and of their errors: circles otherwise."""
        for walker in self.walkers:
            walker.error = None
        self.walkers.clear()
