"""CUDA's streams and events as the clock wants them, and a thread's current streams for another thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidTypeError, StreamCaptureError, WaitTimeoutError, shown
from .streams import StreamBackend, StreamKey

__all__ = ["AS_THEY_ARE", "CudaStreams", "backend_for", "current_streams", "refuse_capture", "settle"]

MAX_FREE_EVENTS = 256
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 20e-6, 1e-3


class CudaStreams:
    """`StreamBackend` over `torch.cuda`, with pooled events."""

    # ruff: noqa: D102 - the contract stands at StreamBackend

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free_events: deque[torch.cuda.Event] = deque(maxlen=MAX_FREE_EVENTS)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def check(self, stream: object) -> None:
        if not isinstance(stream, torch.cuda.Stream):
            raise InvalidTypeError(f"stream must be a torch.cuda.Stream, got {shown(stream)}")
        if stream.device != self._device:
            raise InvalidArgumentError(f"stream must be a stream of {self._device}, got one of {stream.device}")

    def key(self, stream: torch.cuda.Stream) -> StreamKey:
        return (stream.device_index, stream.cuda_stream)

    def is_lasting(self, stream: torch.cuda.Stream) -> bool:
        # torch's own streams live as long as the process. Of a stream that others made, torch's id is its handle.
        return stream.cuda_stream == 0 or stream.stream_id != stream.cuda_stream

    def is_capturing(self, stream: torch.cuda.Stream) -> bool:
        if stream == torch.cuda.current_stream():
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.stream(stream):
            return torch.cuda.is_current_stream_capturing()

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

    def synchronize(self, event: torch.cuda.Event, seconds: float, is_over: Callable[[], bool]) -> bool:
        # Asked again and again, because the event's own synchronize() knows no limit.
        end, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
        while not (is_over() or self.done(event)):
            if time.monotonic() >= end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return True

    def recycle(self, event: torch.cuda.Event) -> None:
        self._free_events.append(event)

    def protect(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        # Nothing happens, and nothing is recorded, for the stream that the memory was allocated on.
        if tensor.device == self._device:
            tensor.record_stream(stream)


def backend_for(device: torch.device) -> StreamBackend | None:
    """The backend of a device; None where work is done when its call returns."""
    return CudaStreams(device) if device.type == "cuda" else None


def refuse_capture(device: torch.device) -> None:
    """Raise `StreamCaptureError` if the current stream of `device` is being captured into a graph."""
    backend = backend_for(device)
    if backend is not None and backend.is_capturing(backend.current()):
        raise StreamCaptureError(
            f"the current stream of {device} is being captured: do this before or after the capture"
        )


def settle(device: torch.device, seconds: float = 60.0) -> None:
    """Block until the current stream of `device` has done its work so far, which any stream may then come after."""
    backend = backend_for(device)
    if backend is not None:
        event = backend.record(backend.current())
        if not backend.synchronize(event, seconds, lambda: False):
            raise WaitTimeoutError(f"{device} has not done its work within {seconds:g} s")
        backend.recycle(event)


AS_THEY_ARE: AbstractContextManager[object] = nullcontext()


def current_streams() -> AbstractContextManager[object]:
    """A context in which any thread has the current device and streams that the caller has now.

    `AS_THEY_ARE` where no work has used CUDA.
    """
    return _CallersStreams() if torch.cuda.is_initialized() else AS_THEY_ARE  # type: ignore[no-untyped-call]


class _CallersStreams(AbstractContextManager[None]):
    """One thread's current streams, made another's for the length of a `with`."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._streams = [torch.cuda.current_stream(device) for device in range(torch.cuda.device_count())]

    def __enter__(self) -> None:
        with ExitStack() as stack:
            # The current device's last, as entering a stream makes its device the current one.
            for stream in (*self._streams, self._streams[self._device]):
                # Where nothing differs nothing is entered: it would initialise devices that no work uses.
                if torch.cuda.current_stream(stream.device) != stream:
                    stack.enter_context(torch.cuda.stream(stream))
            if torch.cuda.current_device() != self._device:
                stack.enter_context(torch.cuda.device(self._device))
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
