"""Hand-batched token rows: what one thread needs, and no more. No locks, no bound, no checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.contestants.base import Contestant, EntryStore, OwnBatch, SearchStore, UnfitError
from benchmarks.peers.shapes import Shape, Trees, difference_of, root_of

__all__ = ["Rows"]

LISTS = 64  # tokens of a window, up to which lists of slot numbers are faster than arrays


class RowsSearch(OwnBatch):
    """One tensor of token rows; a node is a list of row numbers, which a child shares; one `index_select` a gather.

    Rows are numbered in heads: `slot * heads`. Row 0 is a token of zeros, for padding and for room.
    """

    def __init__(self, shape: Shape, trees: Trees) -> None:
        super().__init__(shape, trees.rows)
        roots = trees.rows * trees.root_tokens
        slots = 1 + roots + sum(trees.stored_tokens(shape))
        self._slots = torch.zeros(shape.parts, slots, shape.heads, shape.head_dim)
        self._heads_of = self._slots.view(shape.parts, slots * shape.heads, shape.head_dim)
        self._room = trees.step_tokens
        self._as_lists = shape.window <= LISTS
        self._difference = difference_of(shape).unsqueeze(1) if shape.absolute else None  # [2 * layers, 1, heads, ...]
        self._heads = np.arange(shape.heads)[None, :, None]
        self._next = 1
        self._roots: dict[int, Any] = {}
        for row in range(trees.rows):
            self._roots[row] = self._write(root_of(shape, row, trees.root_tokens).unsqueeze(1))[0]
        self._first = self._next
        self._nodes: dict[int, Any] = {}
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}  # by columns: as index_select writes it, and as a batch

    def _write(self, kv: Tensor) -> list[Any]:
        """Store tokens `[2 * layers, rows, heads, tokens, head_dim]`; where each row's went."""
        parts, rows, heads, tokens, head_dim = kv.shape
        first = self._next
        self._next = first + rows * tokens
        into = self._slots.narrow(1, first, rows * tokens).view(parts, rows, tokens, heads, head_dim)
        into.copy_(kv.transpose(2, 3))
        if self._as_lists:
            step = tokens * heads
            starts = range(first * heads, self._next * heads, step)
            return [list(range(start, start + step, heads)) for start in starts]
        return list((np.arange(first, self._next) * heads).reshape(rows, tokens))

    def open(self) -> None:
        self._nodes, self._next = {}, self._first

    def close(self) -> None:
        self._nodes = {}

    def gather(self, keys: Sequence[int]) -> None:
        nodes, roots = self._nodes, self._roots
        found = [nodes[key] if key in nodes else roots[key] for key in keys]
        lengths = [len(slots) for slots in found]
        end = max(lengths)
        columns = end + self._room
        if self._as_lists:
            room = [0] * self._room
            table = np.array([[0] * (end - len(slots)) + slots + room for slots in found])
        else:
            table = np.zeros((self.rows, columns), dtype=np.int64)
            for row, slots, length in zip(table, found, lengths, strict=True):
                row[end - length : end] = slots
        index = (table[:, None, :] + self._heads).ravel()
        buffer = self._buffers.get(columns)
        if buffer is None:
            batch = torch.empty(self.shape.parts, self.rows, self.shape.heads, columns, self.shape.head_dim)
            buffer = self._buffers[columns] = batch.flatten(1, 3), batch
        torch.index_select(self._heads_of, 1, torch.from_numpy(index), out=buffer[0])
        self.use(buffer[1])
        self._found = found
        self.gathered(lengths, end)

    def commit(self, keys: Sequence[int]) -> None:
        new = self.end - self.start
        dropping = [row for row, length in enumerate(self.lengths) if length + new >= self.shape.limit]
        if self._difference is None or not dropping:
            self._share(keys, range(self.rows))
        elif len(dropping) == self.rows and len(set(self.lengths)) == 1:
            self._correct(keys, dropping, self.data)
        else:
            self._share(keys, [row for row in range(self.rows) if row not in dropping])
            for length in {self.lengths[row] for row in dropping}:
                rows = [row for row in dropping if self.lengths[row] == length]
                self._correct(keys, rows, self.data[:, rows])

    def _share(self, keys: Sequence[int], rows: Sequence[int]) -> None:
        """Store the new tokens of rows; what they were gathered from they share."""
        if not rows:
            return
        new = self.data.narrow(3, self.start, self.end - self.start)
        written = self._write(new if len(rows) == self.rows else new[:, rows])
        for row, slots in zip(rows, written, strict=True):
            before = self._found[row]
            joined = before + slots if self._as_lists else np.concatenate([before, slots])
            self._nodes[keys[row]] = joined[len(joined) - self.shape.kept(len(joined)) :]

    def _correct(self, keys: Sequence[int], rows: Sequence[int], data: Tensor) -> None:
        """Store all tokens of rows that drop some and are equally long: the difference is added to each."""
        kept = self.shape.kept(self.lengths[rows[0]] + self.end - self.start)
        assert self._difference is not None
        written = self._write(data.narrow(3, self.end - kept, kept) + self._difference)
        for row, slots in zip(rows, written, strict=True):
            self._nodes[keys[row]] = slots

    def kv_bytes(self) -> int:
        return (self._next - self._first) * self.shape.token_bytes

    def allocated_bytes(self) -> int | None:
        return self._slots.numel() * self._slots.element_size()


class Rows(Contestant):
    name = "rows"
    about = "hand-batched token rows, one index_select a gather; one thread, no locks"
    shares = True

    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        if count > 1 and not apart:
            raise UnfitError("has no locks: several threads cannot share it")
        return [RowsSearch(shape, trees) for _ in range(count)]

    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        raise UnfitError("for searches only")
