"""What callers of an evaluator wait for: the leaves that they handed in, or searches that hand in leaf after leaf.

`Row` is one leaf, `Ticket` what is handed in together. `Walker` is a walk on its way, a search written as a generator,
which whoever makes the calls leads from leaf to leaf; `Run` is all the walks that one caller waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ..flights.error_copies import copy_of
from .leaves import Leaf

__all__ = ["Row", "Run", "Ticket", "Walker"]


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

    It waits for its leaf (`ticket`), or for a caller that leads it on, or is being led on by one, which alone touches
    the generator then.

    Attributes:
        run: with which it began.
        ticket: what it waits for; none before its first leaf.
        leader: by whom it is led on just now; written under the queue's lock.
        is_abandoned: nobody waits for it any more; whoever leads it on next ends it.
        is_over: it has ended; `result` or `error` say how.
    """

    __slots__ = ("_is_moving", "_steps", "error", "is_abandoned", "is_over", "leader", "result", "run", "ticket")

    def __init__(self, steps: Generator[Leaf[Any], Any, Any], run: Run) -> None:
        self._steps = steps
        self._is_moving = False
        self.run = run
        self.ticket: Ticket | None = None
        self.leader: object = None
        self.is_abandoned = False
        self.is_over = False
        self.result: Any = None
        self.error: Exception | None = None

    def lead_on(self, check: Callable[[Leaf[Any]], object]) -> None:
        """Let it make its next leaf, which then is its `ticket`; or end.

        Args:
            check: raises what is wrong with a leaf, which the walk hears.
        """
        self._is_moving = True
        before, self.ticket = self.ticket, None
        try:
            if self.is_abandoned:
                self._steps.close()
                self.is_over = True
            else:
                leaf = self._next_leaf(before, check)
                self.ticket = Ticket([leaf], self.run.wake, worker=True, walker=self)
        except StopIteration as stop:
            self.result, self.is_over = stop.value, True
        except Exception as error:
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
            leaf = self._steps.send(row.output) if error is None else self._steps.throw(error)
        while True:
            try:
                check(leaf)
            except Exception as wrong:
                leaf = self._steps.throw(wrong)
            else:
                return leaf

    def end_if_cut_off(self) -> None:
        """End it if an asynchronous exception came while it was led on: where it stands, nobody knows."""
        if self._is_moving:
            self._is_moving = False
            self.error, self.is_over = RuntimeError("the thread that led this search on was interrupted there"), True

    def end(self) -> None:
        """Nobody waits for it, and nobody leads it on: let it clean up. Raises what it raises there."""
        self.is_over = True
        self._steps.close()


class Run:
    """The walks that one caller waits for.

    Attributes:
        wake: has the caller look again, as that of a ticket.
        seat: of the worker that the caller is; of its own where it is none.
        walkers: in the caller's order.
    """

    __slots__ = ("seat", "wake", "walkers")

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

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return all(walker.is_over for walker in self.walkers)

    @property
    def waits_since(self) -> float:
        """Since when the leaf has waited that has waited longest; since now, where none waits."""
        tickets = [walker.ticket for walker in self.walkers]
        return min([ticket.since for ticket in tickets if ticket is not None], default=time.monotonic())

    def results(self) -> list[Any]:
        """What the walks returned; the first error is raised."""
        for walker in self.walkers:
            if walker.error is not None:
                error, walker.error = walker.error, None  # as of a ticket
                try:
                    raise error
                finally:
                    del error
        return [walker.result for walker in self.walkers]
