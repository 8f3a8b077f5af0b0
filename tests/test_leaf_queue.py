"""The queue of leaves against a plain model of it: whose turn it is, what is counted, and who is woken, in any order.

Callers are played here: one after the other, each looks, makes a call, gives up, or is cut off at any place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from concurrent_kv import ClosedError
from concurrent_kv.evaluation import queue as module
from concurrent_kv.evaluation.queue import Group, LeafQueue, Worker
from concurrent_kv.evaluation.stats import CallTimes
from concurrent_kv.evaluation.tickets import Row, Ticket
from tests.interrupting import cut_at

FILES = {module.__file__}
MAX_WAIT = 5.0
NEVER = 1e9
RUNS, STEPS = 40, 120


class Clock:
    """A time that goes on when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Caller:
    """Who waits for a ticket, or the evaluator's thread, which has none.

    `told`: it looks before it sleeps again; `until`: when it wakes by itself; `makes`: the call that it makes.
    """

    def __init__(self, ticket: Ticket | None, worker: Worker | None) -> None:
        self.ticket, self.worker = ticket, worker
        self.told, self.until = True, NEVER
        self.makes: Group | None = None


class Played:
    """A queue, the model of it, and all who use it."""

    def __init__(self, max_rows: int, parallel: int, own_thread: bool) -> None:
        self.clock = Clock()
        self.max_rows, self.parallel = max_rows, parallel
        self.queue = LeafQueue(max_rows=max_rows, max_wait_seconds=MAX_WAIT, parallel_calls=parallel)
        self.workers: list[Worker] = []
        self.callers: list[Caller] = []  # whose tickets are not over, or not heard of
        self.threads: list[Caller] = []
        self.orphans: list[Group] = []  # calls whose caller has left
        self.waiting: list[Row] = []
        self.settled: set[Row] = set()
        self.rows = self.calls = 0
        self.closed = False
        if own_thread:
            self.threads = [Caller(None, None) for _ in range(parallel)]
            self.queue.listener = self.tell_threads

    def tell_threads(self) -> None:
        for thread in self.threads:
            thread.told = True

    def end_all(self) -> None:
        """Everybody makes an end: nobody is left, and nothing is counted."""
        if self.closed:
            self.queue.close()
        while self.orphans:
            self.finish(self.orphans.pop(), ["settled"] * 6)
        for _ in range(1000):
            for caller in [*self.callers, *self.threads]:
                self.look_or_end(caller)
            if not self.callers:
                break
            self.clock.now += MAX_WAIT
        assert not self.callers
        for worker in self.workers:
            worker.close()
        assert self.counted() == (0, 0, 0, 0, 0)

    def look_or_end(self, caller: Caller) -> None:
        if caller.makes is not None:
            self.end_call(caller, ["settled"] * 6)
        self.look(caller)

    def counted(self) -> tuple[int, ...]:
        queue: Any = self.queue
        while queue.gone:
            queue._workers.discard(queue.gone.popleft())
        return (
            len(queue._rows),
            len(queue._groups),
            len(queue._workers),
            len(queue._waiting),
            len(queue._queued),
        )

    # What callers do -----------------------------------------------------------------------------------------------

    def looking(self) -> list[Caller]:
        """Those who may make a call, and make none just now."""
        return [caller for caller in (self.threads or self.callers) if caller.makes is None]

    def making(self) -> list[Caller]:
        return [caller for caller in [*self.callers, *self.threads] if caller.makes is not None]

    def groups(self) -> list[Group]:
        return [caller.makes for caller in self.making() if caller.makes is not None] + self.orphans

    def is_due(self) -> bool:
        """By what the model knows: as `LeafQueue` promises it."""
        if not self.waiting or len(self.groups()) >= self.parallel:
            return False
        workers = [caller for caller in self.callers if caller.worker is not None and not caller.ticket.is_over]  # type: ignore[union-attr]
        queued = {row.ticket for row in self.waiting if row.ticket.worker}
        seats = len([worker for worker in self.workers if worker.registered])
        return (
            len(self.waiting) >= self.max_rows
            or len(queued) * self.parallel >= seats
            or len(workers) >= seats
            or self.clock.now >= self.waiting[0].ticket.since + MAX_WAIT
        )

    def leave(self, caller: Caller) -> None:
        self.callers.remove(caller)
        caller.worker = None  # which may be dropped from now on, and at once
        self.waiting = [row for row in self.waiting if row.ticket is not caller.ticket]

    def look(self, caller: Caller) -> None:
        caller.told = False
        ticket = caller.ticket
        if ticket is not None and ticket.is_over:
            rows = list(ticket.rows)
            assert all(row.settled for row in rows)
            error = next((row.error for row in rows if row.error is not None), None)
            if error is None:
                assert ticket.outputs() == [id(row) for row in rows]
            else:
                with pytest.raises(type(error)) as heard:
                    ticket.outputs()
                assert heard.value is error
            self.queue.part(Group(ticket), ticket)
            self.leave(caller)
            return
        if self.threads and ticket is not None:
            caller.until = NEVER
            return
        group, due = Group(ticket), self.is_due()
        assert self.queue.take(group) is due
        if due:
            self.took(caller, group)
        else:
            caller.until = self.clock.now + self.queue.seconds_until_due()

    def took(self, caller: Caller, group: Group) -> None:
        number = min(self.max_rows, len(self.waiting))
        assert group.rows == self.waiting[:number]
        del self.waiting[:number]
        caller.makes = group

    def settle(self, rows: list[Row], endings: list[str]) -> None:
        for row, ending in zip(rows, endings, strict=False):
            assert row not in self.settled, "it was evaluated twice"
            if ending == "left":
                continue
            self.settled.add(row)
            row.succeed(id(row)) if ending == "settled" else row.fail(ValueError("no"))

    def back(self, rows: list[Row]) -> None:
        """What waits again: in the order in which it came."""
        again = [row for row in rows if not row.settled and not row.ticket.is_over and not self.closed]
        self.waiting = sorted([*again, *self.waiting], key=lambda row: (row.ticket.number, row.ticket.rows.index(row)))

    def finish(self, group: Group, endings: list[str], times: int = 1) -> None:
        rows = list(group.rows)
        self.settle(rows, endings)
        self.rows, self.calls = self.rows + len(rows), self.calls + bool(rows)
        self.queue.finish(group, CallTimes(), len(rows))
        self.back(rows)

    def end_call(self, caller: Caller, endings: list[str]) -> None:
        group, caller.makes = caller.makes, None
        assert group is not None
        self.finish(group, endings)
        caller.told = True  # it looks again before it sleeps

    def all_look_by_themselves(self) -> None:
        """After `LOOK_SECONDS`: where those who were to be woken were not, as whoever does it was cut off."""
        for caller in [*self.callers, *self.threads]:
            caller.told = True

    def cut(self, work: Callable[[], object], place: int) -> bool:
        """Run something that an exception cuts off there; whether it came so far."""
        return cut_at(place, work, FILES)

    # What may happen -----------------------------------------------------------------------------------------------

    def a_worker_joins(self) -> None:
        if self.closed:
            with pytest.raises(ClosedError):
                Worker(self.queue)
        else:
            self.workers.append(Worker(self.queue))

    def a_worker_leaves(self, pick: int, how: str) -> None:
        busy = {caller.worker for caller in self.callers}
        idle = [worker for worker in self.workers if worker not in busy]
        if idle:
            worker = idle[pick % len(idle)]
            self.workers.remove(worker)
            if how == "close":
                worker.close()
            busy.clear()
            idle.clear()
            del worker  # the last to name it

    def a_worker_that_waits_is_closed(self, pick: int) -> None:
        if self.workers:
            self.workers[pick % len(self.workers)].close()

    def leaves_come(self, rows: int, pick: int, as_worker: bool, place: int | None) -> None:
        busy = {caller.worker for caller in self.callers}
        idle = [worker for worker in self.workers if worker not in busy and worker.registered]
        worker = idle[pick % len(idle)] if idle and as_worker else None
        caller = Caller(None, worker)
        leaf: Any = SimpleNamespace()
        ticket = Ticket([leaf] * rows, lambda: setattr(caller, "told", True), worker=worker is not None)
        caller.ticket = ticket
        if place is not None and not self.closed and self.cut(lambda: self.queue.add(ticket), place):
            self.queue.part(Group(ticket), ticket)
            caller.worker = None
            return
        try:
            if place is None or self.closed:
                self.queue.add(ticket)
        except ClosedError:
            assert self.closed
            self.queue.part(Group(ticket), ticket)
            caller.worker = None
        else:
            assert not self.closed
            self.callers.append(caller)
            self.waiting += ticket.rows

    def someone_looks(self, pick: int) -> None:
        looking = [caller for caller in [*self.callers, *self.threads] if caller.makes is None]
        if looking:
            self.look(looking[pick % len(looking)])

    def all_who_were_told_look(self) -> None:
        for caller in [caller for caller in self.looking() if caller.told]:
            self.look(caller)

    def someone_is_cut_off_looking(self, pick: int, place: int) -> None:
        looking = [] if self.threads else [each for each in self.looking() if each.ticket and not each.ticket.is_over]
        if not looking:
            return
        caller = looking[pick % len(looking)]
        assert caller.ticket is not None
        group, due = Group(caller.ticket), self.is_due()
        caller.told = False
        if not self.cut(lambda: self.queue.take(group), place):
            if due:
                self.took(caller, group)
            else:
                caller.until = self.clock.now + self.queue.seconds_until_due()
            return
        self.queue.part(group, caller.ticket)
        self.leave(caller)
        if self.closed:
            self.all_look_by_themselves()

    def a_call_ends(self, pick: int, endings: list[str]) -> None:
        if making := self.making():
            self.end_call(making[pick % len(making)], endings)

    def the_end_of_a_call_is_cut_off(self, pick: int, endings: list[str], place: int) -> None:
        making = self.making()
        if not making:
            return
        caller = making[pick % len(making)]
        group, caller.makes = caller.makes, None
        assert group is not None
        rows = list(group.rows)
        self.settle(rows, endings)
        if self.cut(lambda: self.queue.finish(group, CallTimes(), len(rows)), place):
            self.queue.part(group, caller.ticket)
            if caller.ticket is not None:
                self.leave(caller)
        self.rows, self.calls = self.queue.stats().rows, self.queue.stats().calls
        self.back(rows)
        caller.told = True

    def a_caller_leaves_its_call_to_another_thread(self, pick: int) -> None:
        making = [caller for caller in self.making() if caller.ticket is not None]
        if making:
            caller = making[pick % len(making)]
            assert caller.makes is not None
            self.orphans.append(caller.makes)
            self.queue.part(Group(caller.ticket), caller.ticket)
            self.leave(caller)

    def a_call_without_its_caller_ends(self, endings: list[str]) -> None:
        if self.orphans:
            self.finish(self.orphans.pop(), endings)

    def someone_gives_up(self, pick: int, place: int | None) -> None:
        if not self.callers:
            return
        caller = self.callers[pick % len(self.callers)]
        group = caller.makes or Group(caller.ticket)
        rows = list(group.rows)
        was_cut = place is not None and self.cut(lambda: self.queue.part(group, caller.ticket), place)
        if was_cut:
            self.all_look_by_themselves()
        if place is None or was_cut:
            self.queue.part(group, caller.ticket)
        caller.makes = None
        self.leave(caller)
        self.back(rows)

    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds
        for caller in [*self.callers, *self.threads]:
            caller.told |= caller.until <= self.clock.now

    def it_is_closed(self, how: str, place: int | None) -> None:
        self.closed = True
        if how == "drop":
            self.queue.close_unlocked()
            self.waiting = []  # as soon as anybody looks
            return
        if place is None or self.cut(self.queue.close, place):
            self.queue.close()
        if place is not None:
            self.all_look_by_themselves()
        self.waiting = []

    # What always holds ---------------------------------------------------------------------------------------------

    def everything_is_counted_once(self) -> None:
        if self.closed and self.queue.waiting_rows:
            return
        queue: Any = self.queue
        assert list(queue._rows) == self.waiting
        assert queue._groups == set(self.groups())
        queued = {row.ticket for row in self.waiting}
        assert queue._queued == {ticket for ticket in queued if ticket.worker}
        assert queue._waiting == {
            caller.ticket
            for caller in self.callers
            if caller.worker is not None and caller.ticket is not None and not caller.ticket.is_over
        }
        taken = [row for group in self.groups() for row in group.rows]
        assert len(set(taken)) == len(taken)
        assert not set(taken) & set(self.waiting)
        stats = self.queue.stats()
        assert (stats.rows, stats.calls) == (self.rows, self.calls)

    def whoever_can_make_a_call_that_is_due_will_look_in_time(self) -> None:
        if self.closed or len(self.groups()) >= self.parallel:
            return
        queued = {row.ticket for row in self.waiting}
        concerned = [caller for caller in self.looking() if self.threads or caller.ticket in queued]
        if queued and concerned and not any(caller.told for caller in concerned):
            assert not self.is_due(), "nobody was told that a call is due"
            until = min(caller.until for caller in concerned)
            assert until <= self.waiting[0].ticket.since + MAX_WAIT, "nobody looks when it is time"

    def whoever_has_it_all_will_look(self) -> None:
        for caller in self.callers:
            assert caller.ticket is not None
            assert caller.told or caller.makes is not None or not caller.ticket.is_over, "nobody was told of its end"

    def play(self, draw: random.Random) -> None:
        """One thing that may happen, and what holds after it."""
        pick, endings = draw.randrange(1000), draw.choices(["settled", "failed", "left"], [2, 1, 1], k=6)
        place = draw.choice([None, draw.randrange(1, 40)])
        actions: list[tuple[int, Callable[[], None]]] = [
            (2, self.a_worker_joins),
            (1, lambda: self.a_worker_leaves(pick, draw.choice(["close", "drop"]))),
            (1, lambda: self.a_worker_that_waits_is_closed(pick)),
            (6, lambda: self.leaves_come(draw.randrange(1, 6), pick, draw.random() < 0.6, draw.choice([None, place]))),
            (4, lambda: self.someone_looks(pick)),
            (4, self.all_who_were_told_look),
            (1, lambda: self.someone_is_cut_off_looking(pick, place or 1)),
            (4, lambda: self.a_call_ends(pick, endings)),
            (2, lambda: self.the_end_of_a_call_is_cut_off(pick, endings, place or 1)),
            (1, lambda: self.a_caller_leaves_its_call_to_another_thread(pick)),
            (2, lambda: self.a_call_without_its_caller_ends(endings)),
            (2, lambda: self.someone_gives_up(pick, place)),
            (2, lambda: self.time_goes_on(draw.choice([0.1, 1.0, MAX_WAIT]))),
        ]
        draw.choices([action for _, action in actions], [weight for weight, _ in actions])[0]()
        self.everything_is_counted_once()
        self.whoever_can_make_a_call_that_is_due_will_look_in_time()
        self.whoever_has_it_all_will_look()


@pytest.mark.parametrize("own_thread", [False, True])
@pytest.mark.parametrize("parallel", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [1, 3])
def test_in_any_order_each_leaf_is_evaluated_once_and_whoever_should_look_is_told(
    max_rows: int, parallel: int, own_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(RUNS):
        draw = random.Random(seed)
        played = Played(max_rows, parallel, own_thread)
        monkeypatch.setattr(module, "time", played.clock)
        monkeypatch.setattr(module, "LOOK_SECONDS", NEVER)
        for _ in range(draw.randrange(5, STEPS)):
            played.play(draw)
        if draw.random() < 0.5:
            played.it_is_closed(draw.choice(["close", "drop"]), draw.choice([None, draw.randrange(1, 40)]))
        for _ in range(10):
            played.play(draw)
        played.end_all()


def test_a_cut_is_made_in_the_queue() -> None:
    assert cut_at(1, LeafQueue(max_rows=1, max_wait_seconds=0.0, parallel_calls=1).stats, FILES)
    assert sys.getprofile() is None
