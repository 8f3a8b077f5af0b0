"""`StreamUses`: which streams use a buffer; each is ordered after the others, and the next owner after all of them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from ..errors import StreamCaptureError
from .streams import NO_TICKS, StreamClock, StreamKey, Ticks, merge

__all__ = ["StreamUses"]


class StreamUses:
    """The uses of a batch's buffer, by the stream that gathered it first. For one thread at a time.

    Args:
        ticks: of the gather.
    """

    __slots__ = ("_clock", "_current", "_streams", "gathered")

    def __init__(self, clock: StreamClock, stream: Any, ticks: Ticks) -> None:
        self._clock = clock
        self._current = clock.key(stream)
        self._streams: dict[StreamKey, Any] = {self._current: stream}  # every user; each may have uses without a tick
        self.gathered = ticks

    def join(self, buffer: Tensor, stream: Any = None) -> None:
        """Order a stream (the current one if left out) after every use of `buffer` so far, and count it in."""
        clock = self._clock
        stream = clock.current() if stream is None else stream
        key = clock.key(stream)
        if key == self._current:
            return
        clock.order_after(stream, self._ticks(besides=key))
        # A caller that drops the batch unclosed must not have its memory used again under this stream's hands.
        clock.protect(buffer, stream)
        self._streams[key] = stream
        self._current = key

    def finish(self, buffer: Tensor) -> Ticks | None:
        """What the next owner of `buffer` has to come after.

        None while one of its streams is captured: no stream can be ordered after that now; drop the buffer.
        """
        # A stream that the user ordered by other means is most likely the one the batch is closed in.
        with suppress(StreamCaptureError):
            stream = self._clock.current()
            self._streams.setdefault(self._clock.key(stream), stream)
        try:
            return self._ticks(buffer)
        except StreamCaptureError:
            for stream in self._streams.values():
                self._clock.protect(buffer, stream)
            return None

    def _ticks(self, *kept: Tensor, besides: StreamKey | None = None) -> Ticks:
        ticks = NO_TICKS
        for key, stream in self._streams.items():
            if key != besides:
                self._clock.check_not_capturing(stream)
                ticks = merge(ticks, self._clock.stamp(stream, kept))
        return ticks
