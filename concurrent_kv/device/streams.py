"""Order between streams: one happens-before clock for a storage.

Every stream that touches the storage takes ticks. An operation enqueues its work, *then* takes a tick, and the tick
travels with the entry or with the freed slots; the next operation to use those on another stream first makes that
stream wait for an event that covers the tick. On a CPU copies are done when they return, and the clock does nothing.

    producer:  enqueue work, tick, record an event, and then publish or release what the tick travels with
    consumer:  make its stream wait for the event, note that it has seen the tick, enqueue work

While the clock knows one stream, it records no event. It knows a stream from its first use; one whose handle may name
another stream later (see `StreamBackend.is_lasting`) only as long as its work runs.

Lock order: the clock's own lock is innermost and is never held while a backend is called.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InvalidArgumentError, StreamCaptureError, shown
from ..locks.gate import gate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NO_TICKS", "StreamBackend", "StreamClock", "StreamKey", "Ticks", "merge"]

StreamKey = tuple[int, int]  # (device index, stream handle)
Ticks = Mapping[StreamKey, int]

NO_TICKS: Ticks = MappingProxyType({})

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def merge(first: Ticks, second: Ticks) -> Ticks:
    """The later tick of each stream."""
    if not second:
        return first
    if not first:
        return second
    merged = dict(first)
    for key, tick in second.items():
        if merged.get(key, 0) < tick:
            merged[key] = tick
    return merged


class StreamBackend(Protocol):
    """What the clock needs of a device. Streams and events are opaque to it. No call blocks but `synchronize`."""

    def current(self) -> Any:
        """The calling thread's current stream on the device."""

    def use(self, stream: Any) -> AbstractContextManager[object]:
        """A context in which `stream` is the calling thread's current stream on the device."""

    def check(self, stream: object) -> None:
        """Raise `InvalidTypeError` or `InvalidArgumentError` unless it is a stream of the device."""

    def key(self, stream: Any) -> StreamKey:
        """The stream's identity."""

    def is_lasting(self, stream: Any) -> bool:
        """Whether its handle names this stream for good: no user can destroy it and make another of that handle."""

    def is_capturing(self, stream: Any) -> bool:
        """Whether what is enqueued on it goes into a graph instead of being run."""

    def record(self, stream: Any) -> Any:
        """An event that fires when all work enqueued on `stream` so far is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of `stream` wait for `event`."""

    def done(self, event: Any) -> bool:
        """Whether `event` has fired."""

    def synchronize(self, event: Any, seconds: float, is_over: Callable[[], bool]) -> bool:
        """Block the calling thread until `event` has fired, or until `is_over()`; False when `seconds` are over."""

    def recycle(self, event: Any) -> None:
        """Take an event back that has fired."""

    def protect(self, tensor: Tensor, stream: Any) -> None:
        """Have the allocator hand the memory of `tensor` on only after the work that `stream` has when it is freed."""


class _Mark:
    """An event of one stream: once it has fired, all work up to `tick` is done, and `kept` is no longer read."""

    __slots__ = ("event", "kept", "tick")

    def __init__(self, tick: int, event: Any, kept: tuple[Tensor, ...]) -> None:
        self.tick = tick
        self.event = event
        self.kept = kept


class _Known:
    """What the clock knows of one stream; under the clock's lock."""

    __slots__ = ("done", "lasting", "marks", "recording", "seen", "stream", "tick")

    def __init__(self, stream: Any, lasting: bool, now: int) -> None:
        self.stream = stream
        self.lasting = lasting
        self.tick = now  # its last tick
        self.done = now  # work up to this tick is done
        self.seen: dict[StreamKey, int] = {}  # ticks of other streams that its later work comes after
        self.marks: deque[_Mark] = deque()  # what may not be done yet, about in order
        self.recording = 0  # marks that are about to be added

    def mark_for(self, tick: int) -> _Mark | None:
        """The first mark that covers `tick`, if there is one."""
        for mark in self.marks:
            if mark.tick >= tick:
                return mark
        return None


class StreamClock:
    """Ticks, and what each stream has seen of the others.

    Args:
        backend: the device's streams, or None for a CPU: every method then returns at once.
        lock_factory: makes the clock's lock.
    """

    def __init__(self, backend: StreamBackend | None, lock_factory: Callable[[], Any] = threading.Lock) -> None:
        self.backend = backend
        self._lock = lock_factory()
        self._known: dict[StreamKey, _Known] = {}
        # One count for all streams: what a forgotten stream's ticks were is below those of the next with its handle.
        self._now = 0
        self._shared: tuple[Tensor, ...] = ()

    # Streams -------------------------------------------------------------------------------------------------------

    def current(self) -> Any:
        """The calling thread's current stream, looked up now; None on a CPU.

        Raises:
            StreamCaptureError: it is being captured into a graph, which would run this operation's copies again without
                its books.
        """
        backend = self.backend
        if backend is None:
            return None
        stream = backend.current()
        self._check_not_capturing(backend, stream)
        return stream

    def using(self, stream: object) -> AbstractContextManager[object]:
        """A context in which the calling thread's operations run in `stream`; in the current one where it is None.

        Raises:
            InvalidArgumentError, InvalidTypeError: it is no stream of the device, or the device is a CPU.
        """
        if stream is None:
            return _AS_IT_IS
        self.check(stream)
        assert self.backend is not None
        return self.backend.use(stream)

    def check(self, stream: object) -> None:
        """Raise `InvalidTypeError`, `InvalidArgumentError` or `StreamCaptureError` unless `stream` can be used."""
        if self.backend is None:
            raise InvalidArgumentError(f"stream must be left out where the slots are on a CPU, got {shown(stream)}")
        self.backend.check(stream)
        self._check_not_capturing(self.backend, stream)

    def check_not_capturing(self, stream: Any) -> None:
        """Raise `StreamCaptureError` if `stream` is being captured: an event of it would belong to the graph."""
        if self.backend is not None:
            self._check_not_capturing(self.backend, stream)

    def share(self, tensor: Tensor) -> None:
        """Name a tensor that every stream uses: dropped at any point, its memory outlives their work."""
        if self.backend is not None:
            self._shared = (*self._shared, tensor)

    def drop_shared(self) -> None:
        """Let go of the tensors that every stream uses."""
        self._shared = ()

    def protect(self, tensor: Tensor, stream: Any = None) -> None:
        """Have a tensor that a stream (the current one if left out) uses outlive its work, even when it is dropped."""
        backend = self.backend
        if backend is not None:
            backend.protect(tensor, backend.current() if stream is None else stream)

    def key(self, stream: Any) -> StreamKey:
        """A stream's identity."""
        assert self.backend is not None, "a CPU has no streams"
        return self.backend.key(stream)

    # Order ---------------------------------------------------------------------------------------------------------

    def order_after(self, stream: Any, ticks: Ticks) -> None:
        """Make later work of `stream` wait for the work that `ticks` names, as far as it has not seen it yet.

        Raises:
            StreamCaptureError: a stream that it has to wait for is being captured into a graph.
        """
        backend = self.backend
        if backend is None:
            return
        me, mine = self._meet(backend, stream)
        for producer, tick in ticks.items():
            # A stream that may be another's by now is not known to come after its own earlier work, nor to have waited.
            if mine.lasting and (producer == me or mine.seen.get(producer, 0) >= tick):
                continue
            found = self._covering(backend, producer, tick)
            if found is None:
                continue
            covered, events = found
            for event in events:
                backend.wait(stream, event)
            if mine.lasting:
                # After the wait: another thread that sees this enqueues its work behind it. A maximum: threads race.
                with gate.lock, self._lock:
                    if mine.seen.get(producer, 0) < covered:
                        mine.seen[producer] = covered

    def stamp(self, stream: Any, sources: Iterable[Tensor] = ()) -> Ticks:
        """Tick after enqueuing work on `stream`; `sources` live until that work is done. Empty on a CPU."""
        backend = self.backend
        if backend is None:
            return NO_TICKS
        me, mine = self._meet(backend, stream)
        with gate.lock, self._lock:
            # It may have been forgotten since it was met, and what the clock does not know counts as done.
            mine = self._known.setdefault(me, mine)
            self._now += 1
            tick = mine.tick = self._now
            alone = mine.lasting and len(self._known) == 1
            mine.recording += not alone
        if alone:
            # Memory of this very stream is used again only after the stream's own work; other streams' is protected.
            for source in sources:
                backend.protect(source, stream)
        else:
            self._record(backend, mine, stream, tick, tuple(sources))
            self._retire(backend)
        return {me: tick}

    def synchronize(self, ticks: Ticks, seconds: float) -> bool:
        """Block the calling thread until the work that `ticks` names is done; False when `seconds` are over.

        Raises:
            StreamCaptureError: one of the streams is being captured into a graph.
        """
        backend = self.backend
        if backend is None:
            return True
        end = time.monotonic() + seconds
        for producer, tick in ticks.items():
            found = self._covering(backend, producer, tick)
            # Another thread may see that the event has fired, and record it again for later work, before this one does.
            over = partial(self._is_done, producer, tick)
            for event in () if found is None else found[1]:
                if not backend.synchronize(event, max(0.0, end - time.monotonic()), over):
                    return False
        self._retire(backend)
        return True

    def _is_done(self, producer: StreamKey, tick: int) -> bool:
        known = self._known.get(producer)
        return known is None or known.done >= tick

    def everything(self) -> Ticks:
        """A tick of every stream, after all the work that it has by now."""
        backend = self.backend
        if backend is None:
            return NO_TICKS
        self._retire(backend)  # a stream that others made may be destroyed once its work is done
        with gate.lock, self._lock:
            all_known = list(self._known.values())
        ticks: Ticks = NO_TICKS
        for known in all_known:
            self._check_not_capturing(backend, known.stream)
            ticks = merge(ticks, self.stamp(known.stream))
        return ticks

    def _meet(self, backend: StreamBackend, stream: Any) -> tuple[StreamKey, _Known]:
        """What is known of a stream, from now on if it is new."""
        key = backend.key(stream)
        with gate.lock, self._lock:
            known = self._known.get(key)
        if known is None:
            lasting = backend.is_lasting(stream)
            for tensor in self._shared:
                backend.protect(tensor, stream)
            with gate.lock, self._lock:
                known = self._known.setdefault(key, _Known(stream, lasting, self._now))
        elif not known.lasting:
            known.stream = stream  # the one before may be destroyed
        return key, known

    def _covering(self, backend: StreamBackend, producer: StreamKey, tick: int) -> tuple[int, list[Any]] | None:
        """Events of `producer` and the tick that they cover, `tick` or later; None if that work is done.

        One event, where its handle names one stream for good. Otherwise streams of that handle may have gone before it
        with their work still running, which its own events do not cover: theirs too.

        An event may have fired and been recycled before the caller gets to wait for it: it then waits longer.
        """
        with gate.lock, self._lock:
            known = self._known.get(producer)
            if known is None or known.done >= tick:
                return None
            mark = known.mark_for(tick)
            if mark is not None:
                return mark.tick, [mark.event, *self._of_others(known, mark.tick)]
            stream = known.stream
        # An event of a captured stream would draw the one that waits for it into the graph.
        self._check_not_capturing(backend, stream)
        with gate.lock, self._lock:
            if self._known.get(producer) is not known:
                return None
            # Read before the record: work ticked in between is waited for, but not claimed.
            covered, others = known.tick, self._of_others(known, known.tick)
            known.recording += 1
        return covered, [self._record(backend, known, stream, covered), *others]

    def _record(
        self, backend: StreamBackend, known: _Known, stream: Any, tick: int, kept: tuple[Tensor, ...] = ()
    ) -> Any:
        """Mark work up to `tick`, already counted as `recording`, with a new event."""
        mark = _Mark(tick, backend.record(stream), kept)
        with gate.lock, self._lock:
            known.recording -= 1
            known.marks.append(mark)
        return mark.event

    def _of_others(self, known: _Known, tick: int) -> list[Any]:
        """Events before `tick` that may be of other streams with the same handle. Lock held."""
        return [] if known.lasting else [mark.event for mark in known.marks if mark.tick < tick]

    def _check_not_capturing(self, backend: StreamBackend, stream: Any) -> None:
        if backend.is_capturing(stream):
            raise StreamCaptureError(
                f"stream {backend.key(stream)} is being captured into a graph, of which no pool's copy can be a part; "
                "use the pool before and after the capture, or on another stream"
            )

    def _retire(self, backend: StreamBackend) -> None:
        """Drop what was kept for work that is done, and streams that may be other streams by now."""
        with gate.lock, self._lock:
            all_known = list(self._known.items())
        for key, known in all_known:
            while True:
                with gate.lock, self._lock:
                    mark = known.marks[0] if known.marks else None
                if mark is None or not backend.done(mark.event):
                    break
                with gate.lock, self._lock:
                    if not known.marks or known.marks[0] is not mark:
                        continue  # another thread was faster, and the event may be a new mark's by now
                    known.marks.popleft()
                    known.done = max(known.done, mark.tick)
                    if not (known.lasting or known.marks or known.recording) and known.done == known.tick:
                        self._forget(key, known)
                backend.recycle(mark.event)

    def _forget(self, key: StreamKey, known: _Known) -> None:
        """Take out a stream whose work is done. Lock held."""
        if self._known.get(key) is known:
            del self._known[key]
            for other in self._known.values():
                other.seen.pop(key, None)
