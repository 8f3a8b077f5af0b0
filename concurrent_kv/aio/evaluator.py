"""`AsyncEvaluator`: an `Evaluator` for tasks, of any event loops, beside threads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from .._checks import check_seconds
from ..device.cuda import current_streams
from ..errors import InvalidTypeError, WaitTimeoutError
from ..evaluation.evaluator import Evaluator, walks_of
from ..evaluation.leaves import Leaf, Walk
from ..evaluation.queue import LOOK_SECONDS, Group, LeafQueue, Worker
from ..evaluation.stats import EvaluatorStats
from ..evaluation.tickets import Run, Ticket
from ..never_copied import NeverCopied
from .places import call_soon_here

__all__ = ["AsyncEvaluator", "AsyncEvaluatorWorker"]

Inputs = TypeVar("Inputs")
Output = TypeVar("Output")
Result = TypeVar("Result")


QUIET_TURNS = 3  # of a loop, after which no task is about to hand in a leaf


class _Turn:
    """Of one event loop: whether a call has been made on its thread since its other tasks had their turn.

    Without it each task that runs a search would make a call in each turn, and no other task had its own in between.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._is_over = True

    async def work(self, sync: Evaluator[Any, Any], group: Group) -> None:
        """Do what was taken, and let the loop's other tasks have their turn if it was a call."""
        if not group.rows:
            sync.work(group)
            return
        self._calls += 1
        self._is_over = False
        try:
            sync.work(group)
            await anyio.lowlevel.checkpoint()
        finally:
            self._is_over = True

    async def is_led(self) -> bool:
        """Whether a task has made a call since this was asked, and looks again; waits until that is known."""
        calls = self._calls
        while not self._is_over:
            if self._calls != calls:
                return True
            await anyio.lowlevel.checkpoint()
        return False


class AsyncEvaluator(NeverCopied, Generic[Inputs, Output]):
    """What an `Evaluator` does, awaited. A task that waits parks no thread.

    Args:
        sync: the evaluator, which threads may use at the same time; an attribute, too.
        on_loop: whether a task that makes a call does so on its loop's own thread, which others wait for meanwhile; in
            a worker thread otherwise. (Not where the evaluator has a thread of its own: that makes all calls.)

    Raises:
        InvalidTypeError: `sync` is no `Evaluator`.
    """

    _internal = frozenset(("wait", "wait_for_walks"))

    instead_of_copy = "share the one object between tasks"

    def __init__(self, sync: Evaluator[Inputs, Output], *, on_loop: bool = False) -> None:
        if not isinstance(sync, Evaluator):
            raise InvalidTypeError(
                f"sync must be an Evaluator, got {type(sync).__name__}: AsyncEvaluator(Evaluator(manager, model))"
            )
        self.sync = sync
        self._on_loop = on_loop
        self._turns: anyio.lowlevel.RunVar[_Turn] = anyio.lowlevel.RunVar("concurrent_kv turns")

    def worker(self) -> AsyncEvaluatorWorker[Inputs, Output]:
        """See `Evaluator.worker`. Never blocks."""
        return AsyncEvaluatorWorker(self)

    async def evaluate(self, leaf: Leaf[Inputs], *, timeout: float | None = None) -> Output:
        """See `Evaluator.evaluate`. A task that is cancelled takes its leaf out, if no call has it yet.

        With `on_loop=True`, and where no worker is registered, leaves that are handed in during one turn of the loop
        share a call.
        """
        return (await self.evaluate_many([leaf], timeout=timeout))[0]

    async def evaluate_many(self, leaves: Sequence[Leaf[Inputs]], *, timeout: float | None = None) -> list[Output]:
        """See `Evaluator.evaluate_many`."""
        return await self.wait(leaves, timeout, worker=False)

    async def run(self, search: Walk[Inputs, Output, Result], *, timeout: float | None = None) -> Result:
        """See `Evaluator.run`. The generator is no coroutine: it yields leaves, and any thread may lead it on.

        With `on_loop=True` the loop's other tasks have their turn after each call, however many tasks run searches. A
        task that is cancelled leaves at once; the search ends then, or at its next leaf if it runs just now.
        """
        return (await self.run_many([search], timeout=timeout))[0]

    async def run_many(
        self, searches: Iterable[Walk[Inputs, Output, Result]], *, timeout: float | None = None
    ) -> list[Result]:
        """See `Evaluator.run_many`."""
        return await self.wait_for_walks(searches, timeout)

    async def wait_for_walks(
        self,
        searches: Iterable[Walk[Inputs, Output, Result]],
        timeout: float | None,
        *,
        seat: object | None = None,
    ) -> list[Result]:
        """See `run_many`; of a worker, with its seat."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        sync = self.sync
        seconds = sync.timeout if timeout is None else check_seconds("timeout", timeout)
        sync.check_caller()
        queue, call_soon, event = sync.queue, call_soon_here(), anyio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # of a loop that has ended
                call_soon(event.set)

        run = Run(walks_of(searches), wake, seat=seat)
        group = Group(run)
        try:
            queue.start(run)
            for _ in range(QUIET_TURNS if self._on_loop else 0):  # tasks that go on just now take part
                await anyio.lowlevel.checkpoint()
            while True:
                event = anyio.Event()  # before it is looked at: who sets it from here on sets this one
                if run.is_over:
                    await anyio.lowlevel.cancel_shielded_checkpoint()
                    return run.results()
                if self._on_loop and await self._turn_here().is_led():
                    pass  # who leads looks for all
                elif sync.take(group):
                    if self._on_loop:
                        await self._turn_here().work(sync, group)
                    else:
                        await _run_in_worker(sync, group)
                        group = Group(run)
                    continue
                due = LOOK_SECONDS if queue.listener is not None else queue.seconds_until_due()
                with anyio.move_on_after(min(due, sync.seconds_left(run, seconds))):
                    await event.wait()
        finally:
            try:
                _leave_run(queue, group, run)
            except BaseException:  # an asynchronous exception has cut it off
                _leave_run(queue, group, run)
                raise

    async def _hear_others(self) -> None:
        """Let tasks that go on just now hand in theirs, until so many turns of the loop bring no leaf more.

        Not one: of tasks whose searches were led together, those that did not lead go on a turn later.
        """
        queue, before, quiet = self.sync.queue, -1, 0
        while quiet < QUIET_TURNS and queue.seconds_until_due() > 0:
            quiet = 0 if before < queue.waiting_rows else quiet + 1
            before = queue.waiting_rows
            await anyio.lowlevel.checkpoint()

    def _turn_here(self) -> _Turn:
        """That of the current event loop."""
        try:
            return self._turns.get()
        except LookupError:
            made = _Turn()
            self._turns.set(made)
            return made

    def stats(self) -> EvaluatorStats:
        """See `Evaluator.stats`."""
        return self.sync.stats()

    def close(self) -> None:
        """See `Evaluator.close`."""
        self.sync.close()

    async def wait(self, leaves: Sequence[Leaf[Inputs]], timeout: float | None, *, worker: bool) -> list[Output]:
        """See `evaluate_many`."""
        await anyio.lowlevel.checkpoint_if_cancelled()
        sync = self.sync
        seconds = sync.timeout if timeout is None else check_seconds("timeout", timeout)
        until = time.monotonic() + seconds
        queue, call_soon, event = sync.queue, call_soon_here(), anyio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # of a loop that has ended
                call_soon(event.set)

        ticket = Ticket(sync.check(leaves), wake, worker=worker)
        group = Group(ticket)
        try:
            if not ticket.is_over:
                queue.add(ticket)
                if self._on_loop:
                    await self._hear_others()
            while True:
                event = anyio.Event()  # before it is looked at: who sets it from here on sets this one
                if ticket.is_over:
                    if not self._on_loop or not ticket.rows:  # else it has had its turn
                        await anyio.lowlevel.cancel_shielded_checkpoint()
                    return ticket.outputs()
                if queue.listener is None and queue.take(group):
                    if self._on_loop:
                        sync.work(group)
                        await anyio.lowlevel.cancel_shielded_checkpoint()
                    else:
                        await _run_in_worker(sync, group)
                        group = Group(ticket)
                    continue
                due = LOOK_SECONDS if queue.listener is not None else queue.seconds_until_due()
                left = until - time.monotonic()
                if left <= 0:
                    raise WaitTimeoutError(
                        f"this evaluator had not called the model for all leaves within {seconds:g} s; timeout= of "
                        "the evaluator, or of this call, says how long"
                    )
                with anyio.move_on_after(min(due, left)):
                    await event.wait()
        finally:
            try:
                _part(queue, group, ticket)
            except BaseException:  # an asynchronous exception has cut it off
                _part(queue, group, ticket)
                raise


class AsyncEvaluatorWorker(Worker, Generic[Inputs, Output]):
    """A registered worker of an evaluator, for a task; see `Evaluator.worker`."""

    def __init__(self, evaluator: AsyncEvaluator[Inputs, Output]) -> None:
        self._evaluator = evaluator
        super().__init__(evaluator.sync.queue)

    async def evaluate(self, leaf: Leaf[Inputs], *, timeout: float | None = None) -> Output:
        """See `AsyncEvaluator.evaluate`."""
        return (await self.evaluate_many([leaf], timeout=timeout))[0]

    async def evaluate_many(self, leaves: Sequence[Leaf[Inputs]], *, timeout: float | None = None) -> list[Output]:
        """See `AsyncEvaluator.evaluate_many`."""
        return await self._evaluator.wait(leaves, timeout, worker=self.registered)

    async def run(self, search: Walk[Inputs, Output, Result], *, timeout: float | None = None) -> Result:
        """See `AsyncEvaluator.run` and `EvaluatorWorker.run`."""
        return (await self.run_many([search], timeout=timeout))[0]

    async def run_many(
        self, searches: Iterable[Walk[Inputs, Output, Result]], *, timeout: float | None = None
    ) -> list[Result]:
        """See `AsyncEvaluator.run_many` and `EvaluatorWorker.run`."""
        return await self._evaluator.wait_for_walks(searches, timeout, seat=self.seat)


async def _run_in_worker(sync: Evaluator[Inputs, Output], group: Group) -> None:
    """Do what was taken in a worker thread, in the task's streams. A cancelled task leaves the worker to end it."""
    streams = current_streams()

    def work() -> None:
        if group.claim("worker"):
            try:
                with streams:
                    sync.work(group)
                    while isinstance(group.caller, Run) and group.caller.is_waited_for and sync.take(group):
                        sync.work(group)  # the run's walks are led to their end here, and those of others with them
            finally:
                sync.queue.part(group)

    # A limiter of its own: the places of the loop's may all be taken by workers that wait for this very call. Of calls
    # there are no more at once than the evaluator allows.
    await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


def _part(queue: LeafQueue, group: Group, ticket: Ticket | None = None) -> None:
    """A task leaves; what a worker has begun is the worker's to end."""
    queue.part(group if group.claim("task") else None, ticket)


def _leave_run(queue: LeafQueue, group: Group, run: Run) -> None:
    """As `_part`, of a task that has walks."""
    _part(queue, group)
    queue.leave_run(run)
