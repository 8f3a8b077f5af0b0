"""What a host thread does with batches on several streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from concurrent_kv.evaluation import Evaluated, Leaf
from concurrent_kv.evaluation.call import ModelCall
from concurrent_kv.evaluation.queue import Group
from concurrent_kv.evaluation.stats import CallTimes
from concurrent_kv.evaluation.tickets import Ticket
from concurrent_kv.pool.joint import JointBatch, open_together
from concurrent_kv.pool.pool import gather_part_of_pool
from tests.explorer.history import Kind
from tests.explorer.programs import A, B, C, D, must
from tests.explorer.world import value

from .world import GpuWorld


def gathered_on_one_and_closed_on_another(world: GpuWorld) -> None:
    """The user orders the streams, and says nothing of it."""
    with world.on(1), world.noted(Kind.READ, [A]) as call:
        batch = world.pool.gather([A])
    world.after(1, 2)
    with world.on(2):
        world.look_at_batch(call, batch)
        batch.close()
    world.gather([B], on=3)


def read_by_two(world: GpuWorld) -> None:
    """A batch is read on two streams at once, the second of which waited for it."""
    with world.on(1), world.noted(Kind.READ, [A]) as call:
        batch = world.pool.gather([A])
    batch.wait(world.gpu.stream(2))
    for stream in (2, 1):
        with world.on(stream):
            world.look_at_batch(call, batch)
    with world.on(2):
        batch.close()
    world.gather([B], on=3)


def written_in_place(world: GpuWorld) -> None:
    """The model writes to the buffer itself, in a stream that the user ordered, and says so with `advance`."""
    with world.on(1), world.noted(Kind.READ, [A]) as read:
        batch = world.pool.gather([A])
        world.look_at_batch(read, batch)
    world.after(1, 2)
    with world.on(2):
        new = torch.full((1, 1, 1), 77.0).to(world.gpu.devices[0])
        batch.data[0, :, :, 2], batch.data[1, :, :, 2] = new, -new
        batch.advance(1)
    with world.on(3), world.noted(Kind.WRITE, [B], [(*value(A + 1), 77)]) as commit:
        commit.since, commit.stored = read.began, world.pool.commit([B], batch)
    world.get(B, on=3)


def padded_and_dropped(world: GpuWorld) -> None:
    """The padding is made on one stream and read on another; the batch is dropped at once."""
    with world.on(1):
        batch = world.pool.gather([A, B])
        made = batch.padding.clone()
    with world.on(2):
        again = batch.padding.clone()
        batch.close()
        del batch

    def look() -> None:
        for seen in (made, again):
            must(world.gpu.read(seen).tolist() == [1, 0], "padding was read as something else")

    world.look_at_end(look)


def misses_are_zeros(world: GpuWorld) -> None:
    """Nothing is found, so that nothing but the zeroed slot is read, on another stream than the pool's."""
    with world.on(1), world.pool.gather([A, B]) as batch:
        data = batch.data.clone()
    world.look_at_end(lambda: must(not world.gpu.read(data).any(), "rows that missed are not zeros"))


def together(world: GpuWorld, *keys: int, on: int, drop: bool = False) -> None:
    """Two parts of one buffer: the first key, and the others."""
    with world.on(on):
        with world.noted(Kind.READ, keys) as call:
            parts = [gather_part_of_pool(world.pool, list(some), len(some)) for some in (keys[:1], keys[1:]) if some]
            batch = open_together(world.pool.storage, parts)
        world.look_at_batch(call, batch)
        if not drop:
            batch.close()


def evaluated(world: GpuWorld, key: int, child: int, *, on: int, model: ModelCall, new: int) -> None:
    """One call of an evaluator, whose batches all have the same memory."""
    with world.on(on):
        ticket = Ticket([Leaf(world.pool, key, child, new)], lambda: None, worker=False)
        with world.noted(Kind.WRITE, [child], [(*value(key + 1), new)]) as commit:
            group = Group()
            group.rows += ticket.rows
            model.work(group, CallTimes())
            ticket.outputs()
            commit.stored = True


def appending(world: GpuWorld) -> ModelCall:
    """A model that appends what its leaf says."""

    def append_it(batch: JointBatch, new: Sequence[int]) -> Evaluated[None]:
        append(world, batch, list(new))
        return Evaluated([None] * len(new))

    return ModelCall(world.pool.storage, append_it, room=1, overflow=None, row_sizes=[1])


def evaluated_on_two(world: GpuWorld) -> None:
    """Two calls of an evaluator, on two streams, use the same memory one after the other."""
    model = appending(world)
    evaluated(world, A, C, on=1, model=model, new=71)
    evaluated(world, B, D, on=2, model=model, new=72)
    world.get(C, on=3)
    world.get(D, on=3)


def filled_on_another(world: GpuWorld) -> None:
    """A miss is filled on another stream from a source of a third one, and committed on a fourth."""
    with world.on(1), world.noted(Kind.READ, [A, D]) as read:
        batch = world.pool.gather([A, D])
        world.look_at_batch(read, batch)
    with world.on(3):
        kv = world.source(value(8, 1))
    world.after(3, 2)
    with world.on(2):
        batch.fill(1, kv)
        del kv
        append(world, batch, [71, 72])
    with world.on(4), world.noted(Kind.WRITE, [B, C], [(*value(A + 1), 71), (*value(8, 1), 72)]) as commit:
        commit.since, commit.stored = read.began, world.pool.commit([B, C], batch)
    world.gather([B, C], on=1)


def reordered_on_another(world: GpuWorld) -> None:
    """Rows change places on another stream than the one that gathered and appended to them."""
    with world.on(1), world.noted(Kind.READ, [A, B]) as read:
        batch = world.pool.gather([A, B])
        world.look_at_batch(read, batch)
        append(world, batch, [71, 72])
    with world.on(2):
        batch.reorder([1, 0])
    with world.on(3), world.noted(Kind.WRITE, [C, D], [(*value(B + 1), 72), (*value(A + 1), 71)]) as commit:
        commit.since, commit.stored = read.began, world.pool.commit([C, D], batch)
    world.gather([C, D], on=4)


def appended_from_elsewhere(world: GpuWorld, to_all_layers: bool = False) -> None:
    """New tokens are made on another stream than the one they are appended in, and dropped at once."""
    with world.on(1), world.noted(Kind.READ, [A]) as read:
        batch = world.pool.gather([A])
        world.look_at_batch(read, batch)
    with world.on(3):
        new = torch.full((1, 1, 1, 1), 66.0).to(world.gpu.devices[0])
        mirrored = -new
    world.after(3, 2)
    with world.on(2):
        if to_all_layers:
            batch.append_layers(new[None], mirrored[None])
        else:
            batch.append(0, new, mirrored)
        del new, mirrored
        with world.noted(Kind.WRITE, [B], [(*value(A + 1), 66)]) as commit:
            commit.since, commit.stored = read.began, world.pool.commit([B], batch)
    world.get(B, on=2)


def closed_while_its_stream_is_captured(world: GpuWorld) -> None:
    """A batch's uses cannot be named then, so that its memory goes, but not before another stream has read it."""
    with world.on(1), world.noted(Kind.READ, [A]) as call:
        batch = world.pool.gather([A])
    world.after(1, 2)
    captured = world.gpu.stream(1)
    with world.on(2):
        world.look_at_batch(call, batch)
        captured.capturing = True
        batch.close()
    must(batch.closed, "a capture kept a batch open")
    del batch
    captured.capturing = False
    world.gather([B], on=3)


def append(world: GpuWorld, batch: Any, labels: list[int]) -> None:
    new = torch.tensor(labels, dtype=torch.float32).view(-1, 1, 1, 1).to(world.gpu.devices[0])
    batch.append(0, new, -new)


def waited_for(world: GpuWorld) -> None:
    """The host waits for a batch, and then looks at it without a stream."""
    world.put(A, value(5), on=1)
    with world.on(2):
        batch = world.pool.gather([A])
        batch.synchronize()
        seen = world.gpu.read(batch.data)[0, 0, 0, :2, 0].tolist()
        must(seen == list(map(float, value(5))), f"the host waited, and read {seen}")
        batch.close()


def dropped_after_wait(world: GpuWorld) -> None:
    """A buffer that was allocated on one stream is dropped while another one, which waited for it, reads it."""
    with world.on(1), world.noted(Kind.READ, [A]) as call:
        batch = world.pool.gather([A])
    batch.wait(world.gpu.stream(2))
    with world.on(2):
        world.look_at_batch(call, batch)
    del batch
