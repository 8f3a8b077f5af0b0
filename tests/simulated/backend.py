"""The clock's `StreamBackend` over the simulated device, and the places where the library looks one up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from concurrent_kv import KVLayout
from concurrent_kv.device.streams import StreamKey

from .gpu import KIND, SimGPU
from .queues import Event, SimStream

__all__ = ["SimStreams", "install", "layout_on"]


def _no_step(what: str, ready: Callable[[], bool] = lambda: True) -> None:
    assert ready(), f"{what} would wait for ever"


class SimStreams:
    """Streams of one device.

    Args:
        step: called before each call takes effect, so that other host threads can go first.

    Attributes:
        alive_count, most_alive: events that were not recycled, and the most there were.
    """

    def __init__(self, gpu: SimGPU, device: int = 0, step: Callable[..., object] = _no_step) -> None:
        self.gpu = gpu
        self.step = step
        self.alive_count = self.most_alive = 0
        self._device = device
        self._free: list[Event] = []

    def current(self) -> SimStream:
        return self.gpu.current(self._device)

    def use(self, stream: SimStream) -> AbstractContextManager[object]:
        return self.gpu.use(stream)

    def check(self, stream: object) -> None:
        assert isinstance(stream, SimStream)

    def key(self, stream: SimStream) -> StreamKey:
        return (stream.device, stream.handle)

    def is_lasting(self, stream: SimStream) -> bool:
        return stream.lasting

    def is_capturing(self, stream: SimStream) -> bool:
        return stream.capturing

    def record(self, stream: SimStream) -> Event:
        self.step(f"records an event in stream {stream.name}")
        event = self._free.pop() if self._free else Event()
        self.alive_count += 1
        self.most_alive = max(self.most_alive, self.alive_count)
        self.gpu.queues.record(stream, event)
        return event

    def wait(self, stream: SimStream, event: Event) -> None:
        self.step(f"makes stream {stream.name} wait")
        self.gpu.queues.wait(stream, event)

    def done(self, event: Event) -> bool:
        self.step("asks for an event")
        return event.place.reached

    def synchronize(self, event: Event, seconds: float, is_over: Callable[[], bool]) -> bool:
        def may_go_on() -> bool:  # the event's place of then, not of now
            return event.place.reached or is_over()

        if self.step is _no_step:
            self.gpu.queues.run_until(may_go_on)
        else:
            self.step("waits for the device", may_go_on)
        return True

    def recycle(self, event: Event) -> None:
        self.alive_count -= 1
        self._free.append(event)

    def protect(self, tensor: Tensor, stream: SimStream) -> None:
        self.gpu.protect(tensor, stream)


def install(patch: pytest.MonkeyPatch, gpu: SimGPU, step: Callable[..., object] = _no_step) -> None:
    """Have the library find the simulated devices where it would find CUDA's."""

    def backend_for(device: torch.device) -> SimStreams | None:
        return SimStreams(gpu, device.index, step) if device.type == KIND else None

    class Currents(AbstractContextManager[None]):
        def __init__(self) -> None:
            self._streams = gpu.currents()

        def __enter__(self) -> None:
            self._stack = ExitStack()
            self._stack.enter_context(gpu)  # a worker's thread is not in it yet
            self._stack.enter_context(gpu.use(*self._streams))

        def __exit__(self, *error: object) -> None:
            self._stack.close()

    for module in ("device.cuda", "pool.storage", "device.moving"):
        patch.setattr(f"concurrent_kv.{module}.backend_for", backend_for)
    for module in ("aio.offload", "aio.pool"):
        patch.setattr(f"concurrent_kv.{module}.current_streams", Currents)
    for module in ("device.layout", "model.kv"):
        patch.setattr(f"concurrent_kv.{module}.SUPPORTED_DEVICES", ("cpu", "cuda", KIND))


def layout_on(gpu: SimGPU, device: int = 0, **sizes: Any) -> KVLayout:
    """A layout on a simulated device."""
    small = {"num_layers": 1, "num_heads": 1, "head_dim": 1, "max_tokens": 4}
    return KVLayout(**{**small, **sizes}, device=gpu.devices[device])
