"""`Index`: entries by key, one shard's part of a scope; read and changed under that shard's lock."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["Index"]

E = TypeVar("E")


class Index(Generic[E]):
    """A dict whose changes can be made in two steps, of which only the first may fail.

    Keys are the user's: their `__hash__` and `__eq__` may raise. `cell_of` finds or adds the place of a key, and is
    undone without a look at any key; what is put into a cell then can no longer fail. Cost does not grow with the size.
    """

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[Hashable, list[E]] = {}

    def get(self, key: Hashable) -> E | None:
        """The entry of `key`, or None."""
        cell = self._cells.get(key)
        return cell[0] if cell else None

    def find(self, keys: Iterable[Hashable]) -> list[E | None]:
        """The entry of each key, or None."""
        get = self._cells.get
        return [cell[0] if (cell := get(key)) else None for key in keys]

    def cell_of(self, key: Hashable) -> tuple[list[E], bool]:
        """The place of `key`, a list of its one entry; empty and True where it is new."""
        cell = self._cells.get(key)
        if cell is not None:
            return cell, False
        cell = self._cells[key] = []
        return cell, True

    def undo_last(self) -> None:
        """Take the newest place away, without a look at its key."""
        self._cells.popitem()

    def clear(self) -> None:
        """Take every entry away, without a look at any key."""
        self._cells.clear()

    def pop(self, key: Hashable, default: E | None = None) -> E | None:
        """Take the entry of `key` away and return it."""
        cell = self._cells.pop(key, None)
        return cell[0] if cell else default

    def values(self) -> Iterator[E]:
        """Every entry."""
        return (cell[0] for cell in self._cells.values() if cell)

    def items(self) -> Iterator[tuple[Hashable, E]]:
        """Every key as the index has it, with its entry."""
        return ((key, cell[0]) for key, cell in self._cells.items() if cell)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._cells

    def __getitem__(self, key: Hashable) -> E:
        return self._cells[key][0]

    def __setitem__(self, key: Hashable, entry: E) -> None:
        self.cell_of(key)[0][:] = [entry]

    def __delitem__(self, key: Hashable) -> None:
        del self._cells[key]

    def __len__(self) -> int:
        return len(self._cells)
