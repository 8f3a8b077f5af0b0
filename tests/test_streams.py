"""What a pool does with streams: how many events it needs, which stream it works in, what it waits for; captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from concurrent_kv import (
    Batch,
    ClosedError,
    DropAndCorrect,
    InvalidArgumentError,
    KeysValues,
    KVPool,
    KVStorage,
    PositionTable,
    StreamCaptureError,
    WaitTimeoutError,
)
from tests.conftest import MakePool
from tests.simulated.backend import SimStreams, layout_on
from tests.simulated.fixtures import gpu as gpu
from tests.simulated.gpu import SimGPU
from tests.simulated.queues import SimStream


def pool_on(gpu: SimGPU, entries: int = 4, device: int = 0) -> tuple[KVPool, SimStreams]:
    """A pool, and the streams it works with."""
    layout, streams = layout_on(gpu, device), SimStreams(gpu, device)
    storage = KVStorage(layout, entries * layout.max_tokens, headroom_slots=2 * layout.max_tokens, backend=streams)
    pool = KVPool(layout, entries, storage=storage)
    pool.owns_storage = True
    return pool, streams


def row(gpu: SimGPU, number: float, tokens: int = 2, device: int = 0) -> KeysValues:
    """One row on a device, all of one number."""
    return KeysValues.from_packed(torch.full((2, 1, 1, tokens, 1), float(number)).to(gpu.devices[device]))


def number_in(gpu: SimGPU, kv: KeysValues | None) -> float:
    """The number of a row, once the device has done everything."""
    assert kv is not None
    run(gpu)
    found = torch.cat([gpu.read(kv.keys), gpu.read(kv.values)]).unique()  # type: ignore[no-untyped-call]
    assert len(found) == 1, found
    return float(found)


def run(gpu: SimGPU, *first: SimStream) -> None:
    gpu.queues.run_until(lambda: gpu.queues.idle, first)


def every_operation(gpu: SimGPU, pool: KVPool) -> None:
    for key in range(6):  # more than it holds
        pool.put(key, row(gpu, key))
    pool.get(5)
    batch = pool.gather([4, 5])
    batch.append(0, torch.ones(2, 1, 1, 1).to(gpu.devices[0]), torch.ones(2, 1, 1, 1).to(gpu.devices[0]))
    pool.commit(["a", "b"], batch)
    with pool.gather(["a", "missing"]) as batch:
        batch.fill(1, row(gpu, 9))
        assert batch.padding.shape == (2,)
        batch.wait()
    with pool.pin("a") as pin:
        pin.get()
    pool.get_or_compute("c", lambda: row(gpu, 7))
    pool.pop("b")
    pool.clear()
    pool.check_integrity()


# Events --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", [0, 3])
def test_one_stream_alone_needs_no_event(gpu: SimGPU, home: int) -> None:
    with gpu.use(gpu.stream(home)):
        pool, _ = pool_on(gpu)
        every_operation(gpu, pool)
    assert (gpu.queues.recorded_count, gpu.queues.waited_count) == (0, 0)
    pool.close()


def test_from_the_second_stream_on_an_operation_records_one_event(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    with gpu.use(gpu.stream(1)):
        pool.put("a", row(gpu, 1))
    for operation in (lambda: pool.put("b", row(gpu, 2)), lambda: pool.get("a"), lambda: pool.peek("b")):
        before = gpu.queues.recorded_count
        with gpu.use(gpu.stream(1)):
            operation()
        assert gpu.queues.recorded_count == before + 1
    pool.close()


def test_what_a_stream_has_seen_it_does_not_wait_for_again(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    with gpu.use(gpu.stream(1)):
        pool.put("a", row(gpu, 1))
        pool.put("b", row(gpu, 2))
    with gpu.use(gpu.stream(2)):
        pool.gather(["a", "b"]).close()
        waited = gpu.queues.waited_count
        for _ in range(3):
            pool.get("a")
        pool.gather(["b", "a"]).close()
    assert gpu.queues.waited_count == waited
    pool.close()


def test_what_is_done_is_not_waited_for(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    for stream in (1, 2):
        with gpu.use(gpu.stream(stream)):
            pool.put(stream, row(gpu, stream))
    run(gpu)
    with gpu.use(gpu.stream(1)):
        pool.get(1)  # looks at what is done
        waited = gpu.queues.waited_count
        pool.get(2)
    assert gpu.queues.waited_count == waited
    pool.close()


@pytest.mark.parametrize("late", [False, True])
def test_events_are_as_many_as_operations_in_flight_and_not_as_entries(gpu: SimGPU, late: bool) -> None:
    pool, streams = pool_on(gpu, entries=50)
    for number in range(100):
        with gpu.use(gpu.stream(1 + number % 4)):
            pool.put(number % 60, row(gpu, number))
            pool.get((7 * number) % 60)
        if not late or number % 10 == 9:
            run(gpu)
    operations_in_flight = 20 if late else 2
    # And of each stream one of earlier work, found to be done at its own next operation or another stream's.
    assert streams.most_alive <= operations_in_flight + 5
    pool.close()
    assert streams.alive_count == 0


def test_streams_that_others_made_are_forgotten_when_their_work_is_done(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    for number in range(10):
        with gpu.use(gpu.queues.add(f"x{number}", handle=1000 + number)):
            pool.put("a", row(gpu, number))
        run(gpu)
    pool.put("a", row(gpu, 99))
    assert len(pool.storage.clock._known) == 1
    recorded = gpu.queues.recorded_count
    pool.put("a", row(gpu, 98))  # alone again
    assert gpu.queues.recorded_count == recorded
    assert number_in(gpu, pool.get("a")) == 98
    pool.close()


def test_a_stream_that_was_destroyed_when_its_work_was_done_is_not_asked_by_close(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    made_by_others = gpu.queues.add("x", handle=1000)
    with gpu.use(made_by_others):
        pool.put("a", row(gpu, 1))
    run(gpu)
    made_by_others.destroyed = True
    pool.close()
    assert pool.storage.tensor.freed


# Which stream --------------------------------------------------------------------------------------------------------


NAMED: dict[str, Callable[[KVPool, KeysValues, Any], object]] = {
    "put": lambda pool, kv, stream: pool.put("new", kv, stream=stream),
    "put_many": lambda pool, kv, stream: pool.put_many(["new"], kv, stream=stream),
    "get": lambda pool, kv, stream: pool.get("a", stream=stream),
    "peek": lambda pool, kv, stream: pool.peek("a", stream=stream),
    "pop": lambda pool, kv, stream: pool.pop("a", stream=stream),
    "gather": lambda pool, kv, stream: pool.gather(["a"], stream=stream).close(),
    "pin": lambda pool, kv, stream: pool.pin("a").get(stream=stream),
}


@pytest.mark.parametrize("operation", NAMED)
def test_an_operation_works_in_the_stream_that_it_is_given(gpu: SimGPU, operation: str) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    kv = row(gpu, 5)
    run(gpu)
    del gpu.queues.ran[:]
    NAMED[operation](pool, kv, gpu.stream(2))
    run(gpu)
    assert {ran.partition(":")[0] for ran in gpu.queues.ran} == {"2"}
    assert gpu.current() is gpu.stream(0)
    pool.close()


def test_a_commit_works_in_the_stream_that_it_is_given(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    batch = pool.gather(["a"], stream=gpu.stream(1))  # type: ignore[arg-type]
    with gpu.use(gpu.stream(1)):
        batch.append(0, torch.ones(1, 1, 1, 1).to(gpu.devices[0]), torch.ones(1, 1, 1, 1).to(gpu.devices[0]))
    run(gpu)
    del gpu.queues.ran[:]
    pool.commit(["b"], batch, stream=gpu.stream(3))  # type: ignore[arg-type]
    run(gpu)
    assert {ran.partition(":")[0] for ran in gpu.queues.ran} == {"3"}
    assert number_in(gpu, pool.get("b")) == 1
    pool.close()


def test_the_stream_is_looked_up_at_every_call(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    for stream in (3, 1, 2):
        with gpu.use(gpu.stream(stream)):
            pool.put("a", row(gpu, stream))
            assert any(not gpu.stream(number).idle for number in (stream,))
        run(gpu)
        assert gpu.queues.ran[-1].startswith(f"{stream}:")
    pool.close()


def test_a_pool_on_a_cpu_takes_no_stream(make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(InvalidArgumentError, match="stream must be left out"):
        pool.get("a", stream=object())  # type: ignore[arg-type]
    pool.put("a", KeysValues.from_packed(torch.zeros(4, 1, 2, 1, 3)))
    with pool.gather(["a"]) as batch:
        batch.wait()
        batch.synchronize()
        with pytest.raises(InvalidArgumentError, match="stream must be left out"):
            batch.wait(object())


# From and to other devices -------------------------------------------------------------------------------------------


def test_pools_on_different_devices_take_each_others_entries(gpu: SimGPU) -> None:
    (here, _), (there, _) = pool_on(gpu), pool_on(gpu, device=1)
    cpu = KVPool(layout_on_cpu(gpu), 4)
    here.put("a", row(gpu, 5))
    there.put("a", here.get("a") or row(gpu, 0))
    cpu.put("a", there.get("a") or row(gpu, 0))
    found = cpu.get("a")
    assert found is not None
    assert found.keys.ravel().tolist() == [5.0, 5.0]
    here.put("b", found)
    assert number_in(gpu, here.get("b")) == 5
    for pool in (here, there, cpu):
        pool.check_integrity()
        pool.close()


def layout_on_cpu(gpu: SimGPU) -> Any:
    return replace(layout_on(gpu), device=torch.device("cpu"))


READS: dict[str, Callable[[KVPool, Any], KeysValues | None]] = {
    "get": lambda pool, to: pool.get("a", to=to),
    "peek": lambda pool, to: pool.peek("a", to=to),
    "pop": lambda pool, to: pool.pop("a", to=to),
    "pin": lambda pool, to: pool.pin("a").get(to=to),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_to_the_host_is_complete_when_it_returns(gpu: SimGPU, read: str) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 5), stream=gpu.stream(2))  # type: ignore[arg-type]
    found = READS[read](pool, "cpu")
    assert found is not None
    assert found.keys.device == torch.device("cpu")
    assert found.keys.ravel().tolist() == [5.0, 5.0]  # nothing was waited for here
    pool.close()


@pytest.mark.parametrize("read", READS)
def test_a_read_to_another_device_comes_in_the_order_of_its_current_stream(gpu: SimGPU, read: str) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 5))
    with gpu.use(gpu.stream(2, 1)):
        found = READS[read](pool, gpu.devices[1])
        assert found is not None
        doubled = found.keys * 2
    run(gpu, gpu.stream(2, 1))
    assert found.keys.device == gpu.devices[1]
    assert gpu.read(doubled).ravel().tolist() == [10.0, 10.0]
    pool.close()


def test_a_batch_is_filled_and_a_computation_answered_from_the_host(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    with pool.gather(["missing"]) as batch:
        batch.fill(0, KeysValues.from_packed(torch.full((2, 1, 1, 2, 1), 4.0)))
        seen = batch.data[:, :, :, :2].clone()
    taken = pool.get_or_compute("c", lambda: KeysValues.from_packed(torch.full((2, 1, 1, 2, 1), 3.0)))
    assert taken.keys.device == gpu.devices[0]
    assert number_in(gpu, taken) == 3
    assert set(gpu.read(seen).ravel().tolist()) == {4.0}
    pool.close()


def test_a_copy_from_elsewhere_is_refused(make_pool: MakePool) -> None:
    pool = make_pool()
    meta = torch.zeros(4, 1, 2, 1, 3, device="meta")
    with pytest.raises(InvalidArgumentError, match="kv must be on cpu, got meta"):
        pool.put("a", KeysValues.from_packed(meta))


# The end -------------------------------------------------------------------------------------------------------------


def test_a_close_that_the_device_keeps_waiting_says_so_and_can_be_repeated(
    gpu: SimGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1), stream=gpu.stream(1))  # type: ignore[arg-type]
    waited: list[float] = []
    with monkeypatch.context() as patch:
        patch.setattr(SimStreams, "synchronize", lambda self, event, seconds, is_over: waited.append(seconds))
        with pytest.raises(WaitTimeoutError, match="close again"):
            pool.close(timeout=0.25)
    assert len(waited) == 1
    assert 0 < waited[0] <= 0.25
    assert not pool.storage.tensor.freed
    with pytest.raises(ClosedError):
        pool.get("a")
    pool.close()
    assert pool.storage.tensor.freed
    pool.close()


def test_a_host_that_waits_is_not_kept_by_work_that_came_later(gpu: SimGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it waits for is done, but another thread saw that first and recorded the same event again."""
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    batch = pool.gather(["a"], stream=gpu.stream(1))  # type: ignore[arg-type]
    seen: list[tuple[bool, bool]] = []

    def synchronize(self: SimStreams, event: Any, seconds: float, is_over: Callable[[], bool]) -> bool:
        run(gpu)
        for _ in range(8):
            pool.get("a", stream=gpu.stream(2))  # type: ignore[arg-type]
        seen.append((event.place.reached, is_over()))
        return is_over()

    with monkeypatch.context() as patch:
        patch.setattr(SimStreams, "synchronize", synchronize)
        batch.synchronize()
    assert seen == [(False, True)]
    batch.close()
    pool.close()


def test_a_close_waits_for_all_streams_together_no_longer_than_it_was_told(
    gpu: SimGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _ = pool_on(gpu)
    for stream in (1, 2):
        pool.put(stream, row(gpu, stream), stream=gpu.stream(stream))  # type: ignore[arg-type]
    now = [100.0]
    given: list[float] = []

    def synchronize(self: SimStreams, event: Any, seconds: float, is_over: object) -> bool:
        given.append(seconds)
        now[0] += 2.0
        return True

    with monkeypatch.context() as patch:
        patch.setattr(SimStreams, "synchronize", synchronize)
        patch.setattr("concurrent_kv.device.streams.time.monotonic", lambda: now[0])
        pool.storage.clock.synchronize(pool.storage.clock.everything(), 5.0)
    assert given == [5.0, 3.0, 1.0]
    pool.close()


# Graphs --------------------------------------------------------------------------------------------------------------


CAPTURED: dict[str, Callable[[SimGPU, KVPool], object]] = {
    "put": lambda gpu, pool: pool.put("a", row(gpu, 2)),
    "put a new key": lambda gpu, pool: pool.put("b", row(gpu, 2)),
    "get": lambda gpu, pool: pool.get("a"),
    "gather": lambda gpu, pool: pool.gather(["a"]),
    "pop": lambda gpu, pool: pool.pop("a"),
}


@pytest.mark.parametrize("operation", CAPTURED)
def test_an_operation_in_a_stream_that_is_captured_is_refused_and_changes_nothing(gpu: SimGPU, operation: str) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    with gpu.use(gpu.stream(1)):
        gpu.stream(1).capturing = True
        with pytest.raises(StreamCaptureError, match="being captured"):
            CAPTURED[operation](gpu, pool)
        gpu.stream(1).capturing = False
    pool.check_integrity()
    assert len(pool) == 1
    assert number_in(gpu, pool.get("a")) == 1
    pool.close()


def test_a_pool_is_used_while_another_stream_is_captured(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    gpu.stream(4).capturing = True
    for stream in (1, 2):
        with gpu.use(gpu.stream(stream)):
            every_operation(gpu, pool)
    pool.close()


def test_a_stream_that_is_captured_cannot_be_waited_for(gpu: SimGPU) -> None:
    """Its first event would have to be recorded in the middle of the capture, and would draw the waiting stream in."""
    with gpu.use(gpu.stream(1)):
        pool, _ = pool_on(gpu)
        pool.put("a", row(gpu, 1))  # alone: no event
    gpu.stream(1).capturing = True
    with gpu.use(gpu.stream(2)), pytest.raises(StreamCaptureError):
        pool.get("a")
    gpu.stream(1).capturing = False
    with gpu.use(gpu.stream(2)):
        found = pool.get("a")
    assert number_in(gpu, found) == 1
    pool.check_integrity()
    pool.close()


def test_a_batch_is_closed_while_its_own_stream_is_not_captured(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    batch = pool.gather(["a"])
    with gpu.use(gpu.stream(1)):
        gpu.stream(1).capturing = True
        batch.close()
        gpu.stream(1).capturing = False
    assert batch.closed
    pool.close()


def test_a_batch_used_in_a_stream_that_is_captured_is_closed_and_its_buffer_dropped(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    batch = pool.gather(["a"], stream=gpu.stream(1))  # type: ignore[arg-type]
    address, recorded = batch.data.data_ptr(), gpu.queues.recorded_count
    gpu.stream(1).capturing = True
    batch.close()
    gpu.stream(1).capturing = False
    assert gpu.queues.recorded_count == recorded
    with pool.gather(["a"]) as again:
        assert again.data.data_ptr() != address
    pool.check_integrity()
    pool.close()


def test_a_stream_that_is_captured_is_refused_by_name_too(gpu: SimGPU) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    captured: Any = gpu.stream(3)
    captured.capturing = True
    with pool.gather(["a"]) as batch:
        waited = gpu.queues.waited_count
        for refused in (partial(batch.wait, captured), partial(pool.get, "a", stream=captured)):
            with pytest.raises(StreamCaptureError, match="being captured"):
                refused()
        assert gpu.queues.waited_count == waited
    captured.capturing = False
    pool.close()


def on_host() -> KeysValues:
    return KeysValues.from_packed(torch.ones(2, 1, 1, 2, 1))


Refused = Callable[[SimGPU, KVPool, Batch, KeysValues], object]
NOTHING_ENQUEUED: dict[str, Refused] = {
    "put": lambda gpu, pool, batch, kv: pool.put("a", kv),
    "put from the host": lambda gpu, pool, batch, kv: pool.put("a", on_host()),
    "get": lambda gpu, pool, batch, kv: pool.get("a"),
    "gather": lambda gpu, pool, batch, kv: pool.gather(["a", "missing"]),
    "append": lambda gpu, pool, batch, kv: batch.append(0, kv.keys[0, :, :, :1], kv.values[0, :, :, :1]),
    "fill from the host": lambda gpu, pool, batch, kv: batch.fill(0, on_host()),
    "padding": lambda gpu, pool, batch, kv: batch.padding,
    "get_or_compute": lambda gpu, pool, batch, kv: pool.get_or_compute("new", on_host),
    "a new pool": lambda gpu, pool, batch, kv: pool_on(gpu),
    "a correction": lambda gpu, pool, batch, kv: DropAndCorrect(4, 2, torch.zeros(1, 2, 1, 4, 1), pool.layout),
    "corrections": lambda gpu, pool, batch, kv: PositionTable(pool.layout, lambda distance: torch.zeros(1, 2, 1, 4, 1)),
}


@pytest.mark.parametrize("operation", NOTHING_ENQUEUED)
def test_what_is_refused_in_a_capture_leaves_nothing_in_its_graph(gpu: SimGPU, operation: str) -> None:
    pool, _ = pool_on(gpu)
    pool.put("a", row(gpu, 1))
    batch, kv = pool.gather(["missing"]), row(gpu, 2)
    kv = KeysValues(kv.keys.clone(), kv.values.clone())
    run(gpu)
    with gpu.use(gpu.stream(1)):
        gpu.stream(1).capturing = True
        with pytest.raises(StreamCaptureError, match="captured"):
            NOTHING_ENQUEUED[operation](gpu, pool, batch, kv)
        assert not any(gpu.queues.can_run(stream) for stream in gpu.queues.streams)
        gpu.stream(1).capturing = False
    batch.close()
    pool.check_integrity()
    pool.close()
