"""The same orders on real streams, with delays in front of what has to be waited for."""

from __future__ import annotations

import threading

import pytest
import torch

from concurrent_kv import KeysValues, StreamCaptureError
from concurrent_kv.device.cuda import CudaStreams
from tests.simulated.sites import left_out
from tests.support import HANG_SECONDS

from .machine import Machine
from .programs import PROGRAMS, names, packed, put
from .random_programs import run_random_program

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here: nothing of this was run")


@pytest.mark.parametrize("program", PROGRAMS)
def test_reads_see_what_they_should_however_late_streams_are(program: str) -> None:
    machine = Machine()
    PROGRAMS[program](machine)
    assert not machine.wrong()


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_of_several_threads_read_what_they_should(seed: int) -> None:
    machine = Machine()
    run_random_program(machine, seed)
    assert not machine.wrong()


@pytest.mark.parametrize(
    ("file", "function", "call", "program"),
    [
        ("reading.py", "gather_entries", "order_after", "read_after_write"),
        ("writing.py", "write", "stamp", "read_after_write"),
        ("writing.py", "write", "order_after", "write_after_read"),
        ("reading.py", "gather_entries", "stamp", "write_after_read"),
        ("batch.py", "end_rows", "finish", "buffer_used_again"),
        ("padded_rows.py", "use_here", "join", "committed_on_another"),
    ],
)
def test_fault_shows_as_wrong_bytes(
    file: str, function: str, call: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out(file, function, call, program).plant(monkeypatch)
    machine = Machine()
    PROGRAMS[program](machine)
    assert machine.wrong(), "a missing order was not seen"


def test_one_stream_alone_records_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[object] = []
    original = CudaStreams.record

    def record(self: CudaStreams, stream: torch.cuda.Stream) -> torch.cuda.Event:
        recorded.append(stream)
        return original(self, stream)

    monkeypatch.setattr(CudaStreams, "record", record)
    machine = Machine()
    pool = machine.pool(2)
    for number in range(1, 6):
        put(machine, pool, number, number)
        pool.gather([number, number - 1]).close()
    assert not recorded
    pool.close()


def test_a_pool_is_used_while_a_graph_is_captured_elsewhere_and_refuses_to_be_part_of_it() -> None:
    machine = Machine()
    pool = machine.pool(2)
    put(machine, pool, 0, 1)
    pool.get(0)  # what these operations allocate is there already
    machine.settle()
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device=machine.device)
    beside: list[KeysValues | None] = []

    def read_beside() -> None:
        with machine.on(2):
            beside.append(pool.get(0))
            machine.see(packed(beside[0]), names(1), "read beside a capture")

    # In a thread of its own: the thread that captures may not ask for events, nor allocate, on any stream.
    reader = threading.Thread(target=read_beside)
    with torch.cuda.graph(graph, stream=machine.stream(3), capture_error_mode="thread_local"):
        number.add_(1)
        with pytest.raises(StreamCaptureError):
            pool.get(0)
        reader.start()
        reader.join(HANG_SECONDS)
    assert beside
    graph.replay()
    assert not machine.wrong()
    pool.check_integrity()
    pool.close()
