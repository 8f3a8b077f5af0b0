"""The queue of leaves against a plain model of it: whose turn it is, what is counted, and who is woken, in any order.

Callers are played here: one after the other, each looks, makes a call, leads walks on, gives up, or is cut off at any
place.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Collection, Generator
from contextlib import suppress
from functools import partial
from inspect import getgeneratorstate
from types import SimpleNamespace
from typing import Any

import pytest

from concurrent_kv import ClosedError
from concurrent_kv.evaluation import queue as module
from concurrent_kv.evaluation import tickets as tickets_module
from concurrent_kv.evaluation.queue import Group, LeafQueue, Worker
from concurrent_kv.evaluation.stats import CallTimes
from concurrent_kv.evaluation.tickets import Row, Run, Ticket, Walker
from concurrent_kv.locks.gate import gate
from tests.interrupting import cut_at

FILES = {module.__file__}
LEADING = {tickets_module.__file__}
MAX_WAIT = 5.0
NEVER = 1e9
RUNS, STEPS = 60, 160


class Clock:
    """A time that goes on when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Search:
    """A walk of so many leaves, which hears the output of its own leaf, or a reason why there is none."""

    def __init__(self, leaves: int, raises: bool) -> None:
        self.leaves, self.raises = leaves, raises
        self.steps = self._steps()

    def _steps(self) -> Generator[Any, Any, Search]:
        try:
            for _ in range(self.leaves):
                leaf = SimpleNamespace()
                try:
                    assert (yield leaf) == id(leaf)
                except (ValueError, ClosedError):
                    continue
        finally:
            if self.raises:
                raise KeyError("at its end, and when it is closed")
        return self

    @property
    def is_closed(self) -> bool:
        return getgeneratorstate(self.steps) == "GEN_CLOSED"


class Caller:
    """Who waits for a ticket or a run, or the evaluator's thread, which has neither.

    `told`: it looks before it sleeps again; `until`: when it wakes by itself; `makes`: what it does for all, a call or
    the walks that it leads on.
    """

    def __init__(self, ticket: Ticket | None, worker: Worker | None) -> None:
        self.ticket, self.worker = ticket, worker
        self.run: Run | None = None
        self.searches: dict[Walker, Search] = {}
        self.told, self.until = True, NEVER
        self.makes: Group | None = None

    @property
    def waits_for(self) -> Ticket | Run | None:
        return self.run if self.ticket is None else self.ticket

    @property
    def is_over(self) -> bool:
        return self.waits_for is not None and self.waits_for.is_over

    def wake(self) -> None:
        self.told = True


class Played:
    """A queue, the model of it, and all who use it."""

    def __init__(self, max_rows: int, parallel: int, own_thread: bool) -> None:
        self.clock = Clock()
        self.max_rows, self.parallel, self.own_thread = max_rows, parallel, own_thread
        self.queue = LeafQueue(max_rows=max_rows, max_wait_seconds=MAX_WAIT, parallel_calls=parallel)
        self.workers: list[Worker] = []
        self.callers: list[Caller] = []  # whose tickets and runs are not over, or not heard of
        self.threads: list[Caller] = []
        self.orphans: list[Group] = []  # what callers do that have left
        self.waiting: list[Row] = []
        self.ready: list[Walker] = []
        self.going: set[Walker] = set()  # walks that count as workers
        self.searches: dict[Walker, Search] = {}
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
        for thread in self.threads:
            if thread.makes is not None:
                self.end_group(thread, [])
        while True:  # who comes next closes what finalisers have left
            group = Group()
            if not self.queue.take(group):
                break
            self.finish(group, [])
        assert all(search.is_closed for search in self.searches.values())
        assert self.counted() == (0, 0, 0, 0, 0, 0)

    def look_or_end(self, caller: Caller) -> None:
        if caller.makes is not None:
            self.end_group(caller, ["settled"] * 6)
        if caller in self.callers or caller in self.threads:
            self.look(caller)

    def counted(self) -> tuple[int, ...]:
        queue: Any = self.queue
        while queue.gone:
            queue._workers.discard(queue.gone.popleft())
        return tuple(
            len(each)
            for each in (
                queue._rows,
                queue._ready,
                queue._groups,
                queue._workers,
                queue._waiting,
                queue._queued,
            )
        )

    # What callers do -----------------------------------------------------------------------------------------------

    def may_take(self, caller: Caller) -> bool:
        """Callers do nothing where the evaluator's threads do it; those end when it is closed."""
        return caller.waits_for is None or not self.own_thread or (self.closed and caller.run is not None)

    def looking(self) -> list[Caller]:
        """Those who may take something, and have nothing just now."""
        return [caller for caller in [*self.callers, *self.threads] if caller.makes is None and self.may_take(caller)]

    def making(self) -> list[Caller]:
        return [caller for caller in [*self.callers, *self.threads] if caller.makes is not None]

    def groups(self) -> list[Group]:
        return [caller.makes for caller in self.making() if caller.makes is not None] + self.orphans

    def waiting_tickets(self) -> set[Ticket]:
        """Of workers, and of walks, which have theirs in the queue or in a call."""
        rows = [*self.waiting, *(row for group in self.groups() for row in group.rows)]
        of_walks = [row.ticket for row in rows if row.ticket.walker is not None]
        of_workers = [caller.ticket for caller in self.callers if caller.worker is not None and caller.ticket]
        return {ticket for ticket in [*of_walks, *of_workers] if not ticket.is_over}

    def workers_now(self) -> int:
        return len([worker for worker in self.workers if worker.registered]) + len(self.going)

    def is_due(self) -> bool:
        """By what the model knows: as `LeafQueue` promises it."""
        if not (self.waiting or self.ready) or len(self.groups()) >= self.parallel:
            return False
        if self.ready:
            return True
        queued = {row.ticket for row in self.waiting if row.ticket.worker}
        return (
            len(self.waiting) >= self.max_rows
            or len(queued) * self.parallel >= self.workers_now()
            or len(self.waiting_tickets()) >= self.workers_now()
            or self.clock.now >= self.waiting[0].ticket.since + MAX_WAIT
        )

    def leave(self, caller: Caller) -> None:
        self.callers.remove(caller)
        caller.worker = None  # which may be dropped from now on, and at once
        self.waiting = [row for row in self.waiting if row.ticket is not caller.ticket]

    def part(self, caller: Caller, group: Group, place: int | None = None, *, inside: bool = False) -> None:
        """A caller leaves what it has taken, and what it waits for; perhaps it is cut off there.

        `inside` a critical section, as a finaliser, it leaves a note, and the queue is looked at next.
        """
        queue, run = self.queue, caller.run

        def part() -> None:
            queue.part(group, caller.ticket)
            if run is not None:
                queue.leave_run(run)

        def calmly() -> None:
            with suppress(KeyError):  # of a walk's
                part()

        walkers = [walker for walker in group.walkers if walker.leader is group]
        of_run = [] if run is None else list(run.walkers)
        self.back(list(group.rows), walkers, stay=inside)
        idle = [walker for walker in of_run if not walker.is_over and walker.leader in (None, group)]
        if inside:
            with gate.lock:
                part()
            with gate.lock, queue._lock:
                queue._note_gone()
        else:
            if place is not None and self.cut(calmly, place):
                self.all_look_by_themselves()
            try:
                part()
            except KeyError:
                part()
            assert all(self.searches[walker].is_closed for walker in idle)
            assert not (run and run.walkers)
        self.waiting = [row for row in self.waiting if row.ticket.walker not in idle]
        self.ready = [walker for walker in self.ready if walker not in idle]
        if inside:
            self.ready += idle
        self.going.difference_update(idle)
        caller.makes = None
        self.leave(caller)

    def look(self, caller: Caller) -> None:
        caller.told = False
        if caller.is_over:
            self.hear(caller)
            return
        if not self.may_take(caller):
            caller.until = NEVER
            return
        self.note_closed()
        group, due = Group(caller.waits_for), self.is_due()
        assert self.queue.take(group) is due
        if due:
            self.took(caller, group)
        elif self.closed and caller in self.threads:
            self.threads.remove(caller)  # it ends
            self.queue.close()
        else:
            caller.until = self.clock.now + self.queue.seconds_until_due()

    def hear(self, caller: Caller) -> None:
        if caller.ticket is not None:
            rows = list(caller.ticket.rows)
            assert all(row.settled for row in rows)
            errors = [row.error for row in rows]
            results: Callable[[], list[Any]] = caller.ticket.outputs
            expected: list[Any] = [id(row.leaf) for row in rows]
        else:
            assert caller.run is not None
            walkers = caller.run.walkers
            errors = [walker.error for walker in walkers]
            results, expected = caller.run.results, [self.searches[walker] for walker in walkers]
        error = next((error for error in errors if error is not None), None)
        if error is None:
            assert results() == expected
        else:
            with pytest.raises(type(error)) as heard:
                results()
            assert heard.value is error
        self.part(caller, Group(caller.waits_for))

    def note_closed(self) -> None:
        """Where the evaluator was dropped, whoever looks next fails what waits."""
        if self.closed:
            self.ready += [row.ticket.walker for row in self.waiting if row.ticket.walker is not None]
            self.waiting = []

    def took(self, caller: Caller, group: Group) -> None:
        if self.ready:
            share = max(1, -(-self.workers_now() // self.parallel))
            assert set(group.walkers) <= set(self.ready)
            assert len(set(group.walkers)) == len(group.walkers) == min(share, len(self.ready))
            assert not group.rows
            self.ready = [walker for walker in self.ready if walker not in group.walkers]
        else:
            number = min(self.max_rows, len(self.waiting))
            assert group.rows == self.waiting[:number]
            assert not group.walkers
            del self.waiting[:number]
        caller.makes = group

    def settle(self, rows: list[Row], endings: list[str]) -> None:
        for row, ending in zip(rows, endings, strict=False):
            assert row not in self.settled, "it was evaluated twice"
            if ending == "left":
                continue
            self.settled.add(row)
            row.succeed(id(row.leaf)) if ending == "settled" else row.fail(ValueError("no"))

    def lead(self, group: Group, endings: list[str]) -> None:
        """Lead the walks on, but for those after the first that is left: as many as there were before an exception."""
        for walker, ending in zip(group.walkers, [*endings, *["settled"] * 99], strict=False):
            if ending == "left":
                return
            walker.lead_on(lambda leaf: None)

    def back(self, rows: list[Row], walkers: list[Walker], *, stay: bool = False) -> None:
        """What waits again: leaves in the order in which they came, and walks. Asked before the queue is told.

        Walks that have to end are closed, or `stay` to be closed by whoever looks next.
        """
        over = [row for row in rows if (row.settled or self.closed) and not row.ticket.is_over]
        again = [row for row in rows if not row.settled and not row.ticket.is_over and not self.closed]
        self.ready += [row.ticket.walker for row in over if row.ticket.walker is not None]
        self.waiting = sorted([*again, *self.waiting], key=lambda row: (row.ticket.number, row.ticket.rows.index(row)))
        for walker in walkers:
            if walker.has_to_end or walker.is_over:
                self.going.discard(walker)
                if walker.has_to_end and stay:
                    self.ready.append(walker)
            elif walker.ticket is None or walker.ticket.is_over:
                self.ready.append(walker)
            else:
                self.waiting += walker.ticket.rows

    def finish(self, group: Group, endings: list[str]) -> None:
        rows, walkers = list(group.rows), list(group.walkers)
        self.settle(rows, endings)
        self.lead(group, endings)
        self.rows, self.calls = self.rows + len(rows), self.calls + bool(rows)
        self.back(rows, walkers)
        to_end = [walker for walker in walkers if walker.has_to_end]
        self.queue.finish(group, CallTimes(), len(rows))
        assert all(walker.is_over and self.searches[walker].is_closed for walker in to_end)

    def end_group(self, caller: Caller, endings: list[str]) -> None:
        group, caller.makes = caller.makes, None
        assert group is not None
        self.finish(group, endings)
        caller.told = True  # it looks again before it sleeps

    def all_look_by_themselves(self) -> None:
        """After `LOOK_SECONDS`: where those who were to be woken were not, as whoever does it was cut off."""
        for caller in [*self.callers, *self.threads]:
            caller.told = True

    def cut(self, work: Callable[[], object], place: int, files: Collection[str] = FILES) -> bool:
        """Run something that an exception cuts off there; whether it came so far."""
        return cut_at(place, work, files)

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
        leaves: Any = [SimpleNamespace() for _ in range(rows)]
        ticket = caller.ticket = Ticket(leaves, caller.wake, worker=worker is not None)
        self.comes(caller, lambda: self.queue.add(ticket), place)
        if caller in self.callers:
            self.waiting += ticket.rows

    def walks_come(self, searches: list[Search], place: int | None) -> None:
        caller = Caller(None, None)
        run = caller.run = Run([search.steps for search in searches], caller.wake)
        self.searches.update(zip(run.walkers, searches, strict=True))
        walkers = list(run.walkers)
        self.comes(caller, lambda: self.queue.start(run), place)
        if caller in self.callers:
            self.going.update(walkers)
            self.ready += walkers

    def comes(self, caller: Caller, enter: Callable[[], None], place: int | None) -> None:
        self.callers.append(caller)
        if place is not None and not self.closed and self.cut(enter, place):
            self.part(caller, Group(caller.waits_for))
            return
        try:
            if place is None or self.closed:
                enter()
        except ClosedError:
            assert self.closed
            self.part(caller, Group(caller.waits_for))
        else:
            assert not self.closed

    def someone_looks(self, pick: int) -> None:
        looking = [caller for caller in [*self.callers, *self.threads] if caller.makes is None]
        if looking:
            self.look(looking[pick % len(looking)])

    def all_who_were_told_look(self) -> None:
        for caller in [caller for caller in self.looking() if caller.told]:
            if caller.makes is None and caller in [*self.callers, *self.threads]:
                self.look(caller)

    def someone_is_cut_off_looking(self, pick: int, place: int) -> None:
        looking = [each for each in self.looking() if each.waits_for is not None and not each.is_over]
        if not looking:
            return
        caller = looking[pick % len(looking)]
        self.note_closed()
        group, due = Group(caller.waits_for), self.is_due()
        caller.told = False
        if not self.cut(lambda: self.queue.take(group), place):
            if due:
                self.took(caller, group)
            else:
                caller.until = self.clock.now + self.queue.seconds_until_due()
            return
        self.ready = [walker for walker in self.ready if walker.leader is not group]
        self.waiting = [row for row in self.waiting if row not in group.rows]
        self.part(caller, group)
        if self.closed:
            self.all_look_by_themselves()

    def a_group_ends(self, pick: int, endings: list[str]) -> None:
        if making := self.making():
            self.end_group(making[pick % len(making)], endings)

    def the_end_of_a_group_is_cut_off(self, pick: int, endings: list[str], place: int) -> None:
        making = self.making()
        if not making:
            return
        caller = making[pick % len(making)]
        group, caller.makes = caller.makes, None
        assert group is not None
        rows, walkers = list(group.rows), list(group.walkers)
        self.settle(rows, endings)
        self.lead(group, endings)
        self.back(rows, walkers)
        was_cut = self.cut(lambda: self.queue.finish(group, CallTimes(), len(rows)), place)
        caller.told = True
        if was_cut:
            self.queue.part(group)
            if caller.waits_for is not None:
                self.part(caller, group)
            self.all_look_by_themselves()
        self.rows, self.calls = self.queue.stats().rows, self.queue.stats().calls

    def a_leader_is_cut_off(self, pick: int, place: int) -> None:
        making = [caller for caller in self.making() if caller.makes is not None and caller.makes.walkers]
        if not making:
            return
        caller = making[pick % len(making)]
        group = caller.makes
        assert group is not None
        walkers, ended = list(group.walkers), {walker for walker in group.walkers if walker.is_over}
        if not self.cut(lambda: self.lead(group, []), place, LEADING):
            self.back([], walkers)
            self.queue.finish(group, CallTimes())
            caller.makes, caller.told = None, True
            return
        lost = [walker for walker in walkers if walker.has_to_end and not walker.run.is_abandoned]
        assert len(lost) <= 1, "more is lost than what was led on"
        assert not ended
        self.back([], walkers)
        self.queue.finish(group, CallTimes())
        assert all(isinstance(walker.error, RuntimeError) and self.searches[walker].is_closed for walker in lost)
        caller.makes = None
        if caller.waits_for is not None:
            self.part(caller, group)

    def a_caller_leaves_its_group_to_another_thread(self, pick: int) -> None:
        making = [caller for caller in self.making() if caller.waits_for is not None]
        if making:
            caller = making[pick % len(making)]
            assert caller.makes is not None
            self.orphans.append(caller.makes)
            self.part(caller, Group(caller.waits_for))

    def a_group_without_its_caller_ends(self, endings: list[str]) -> None:
        if self.orphans:
            self.finish(self.orphans.pop(), endings)

    def someone_gives_up(self, pick: int, place: int | None, inside: bool) -> None:
        if self.callers:
            caller = self.callers[pick % len(self.callers)]
            self.part(caller, caller.makes or Group(caller.waits_for), place, inside=inside)

    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds
        for caller in [*self.callers, *self.threads]:
            caller.told |= caller.until <= self.clock.now

    def it_is_closed(self, how: str, place: int | None) -> None:
        self.closed = True
        if how == "drop":
            self.queue.close_unlocked()
            return
        if place is None or self.cut(self.queue.close, place):
            self.queue.close()
        if place is not None:
            self.all_look_by_themselves()
        self.note_closed()

    # What always holds ---------------------------------------------------------------------------------------------

    def everything_is_counted_once(self) -> None:
        if self.closed and self.queue.waiting_rows:
            return
        queue: Any = self.queue
        assert list(queue._rows) == self.waiting
        assert set(queue._ready) == set(self.ready)
        assert len(queue._ready) == len(self.ready)
        assert queue._groups == set(self.groups())
        assert {each for each in queue._workers if isinstance(each, Walker)} == self.going
        queued = {row.ticket for row in self.waiting}
        assert queue._queued == {ticket for ticket in queued if ticket.worker}
        assert queue._waiting == self.waiting_tickets()
        taken = [row for group in self.groups() for row in group.rows]
        assert len(set(taken)) == len(taken)
        assert not set(taken) & set(self.waiting)
        led = [walker for group in self.groups() for walker in group.walkers]
        assert len(set(led)) == len(led)
        assert not set(led) & set(self.ready)
        stats = self.queue.stats()
        assert (stats.rows, stats.calls) == (self.rows, self.calls)

    def whoever_can_do_what_is_due_will_look_in_time(self) -> None:
        if len(self.groups()) >= self.parallel:
            return
        looking = self.looking()
        queued = {row.ticket.caller for row in self.waiting}
        queued |= {walker.run for walker in self.ready if not walker.run.is_abandoned}
        concerned = [caller for caller in looking if caller.waits_for is None or caller.waits_for in queued]
        if queued and concerned and not any(caller.told and not caller.is_over for caller in looking):
            assert not self.is_due(), "nobody was told that something is due"
            assert not (self.closed and self.waiting), "nobody was told that it is closed"
            until = min(caller.until for caller in looking if not caller.is_over)
            assert until <= self.waiting[0].ticket.since + MAX_WAIT, "nobody looks when it is time"

    def whoever_has_it_all_will_look(self) -> None:
        for caller in self.callers:
            assert caller.told or caller.makes is not None or not caller.is_over, "nobody was told of its end"

    def play(self, draw: random.Random) -> None:
        """One thing that may happen, and what holds after it."""
        pick, endings = draw.randrange(1000), draw.choices(["settled", "failed", "left"], [2, 1, 1], k=6)
        place = draw.choice([None, draw.randrange(1, 40)])
        searches = [Search(draw.randrange(4), draw.random() < 0.2) for _ in range(draw.randrange(1, 4))]
        actions: list[tuple[int, Callable[[], None]]] = [
            (2, self.a_worker_joins),
            (1, lambda: self.a_worker_leaves(pick, draw.choice(["close", "drop"]))),
            (1, lambda: self.a_worker_that_waits_is_closed(pick)),
            (4, lambda: self.leaves_come(draw.randrange(1, 6), pick, draw.random() < 0.6, draw.choice([None, place]))),
            (4, lambda: self.walks_come(searches, draw.choice([None, place]))),
            (4, lambda: self.someone_looks(pick)),
            (6, self.all_who_were_told_look),
            (1, lambda: self.someone_is_cut_off_looking(pick, place or 1)),
            (7, lambda: self.a_group_ends(pick, endings)),
            (2, lambda: self.the_end_of_a_group_is_cut_off(pick, endings, place or 1)),
            (2, lambda: self.a_leader_is_cut_off(pick, place or 1)),
            (1, lambda: self.a_caller_leaves_its_group_to_another_thread(pick)),
            (2, lambda: self.a_group_without_its_caller_ends(endings)),
            (2, lambda: self.someone_gives_up(pick, place, draw.random() < 0.3)),
            (2, lambda: self.time_goes_on(draw.choice([0.1, 1.0, MAX_WAIT]))),
        ]
        draw.choices([action for _, action in actions], [weight for weight, _ in actions])[0]()
        self.everything_is_counted_once()
        self.whoever_can_do_what_is_due_will_look_in_time()
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
        monkeypatch.setattr(tickets_module, "time", played.clock)
        monkeypatch.setattr(module, "LOOK_SECONDS", NEVER)
        for _ in range(draw.randrange(5, STEPS)):
            played.play(draw)
        if draw.random() < 0.5:
            played.it_is_closed(draw.choice(["close", "drop"]), draw.choice([None, draw.randrange(1, 40)]))
        for _ in range(10):
            played.play(draw)
        played.end_all()


class Alone:
    """A queue of two parallel calls, one walk of so many leaves, and a caller of it that is played by the test."""

    def __init__(self, leaves: int) -> None:
        self.queue = LeafQueue(max_rows=1, max_wait_seconds=MAX_WAIT, parallel_calls=2)
        self.search, self.woken = Search(leaves, False), 0
        self.run = Run([self.search.steps], self.wake)
        (self.walker,) = self.run.walkers
        self.evaluated: list[Row] = []
        self.queue.start(self.run)

    def wake(self) -> None:
        self.woken += 1

    def take(self, group: Group) -> bool:
        """Take something and do it, but for giving it back."""
        if not self.queue.take(group):
            return False
        self.works(group)
        return True

    def works(self, group: Group) -> None:
        for row in group.rows:
            assert row not in self.evaluated, "it was evaluated twice"
            self.evaluated.append(row)
            row.succeed(id(row.leaf))
        for walker in group.walkers:
            walker.lead_on(lambda leaf: None)

    def does(self, group: Group) -> None:
        """What a caller does that finds something to do."""
        if self.take(group):
            self.queue.finish(group, CallTimes(), len(group.rows))

    def goes_on(self, times: int) -> None:
        for _ in range(times):
            self.does(Group())


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("between", range(5))
@pytest.mark.parametrize("then", ["", "its caller leaves", "another has taken it"])
def test_what_is_done_once_more_after_others_went_on_counts_once(before: int, between: int, then: str) -> None:
    place, was_cut = 0, True
    while was_cut:
        place += 1
        alone, group = Alone(3), Group()
        alone.goes_on(before)
        was_cut = cut_at(place, partial(alone.does, group), FILES)
        alone.goes_on(between)  # before whoever was cut off gives up what it had
        if then == "its caller leaves":
            alone.queue.leave_run(alone.run)
        held = Group()
        if then == "another has taken it":
            alone.queue.take(held)
        alone.queue.part(group)
        alone.goes_on(20)
        if held.rows or held.walkers:
            alone.works(held)
            alone.queue.finish(held, CallTimes(), len(held.rows))
            alone.goes_on(20)
        if then != "its caller leaves":
            assert alone.run.results() == [alone.search]
            assert len(alone.evaluated) == 3
        alone.queue.leave_run(alone.run)
        assert alone.search.is_closed
        queue: Any = alone.queue
        assert not any((queue._rows, queue._ready, queue._groups, queue._workers, queue._waiting, queue._queued))
    assert place > 20


def test_a_walk_whose_call_ends_while_its_caller_closes_another_is_led_on_by_no_other() -> None:
    queue = LeafQueue(max_rows=2, max_wait_seconds=MAX_WAIT, parallel_calls=1)
    leading, calling = Group(), Group()

    def ends_the_call() -> Generator[Any, Any, None]:
        try:
            yield SimpleNamespace()
        finally:
            for row in calling.rows:
                row.succeed(1)
            queue.finish(calling, CallTimes(), 2)

    other = Search(2, False)
    run = Run([ends_the_call(), other.steps], lambda: None)
    queue.start(run)
    assert queue.take(leading)
    for walker in leading.walkers:
        walker.lead_on(lambda leaf: None)
    queue.finish(leading, CallTimes())
    assert queue.take(calling)
    queue.leave_run(run)
    assert other.is_closed
    assert not queue.take(leading)


def test_a_walk_that_nobody_waits_for_is_closed_by_whoever_looks_next_where_no_worker_is_left() -> None:
    alone, group, other = Alone(3), Group(), Group()
    assert alone.take(group)  # by another caller
    alone.queue.leave_run(alone.run)
    assert not alone.search.is_closed  # which leads it on still
    with gate.lock:
        alone.queue.part(group)
    assert not alone.search.is_closed
    assert alone.take(other)
    assert alone.search.is_closed
    alone.queue.finish(other, CallTimes())
    assert not alone.take(other)


def test_what_a_finaliser_gives_up_is_told_to_those_whose_it_is() -> None:
    queue = LeafQueue(max_rows=2, max_wait_seconds=MAX_WAIT, parallel_calls=1)
    leaf: Any = SimpleNamespace()
    woken: list[str] = []
    ours, others = (Ticket([leaf], partial(woken.append, name), worker=False) for name in ("ours", "others"))
    queue.add(ours)
    queue.add(others)
    group = Group(ours)
    assert queue.take(group)
    woken.clear()
    with gate.lock:
        queue.part(group, ours)
    assert "others" in woken
    assert queue.take(Group(others))


def test_a_thread_of_the_evaluators_that_ends_leaves_walks_to_their_callers() -> None:
    queue = LeafQueue(max_rows=1, max_wait_seconds=MAX_WAIT, parallel_calls=1)
    queue.listener = lambda: None  # it has looked, and heard nothing since
    woken: list[int] = []
    queue.start(Run([Search(1, False).steps], lambda: woken.append(1)))
    queue.close()  # as it does last
    assert woken == [1]


def test_a_cut_is_made_in_the_queue() -> None:
    assert cut_at(1, LeafQueue(max_rows=1, max_wait_seconds=0.0, parallel_calls=1).stats, FILES)
    assert sys.getprofile() is None
