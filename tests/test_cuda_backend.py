"""What the backend asks of `torch.cuda`, with a stand-in for it: events that it keeps, and streams that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concurrent_kv import InvalidArgumentError, InvalidTypeError
from concurrent_kv.device import cuda
from concurrent_kv.device.cuda import CudaStreams, current_streams


@dataclass(eq=False)
class FakeStream:
    device_index: int
    cuda_stream: int
    stream_id: int
    capturing: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.device_index)

    def wait_event(self, event: FakeEvent) -> None:
        event.waited_by.append(self)


@dataclass(eq=False)
class FakeEvent:
    recorded: list[FakeStream] = field(default_factory=list)
    waited_by: list[FakeStream] = field(default_factory=list)
    asked: int = 0
    fires_after: int = 0  # questions

    def record(self, stream: FakeStream) -> None:
        self.recorded.append(stream)

    def query(self) -> bool:
        self.asked += 1
        return self.asked > self.fires_after


class FakeCuda:
    """Two devices, and the current stream of each; one thread."""

    Stream = FakeStream
    Event = FakeEvent

    def __init__(self) -> None:
        self.device_number = 0
        self.currents = [FakeStream(0, 0, 0), FakeStream(1, 0, 0)]
        self.entered: list[object] = []

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return len(self.currents)

    def current_device(self) -> int:
        return self.device_number

    def current_stream(self, device: Any = None) -> FakeStream:
        if device is None:
            device = self.device_number
        return self.currents[device.index if isinstance(device, torch.device) else device]

    def is_current_stream_capturing(self) -> bool:
        return self.current_stream().capturing

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.entered.append(stream)
        before = self.device_number, self.currents[stream.device_index]
        self.device_number, self.currents[stream.device_index] = stream.device_index, stream
        yield
        self.device_number, self.currents[stream.device_index] = before

    @contextmanager
    def device(self, number: int) -> Iterator[None]:
        self.entered.append(number)
        before, self.device_number = self.device_number, number
        yield
        self.device_number = before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    names = {name: getattr(torch, name) for name in ("device", "cuda")}
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(**{**names, "cuda": made}))
    return made


@pytest.fixture
def streams(fake: FakeCuda) -> Any:
    return CudaStreams(torch.device("cuda", 0))


OWN, OTHER = FakeStream(0, 0x7F00, 0x21), FakeStream(0, 0x7F10, 0x41)


def test_events_that_came_back_are_recorded_again(streams: Any) -> None:
    first = streams.record(OWN)
    assert streams.record(OTHER) is not first
    streams.recycle(first)
    assert streams.record(OTHER) is first
    assert first.recorded == [OWN, OTHER]


def test_a_wait_is_the_streams_and_blocks_nobody(streams: Any) -> None:
    event = streams.record(OWN)
    streams.wait(OTHER, event)
    assert event.waited_by == [OTHER]
    assert not event.asked


def test_the_host_asks_until_an_event_has_fired_or_the_time_is_over(streams: Any) -> None:
    assert streams.synchronize(FakeEvent(fires_after=5), 60.0, lambda: False)
    never = FakeEvent(fires_after=1_000_000)
    assert not streams.synchronize(never, 0.0, lambda: False)
    assert never.asked == 1
    answers = iter((False, False, True))
    assert streams.synchronize(never, 60.0, lambda: next(answers))


@pytest.mark.parametrize(
    ("stream", "lasting"),
    [
        (FakeStream(0, 0, 0), True),  # the default stream
        (OWN, True),  # of torch's pools
        (FakeStream(0, 0x7F00, 0x7F00), False),  # wrapped by torch: its id is its handle
        (FakeStream(0, 2, 2), False),  # the default stream of whichever thread
    ],
)
def test_only_torchs_own_streams_are_taken_to_keep_their_handle(
    streams: Any, stream: FakeStream, lasting: bool
) -> None:
    assert streams.is_lasting(stream) is lasting


def test_streams_of_two_devices_have_two_identities(streams: Any) -> None:
    assert streams.key(FakeStream(0, 0x10, 1)) != streams.key(FakeStream(1, 0x10, 1))


def test_what_is_no_stream_of_the_device_is_refused_by_name(streams: Any) -> None:
    streams.check(OWN)
    with pytest.raises(InvalidTypeError, match=r"stream must be a torch\.cuda\.Stream, got 5"):
        streams.check(5)
    with pytest.raises(InvalidArgumentError, match="stream must be a stream of cuda:0, got one of cuda:1"):
        streams.check(FakeStream(1, 0x10, 1))


@pytest.mark.parametrize("current", [True, False])
def test_a_capture_is_noticed_in_the_current_stream_and_in_others(fake: FakeCuda, streams: Any, current: bool) -> None:
    captured, free = FakeStream(0, 0x10, 1, capturing=True), FakeStream(0, 0x20, 2)
    fake.currents[0] = captured if current else free
    assert streams.is_capturing(captured)
    assert not streams.is_capturing(free)
    assert fake.current_stream() is (captured if current else free)


def test_current_streams_and_device_go_along_to_another_thread(fake: FakeCuda) -> None:
    mine = [FakeStream(0, 0x10, 1), FakeStream(1, 0x20, 2)]
    fake.currents, fake.device_number = list(mine), 1
    captured = current_streams()
    fake.currents, fake.device_number = [FakeStream(0, 0, 0), FakeStream(1, 0, 0)], 0  # as in a worker
    for _ in range(2):
        with captured:
            assert fake.currents == mine
            assert fake.current_device() == 1
        assert fake.current_stream() is not mine[0]
        assert fake.current_device() == 0


def test_devices_whose_stream_is_current_already_are_left_alone(fake: FakeCuda) -> None:
    with current_streams():
        assert not fake.entered


def test_a_process_without_cuda_has_nothing_to_carry_along() -> None:
    assert not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with current_streams():
        pass
