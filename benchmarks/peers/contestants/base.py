"""What a contestant is: somewhere to keep the K and V of a search's nodes, and of single entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.shapes import Shape, Trees

__all__ = ["Contestant", "EntryStore", "OwnBatch", "SearchStore", "UnfitError"]


class UnfitError(Exception):
    """A contestant cannot take part in a case, and says why: the tables show it."""


class SearchStore(ABC):
    """Keeps one search's nodes. Every step is one `gather`, an `append` for each layer, one `commit`.

    Attributes:
        checked: whether its batches are what the others' are.
    """

    checked = True

    @abstractmethod
    def open(self) -> None:
        """Begin a search; the roots are there."""

    @abstractmethod
    def gather(self, keys: Sequence[int]) -> None:
        """Look the parents up, one for each row, and assemble them: in the search's own nodes, then among the roots."""

    @abstractmethod
    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new tokens `[rows, heads, tokens, head_dim]` after each row's newest; returns all of the layer's."""

    @abstractmethod
    def tokens(self) -> Tensor:
        """The batch up to its newest token, `[2 * layers, rows, heads, tokens, head_dim]`: all keys, then all values.

        Rows are left-padded with zeros. A view of a buffer in which each layer's K and V are contiguous.
        """

    @abstractmethod
    def commit(self, keys: Sequence[int]) -> None:
        """Store every row of the batch under a key of its own."""

    @abstractmethod
    def close(self) -> None:
        """End the search: all it stored goes, the roots stay."""

    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of K and V that the open search's nodes take, those of shared tokens once."""

    def allocated_bytes(self) -> int | None:
        """Bytes of K and V set aside for all that may be stored; None where every node is allocated by itself."""
        return None

    def destroy(self) -> None:  # noqa: B027  what most of them need not
        """Check what can be checked and free everything. The store is not used any more."""


class EntryStore(ABC):
    """Keeps single entries: what is got is the caller's to keep, what was put may be written to afterwards."""

    @abstractmethod
    def prepared(self, kv: Tensor) -> Any:
        """K and V `[2 * layers, heads, tokens, head_dim]` as `put` takes them; not timed."""

    @abstractmethod
    def put(self, key: int, kv: Any) -> None:
        """Store a copy; the oldest goes where there is no room."""

    @abstractmethod
    def get(self, key: int) -> Any:
        """What was stored."""

    @abstractmethod
    def tensor_of(self, found: Any) -> Tensor:
        """What `get` returned as K and V `[2 * layers, heads, tokens, head_dim]`; not timed."""

    def fill(self, keys: Sequence[int], kv: Tensor) -> None:
        """Store the same K and V under many keys."""
        made = self.prepared(kv)
        for key in keys:
            self.put(key, made)

    def destroy(self) -> None:  # noqa: B027  what most of them need not
        """Check what can be checked and free everything. The store is not used any more."""


class Contestant(ABC):
    """A way to keep K and V, wired as a careful user would.

    Attributes:
        name: in tables and on the command line.
        about: one line of what it is.
        shares: whether a child shares its parent's tokens.
    """

    name: str
    about: str
    shares = False

    @abstractmethod
    def searches(self, shape: Shape, trees: Trees, count: int = 1, *, apart: bool = False) -> list[SearchStore]:
        """Stores of `count` searches, each for a thread of its own; over one cache, or `apart` over one each.

        Raises:
            UnfitError: it cannot do that.
        """

    @abstractmethod
    def entries(self, shape: Shape, tokens: int, capacity: int) -> EntryStore:
        """A store of single entries of so many tokens.

        Raises:
            UnfitError: it has none.
        """


class OwnBatch(SearchStore):
    """One that assembles its batches by itself: one buffer as wide as the window, used again at every step."""

    def __init__(self, shape: Shape, rows: int) -> None:
        self.shape, self.rows = shape, rows
        self._buffer = torch.empty(shape.parts, rows, shape.heads, shape.window, shape.head_dim)
        self.use(self._buffer)

    def use(self, data: Tensor) -> None:
        """Make `data` the batch, `[2 * layers, rows, heads, columns, head_dim]`."""
        self.data, self._parts = data, data.unbind(0)

    def gathered(self, lengths: Sequence[int], end: int) -> None:
        """The rows, so long, are there up to the column `end`."""
        self.lengths, self.start = lengths, end
        self.end = end

    def tokens(self) -> Tensor:
        return self.data.narrow(3, 0, self.end)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        tokens = keys.shape[2]
        all_keys, all_values = self._parts[layer], self._parts[self.shape.layers + layer]
        all_keys.narrow(2, self.start, tokens).copy_(keys)
        all_values.narrow(2, self.start, tokens).copy_(values)
        self.end = end = self.start + tokens
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)
