"""Streams as queues, events as places in them, and what may run next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count

__all__ = ["Event", "Queues", "SimStream"]


@dataclass(eq=False)
class _Place:
    """A point in a stream; reached once everything enqueued before it has run."""

    reached: bool = False

    def reach(self) -> None:
        self.reached = True


@dataclass(eq=False)
class _Work:
    """What takes time: it runs when it is chosen."""

    what: str
    run: Callable[[], None]


@dataclass(eq=False)
class _Passing:
    """What takes none: passed as soon as it comes to the front and `may_pass`."""

    passed: Callable[[], object]
    may_pass: Callable[[], bool] = lambda: True


class Event:
    """What CUDA's are: recorded again and again; a wait is for the place it had at the time of the wait."""

    def __init__(self) -> None:
        self.place = _Place(reached=True)  # one that was never recorded has fired


@dataclass(eq=False)
class SimStream:
    """A stream of one device.

    Attributes:
        destroyed: by whoever made it; nothing more can be enqueued.
        handle: what it is called; another stream may have had it before, unless it is `lasting`.
        is_wait: of each item enqueued, not run yet.
    """

    name: str
    device: int
    handle: int
    lasting: bool = True
    capturing: bool = False
    destroyed: bool = False
    items: deque[_Work | _Passing] = field(default_factory=deque, repr=False)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to run or to wait for."""
        return not self.items


class Queues:
    """All streams of all devices, and the order in which they run: whatever `run_next` is called with.

    Attributes:
        ran: what has run, in order.
        recorded_count, waited_count: calls of `record`, and of `wait`.
    """

    def __init__(self, devices: int, streams: int) -> None:
        self.streams: list[SimStream] = []
        self.ran: list[str] = []
        self.recorded_count = self.waited_count = 0
        self._handles = count(1)
        for device in range(devices):
            for number in range(streams):
                self.streams.append(SimStream(f"{number}" if not device else f"{device}.{number}", device, number))

    def add(self, name: str, handle: int) -> SimStream:
        """A stream that others made on device 0, whose handle may have been that of another one."""
        self.streams.append(SimStream(name, 0, handle, lasting=False))
        return self.streams[-1]

    def enqueue(self, stream: SimStream, what: str, run: Callable[[], None]) -> None:
        """Have `run` called some time, after everything that the stream has by now."""
        stream.items.append(_Work(what, run))

    def record(self, stream: SimStream, event: Event) -> None:
        """Move an event behind everything that the stream has by now."""
        assert not stream.destroyed, f"stream {stream.name} was destroyed"
        self.recorded_count += 1
        event.place = _Place()
        self.pass_by(stream, event.place.reach)

    def wait(self, stream: SimStream, event: Event) -> None:
        """Let the stream's later work run only after the event's present place is reached."""
        self.waited_count += 1
        place = event.place
        if not place.reached:
            self.hold(stream, lambda: place.reached)

    def hold(self, stream: SimStream, may_pass: Callable[[], bool]) -> None:
        """Let the stream's later work run only when `may_pass()`."""
        stream.items.append(_Passing(lambda: None, may_pass))
        self._advance()

    def pass_by(self, stream: SimStream, passed: Callable[[], object]) -> None:
        """Have `passed` called as soon as everything is done that the stream has by now."""
        stream.items.append(_Passing(passed))
        self._advance()

    def can_run(self, stream: SimStream) -> bool:
        """Whether the stream's next work may run now."""
        return bool(stream.items) and isinstance(stream.items[0], _Work)

    def run_next(self, stream: SimStream) -> str:
        """Run the stream's next work; says what it was."""
        work = stream.items.popleft()
        assert isinstance(work, _Work)
        work.run()
        self._advance()
        self.ran.append(f"{stream.name}: {work.what}")
        return work.what

    def run_until(self, done: Callable[[], bool], first: Iterable[SimStream] = ()) -> None:
        """Run work, that of `first` before others', until `done()`; what that needs, and perhaps more."""
        order = [*first, *self.streams]
        while not done():
            stream = next((stream for stream in order if self.can_run(stream)), None)
            assert stream is not None, "the device waits for itself"
            self.run_next(stream)

    def drain(self, stream: SimStream) -> None:
        """Run everything that a stream has."""
        self.run_until(lambda: stream.idle, first=[stream])

    @property
    def idle(self) -> bool:
        """Whether every stream is."""
        return all(stream.idle for stream in self.streams)

    def _advance(self) -> None:
        """Pass the records and the waits that can be passed."""
        moved = True
        while moved:
            moved = False
            for stream in self.streams:
                while stream.items and isinstance(item := stream.items[0], _Passing) and item.may_pass():
                    stream.items.popleft()
                    item.passed()
                    moved = True
