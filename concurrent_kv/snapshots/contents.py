"""What a snapshot holds beside the tokens, as records; and as tensors of a file and back, with every number checked."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..device.layout import KVLayout
from .keys import decoded, encoded

__all__ = [
    "Contents",
    "Numbers",
    "OwedMark",
    "PoolContents",
    "PoolInfo",
    "SideCodec",
    "SnapshotInfo",
    "from_parts",
    "to_parts",
]

Numbers = npt.NDArray[np.int64]
NO_SIDE = -1
OWED_NOTHING = -1


class SideCodec(Protocol):
    """Side data as bytes and back; called with no lock held."""

    def encode(self, side: Any) -> bytes:
        """What is written to a file."""

    def decode(self, data: bytes) -> Any:
        """What was `encoded` as these bytes."""


@dataclass(frozen=True)
class PoolInfo:
    """A pool of a snapshot: what is in the file, and how large the pool was."""

    entries: int
    slots: int
    max_entries: int
    max_slots: int
    version: int
    policy: str
    scopes: tuple[Hashable, ...]


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot says of itself.

    Attributes:
        layout: of its tokens, on a CPU.
        pools: by role: "pool" of a pool's, "init[0]", ..., "recur", "wm" of a manager's.
        entries, slots: of all of them; a slot that several entries share is one.
        format_version: of the file.
    """

    layout: KVLayout
    pools: Mapping[str, PoolInfo]
    entries: int
    slots: int
    format_version: int


class OwedMark(NamedTuple):
    """Tells the table that some tokens are owed corrections by from others."""

    kind: str
    step: int  # tokens of a drop; 0 of a table of every distance
    checksum: str


@dataclass
class PoolContents:
    """The entries of one pool, the next victim first.

    Attributes:
        scopes: names; None for the default scope, else a tuple of one.
        scope_of, keys, priorities, owed, sides: of each entry; `owed` is a number of `Contents.marks`, or -1; a side is
            what a codec made, or None.
        lengths: tokens of each entry.
        tables: the slots of all entries, one entry after the other, as numbers into the file's.
    """

    role: str
    max_entries: int
    max_slots: int
    policy: str
    version: int
    scopes: list[tuple[Hashable] | None]
    scope_of: list[int]
    keys: list[Hashable]
    priorities: list[float]
    owed: list[int]
    sides: list[bytes | None]
    lengths: Numbers
    tables: Numbers

    def info(self) -> PoolInfo:
        """What it says of itself."""
        names = tuple([scope[0] for scope in self.scopes if scope is not None])
        slots = len(np.unique(self.tables))
        sizes = len(self.keys), slots, self.max_entries, self.max_slots
        return PoolInfo(*sizes, self.version, self.policy, names)

    def ends(self) -> Numbers:
        """Where each entry's part of `tables` ends."""
        return np.cumsum(self.lengths)


@dataclass
class Contents:
    """A whole snapshot, but for the tokens themselves.

    Attributes:
        positions: that each slot's token was written at.
        marks: of the tables that entries are owed corrections by.
    """

    layout: KVLayout
    pools: list[PoolContents]
    positions: Numbers
    marks: list[OwedMark] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """How many slots the file has."""
        return len(self.positions)

    @property
    def entries(self) -> int:
        """How many entries, of all pools."""
        return sum(len(pool.keys) for pool in self.pools)

    def info(self, format_version: int) -> SnapshotInfo:
        """What it says of itself."""
        pools = {pool.role: pool.info() for pool in self.pools}
        return SnapshotInfo(self.layout, pools, self.entries, self.slots, format_version)


def to_parts(contents: Contents) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a file by name, but for the tokens."""
    pools = [_pool_form(pool) for pool in contents.pools]
    index = json.dumps({"pools": pools, "marks": contents.marks}, separators=(",", ":"), allow_nan=False)
    sides = b"".join(side for pool in contents.pools for side in pool.sides if side is not None)
    none: list[Numbers] = [np.empty(0, dtype=np.int64)]
    return {
        "positions": contents.positions.astype("<i4"),
        "lengths": np.concatenate(none + [pool.lengths for pool in contents.pools]).astype("<i4"),
        "tables": np.concatenate(none + [pool.tables for pool in contents.pools]).astype("<i4"),
        "index": np.frombuffer(index.encode(), dtype=np.uint8),
        "sides": np.frombuffer(sides, dtype=np.uint8),
    }


def _pool_form(pool: PoolContents) -> dict[str, object]:
    return {
        "role": pool.role,
        "max_entries": pool.max_entries,
        "max_slots": pool.max_slots,
        "policy": pool.policy,
        "version": pool.version,
        "scopes": [None if scope is None else [encoded(scope[0])] for scope in pool.scopes],
        "scope_of": pool.scope_of,
        "keys": list(map(encoded, pool.keys)),
        "priorities": list(map(encoded, pool.priorities)),
        "owed": pool.owed,
        "sides": [NO_SIDE if side is None else len(side) for side in pool.sides],
    }


def from_parts(layout: KVLayout, slots: int, parts: Mapping[str, npt.NDArray[Any]]) -> Contents:
    """What `to_parts` was given, if these are such tensors of a file with so many slots, and they fit together.

    Raises:
        ValueError, TypeError, KeyError, IndexError, RecursionError, OverflowError: they do not; says what is wrong.
    """
    index = json.loads(parts["index"].tobytes())
    marks = [OwedMark(_text(kind), _whole(count, 0), _text(checksum)) for kind, count, checksum in index["marks"]]
    positions, lengths, tables = (parts[name].astype(np.int64) for name in ("positions", "lengths", "tables"))
    sides = parts["sides"].tobytes()
    _require(len(positions) == slots, "not one position for each slot")
    _require(bool(((positions >= 0) & (positions < layout.max_tokens)).all()), "a position is outside of the window")
    _require(bool(((lengths >= 1) & (lengths <= layout.max_tokens)).all()), "a length is outside of the window")
    _require(int(lengths.sum()) == len(tables), "the tables have another size than the entries")
    _require(bool(((tables >= 0) & (tables < slots)).all()), "a table names a slot that is not there")
    pools: list[PoolContents] = []
    entry = token = byte = 0
    for form in index["pools"]:
        pool = _pool_of(form, len(marks))
        number = len(pool.keys)
        pool.lengths = lengths[entry : entry + number]
        _require(len(pool.lengths) == number, "there are more keys than entries")
        pool.tables = tables[token : (token := token + int(pool.lengths.sum()))]
        entry += number
        pool.sides, byte = _sides_of(form["sides"], number, sides, byte)
        _check_rows(pool, positions, marks)
        pools.append(pool)
    _require(entry == len(lengths), "there are more entries than keys")
    _require(byte == len(sides), "there are more bytes of side data than entries have")
    _require(len({pool.role for pool in pools}) == len(pools), "two pools have the same role")
    return Contents(layout, pools, positions, marks)


def _pool_of(form: Any, marks: int) -> PoolContents:
    keys = [decoded(key) for key in _listed(form["keys"])]
    scopes: list[tuple[Hashable] | None] = [
        None if scope is None else (decoded(*_listed(scope)),) for scope in _listed(form["scopes"])
    ]
    scope_of = [_whole(number, 0) for number in _listed(form["scope_of"])]
    priorities: list[Any] = [decoded(priority) for priority in _listed(form["priorities"])]
    owed = [_whole(number, OWED_NOTHING) for number in _listed(form["owed"])]
    _require(len(keys) == len(scope_of) == len(priorities) == len(owed), "not as many of each as there are keys")
    _require(len({*scopes}) == len(scopes), "two scopes have the same name")
    _require(all(number < len(scopes) for number in scope_of), "an entry is in a scope that is not there")
    _require(len({*zip(scope_of, keys, strict=True)}) == len(keys), "a key is there twice")
    _require(all(type(priority) in (int, float) for priority in priorities), "a priority is no number")
    _require(all(number < marks for number in owed), "an entry is owed by a table that is not there")
    return PoolContents(
        _text(form["role"]),
        _whole(form["max_entries"], 1),
        _whole(form["max_slots"], 1),
        _text(form["policy"]),
        _whole(form["version"], 0),
        scopes,
        scope_of,
        keys,
        priorities,
        owed,
        [],
        np.empty(0, dtype=np.int64),
        np.empty(0, dtype=np.int64),
    )


def _sides_of(sizes: Any, number: int, data: bytes, start: int) -> tuple[list[bytes | None], int]:
    checked = [_whole(size, NO_SIDE) for size in _listed(sizes)]
    _require(len(checked) == number, "not one piece of side data for each entry")
    _require(sum(max(0, size) for size in checked) <= len(data) - start, "side data is missing")
    sides: list[bytes | None] = []
    for size in checked:
        sides.append(None if size == NO_SIDE else data[start : start + size])
        start += max(0, size)
    return sides, start


def _check_rows(pool: PoolContents, positions: Numbers, marks: list[OwedMark]) -> None:
    """Raise unless each row's slots differ, and stand where a token that was written there can stand by now."""
    starts = pool.ends() - pool.lengths
    entries = np.repeat(np.arange(len(pool.keys)), pool.lengths)
    moved = positions[pool.tables] - (np.arange(len(pool.tables)) - starts[entries])
    _require(bool((moved >= 0).all()), "a token stands behind the position that it was written at")
    named = entries * (len(positions) + 1) + pool.tables
    _require(len(np.unique(named)) == len(named), "a table names a slot twice")
    owed = np.array(pool.owed, dtype=np.int64)[entries]
    for number, mark in enumerate(marks):
        if mark.step:
            _require(not (moved[owed == number] % mark.step).any(), "a token moved by something else than whole drops")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _listed(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError("a list is missing")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("a text is missing")
    return value


def _whole(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"a number of at least {least} is missing")
    return value
