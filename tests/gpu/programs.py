"""Programs that show one missing wait each, by a delay in front of what has to be waited for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from concurrent_kv import KeysValues, KVPool

from .machine import LAYOUT, Machine, tokens

__all__ = ["PROGRAMS", "WHOLE"]

WHOLE = tuple(range(1, LAYOUT.max_tokens + 1))  # names of the tokens of a whole entry
LATE_MS = 30.0
Program = Callable[[Machine], None]


def names(number: int, count: int = LAYOUT.max_tokens) -> tuple[int, ...]:
    return tuple(100 * number + i for i in range(1, count + 1))


def put(machine: Machine, pool: KVPool, key: int, number: int) -> None:
    pool.put(key, machine.row(names(number)), side=names(number))


def packed(found: KeysValues | None) -> torch.Tensor:
    """The tensor of what was read."""
    assert found is not None
    assert found.packed is not None
    return found.packed


def read_after_write(machine: Machine) -> None:
    pool = machine.pool(2)
    with machine.on(1):
        machine.delay(LATE_MS)
        put(machine, pool, 0, 1)
    with machine.on(2):
        found = pool.get(0)
        machine.see(packed(found), names(1), "read before it was written")
    pool.close()


def write_after_read(machine: Machine) -> None:
    pool = machine.pool(1)
    put(machine, pool, 0, 1)
    machine.settle()
    with machine.on(1):
        machine.delay(LATE_MS)
        found = pool.get(0)
        machine.see(packed(found), names(1), "its slots were used again while it was read")
    with machine.on(2):
        for number in range(2, 5):
            put(machine, pool, number, number)
    pool.close()


def buffer_used_again(machine: Machine) -> None:
    pool = machine.pool(2)
    for key in (0, 1):
        put(machine, pool, key, key + 1)
    machine.settle()
    with machine.on(1):
        batch = pool.gather([0])
        machine.delay(LATE_MS)
        machine.see(batch.data, names(1), "its buffer was used again while it was read")
        batch.close()
    with machine.on(2):
        pool.gather([1]).close()
    pool.close()


def committed_on_another(machine: Machine) -> None:
    pool = machine.pool(3)
    pool.put(0, machine.row((1, 2)))
    machine.settle()
    with machine.on(1):
        batch = pool.gather([0])
    batch.wait(machine.stream(2))
    with machine.on(2):
        machine.delay(LATE_MS)
        new = machine.upload(tokens((3,)))
        layers = LAYOUT.num_layers
        for layer in range(layers):
            batch.append(layer, new[layer], new[layers + layer])
    with machine.on(3):
        pool.commit([1], batch)
        found = pool.get(1)
        machine.see(packed(found), (1, 2, 3), "committed before it was appended")
    pool.close()


def source_dropped(machine: Machine) -> None:
    """Memory of one stream is put late in another, dropped, and used again by its own stream."""
    pool = machine.pool(2)
    with machine.on(1):
        kv = machine.row(names(1))
    machine.after(1, 2)
    with machine.on(2):
        machine.delay(LATE_MS)
        pool.put(0, kv)
        del kv
    with machine.on(1):
        for _ in range(8):  # of the same size: the allocator hands out what was freed
            torch.full_like(packed(machine.row(names(9))), -1.0)
    with machine.on(2):
        found = pool.get(0)
        machine.see(packed(found), names(1), "its source was freed too soon")
    pool.close()


def host_memory_written_again(machine: Machine) -> None:
    pool = machine.pool(2)
    source = tokens(names(1))
    source = source.pin_memory() if machine.has_gpu else source
    with machine.on(1):
        machine.delay(LATE_MS)
        pool.put(0, KeysValues.from_packed(source))
    source.fill_(-1.0)
    with machine.on(1):
        found = pool.get(0)
        machine.see(packed(found), names(1), "the caller's memory was read after put had returned")
    pool.close()


def read_to_the_host(machine: Machine) -> None:
    pool = machine.pool(2)
    with machine.on(1):
        machine.delay(LATE_MS)
        put(machine, pool, 0, 1)
    with machine.on(2):
        found = pool.get(0, to="cpu")
    machine.see(packed(found), names(1), "a read to the host had not waited")
    pool.close()


PROGRAMS: dict[str, Program] = {
    program.__name__: program
    for program in (
        read_after_write,
        write_after_read,
        buffer_used_again,
        committed_on_another,
        source_dropped,
        host_memory_written_again,
        read_to_the_host,
    )
}
