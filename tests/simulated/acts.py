"""What a host thread does on several streams with entries, sources, tables, flights and whole pools."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from concurrent_kv import DropAndCorrect, DropLazily, KeysValues, KVPool, PositionSteps, PositionTable
from concurrent_kv.books.records import Hold
from concurrent_kv.device.buffers import new_buffer
from concurrent_kv.flights.waiting import outcome
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.pool.plan import plan_share
from concurrent_kv.pool.reading import gather_entries
from concurrent_kv.pool.writing import write
from tests.explorer.history import Kind
from tests.explorer.programs import A, B, C, Operation, must
from tests.explorer.world import value

from .backend import layout_on
from .batch_acts import append
from .world import WINDOW, GpuWorld

WHOLE = WINDOW  # tokens


def several(*steps: Operation) -> Operation:
    """One after the other."""

    def run(world: GpuWorld) -> None:
        for step in steps:
            step(world)

    return run


def put_often(key: int, first: int, times: int, on: int) -> Operation:
    return several(*(partial(put_whole, key=key, number=first + i, on=on) for i in range(times)))


def put_whole(world: GpuWorld, key: int, number: int, on: int) -> None:
    world.put(key, value(number, WHOLE), on=on)


# Sources and tables --------------------------------------------------------------------------------------------------


def put_unpacked_from_elsewhere(world: GpuWorld) -> None:
    """Keys and values that are no views of one tensor, of another stream's memory."""
    with world.on(3):
        made = world.source(value(5))
        kv = KeysValues(made.keys.clone(), made.values.clone())
        del made
    world.after(3, 1)
    with world.on(1):
        world.put_it(A, value(5), kv)
        del kv
    world.get(A, on=1)


def _difference(world: GpuWorld, distance: int = 0) -> torch.Tensor:
    return torch.zeros(1, 2, 1, WINDOW - distance, 1).to(world.gpu.devices[0])


def overflowing(make: Callable[[GpuWorld], Any], then: Operation | None = None) -> Operation:
    """A policy is made on one stream, used at once on another, and dropped while the device is at it.

    Args:
        then: how the result is read, instead of by a `get`.
    """

    def run(world: GpuWorld) -> None:
        with world.on(3):
            overflow = make(world)
        with world.on(1), world.noted(Kind.READ, [A]) as read:
            batch = world.pool.gather([A])
            world.look_at_batch(read, batch)
            append(world, batch, [55])
            with world.noted(Kind.WRITE, [B], [(*value(A + 1, 3)[2:], 55)]) as commit:
                commit.since, commit.stored = read.began, world.pool.commit([B], batch, overflow=overflow)
            del overflow
        if then is not None:
            then(world)
        else:
            with world.on(2), world.noted(Kind.READ, [B]) as again:
                found = world.pool.get(B)
                world.look_later(again, [found])
        world.clear()  # and with the entry goes what it named of the policy

    return run


def correcting(world: GpuWorld) -> DropAndCorrect:
    return DropAndCorrect(WINDOW, 2, _difference(world), world.pool.layout)


def correcting_lazily(world: GpuWorld) -> DropLazily:
    table = PositionTable(world.pool.layout, lambda distance: _difference(world, distance))
    return DropLazily(WINDOW, 2, table)


def correcting_stepwise(world: GpuWorld) -> DropLazily:
    return DropLazily(WINDOW, 2, PositionSteps(world.pool.layout, 2, _difference(world)))


# Publication and flights ---------------------------------------------------------------------------------------------


def stored_once_more(world: GpuWorld) -> None:
    """As a promotion does: an entry under another key, which copies nothing, is read on a third stream."""
    world.put(A, value(5), on=1)
    scope = world.pool.default_scope
    entry = scope.entries[0].get(A)
    assert entry is not None
    with world.on(2), world.noted(Kind.WRITE, [B], [value(5)]) as call:
        plan = plan_share(world.storage, entry, B, None, 0.0)
        call.since, call.stored = call.began, write(world.pool, scope, scope.generation, plan, Deadline(10.0))
    world.get(B, on=3)


def taken_from_a_flight(world: GpuWorld) -> None:
    """Who waited for a computation copies its result, and is the last to let go of it."""
    with world.on(1):
        first, second = world.pool.try_claim(A), world.pool.try_claim(A)
        with world.noted(Kind.WRITE, [A], [value(5)]) as commit:
            commit.since, commit.stored = commit.began, first.fulfil(world.source(value(5)))
            del first
    with world.on(2), world.noted(Kind.READ, [A]) as read:
        found = outcome(second, world.storage.clock, "pool")
        world.look_later(read, [found])
        del second


def cleared_while_it_is_copied(world: GpuWorld) -> None:
    """What was written, and never published as a clear came between, gives its slots back; another stream uses them."""
    tensor = world.pool.storage.tensor
    scatter = tensor.scatter

    def scatter_then_clear(*arguments: Any, **options: Any) -> Any:
        vars(tensor).pop("scatter")
        copied = scatter(*arguments, **options)
        world.clear()
        return copied

    with world.on(1):
        with world.noted(Kind.READ, [A]) as read:
            batch = world.pool.gather([A])
        world.look_at_batch(read, batch)
        append(world, batch, [99])
        vars(tensor)["scatter"] = scatter_then_clear
        with world.noted(Kind.WRITE, [B], [(*value(A + 1), 99)]) as commit:
            commit.since, commit.stored = read.began, world.pool.commit([B], batch)
        must(not commit.stored, "what was cleared while it was copied was stored")
    put_often(C, 20, 1, on=2)(world)


# The end of pools ----------------------------------------------------------------------------------------------------


def closed_while_it_works(world: GpuWorld) -> None:
    world.put(A, value(5), on=1)
    world.get(A, on=2)
    world.close()
    must(all(not any_copy(world, number) for number in (1, 2)), "close() returned while the device was at work")


def any_copy(world: GpuWorld, number: int) -> bool:
    return world.gpu.queues.can_run(world.gpu.stream(number))


def dropped_while_it_works(world: GpuWorld) -> None:
    """A pool that nobody closes goes, and its slots with it, while another stream than its own reads them."""
    with world.on(3):
        pool = KVPool(layout_on(world.gpu), 1)
    with world.on(1):
        pool.put(A, world.source(value(5)))
        found = pool.get(A)
        assert found is not None
    del pool
    gc.collect(0)  # it is a cycle
    world.look_at_end(lambda: must(world.labels_in(found) == value(5), "the slots went while they were read"))


def cut_off_and_repaired(world: GpuWorld) -> None:
    """A read is cut off by an asynchronous exception between its copy and its tick; `repair` returns the slots."""
    storage = world.storage
    entry = world.pool.default_scope.entries[0].get(A)
    assert entry is not None
    with world.on(1):
        out = new_buffer(storage.tensor.layout, 1, WHOLE)
        with storage.ledger.mutex:
            storage.ledger.extend(Hold("read", []), [entry])
        with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(storage.clock, "stamp", _cut_off)
            gather_entries(world.pool, [entry], out, WHOLE)
    with world.on(2):
        world.clear()
        world.pool.repair()
        put_often(B, 20, 2, on=2)(world)
    found = KeysValues.from_packed(out)
    world.look_at_end(lambda: must(world.labels_in(found) == value(A + 1, WHOLE), "slots were used again too soon"))


def _cut_off(*arguments: object) -> None:
    raise KeyboardInterrupt


def checked_on_another(world: GpuWorld) -> None:
    """A pool is made on one stream and checked at once on another, which reads slot 0."""
    with world.on(3):
        pool = KVPool(layout_on(world.gpu), 1)
    with world.on(1):
        pool.check_integrity()
    pool.close()


def saved(world: GpuWorld, key: int, number: int, *, on: int) -> None:
    """The only entry is in the file with the tokens that it has, whatever is still to run."""
    with tempfile.TemporaryDirectory() as folder, world.on(on):
        file = Path(folder, "snapshot")
        world.pool.save(file)
        seen = load_file(file)["slots"][:, 0, 0, 0].tolist()
    must(seen == list(map(float, value(number, WHOLE))), f"{key} was saved as {seen}")


# Streams that others made --------------------------------------------------------------------------------------------

HANDLE = 77


def recycled(world: GpuWorld) -> None:
    """A stream is destroyed, and another one gets its handle: it has waited for nothing, and nothing is its own."""
    first, second = world.gpu.queues.streams[-2:]
    world.put(A, value(5), on=1)
    world.get(A, on=first)
    world.put(B, value(6), on=first)
    world.get(A, on=second)
    world.get(B, on=second)


def read_by_two_of_one_handle(world: GpuWorld) -> None:
    """A stream is destroyed while it reads, and another one gets its handle and reads the same slots."""
    first, second = world.gpu.queues.streams[-2:]
    world.get(A, on=first)
    world.get(A, on=second)
    put_often(B, 20, 2, on=2)(world)


def put_on_another_s_and_read(world: GpuWorld) -> None:
    world.put(A, value(5), on=world.gpu.queues.streams[-1])
    world.get(A, on=2)


def work_of_a_stream_that_others_made_is_done(world: GpuWorld) -> None:
    """Nobody has looked yet: whoever does next forgets the stream."""
    world.gpu.queues.add("x", HANDLE)
    world.store({B: value(B + 1)})
    world.put(C, value(6), on=world.gpu.queues.streams[-1])
    world.settle()


def stored_beside_two_of_one_handle(world: GpuWorld) -> None:
    two_of_one_handle(world)
    world.store({A: value(A + 1, WHOLE)})


def two_of_one_handle(world: GpuWorld) -> None:
    for name in ("x", "y"):
        world.gpu.queues.add(name, HANDLE)
