"""`Evaluator`: leaves of many searches evaluated together, for threads; each call of the model serves all who wait."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import GEN_CREATED, getgeneratorstate
from types import GeneratorType
from typing import Generic, TypeVar

import torch

from .._checks import check_seconds, positive_int, sequence_of
from ..errors import InvalidArgumentError, InvalidTypeError, ReentrantCallError, WaitTimeoutError
from ..locks.gate import gate
from ..locks.signal import Signal
from ..manager import KVCacheManager
from ..model.overflow import Overflow, check_overflow
from ..pool.handle import Handle
from ..pool.storage import KVStorage
from .call import ModelCall
from .leaves import Leaf, Model, Walk
from .queue import LOOK_SECONDS, Group, LeafQueue, Worker
from .stats import CallTimes, EvaluatorStats
from .tickets import Run, Ticket

__all__ = ["Evaluator", "EvaluatorWorker", "walks_of"]

logger = logging.getLogger("concurrent_kv")

Inputs = TypeVar("Inputs")
Output = TypeVar("Output")
Result = TypeVar("Result")


class Evaluator(Handle, Generic[Inputs, Output]):
    """Gathers the leaves that threads and tasks hand in, calls the model once for all of them, and stores the children.

    A call begins when `max_rows` leaves wait, or every search that runs (`run`) and every registered worker
    (`worker()`) waits with one, or the first leaf has waited for `max_wait_seconds`; where there is neither, at once.
    It is made by the caller who came last or, with `own_thread`, by a thread of the evaluator's. What fails is heard by
    whom it concerns: a leaf without its parent, or of a search that has ended, by its own caller; what the model raises
    by all callers of that call.

    What a leaf's outputs are does not depend on who shares its call, but for how the model rounds in batches of
    different sizes; with `max_rows=1` not at all. A call in which the model appends more than there is room for is made
    again, for the rows that leave more room and for the others.

    No output mixes weights, where the model's call and `bump_version()` exclude each other (docs/weights.md): a leaf
    whose weights version was bumped after its parent had been read is evaluated again, if it is of a pool, and hears
    `SearchEndedError`, if it is of a search. The others of its call go on.

    Args:
        cache: the manager, or the storage, that the leaves' searches and pools are of.
        model: called with a `JointBatch` and the inputs of its first rows; it appends each layer's new keys and values
            to the batch, as after any gather, and returns an `Evaluated`. It runs in a caller's thread (on a caller's
            event loop, see `AsyncEvaluator`), or in the evaluator's own; by as many at once as `parallel_calls` says.
        max_rows: leaves of a call.
        max_wait_seconds: that a leaf waits for others.
        parallel_calls: of the model, at once. With more than one, a call takes as many workers as would make all calls
            equally large.
        room: columns that the model appends to, at most; up to the window if left out.
        overflow: what happens to rows of pools that outgrow the window. A search has its own.
        row_sizes: sizes of batches, ascending, the last at least `max_rows`. A batch is then padded to the next of them
            with empty rows after its leaves', and has the whole window's columns, the last `room` of which are free, in
            the same memory each time: for models that were compiled for, or captured with, fixed shapes. With
            `parallel_calls`, each size has at most so many memories, and no two calls have one at once. What a model
            keeps of a batch after its call is overwritten by the next.
        own_thread: whether threads of its own make the calls, as many as `parallel_calls`; on a GPU, each in a stream
            of its own.
        timeout: seconds that a caller waits at most.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument that cannot work.
    """

    _internal = frozenset(
        ("check", "check_caller", "queue", "seconds_left", "storage", "take", "wait", "wait_for_walks", "work")
    )

    instead_of_copy = "share the one object between threads"

    def __init__(
        self,
        cache: KVCacheManager | KVStorage,
        model: Model[Inputs, Output],
        *,
        max_rows: int = 64,
        max_wait_seconds: float = 0.002,
        parallel_calls: int = 1,
        room: int | None = None,
        overflow: Overflow | None = None,
        row_sizes: Sequence[int] = (),
        own_thread: bool = False,
        timeout: float = 60.0,
    ) -> None:
        if not isinstance(cache, (KVCacheManager, KVStorage)):
            raise InvalidTypeError(f"cache must be a KVCacheManager or a KVStorage, got {type(cache).__name__}")
        if not callable(model):
            raise InvalidTypeError(f"model must be callable, got {type(model).__name__}")
        storage = cache.storage if isinstance(cache, KVCacheManager) else cache
        max_rows = positive_int("max_rows", max_rows)
        sizes = [positive_int("row_sizes", size) for size in sequence_of("row_sizes", row_sizes, "ints")]
        if sizes and (sizes != sorted(set(sizes)) or sizes[-1] < max_rows):
            raise InvalidArgumentError(f"row_sizes must ascend to at least max_rows={max_rows}, got {tuple(row_sizes)}")
        room = None if room is None else positive_int("room", room)
        if sizes and room is None:
            raise InvalidArgumentError("room must be given with row_sizes: it says which columns are free")
        if room is not None and room > storage.layout.max_tokens:
            raise InvalidArgumentError(f"room must be at most the window of {storage.layout.max_tokens}, got {room}")
        check_overflow(overflow, storage.layout)
        self._call = ModelCall(storage, model, room=room, overflow=overflow, row_sizes=sizes)
        self._queue = LeafQueue(
            max_rows=max_rows,
            max_wait_seconds=check_seconds("max_wait_seconds", max_wait_seconds),
            parallel_calls=positive_int("parallel_calls", parallel_calls),
            check_process=storage.check_process,
        )
        self.timeout = check_seconds("timeout", timeout)
        if own_thread:
            _start_threads(self._call, self._queue, parallel_calls)

    def worker(self) -> EvaluatorWorker[Inputs, Output]:
        """Register a worker: from now on calls wait for its leaves, too, until its `with` is left or it is dropped.

        Raises:
            ClosedError: the evaluator is closed.
        """
        return EvaluatorWorker(self)

    def evaluate(self, leaf: Leaf[Inputs], *, timeout: float | None = None) -> Output:
        """The model's output for a leaf, which is stored then. May block.

        Where its pool was cleared during the call, it was stored before the clear.

        Raises:
            KeyNotFoundError: there is no entry for its parent, or none any more: the weights version was bumped.
            SearchEndedError, CapacityError, WindowOverflowError: as from `Search.commit`; nothing is stored.
            WaitTimeoutError: no call was over in time, or the weights version was bumped during 16 calls of it.
            ClosedError: the evaluator, or a pool, is closed.
            ReentrantCallError: the model itself asks, or what runs inside a critical section of the calling thread.
        """
        return self.evaluate_many([leaf], timeout=timeout)[0]

    def evaluate_many(self, leaves: Sequence[Leaf[Inputs]], *, timeout: float | None = None) -> list[Output]:
        """The outputs for several leaves, in their order, perhaps of several calls. May block.

        Raises what the first of them raises that fails; the others are stored all the same. Otherwise as `evaluate`.
        """
        return self.wait(leaves, timeout, worker=False)

    def run(self, search: Walk[Inputs, Output, Result], *, timeout: float | None = None) -> Result:
        """What a search returns that is written as a generator: it yields leaves, and is sent the output of each.

        May block. Whoever makes the calls also leads all searches that run at the same time from leaf to leaf, in its
        own thread: for one call of the model no thread has to wake another, which with a GIL takes longer than what a
        search does between its leaves. So the generator runs in any thread, and while it does others wait for it: it
        should not block (nor open a search of the cache's, which may wait for room that one of the others has), nor
        rely on what a thread has of its own (`torch.inference_mode`, context variables). Calls wait for its next leaf
        as for a worker's.

        An error of a leaf is raised where the generator yielded it, which may catch it and go on. Where the caller
        leaves before the end (an error, a timeout, cancellation), the generator is closed, at its next leaf if it runs
        just then. One that is led on by a thread that an exception interrupts there ends with a `RuntimeError`.

        Of searches of one evaluator no two run at the same moment, unless `parallel_calls` is more than 1: then those
        of one tree need a lock for it, which none may hold where it yields.

        Args:
            search: the generator, which has not begun; see `Walk`. It yields what it wants of this evaluator, and does
                not call it.
            timeout: seconds that one leaf of it waits at most; the evaluator's if left out.

        Raises what the generator raises; `WaitTimeoutError`: no call was over in time; `ClosedError`;
            `ReentrantCallError` as `evaluate`.
        """
        return self.run_many([search], timeout=timeout)[0]

    def run_many(
        self, searches: Iterable[Walk[Inputs, Output, Result]], *, timeout: float | None = None
    ) -> list[Result]:
        """What several such searches return, which run side by side. May block.

        When all have ended, raises what the first of them raised that failed. Otherwise as `run`.
        """
        return self.wait_for_walks(searches, timeout)

    def stats(self) -> EvaluatorStats:
        """What was counted since it was made."""
        return self._queue.stats()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._queue.closed

    def close(self) -> None:
        """Let no more leaves in; who waits for a call hears `ClosedError`. Calls under way end. Never blocks."""
        self._queue.close()

    def __del__(self) -> None:
        queue = getattr(self, "_queue", None)
        if queue is not None:
            queue.close_unlocked()  # its threads look, and end

    # For workers and facades ---------------------------------------------------------------------------------------

    @property
    def queue(self) -> LeafQueue:
        """What waits."""
        return self._queue

    @property
    def storage(self) -> KVStorage:
        """What the leaves' searches and pools are over."""
        return self._call.storage

    def check_caller(self) -> None:
        """Raises if what calls must not wait for a call of the model."""
        self._call.storage.check_process()
        gate.check("this evaluator")
        if self._call.is_made_here:
            raise ReentrantCallError(
                "this evaluator was called by its own model, or by a search that it leads on, or by a finaliser that "
                "ran there: the call would wait for itself; evaluate in advance, yield the leaf, or use an evaluator "
                "of its own"
            )

    def check(self, leaves: Iterable[Leaf[Inputs]]) -> list[Leaf[Inputs]]:
        """Leaves that can be handed in; raises otherwise."""
        self.check_caller()
        leaves = sequence_of("leaves", leaves, "leaves")
        for leaf in leaves:
            self._call.check_leaf(leaf)
        return leaves

    def take(self, group: Group) -> bool:
        """Whether there is something to do for a caller, which has it then. Not where threads of the evaluator's do."""
        self._call.storage.check_process()
        queue = self._queue
        # Those have ended where it is closed; what is left are walks that hear of it.
        return (queue.listener is None or queue.closed) and queue.take(group)

    def work(self, group: Group) -> None:
        """Do what was taken, and give it back."""
        times, rows = CallTimes(), 0
        try:
            rows = self._call.work(group, times)
        finally:
            self._queue.finish(group, times, rows)

    def seconds_left(self, run: Run, seconds: float) -> float:
        """How long a leaf of a run may still wait; raises where it has waited `seconds`."""
        left = run.waits_since + seconds - time.monotonic()
        if left <= 0:
            raise _too_late(seconds)
        return left

    def wait_for_walks(
        self,
        searches: Iterable[Walk[Inputs, Output, Result]],
        timeout: float | None,
        *,
        seat: object | None = None,
    ) -> list[Result]:
        """See `run_many`; of a worker, with its seat."""
        seconds = self.timeout if timeout is None else check_seconds("timeout", timeout)
        self.check_caller()
        queue, signal = self._queue, Signal()
        run = Run(walks_of(searches), lambda: signal.set(), seat=seat)
        group = Group(run)
        try:
            queue.start(run)
            while True:
                signal = Signal()  # before it is looked at: who changes it from here on sets this one
                if run.is_over:
                    return run.results()
                if self.take(group):
                    self.work(group)
                    continue
                due = LOOK_SECONDS if queue.listener is not None else queue.seconds_until_due()
                signal.wait(min(due, self.seconds_left(run, seconds)))
        finally:
            try:
                _leave_run(queue, group, run)
            except BaseException:  # an asynchronous exception has cut it off
                _leave_run(queue, group, run)
                raise

    def wait(self, leaves: Sequence[Leaf[Inputs]], timeout: float | None, *, worker: bool) -> list[Output]:
        """See `evaluate_many`."""
        seconds = self.timeout if timeout is None else check_seconds("timeout", timeout)
        until = time.monotonic() + seconds
        queue, signal = self._queue, Signal()
        ticket = Ticket(self.check(leaves), lambda: signal.set(), worker=worker)
        if ticket.is_over:
            return []
        group = Group(ticket)
        try:
            queue.add(ticket)
            while True:
                signal = Signal()  # before it is looked at: who changes it from here on sets this one
                if ticket.is_over:
                    return ticket.outputs()
                if queue.listener is None and queue.take(group):
                    self.work(group)
                    continue
                due = LOOK_SECONDS if queue.listener is not None else queue.seconds_until_due()
                left = until - time.monotonic()
                if left <= 0:
                    raise _too_late(seconds)
                signal.wait(min(due, left))
        finally:
            try:
                queue.part(group, ticket)
            except BaseException:  # an asynchronous exception has cut it off
                queue.part(group, ticket)
                raise


class EvaluatorWorker(Worker, Generic[Inputs, Output]):
    """A registered worker of an evaluator; see `Evaluator.worker`."""

    def __init__(self, evaluator: Evaluator[Inputs, Output]) -> None:
        self._evaluator = evaluator
        super().__init__(evaluator.queue)

    def evaluate(self, leaf: Leaf[Inputs], *, timeout: float | None = None) -> Output:
        """See `Evaluator.evaluate`."""
        return self.evaluate_many([leaf], timeout=timeout)[0]

    def evaluate_many(self, leaves: Sequence[Leaf[Inputs]], *, timeout: float | None = None) -> list[Output]:
        """See `Evaluator.evaluate_many`."""
        return self._evaluator.wait(leaves, timeout, worker=self.registered)

    def run(self, search: Walk[Inputs, Output, Result], *, timeout: float | None = None) -> Result:
        """See `Evaluator.run`. Meanwhile calls wait for the search's leaves, and afterwards for the worker again."""
        return self.run_many([search], timeout=timeout)[0]

    def run_many(
        self, searches: Iterable[Walk[Inputs, Output, Result]], *, timeout: float | None = None
    ) -> list[Result]:
        """See `Evaluator.run_many`, and `run`."""
        return self._evaluator.wait_for_walks(searches, timeout, seat=self.seat)


def _start_threads(call: ModelCall, queue: LeafQueue, number: int) -> None:
    """Have threads make the queue's calls until it is closed. They do not keep the evaluator alive."""
    signals = [Signal() for _ in range(number)]

    def look() -> None:
        for signal in signals:
            signal.set()

    def work(own: int) -> None:
        group = Group()
        try:
            with _own_stream(call.storage.layout.device):
                while True:
                    signals[own] = Signal()  # before it looks: who sets it from here on sets this one
                    if queue.take(group):
                        _call_for_others(call, queue, group)
                    elif queue.closed:
                        return
                    else:
                        signals[own].wait(queue.seconds_until_due())
        finally:
            # Whatever ends it, nobody waits for it: what it still had is failed with the rest.
            queue.close()
            queue.part(group)

    queue.listener = look
    for own in range(number):
        threading.Thread(target=work, args=(own,), name="concurrent_kv evaluator", daemon=True).start()


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    if device.type != "cuda":
        return nullcontext()
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)


def _call_for_others(call: ModelCall, queue: LeafQueue, group: Group) -> None:
    """As `Evaluator.work`, in a thread that nobody hears: callers hear of whatever ends a call."""
    times, rows = CallTimes(), 0
    try:
        rows = call.work(group, times)
    except BaseException as error:
        for row in group.rows:
            if not row.settled:
                row.fail(RuntimeError(f"the model raised {type(error).__name__}: {error}"))
        logger.exception("the model, or a search, ended what an evaluator's thread did")
    finally:
        queue.finish(group, times, rows)


def walks_of(searches: Iterable[Walk[Inputs, Output, Result]]) -> list[Walk[Inputs, Output, Result]]:
    """Searches that can be run; raises otherwise."""
    found = sequence_of("searches", searches, "generators")
    for search in found:
        if not isinstance(search, Generator):
            raise InvalidTypeError(
                f"search must be a generator, which a function with a yield in it returns, got {type(search).__name__}"
            )
        # One that has begun would be sent None for the leaf that it has yielded.
        if isinstance(search, GeneratorType) and getgeneratorstate(search) != GEN_CREATED:
            raise InvalidArgumentError(
                f"search must be a generator that has not begun, got one in the state {getgeneratorstate(search)}"
            )
    if len({id(search) for search in found}) < len(found):
        raise InvalidArgumentError("searches must be different generators, got one of them twice")
    return found


def _leave_run(queue: LeafQueue, group: Group, run: Run) -> None:
    """A caller leaves: what it has taken goes on, what it has begun ends."""
    queue.part(group)
    queue.leave_run(run)


def _too_late(seconds: float) -> WaitTimeoutError:
    return WaitTimeoutError(
        f"this evaluator had not called the model for all leaves within {seconds:g} s; timeout= of the evaluator, "
        "or of this call, says how long"
    )
