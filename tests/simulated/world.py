"""Pools on a simulated device under the explorer's scheduler: what host threads did there, and what they had to see.

Whatever is read is looked at when everything is over, as a kernel of the reader's would have seen it.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from concurrent_kv import DiskTier, HostTier, KeysValues, KVPool, KVStorage
from concurrent_kv.errors import ClosedError
from concurrent_kv.flights.table import Flight, FlightState
from concurrent_kv.pool.tier import put_beneath
from tests.explorer.history import Call, Kind, State, Value, check_linearizable
from tests.explorer.parts import ModelEvent, ModelLock, ModelShards
from tests.explorer.programs import Program
from tests.explorer.scheduler import BrokenPromiseError, Scheduler
from tests.explorer.world import labels_of

from .backend import SimStreams, install, layout_on
from .gpu import SimGPU
from .queues import Event, SimStream

__all__ = ["WINDOW", "GpuProgram", "GpuWorld"]

WINDOW = 4
NO_VALUE = 999  # what is put over a source once it is the caller's again


def packed(rows: Sequence[Value]) -> tuple[Tensor, list[int]]:
    """Rows, left-padded: labels as keys, their negatives as values; and their lengths."""
    end = max(map(len, rows))
    labels = torch.tensor([[0] * (end - len(row)) + list(row) for row in rows], dtype=torch.float32)
    return torch.stack([labels, -labels]).view(2, len(rows), 1, end, 1), [len(row) for row in rows]


class GpuWorld:
    """One storage with one pool, `pool`, on device 0, and what its callers saw.

    Args:
        scheduler: who drives it.
        patch: where the device is installed.
        entries, slots, headroom, shards, policy: of the pool.
        evicting: whether the program may evict (see `check_linearizable`).
        home: the stream that the pool is made on.
        more_slots: of other pools over its storage.
        devices: how many there are.
        tier: windows of a tier beneath it; none if 0.
        pinned: whether the tier is in pinned memory.
        disk: whether it is in a file, with one window of memory before it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        patch: pytest.MonkeyPatch,
        gpu: SimGPU,
        *,
        entries: int = 4,
        slots: int | None = None,
        headroom: int = 2 * WINDOW,
        shards: int = 1,
        policy: str = "fifo",
        evicting: bool = False,
        home: int = 0,
        more_slots: int = 0,
        tier: int = 0,
        pinned: bool = True,
        disk: bool = False,
    ) -> None:
        slots = entries * WINDOW if slots is None else slots
        self.scheduler = scheduler
        self.gpu = gpu
        install(patch, gpu, scheduler.step)
        self.backend = SimStreams(gpu, 0, scheduler.step)
        patch.setattr("concurrent_kv.pool.pool.wait_in_thread", self._wait_for_flight)
        with self.on(home):
            self.storage = KVStorage(
                layout_on(gpu),
                slots + more_slots,
                headroom_slots=headroom,
                shards=shards,
                lock_factory=lambda: ModelLock(scheduler),
                event_factory=lambda: ModelEvent(scheduler),
                locks=ModelShards(scheduler, shards),
                search_locks=partial(ModelShards, scheduler, 1),
                backend=self.backend,
            )
            if tier:
                put_beneath(self.storage, self._tier(tier, pinned, disk))
        self.pool = KVPool(
            self.storage.layout, entries, max_slots=slots, storage=self.storage, name="pool", policy=policy
        )
        self.pool.owns_storage = True  # closed with it
        self.calls: list[Call] = []
        self.before: State = {}
        self.handles: list[Any] = []
        self.evicting = evicting
        self.closing = False  # or closed
        self._late: list[Callable[[], object]] = []  # looks at what was read, in the order of the reads
        self._clock = count()
        self._busy = 0

    def _tier(self, windows: int, pinned: bool, disk: bool) -> HostTier:
        window = self.storage.layout.bytes_per_entry
        if not disk:
            return HostTier(windows * window, pinned)
        return HostTier(window, pinned, DiskTier(tempfile.gettempdir(), windows * window + (windows == 1)))

    # The device ----------------------------------------------------------------------------------------------------

    def on(self, *streams: int | SimStream) -> Any:
        """Run in a stream of device 0, by its number."""
        return self.gpu.use(*(self.gpu.stream(one) if isinstance(one, int) else one for one in streams))

    def after(self, earlier: int | SimStream, later: int | SimStream) -> None:
        """What a user does: order one stream after another."""
        first, second = (self.gpu.stream(one) if isinstance(one, int) else one for one in (earlier, later))
        event = Event()
        self.gpu.queues.record(first, event)
        self.gpu.queues.wait(second, event)

    def spawn(self, *tasks: Callable[[], object]) -> None:
        """Add host threads, the streams, and one that waits for all of them."""
        self._busy = len(tasks)

        def until_done(task: Callable[[], object]) -> None:
            task()
            self._busy -= 1

        for task in tasks:
            self.scheduler.spawn(lambda task=task: until_done(task))  # type: ignore[misc]
        queues = self.gpu.queues
        self.scheduler.spawn(lambda: self.scheduler.step("waits for all", lambda: not self._busy and queues.idle))
        for number, stream in enumerate(queues.streams):
            self.scheduler.spawn_endless(str(number), lambda stream=stream: self._run(stream))  # type: ignore[misc]

    def _run(self, stream: SimStream) -> None:
        while True:
            self.scheduler.step(f"stream {stream.name} works", lambda: self.gpu.queues.can_run(stream))
            what = self.gpu.queues.run_next(stream)
            self.scheduler.trace[-1] = f"       {stream.name}: {what}"

    def _wait_for_flight(self, flight: Flight, deadline: object, name: str) -> None:
        self.scheduler.step("waits for a flight", lambda: flight.state is not FlightState.COMPUTING)

    # Operations ----------------------------------------------------------------------------------------------------

    @contextmanager
    def noted(self, kind: Kind, keys: Sequence[int] = (), writes: Sequence[Value] = ()) -> Iterator[Call]:
        call = Call(kind, tuple(keys), tuple(writes), next(self._clock))
        self.calls.append(call)
        yield call
        call.ended = next(self._clock)

    def source(self, *rows: Value) -> KeysValues:
        """Keys and values on device 0, made late by the current stream."""
        labels, lengths = packed(rows)
        return KeysValues.from_packed(labels.to(self.gpu.devices[0]), lengths)

    def put(self, key: int, what: Value, *, on: int | SimStream = 0, **options: Any) -> bool:
        """Put from memory that is freed at once."""
        with self.on(on):
            return self.put_it(key, what, self.source(what), **options)

    def put_from_elsewhere(self, key: int, what: Value, *, made_on: int, on: int) -> bool:
        """Put what another stream allocated and made, in a stream that comes after it."""
        with self.on(made_on):
            kv = self.source(what)
        self.after(made_on, on)
        with self.on(on):
            return self.put_it(key, what, kv)

    def put_from_host(self, key: int, what: Value, *, on: int, pinned: bool) -> bool:
        """Put from memory of the host that is written to as soon as the put has returned."""
        labels, lengths = packed([what])
        if pinned:
            labels = self.gpu.pinned(labels, torchs=False)
        with self.on(on):
            stored = self.put_it(key, what, KeysValues.from_packed(labels, lengths))
        labels.fill_(NO_VALUE)
        return stored

    def put_from_other_device(
        self, key: int, what: Value, *, made_on: int, on: int, used_on: int | None = None
    ) -> bool:
        """Put what a stream of device 1 made, in the current streams of both devices, and drop it."""
        labels, lengths = packed([what])
        made, used = (self.gpu.stream(made_on if number is None else number, 1) for number in (None, used_on))
        with self.on(made):
            kv = KeysValues.from_packed(labels.to(self.gpu.devices[1]), lengths)
        if used is not made:
            self.after(made, used)
        with self.on(on, used), self.noted(Kind.WRITE, [key], [what]) as call:
            call.since, call.stored = call.began, self.pool.put(key, kv)
            del kv
        return call.stored

    def put_it(self, key: int, what: Value, kv: KeysValues, **options: Any) -> bool:
        with self.noted(Kind.WRITE, [key], [what]) as call:
            call.since, call.stored = call.began, self.pool.put(key, kv, **options)
        return call.stored

    def get(self, key: int, *, on: int | SimStream = 0, pop: bool = False, **options: Any) -> None:
        with self.on(on), self.noted(Kind.POP if pop else Kind.READ, [key]) as call:
            found = (self.pool.pop if pop else self.pool.get)(key, **options)
        self.look_later(call, [found])

    def get_pinned(self, key: int, *, on: int) -> None:
        with self.on(on), self.noted(Kind.READ, [key]) as call, self.pool.pin(key) as pin:
            self.look_later(call, [pin.get()])

    def take(self, key: int, what: Value, *, on: int) -> None:
        """Get or compute; whoever computes it gives `what`."""
        with self.on(on):
            call = Call(Kind.READ, (key,), (), next(self._clock))
            made: list[Call] = []

            def compute() -> KeysValues:
                made.append(Call(Kind.WRITE, (key,), (what,), next(self._clock), stored=True))
                return self.source(what)

            found = self.pool.get_or_compute(key, compute)
            for done in (*made, call):
                done.ended = next(self._clock)
                done.since = done.began
                self.calls.append(done)
        self.look_later(call, [found])

    def gather(
        self, keys: Sequence[int], *, on: int, close_on: int | None = None, drop: bool = False, **o: Any
    ) -> None:
        """Gather and let go: in another stream, which the user ordered after this one, or without closing."""
        with self.on(on):
            with self.noted(Kind.READ, keys) as call:
                batch = self.pool.gather(keys, **o)
            self.look_at_batch(call, batch)
            if drop:
                del batch
                return
        with self.on(on if close_on is None else close_on):
            if close_on is not None:
                batch.wait()
                self.look_at_batch(call, batch)
            batch.close()

    def extend(
        self,
        children: Mapping[int, tuple[int, int]],
        *,
        on: int,
        model: int | None = None,
        commit: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> bool | None:
        """Gather parents, append, and commit children `{child: (parent, label)}`, each on a stream of its own.

        With `lengths`, 0 or 1 of each row, a parent that is missed counts as one without tokens, and gets its child 1.
        """
        model = on if model is None else model
        parents = [parent for parent, _ in children.values()]
        labels = [label for _, label in children.values()]
        with self.on(on):
            with self.noted(Kind.READ, parents) as read:
                batch = self.pool.gather(parents)
            self.look_at_batch(read, batch)
        too_many = len(children) > self.pool.account.max_entries
        if (not all(batch.hits) and (lengths is None or too_many)) or max(batch.lengths) == WINDOW:
            batch.close()
            return None
        if lengths is not None:
            lengths = [length if hit else 1 for length, hit in zip(lengths, batch.hits, strict=False)]
        with self.on(model):
            new = torch.tensor(labels, dtype=torch.float32).view(-1, 1, 1, 1).to(self.gpu.devices[0])
            batch.append(0, new, -new)
            del new
        with self.on(model if commit is None else commit), self.noted(Kind.WRITE, list(children)) as write:
            write.since, write.stored = read.began, self.pool.commit(list(children), batch, lengths=lengths)

        def resolve() -> None:
            new = [(label,)[:length] for label, length in zip(labels, lengths or [1] * len(labels), strict=True)]
            write.writes = tuple((*(row or ()), *added) for row, added in zip(read.seen, new, strict=True))

        self.look_at_end(resolve)
        return write.stored

    def clear(self) -> None:
        with self.noted(Kind.CLEAR):
            self.pool.clear()

    def close(self) -> None:
        self.closing = True
        with self.noted(Kind.CLEAR):
            self.pool.close()

    def or_closed(self, action: Callable[[], object]) -> None:
        """An operation that a close may cut short."""
        with suppress(ClosedError):
            action()

    def store(self, what: Mapping[int, Value], *, on: int = 0) -> None:
        """Put entries in before the program begins, and wait for them."""
        with self.on(on):
            for key, stored in what.items():
                self.pool.put(key, self.source(stored))
        self.before.update(what)
        self.settle()

    def settle(self) -> None:
        """Have the device do all its work. Outside of tasks."""
        self.gpu.queues.run_until(lambda: self.gpu.queues.idle)

    # What was seen ---------------------------------------------------------------------------------------------------

    def look_at_end(self, look: Callable[[], object]) -> None:
        """Have `look` called when everything is over, before the pools are closed."""
        self._late.append(look)

    def look_later(self, call: Call, rows: Sequence[KeysValues | None]) -> None:
        def resolve() -> None:
            call.seen = tuple(None if row is None else self.labels_in(row) for row in rows)

        self.look_at_end(resolve)

    def look_at_batch(self, call: Call, batch: Any) -> None:
        """As a kernel of the model does, in the current stream; again, it must see the same."""
        data, hits, lengths, end = batch.data.clone(), batch.hits, batch.lengths, batch.end

        def resolve() -> None:
            seen: list[Value | None] = []
            for row, (hit, length) in enumerate(zip(hits, lengths, strict=True)):
                labels = self.labels_in(KeysValues.from_packed(data[:, row : row + 1, :, :end]))
                padding = labels[: end - length]
                if any(padding):
                    raise BrokenPromiseError(f"the padding of row {row} holds {padding}")
                seen.append(labels[end - length :] if hit else None)
            if call.seen not in ((), tuple(seen)):
                raise BrokenPromiseError(f"{call.keys} held {call.seen}, and then {seen}")
            call.seen = tuple(seen)

        self.look_at_end(resolve)

    def labels_in(self, kv: KeysValues) -> Value:
        return labels_of(KeysValues(self.gpu.read(kv.keys), self.gpu.read(kv.values)))

    # Checks ----------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What holds when all is over."""
        self.settle()
        if self.gpu.faults:
            raise BrokenPromiseError(f"the device failed: {self.gpu.faults[0]}")
        for resolve in self._late:
            resolve()
        for handle in self.handles:
            handle.close()
        self.storage.enter_quietly()
        if not self.storage.closed:
            self.pool.check_integrity()
            for key in sorted({key for call in self.calls for key in call.keys} | set(self.before)):
                seen = len(self._late)
                self.get(key)
                self.settle()
                for resolve in self._late[seen:]:
                    resolve()
        check_linearizable(self.calls, self.before, evicting=self.evicting)
        self.pool.close()
        self.storage.clock.synchronize({}, 0.0)  # looks at what came in after another close
        if self.backend.alive_count:
            raise BrokenPromiseError(f"{self.backend.alive_count} events were not given back")


@dataclass(frozen=True)
class GpuProgram(Program):
    """Host threads at once, on a simulated device of their own."""

    make: Callable[..., Any] = GpuWorld

    def __call__(self, scheduler: Scheduler) -> None:
        setting = dict(self.setting)
        gpu = SimGPU(devices=setting.pop("devices", 1), streams=5)
        collecting = gc.isenabled()
        gc.disable()  # what is freed when must not depend on it
        try:
            with pytest.MonkeyPatch.context() as patch, gpu:
                world = self.make(scheduler, patch, gpu, **setting)
                self.before(world)
                world.spawn(*(lambda task=task: task(world) for task in self.tasks))
                scheduler.run()
                self.after(world)
                world.check()
        finally:
            if collecting:
                gc.enable()
