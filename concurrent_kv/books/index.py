"""`Index`: entries by key, one shard's part of a scope; read and changed under that shard's lock."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

from ..device.native import native

__all__ = ["Cells", "Index", "find_places", "take_away"]

E = TypeVar("E")
Cells: TypeAlias = "dict[Hashable, list[E]]"  # a list of one, or of none while it is being written


class Index(Generic[E]):
    """A dict whose changes can be made in two steps, of which only the first may fail.

    Keys are the user's: their `__hash__` and `__eq__` may raise. `find_places` finds or adds the places of keys, and is
    undone without a look at any key; what is put into them then can no longer fail. Cost does not grow with the size.

    Attributes:
        cells: what is in it, for `find_places`.
    """

    __slots__ = ("cells",)

    def __init__(self) -> None:
        self.cells: Cells[E] = {}

    def get(self, key: Hashable) -> E | None:
        """The entry of `key`, or None."""
        cell = self.cells.get(key)
        return cell[0] if cell else None

    def find(self, keys: list[Hashable]) -> list[E | None]:
        """The entry of each key, or None."""
        if native is not None:
            return native.find(self.cells, keys)  # type: ignore[no-any-return]
        get = self.cells.get
        return [cell[0] if (cell := get(key)) else None for key in keys]

    def place_of(self, key: Hashable) -> list[E]:
        """The place of `key`, a list of its one entry; empty where it is new."""
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = []
        return cell

    def clear(self) -> None:
        """Take every entry away, without a look at any key."""
        self.cells.clear()

    def pop(self, key: Hashable, default: E | None = None) -> E | None:
        """Take the entry of `key` away and return it."""
        cell = self.cells.pop(key, None)
        return cell[0] if cell else default

    def values(self) -> Iterator[E]:
        """Every entry."""
        return (cell[0] for cell in self.cells.values() if cell)

    def items(self) -> Iterator[tuple[Hashable, E]]:
        """Every key as the index has it, with its entry."""
        return ((key, cell[0]) for key, cell in self.cells.items() if cell)

    def listed(self) -> list[tuple[Hashable, E]]:
        """`items()` as a list, made in a frame of its own (no loop may stand in the `with` block of a lock)."""
        return list(self.items())

    def lacking(self, keys: Iterable[Hashable]) -> list[Hashable]:
        """Those of `keys` that are not in it."""
        return [key for key in keys if key not in self.cells]

    def all_of(self, keys: Iterable[Hashable]) -> list[E]:
        """The entry of each key, all of which are in it."""
        return [self.cells[key][0] for key in keys]

    def chosen(self, condition: Callable[[E], bool]) -> list[E]:
        """The entries that meet a condition."""
        return [entry for entry in self.values() if condition(entry)]

    def __contains__(self, key: Hashable) -> bool:
        return key in self.cells

    def __getitem__(self, key: Hashable) -> E:
        return self.cells[key][0]

    def __setitem__(self, key: Hashable, entry: E) -> None:
        self.place_of(key)[:] = [entry]

    def __delitem__(self, key: Hashable) -> None:
        del self.cells[key]

    def __len__(self) -> int:
        return len(self.cells)


def find_places(
    cells_of: list[Cells[E]], keys: list[Hashable]
) -> tuple[list[list[E]], list[E | None], list[E], list[Cells[E]]]:
    """The place of each key in its part of an index, made where it is new; nothing, if a key raises.

    Returns the places, what each holds or None, what is held, and the parts in which places are new.
    """
    if native is not None:
        return native.places(cells_of, keys)  # type: ignore[no-any-return]
    places: list[list[E]] = []
    added: list[Cells[E]] = []
    try:
        for cells, key in zip(cells_of, keys, strict=True):
            cell = cells.get(key)
            if cell is None:
                cell = cells[key] = []
                added.append(cells)
            places.append(cell)
    except BaseException:
        take_away(added)
        raise
    held = [cell[0] if cell else None for cell in places]
    return places, held, [entry for entry in held if entry is not None], added


def take_away(added: list[Cells[E]]) -> None:
    """Undo `find_places`: take new places away, the newest first, without a look at any key."""
    for cells in reversed(added):
        cells.popitem()
