"""`Index`: entries by key, one shard's part of a scope; read and changed under that shard's lock."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

__all__ = ["Index", "find_places", "take_away"]

E = TypeVar("E")


class Index(Generic[E]):
    """A dict whose changes can be made in two steps, of which only the first may fail.

    Keys are the user's: their `__hash__` and `__eq__` may raise. `find_places` finds or adds the places of keys, and is
    undone without a look at any key; what is put into them then can no longer fail. Cost does not grow with the size.
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

    def place_of(self, key: Hashable) -> list[E]:
        """The place of `key`, a list of its one entry; empty where it is new."""
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = []
        return cell

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
        self.place_of(key)[:] = [entry]

    def __delitem__(self, key: Hashable) -> None:
        del self._cells[key]

    def __len__(self) -> int:
        return len(self._cells)


def find_places(indices: Sequence[Index[E]], keys: Sequence[Hashable]) -> tuple[list[list[E]], list[Index[E]]]:
    """The place of each key in its index, and the indices in which places are new; nothing, if a key raises."""
    places: list[list[E]] = []
    added: list[Index[E]] = []
    try:
        for index, key in zip(indices, keys, strict=True):
            cells = index._cells
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = []
                added.append(index)
            places.append(cell)
    except BaseException:
        take_away(added)
        raise
    return places, added


def take_away(added: Sequence[Index[E]]) -> None:
    """Undo `find_places`: take new places away, the newest first."""
    for index in reversed(added):
        index.undo_last()
