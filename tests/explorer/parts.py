"""The parts that a scheduler drives: mutex, events, shard locks, and a slot tensor whose copies take two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from concurrent_kv import KVLayout, WaitTimeoutError
from concurrent_kv.books import tables as books_tables
from concurrent_kv.device.appends import HostMemory
from concurrent_kv.device.slot_numbers import Slots, as_array
from concurrent_kv.device.tensors import Block, Indices, SlotRows, SlotTensor
from concurrent_kv.locks.deadline import Deadline
from concurrent_kv.locks.sharded import ShardedRWLock

from .scheduler import BrokenPromiseError, Scheduler, Task

__all__ = ["ModelEvent", "ModelLock", "ModelShards", "ModelTensor"]

TORN = -999.0  # what a slot reads as while it is being written


class ModelLock:
    """A plain lock. Taking it is a step; giving it back is none, because only those who wait could tell."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._held = False

    def _free(self) -> bool:
        return not self._held

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking or timeout == 0:
            self._scheduler.step("tries a lock")
            if self._held:
                return False
        elif not self._scheduler.step("takes a lock", self._free, expires=timeout >= 0):
            return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise BrokenPromiseError("a lock was released that nobody holds")
        self._held = False

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()


class ModelEvent:
    """An event. Waiting is a step, and so is setting it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._scheduler.step("wakes a waiter")
        self._set = True

    def wait(self, timeout: float | None = None) -> bool:
        return self._scheduler.step("waits to be woken", self.is_set, expires=timeout is not None)


class _ModelShard:
    """One fair reader-writer lock: a writer that waits keeps later readers and writers out, as in `RWLockFair`."""

    def __init__(self, scheduler: Scheduler, number: int) -> None:
        self._scheduler = scheduler
        self._number = number
        self._readers = 0
        self._writer = False  # inside, or waiting for the readers to leave

    def _no_writer(self) -> bool:
        return not self._writer

    def _no_readers(self) -> bool:
        return not self._readers

    def acquire(self, write: bool) -> bool:
        step = self._scheduler.step
        if not step(f"takes shard {self._number} to {'write' if write else 'read'}", self._no_writer, expires=True):
            return False
        if not write:
            self._readers += 1
            return True
        self._writer = True
        if self._readers and not step(f"waits for the readers of shard {self._number}", self._no_readers, expires=True):
            self._writer = False
            return False
        return True

    def release(self, write: bool) -> None:
        if write:
            self._writer = False
        else:
            self._readers -= 1


class _ShardHeld:
    def __init__(self, owner: ModelShards, shard: _ModelShard, write: bool) -> None:
        self._owner = owner
        self._shard = shard
        self._write = write

    def release(self) -> None:
        self._shard.release(self._write)
        self._owner.let_go()


class ModelShards(ShardedRWLock):
    """The shards' locks: the real order and the real release around model locks.

    Letting go of the last shard is a step: what comes next reads epochs and flags that others may change.
    """

    def __init__(self, scheduler: Scheduler, count: int) -> None:
        super().__init__(count, name="model")
        self._scheduler = scheduler
        self._shards = [_ModelShard(scheduler, number) for number in range(count)]
        self._held: Counter[Task | None] = Counter()

    def _acquire(
        self, shards: Sequence[int], write: bool, deadline: Deadline, held: list[Any], at_most: float | None = None
    ) -> bool:
        for shard in shards:
            model = self._shards[shard]
            if not model.acquire(write):
                raise WaitTimeoutError(f"shard {shard} was not free")
            held.append(_ShardHeld(self, model, write))
            self._held[self._scheduler.running] += 1
        return True

    def let_go(self) -> None:
        """Note that the running task released a shard."""
        task = self._scheduler.running
        self._held[task] -= 1
        if not self._held[task]:
            self._scheduler.step("has let its shards go")


class ModelTensor(SlotTensor):
    """Slots that hold labels: `label` in the key and `-label` in the value, one layer, one head, one number.

    A copy begins, lets others take steps, and ends. A slot read while it is written holds `TORN`; slots that change
    while they are read, or that two writers have at once, are violations.
    """

    def __init__(self, scheduler: Scheduler, layout: KVLayout, num_slots: int) -> None:
        super().__init__(layout, num_slots)
        self._scheduler = scheduler
        self._writing: set[int] = set()

    def gather(
        self,
        tables: SlotRows,
        rows: list[int],
        end: int,
        out: Tensor,
        *,
        whole: bool = True,
    ) -> tuple[Tensor, ...]:
        table = books_tables.in_columns(cast(books_tables.Tables, tables), rows, end, out.shape[3])
        slots = self.data[:, torch.from_numpy(table)]
        self._scheduler.step("is in the middle of reading its slots")
        again = self.data[:, torch.from_numpy(table)]
        if not torch.equal(slots, again):
            raise BrokenPromiseError(f"slots {np.unique(table).tolist()} changed while they were read")
        if bool((again == TORN).any()):
            raise BrokenPromiseError(f"slots {np.unique(table).tolist()} were read while they were written")
        out[:, :, 0, :, 0] = again[:, :, :, 0, 0]
        return ()

    def scatter(
        self,
        source: Tensor,
        rows: Indices,
        columns: Indices,
        slots: Slots,
        difference: Tensor | None = None,
        runs: int = 0,
        block: Block | None = None,
        memory: HostMemory | None = None,
    ) -> tuple[Tensor, ...]:
        assert difference is None, "programs commit without corrections"
        taken = as_array(slots).tolist()
        if not self._writing.isdisjoint(taken):
            raise BrokenPromiseError(f"slots {taken} are written by two tasks at once")
        index = torch.from_numpy(as_array(slots))
        self._writing.update(taken)
        self.data[:, index] = TORN
        self._scheduler.step("is in the middle of writing its slots")
        self.data[:, index] = source[:, torch.tensor(rows), :, torch.tensor(columns)].transpose(0, 1)
        self._writing.difference_update(taken)
        return ()
