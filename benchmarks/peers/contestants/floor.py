"""The floor: a bare copy of as many bytes as every operation has to move, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers.contestants.base import Contestant, EntryStore, SearchStore, UnfitError
from benchmarks.peers.shapes import Shape, Trees

__all__ = ["Floor"]

Copy = tuple[Tensor, Tensor]  # from, to


class CopiedSearch(SearchStore):
    """One contiguous copy for a gather, one for all layers' new tokens, one for a commit."""

    checked = False

    def __init__(self, shape: Shape, trees: Trees) -> None:
        gathered = [sum(lengths) * shape.token_numbers for lengths in trees.gathered]
        stored = [tokens * shape.token_numbers for tokens in trees.stored_tokens(shape)]
        new = trees.rows * trees.step_tokens * shape.token_numbers
        most = max(*gathered, *stored, new)
        source, target = torch.randn(most), torch.empty(most)
        copies = {count: (source[:count], target[:count]) for count in {*gathered, *stored, new}}
        self._gathers, self._commits = [copies[count] for count in gathered], [copies[count] for count in stored]
        self._append = copies[new]
        self._step = 0

    def open(self) -> None:
        self._step = 0

    def gather(self, keys: Sequence[int]) -> None:
        source, target = self._gathers[self._step]
        target.copy_(source)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not layer:
            self._append[1].copy_(self._append[0])
        return self._append

    def tokens(self) -> Tensor:
        return self._append[1]

    def commit(self, keys: Sequence[int]) -> None:
        source, target = self._commits[self._step]
        target.copy_(source)
        self._step += 1

    def close(self) -> None:
        pass

    def kv_bytes(self) -> int:
        return 0


class ClonedEntries(EntryStore):
    """A clone to put, a clone to get."""

    def __init__(self) -> None:
        self._kv = torch.empty(0)

    def prepared(self, kv: Tensor) -> Tensor:
        return kv

    def put(self, key: int, kv: Tensor) -> None:
        self._kv = kv.clone()

    def get(self, key: int) -> Tensor:
        return self._kv.clone()

    def tensor_of(self, found: Tensor) -> Tensor:
        return found

    def fill(self, keys: Sequence[int], kv: Tensor) -> None:
        self.put(0, kv)


class Floor(Contestant):
    name = "floor"
    about = "a bare copy of the same bytes: copy_() of contiguous memory, clone() for single entries"

    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        if count > 1:
            raise UnfitError("for one thread")
        return [CopiedSearch(shape, trees)]

    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        return ClonedEntries()
