"""Order between streams: one happens-before clock for a storage.

Every stream that touches the storage has a tick counter. An operation enqueues its work, *then* takes a tick, and the
tick travels with the entry or with the freed slots; whoever uses those next on another stream first makes that stream
wait for an event that covers the tick. On a CPU copies are done when they return, and the clock does nothing.

Lock order: the clock's own lock is innermost and is never held while a backend is called.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["NO_TICKS", "CudaStreams", "StreamBackend", "StreamClock", "StreamKey", "Ticks", "backend_for", "merge"]

StreamKey = tuple[int, int]  # (device index, stream handle)
Ticks = Mapping[StreamKey, int]

NO_TICKS: Ticks = MappingProxyType({})


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
    """What the clock needs of a device. Streams and events are opaque to it."""

    def current(self) -> Any:
        """The calling thread's current stream on the storage's device."""

    def key(self, stream: Any) -> StreamKey:
        """The stream's identity."""

    def record(self, stream: Any) -> Any:
        """An event that fires when all work enqueued on `stream` so far is done."""

    def wait(self, stream: Any, event: Any) -> None:
        """Make later work of `stream` wait for `event`; does not block the host."""

    def done(self, event: Any) -> bool:
        """Whether `event` has fired."""

    def recycle(self, event: Any) -> None:
        """Take an event back that nothing refers to any more."""


class CudaStreams:
    """`StreamBackend` over `torch.cuda`, with pooled events."""

    # ruff: noqa: D102 - the contract stands at StreamBackend

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free_events: deque[torch.cuda.Event] = deque()

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def key(self, stream: torch.cuda.Stream) -> StreamKey:
        return (stream.device_index, stream.cuda_stream)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        try:
            event = self._free_events.popleft()
        except IndexError:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def done(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())  # type: ignore[no-untyped-call]

    def recycle(self, event: torch.cuda.Event) -> None:
        self._free_events.append(event)


def backend_for(device: torch.device) -> StreamBackend | None:
    """The backend of a device; None where work is done when its call returns."""
    return CudaStreams(device) if device.type == "cuda" else None


class StreamClock:
    """Ticks, and what each stream has seen of the others.

    Args:
        backend: the device's streams, or None for a CPU: every method then returns at once.
        lock_factory: makes the clock's lock.
    """

    def __init__(self, backend: StreamBackend | None, lock_factory: Callable[[], Any] = threading.Lock) -> None:
        self._backend = backend
        self._lock = lock_factory()
        self._streams: dict[StreamKey, Any] = {}
        self._ticks: dict[StreamKey, int] = {}
        self._seen: dict[StreamKey, dict[StreamKey, int]] = {}
        # Events by producer, oldest first: (covered tick, event). Only kept once a second stream is known.
        self._events: dict[StreamKey, deque[tuple[int, Any]]] = {}
        # What a copy that may still run reads from: (event, objects).
        self._kept: deque[tuple[Any, tuple[object, ...]]] = deque()

    def current(self) -> Any:
        """The calling thread's current stream, looked up now; None on a CPU."""
        return None if self._backend is None else self._backend.current()

    def order_after(self, stream: Any, ticks: Ticks) -> None:
        """Make later work of `stream` wait for the work that `ticks` names, as far as it has not seen it yet."""
        backend = self._backend
        if backend is None or not ticks:
            return
        me = backend.key(stream)
        for producer, tick in ticks.items():
            if producer == me:
                continue
            with self._lock:
                if self._seen.setdefault(me, {}).get(producer, 0) >= tick:
                    continue
                covered, event = next(
                    (item for item in self._events.get(producer, ()) if item[0] >= tick), (self._ticks[producer], None)
                )
                source = self._streams[producer]
            if event is None:
                # `covered` was read before the record: work ticked in between is waited for, but not claimed.
                event = backend.record(source)
            backend.wait(stream, event)
            with self._lock:
                seen = self._seen[me]
                if seen.get(producer, 0) < covered:
                    seen[producer] = covered

    def stamp(self, stream: Any, sources: tuple[Tensor, ...] = ()) -> Ticks:
        """Tick after enqueuing work on `stream`; `sources` live until that work is done. Empty on a CPU."""
        backend = self._backend
        if backend is None:
            return NO_TICKS
        me = backend.key(stream)
        with self._lock:
            tick = self._ticks[me] = self._ticks.get(me, 0) + 1
            self._streams[me] = stream
            several = len(self._streams) > 1
        staged = tuple(source for source in sources if source.device.type == "cpu" and source.is_pinned())
        if several:
            event = backend.record(stream)
            with self._lock:
                self._events.setdefault(me, deque()).append((tick, event))
        if several or staged:
            with self._lock:
                self._kept.append((backend.record(stream), sources if several else staged))
        self._retire()
        return {me: tick}

    def everything(self) -> Ticks:
        """All work ticked so far, on every stream."""
        with self._lock:
            return dict(self._ticks)

    def _retire(self) -> None:
        """Drop sources and events whose work is done."""
        backend = self._backend
        assert backend is not None
        while True:
            with self._lock:
                if not self._kept:
                    break
                event, sources = self._kept.popleft()
            if not backend.done(event):
                with self._lock:
                    self._kept.appendleft((event, sources))
                break
            backend.recycle(event)
        with self._lock:
            for events in self._events.values():
                while len(events) > 1 and backend.done(events[0][1]):
                    # Not recycled: another thread may be about to wait for it. It is freed when nobody holds it.
                    events.popleft()
