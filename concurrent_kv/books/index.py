"""`Index`: entries by key, one shard's part of a scope; read and changed under that shard's lock."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import repeat
from operator import attrgetter, setitem
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from ..native import lookup, native

__all__ = ["Cells", "Index", "Indexed", "find_in", "find_places", "take_away"]


class Indexed(Protocol):
    """What an index asks of an entry."""

    @property
    def key_hash(self) -> int:
        """That of its key when it was stored; the key's `__hash__` is never asked again."""

    @property
    def index_key(self) -> Hashable:
        """What later keys are compared with."""

    @property
    def scope(self) -> Any:
        """Where it is stored."""

    @property
    def generation(self) -> object:
        """That of the scope when it was stored."""


FEW = 256  # keys of which compiled code looks at every pair sooner than this does at each

E = TypeVar("E", bound=Indexed)
# A cell's place in the dict: the hash of its key or, where another key of that hash is in that place, (hash, number).
Place: TypeAlias = "int | tuple[int, int]"
Cells: TypeAlias = "dict[Place, list[E]]"  # a list of one, or of none while it is being written


class Index(Generic[E]):
    """A dict that takes entries out without a look at any key, and adds in two steps, of which only the first may fail.

    Keys are the user's: their `__hash__` and `__eq__` may raise, and may say something else than when they were stored.
    Only a lookup runs them, and only `__hash__` of the key that is looked up, and `__eq__` of a stored key of the same
    hash. What goes is found by the hash it was stored under and by identity. Cost does not grow with the size.

    Attributes:
        cells: what is in it, in the order of its keys' first writes.
        extra: the places of cells whose hash was taken; some may be empty.
    """

    __slots__ = ("cells", "extra")

    def __init__(self) -> None:
        self.cells: Cells[E] = {}
        self.extra: dict[int, list[tuple[int, int]]] = {}

    def get(self, key: Hashable, hashed: int | None = None) -> E | None:
        """The entry of `key`, or None. `hashed` is the key's hash, where the caller has it."""
        cell = self._cell_of(key, hash(key) if hashed is None else hashed)
        return None if cell is None else cell[0]

    def _cell_of(self, key: Hashable, hashed: int) -> list[E] | None:
        cell: list[E] | None = lookup(self.cells, hashed)
        if cell:
            known = cell[0].index_key
            if known is key or known == key:
                return cell
        if self.extra:
            for place in self.extra.get(hashed, ()):
                cell = lookup(self.cells, place)
                if cell:
                    known = cell[0].index_key
                    if known is key or known == key:
                        return cell
        return None

    def holds(self, entry: E) -> bool:
        """Whether this very entry is in it. Looks at no key."""
        return self._place_of(entry) is not None

    def remove(self, entry: E) -> bool:
        """Take this very entry out, which the caller keeps alive; False if it is not in it. Looks at no key."""
        place = self._place_of(entry)
        if place is None:
            return False
        self._drop(place)
        return True

    def move(self, entry: E, other: E, into: Index[E]) -> bool:
        """Take this very entry out, and put another into an index that has none of its key, as one step.

        False if it is not in it. Nothing has changed where it raises. Looks at no key.
        """
        place = self._place_of(entry)
        if place is None:
            return False
        leaving: list[E] = self.cells[place]
        coming: list[E] = []
        new_place = into.new_place(other.key_hash)
        into.cells[new_place] = coming
        steps = map(setitem, (coming, leaving), repeat(slice(None)), ((other,), ()))
        try:
            # In one call of C functions: what cuts in from outside comes before both, or after. The second needs no
            # memory.
            any(steps)
        except Exception:
            del into.cells[new_place]
            raise
        # Nothing that fails from here on may be heard: it has happened.
        del self.cells[place]
        if type(place) is tuple:
            try:
                self._drop_extra(place)
            except Exception:  # no memory, no frames: it is there, and empty
                return True
        return True

    def chosen_of(self, hashed: int, condition: Callable[[E], bool]) -> list[E]:
        """The entries of this hash that meet a condition. Looks at no key."""
        places: list[Place] = [hashed, *self.extra.get(hashed, ())]
        cells = filter(None, [lookup(self.cells, place) for place in places])
        return [cell[0] for cell in cells if condition(cell[0])]

    def remove_each(self, entries: Iterable[E]) -> list[E]:
        """Take those of some entries out that are in it; returns them. All of them, or none where it raises."""
        found = [(place, entry) for entry in entries if (place := self._place_of(entry)) is not None]
        gone, left, cells = [entry for _, entry in found], iter(found), self.cells
        # Nothing that needs memory from here on.
        for place, _ in left:
            if type(place) is tuple:
                self._drop(place)
            else:
                del cells[place]
        return gone

    def _drop(self, place: Place) -> None:
        del self.cells[place]
        if type(place) is tuple:
            try:
                self._drop_extra(place)
            except Exception:  # no memory, no frames: it is there, and empty
                return

    def _place_of(self, entry: E) -> Place | None:
        hashed = entry.key_hash
        cell: list[E] | None = lookup(self.cells, hashed)
        if cell and cell[0] is entry:
            return hashed
        if self.extra:
            for place in self.extra.get(hashed, ()):
                cell = lookup(self.cells, place)
                if cell and cell[0] is entry:
                    return place
        return None

    def _drop_extra(self, place: tuple[int, int]) -> None:
        places = self.extra[place[0]]
        places.remove(place)
        if not places:
            del self.extra[place[0]]

    def new_place(self, hashed: int) -> Place:
        """Where to put a key of this hash that is not in it."""
        if hashed not in self.cells:
            return hashed
        places = self.extra.setdefault(hashed, [])
        # Those of writes that were undone are empty.
        places[:] = [place for place in places if place in self.cells]
        place = hashed, places[-1][1] + 1 if places else 1
        places.append(place)
        return place

    def put(self, entry: E) -> None:
        """Put one entry in, in the stead of that of an equal key."""
        cell = self._cell_of(entry.index_key, entry.key_hash)
        if cell is None:
            cell = self.cells[self.new_place(entry.key_hash)] = []
        cell[:] = [entry]

    def pop(self, key: Hashable, default: E | None = None) -> E | None:
        """Take the entry of `key` out and return it."""
        entry = self.get(key)
        if entry is None:
            return default
        self.remove(entry)
        return entry

    def take_all(self) -> tuple[list[E], Cells[E]]:
        """Take every entry away; returns them, and the cells, which may die where no lock is held. Looks at no key."""
        taken = self.all(), self.cells
        self.cells, self.extra = {}, {}
        return taken

    def all(self) -> list[E]:
        """Every entry."""
        return list(self.values()) if native is None else native.items_of(self.cells)

    def clear(self) -> None:
        """Take every entry away. Looks at no key."""
        self.cells.clear()
        self.extra.clear()

    def drop_empty(self) -> None:
        """Take away the cells of writes that were cut off."""
        for place in [place for place, cell in self.cells.items() if not cell]:
            del self.cells[place]

    def values(self) -> Iterator[E]:
        """Every entry."""
        return (cell[0] for cell in self.cells.values() if cell)

    def items(self) -> Iterator[tuple[Hashable, E]]:
        """Every key as it was first written, with its entry."""
        return ((cell[0].index_key, cell[0]) for cell in self.cells.values() if cell)

    def misplaced(self) -> list[E]:
        """Entries that are not where their hashes say. Looks at no key."""
        return [
            cell[0]
            for place, cell in self.cells.items()
            if cell and cell[0].key_hash != (place[0] if isinstance(place, tuple) else place)
        ]

    def listed(self) -> list[tuple[Hashable, E]]:
        """`items()` as a list, made in a frame of its own (no loop may stand in the `with` block of a lock)."""
        return list(self.items())

    def find_each(self, keys: Iterable[Hashable]) -> list[E | None]:
        """The entry of each key, or None."""
        return [self.get(key) for key in keys]

    def chosen(self, condition: Callable[[E], bool]) -> list[E]:
        """The entries that meet a condition."""
        return [entry for entry in self.values() if condition(entry)]

    def __contains__(self, key: Hashable) -> bool:
        return self._cell_of(key, hash(key)) is not None

    def __getitem__(self, key: Hashable) -> E:
        cell = self._cell_of(key, hash(key))
        if cell is None:
            raise KeyError(key)
        return cell[0]

    def __len__(self) -> int:
        return len(self.cells)


def find_in(
    indexes: list[Index[E]], keys: list[Hashable], hashes: list[int], generations: Mapping[Any, object] | None = None
) -> list[E | None]:
    """The entry of each key in its part of an index, or None; with `generations`, of those of their scopes alone."""
    found: list[E | None] | None = None if native is None else native.find(indexes, keys, hashes)
    if found is None:  # or there are two keys of one hash
        found = list(map(Index.get, indexes, keys, hashes))
    if generations is not None:
        for row, entry in enumerate(found):
            if entry is not None and entry.generation is not generations[entry.scope]:
                found[row] = None
    return found


_CELLS, _EXTRA = attrgetter("cells"), attrgetter("extra")


def find_places(
    indexes: list[Index[E]], keys: list[Hashable], hashes: list[int]
) -> tuple[list[list[E]], list[E | None], list[E], list[Cells[E]]]:
    """The place of each of some different keys in its part of an index, made where it is new; nothing, if a key raises.

    Returns the places, what each holds or None, what is held, and the parts in which places are new.
    """
    if native is not None and len(keys) <= FEW and not any(map(_EXTRA, indexes)):
        found = native.places(list(map(_CELLS, indexes)), keys, hashes)
        if found is not None:  # no two keys of one hash
            return found  # type: ignore[no-any-return]
    places: list[list[E]] = []
    added: list[Cells[E]] = []
    try:
        for index, key, hashed in zip(indexes, keys, hashes, strict=True):
            cell = index._cell_of(key, hashed)
            if cell is None:
                place = index.new_place(hashed)
                cell = index.cells[place] = []
                try:
                    added.append(index.cells)  # after: what is cut off in between leaves a place, and takes no other's
                except MemoryError:
                    del index.cells[place]
                    raise
            places.append(cell)
        held = [cell[0] if cell else None for cell in places]
        return places, held, [entry for entry in held if entry is not None], added
    except BaseException:
        take_away(added)
        raise


def take_away(added: list[Cells[E]]) -> None:
    """Undo `find_places`: take new places away, the newest first, without a look at any key."""
    left = len(added)
    while left:
        left -= 1
        try:
            added[left].popitem()
        except MemoryError:  # for the pair; once more
            added[left].popitem()
