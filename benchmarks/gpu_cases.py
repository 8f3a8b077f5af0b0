"""One batched step of a search on a device: through the pool, and as one copy for each entry, layer, K and V."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import TOKENS_PER_STEP, Workload
from concurrent_kv import DropAndCorrect, DropOldest, KeysValues, KVLayout, KVPool

__all__ = ["PerEntry", "Pooled", "copy_of", "device_micros", "issue_micros"]


class Pooled:
    """Gather the parents, append two tokens to each, and commit the children.

    Args:
        owner: makes the keys its own where several use one pool.
    """

    def __init__(self, workload: Workload, rows: int, device: torch.device, pool: KVPool | None = None, owner: int = 0):
        self.layout = _layout(workload, device)
        self.steady = workload.window - 3  # tokens of nearly every node of a search
        self.pool = pool or self.pool_for(workload, rows, device)
        self.parents = [(owner, "parent", row) for row in range(rows)]
        self.children = [(owner, "child", row) for row in range(rows)]
        shape = (self.layout.num_layers, 1, self.layout.num_heads, self.steady, self.layout.head_dim)
        for key in self.parents:
            made = torch.randn(shape, device=device)
            self.pool.put(key, KeysValues(made, made))
        new = (rows, self.layout.num_heads, TOKENS_PER_STEP, self.layout.head_dim)
        self._new = [torch.randn(new, device=device) for _ in range(self.layout.num_layers)]
        self._overflow = _overflow(workload, self.layout)
        self._batch: Any = None

    @staticmethod
    def pool_for(workload: Workload, rows: int, device: torch.device, owners: int = 1) -> KVPool:
        """A pool with room for the parents and children of so many owners, twice."""
        return KVPool(_layout(workload, device), 4 * rows * owners, writers=2 * rows)

    def gather(self) -> None:
        """One gather of every parent."""
        self._batch = self.pool.gather(self.parents)

    def append(self) -> None:
        """What the model does between."""
        for layer, new in enumerate(self._new):
            self._batch.append(layer, new, new)

    def commit(self) -> None:
        """One commit of every child, which replaces that of the step before."""
        self.pool.commit(self.children, self._batch, overflow=self._overflow)

    def step(self) -> None:
        """All three."""
        self.gather()
        self.append()
        self.commit()

    def close(self) -> None:
        """Check the books, and free the storage."""
        self.pool.check_integrity()
        self.pool.close()


class PerEntry:
    """The same as it is done where every entry has tensors of its own: a copy for each row, layer, and K and V."""

    def __init__(self, workload: Workload, rows: int, device: torch.device) -> None:
        layout = _layout(workload, device)
        self.rows, self.layers, self.steady, self.window = rows, layout.num_layers, workload.window - 3, workload.window
        entry = (2 * layout.num_layers, layout.num_heads, layout.max_tokens, layout.head_dim)
        self._parents = [torch.randn(entry, device=device) for _ in range(rows)]
        self._children = [torch.empty(entry, device=device) for _ in range(rows)]
        batch = (rows, layout.num_heads, layout.max_tokens, layout.head_dim)
        self._batch = [torch.empty(batch, device=device) for _ in range(2 * layout.num_layers)]
        overflow = _overflow(workload, layout)
        self._difference: Tensor | None = None
        if isinstance(overflow, DropAndCorrect):
            self._difference = overflow.packed[:, : self.steady].transpose(1, 2).contiguous()

    def gather(self) -> None:
        """A copy of each parent's tokens, layer by layer."""
        for row, parent in enumerate(self._parents):
            for part, target in enumerate(self._batch):
                target[row, :, : self.steady].copy_(parent[part, :, : self.steady])

    def commit(self) -> None:
        """A copy of each child's tokens, layer by layer, less the oldest two; corrected for absolute positions."""
        for row, child in enumerate(self._children):
            for part, source in enumerate(self._batch):
                kept = child[part, :, : self.steady]
                kept.copy_(source[row, :, TOKENS_PER_STEP : self.steady + TOKENS_PER_STEP])
                if self._difference is not None:
                    kept.add_(self._difference[part])


def copy_of(floats: int, device: torch.device) -> Callable[[], object]:
    """One contiguous copy of so many floats."""
    source, target = torch.randn(floats, device=device), torch.empty(floats, device=device)
    return lambda: target.copy_(source)


def _layout(workload: Workload, device: torch.device) -> KVLayout:
    return replace(workload.layout, device=device)


def _overflow(workload: Workload, layout: KVLayout) -> DropOldest | DropAndCorrect:
    limit, count = workload.window - 1, TOKENS_PER_STEP
    if workload.positions == "rotary":
        return DropOldest(limit, count)
    shape = (layout.num_layers, 2, layout.num_heads, limit - count, layout.head_dim)
    return DropAndCorrect(limit, count, torch.randn(shape, device=layout.device), layout)


def device_micros(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Microseconds of one `work()` on the device when many are issued one after the other."""
    if device.type != "cuda":
        started = time.perf_counter_ns()
        for _ in range(times):
            work()
        return (time.perf_counter_ns() - started) / times / 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) * 1e3 / times


def issue_micros(work: Callable[[], object], device: torch.device, times: int) -> list[float]:
    """Microseconds that the host needs for each of `times` calls, the device idle before each."""
    took = []
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter_ns()
        work()
        took.append((time.perf_counter_ns() - started) / 1e3)
    return took
