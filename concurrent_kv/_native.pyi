# The compiled module, where it was built. Arguments are by position. Arrays are C contiguous and of the types below, or
# ValueError or BufferError is raised; a wrong number or kind of arguments is a TypeError; a row, column or slot that is
# none is an IndexError. Whatever is raised, nothing was written. Addresses are not checked: the caller keeps the
# contiguous memory alive for the call, and holds the locks that the counterpart in Python needs.
#
# `shape` is that of the slots: (planes, slots, heads, bytes of one head of a token); planes are 2 * layers. Slots are
# an array, or a range of step 1.

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Buffer

from .books.index import Cells, Index
from .books.records import Entry
from .locks.contention import Contention
from .locks.deadline import Deadline

_Shape: TypeAlias = tuple[int, int, int, int]
_Slots: TypeAlias = range | NDArray[np.int64]

# `Tables` and `Uses` of `books/tables.py`; arrays come as the bytes of one. A row that is not taken is an
# IndexError, a row that was not counted in a ValueError.
class Tables:
    def __init__(self, num_slots: int, window: int) -> None: ...
    @property
    def used(self) -> int: ...
    @property
    def shared(self) -> int: ...
    def enter(
        self, parents: list[int], kept: list[int], own: list[int], taken: _Slots, positions: NDArray[np.int64], /
    ) -> tuple[list[int], list[int]]: ...
    def leave(self, rows: list[int], /) -> tuple[bytearray, bool]: ...
    def columns(self, rows: list[int], end: int, columns: int, /) -> bytearray: ...
    def slots_of(self, row: int, /) -> bytearray: ...
    def slots_of_all(self, rows: list[int], /) -> bytearray: ...
    def pages_of(self, row: int, /) -> list[tuple[int, list[int]]]: ...
    def named_elsewhere(self, rows: list[int], /) -> bool: ...
    def positions(self, slots: _Slots, /) -> bytearray: ...
    def exclusive(self, rows: list[int], /) -> int: ...
    def weights(self, slots: _Slots, /) -> bytearray: ...
    def counted(self) -> tuple[bytearray, bytearray]: ...
    def keep(self, rows: list[int], /) -> None: ...

class Uses:
    def __init__(self, tables: Tables) -> None: ...
    @property
    def used(self) -> int: ...
    def add(self, rows: list[int], /) -> None: ...
    def remove(self, rows: list[int], /) -> None: ...
    def exclusive(self, rows: list[int], /) -> int: ...
    def weights(self, slots: _Slots, /) -> bytearray: ...
    def counted(self) -> tuple[bytearray, bytearray]: ...
    def keep(self, rows: list[int], /) -> None: ...

# Whether nothing has to be asked of any of some keys: they are text, bytes, numbers, None, or tuples of such.
def are_plain(keys: list[Hashable], /) -> bool: ...

# `ShardLocks` of `locks/shards.py`. The `wait_until` of `contention` is called where a shard has to be waited for.
# Shards are in ascending order, or a ValueError is raised.
class ShardLocks:
    def __init__(self, count: int, contention: Contention) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def contention(self) -> Contention: ...
    @property
    def held(self) -> int: ...
    def read(self, shards: Sequence[int], deadline: Deadline, /) -> Held: ...
    def write(self, shards: Sequence[int], deadline: Deadline, /) -> Held: ...

class Held:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def wait(self, seconds: float, /) -> bool: ...

# The lock of `locks/gate.py`: how deep the calling thread is inside.
class Gate:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def holds(self) -> bool: ...

# What the process uses to its end, and the calling thread has made: without the GIL, no thread counts references of it.
def keep_for_ever(object: object, /) -> None: ...

# `dict.get`, without waiting for other threads where nothing is written.
def lookup(dict: Mapping[Any, Any], key: Hashable, /) -> Any: ...

# Tokens of rows of the tables, each row's newest before column `end`, into columns 0 to `filled` of a batch [planes,
# rows, heads, columns] at the address `batch`. What no row fills becomes slot 0, which is zeros. Lets go of the GIL for
# a large copy.
def gather(
    slots: int,
    shape: _Shape,
    batch: int,
    batch_rows: int,
    columns: int,
    end: int,
    filled: int,
    tables: Tables,
    rows: list[int],
    /,
) -> None: ...

# As `gather`, of float32. Tokens of rows whose item of `owed` is `owing` have added, in the drops' order, what they are
# owed for every `drop` positions between that which their slot was written at and where they stand in their row: the
# differences [planes, positions + 1, heads] at an address, of the position that a token came to.
def gather_stepwise(
    slots: int,
    shape: _Shape,
    batch: int,
    batch_rows: int,
    columns: int,
    end: int,
    filled: int,
    tables: Tables,
    rows: list[int],
    owed: list[object],
    owing: object,
    difference: int,
    positions: int,
    drop: int,
    /,
) -> None: ...

# Token `columns[i]` of row `rows[i]` of a batch [planes, rows_of_batch, heads, columns_of_batch] at the address `batch`
# into slot `taken[i]`, for every i. The first `corrected` of them, in runs of `kept`, are float32 and have the
# differences [planes, kept, heads] at the address `difference` added, whose planes are `plane_bytes` apart. Lets go of
# the GIL for a large copy.
def scatter(
    slots: int,
    shape: _Shape,
    batch: int,
    rows_of_batch: int,
    columns_of_batch: int,
    difference: int,
    plane_bytes: int,
    kept: int,
    corrected: int,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    taken: _Slots,
    /,
) -> None: ...

# Different slots in ascending order: as ranges or, if these are more than `most`, as int64. None if they lie so far
# apart that it takes long.
def in_runs(slots: NDArray[np.int64], most: int, /) -> list[range] | bytearray | None: ...

# The xxh64 hash of each of `rows` rows of equally many bytes, as 16 hexadecimal digits.
def hash_rows(data: Buffer, rows: int, /) -> list[str]: ...

# As `hash_rows`, of `rows` rows of `row_bytes` bytes at an address.
def hash_memory(address: int, rows: int, row_bytes: int, /) -> list[str]: ...

# The class of entries, whose slots the functions below read and write where they lie, and the place of new ones.
# Entries are of that class and of no other, with all slots filled, or TypeError or AttributeError is raised.
def bind(entry: type[object], place: object, /) -> None: ...

# `Entry(key, scope, generation, length, side, priority, key_hash, correction, written)` of each.
def new_entries(
    keys: list[Hashable],
    scope: object,
    generation: object,
    lengths: list[int],
    sides: list[object],
    priorities: list[float],
    hashes: list[int],
    corrections: list[Any],
    written: object,
    /,
) -> list[Entry]: ...

# Rows, lengths and corrections of entries, 0, 0 and None of None; and those of other scopes than `scope`.
def describe(entries: list[Entry | None], scope: object, /) -> tuple[list[int], list[int], list[Any], list[Entry]]: ...

# One more reference of each entry, which join `held`.
def retain(entries: list[Entry], held: list[Entry], /) -> None: ...

# One reference less of each entry; those that have none left, their rows, and their ticks, where there are any and not
# the same again and again.
def let_go(entries: list[Entry], /) -> tuple[list[Entry], list[int], list[Mapping[Any, int]]]: ...

# Rows and their last slots for new entries, and the reference of the index. Needs no memory.
def name_rows(entries: list[Entry], rows: list[int], tails: list[int], /) -> None: ...

# Entries at the place of new ones.
def displace(entries: list[Entry], /) -> None: ...

# The entry in the cell of each key's hash in its index, a list of one or of none, where its `index_key` equals the key;
# or None. None for all where an index has extra places. Runs `__eq__` of the keys that are stored.
def find(indexes: list[Index[Entry]], keys: list[Hashable], hashes: list[int], /) -> list[Entry | None] | None: ...

# What is in cells, each a list of one or of none, in their order.
def items_of(cells: Cells[Entry], /) -> list[Entry]: ...

# The cell of each key in its dict, new and empty where there was none; what each holds, or None; what is held; and the
# dict of each new one. Where a key's `__eq__` raises, no cell is new; nor where another key of the same hash has the
# cell, or a cell is empty: None then.
def places(
    dicts: list[Cells[Entry]], keys: list[Hashable], hashes: list[int], /
) -> tuple[list[list[Entry]], list[Entry | None], list[Entry], list[Cells[Entry]]] | None: ...

# Entries into their cells, at `place`; what a cell held gives way, and its key stays.
def occupy(cells: list[list[Entry]], entries: list[Entry], held: list[Entry | None], place: object, /) -> None: ...

# New tokens into columns from `end` on of one layer of a batch or, where `layer` is -1, of all, of which `keys` and
# `values` are stacked; returns how many each row got. 0, with nothing written, where they are not what the batch takes
# or no plain tensors whose memory can be read (their last dimension in one piece), where there is no room, where the
# batch has other memory than at its address, and for a very large copy. `batch` is the tensor [2 * layers, rows, heads,
# columns, head_dim], contiguous and plain; its dtype and address, layers and the other four sizes, and the bytes of a
# number. Errors of the tensors but RuntimeError are passed on. Lets go of the GIL for a large copy.
def append(
    batch: tuple[Tensor, object, int, int, int, int, int, int, int],
    layer: int,
    end: int,
    keys: Tensor,
    values: Tensor,
    /,
) -> int: ...

# Ask the system for large pages where it has them; it may refuse without a word.
def advise_huge_pages(address: int, num_bytes: int, /) -> None: ...
