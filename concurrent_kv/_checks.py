"""Checks of what callers pass in; each error names the argument, what it was, and what would do."""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any
from weakref import WeakSet

import numpy as np

from .errors import InvalidArgumentError, InvalidTypeError, shown
from .native import native

__all__ = [
    "check_compute",
    "check_env_ids",
    "check_keys",
    "check_priorities",
    "check_seconds",
    "check_sides",
    "hash_all",
    "hash_of",
    "last_of_each",
    "list_or_none",
    "listed",
    "numbers_or_none",
    "positive_int",
    "sequence_of",
]


def positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum`, or an error that names the argument."""
    if type(value) is int:
        number = value
    elif isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name} must be an int of at least {minimum}, got {shown(value)}")
    else:
        number = int(value)
    if number < minimum:
        raise InvalidArgumentError(f"{name} must be at least {minimum}, got {number}")
    return number


def check_compute(compute: object) -> None:
    """Raise unless it can be called."""
    if not callable(compute):
        raise InvalidTypeError(f"compute must be a function that gives one row of KeysValues, got {shown(compute)}")


def check_seconds(name: str, value: object) -> float:
    """`value` as a finite number of seconds of at least 0, or an error that names the argument."""
    if type(value) is float and 0.0 <= value <= threading.TIMEOUT_MAX:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} must be a number of seconds, got {shown(value)}")
    if not math.isfinite(value) or not 0 <= float(value) <= threading.TIMEOUT_MAX:
        raise InvalidArgumentError(
            f"{name} must be a finite number of seconds from 0 to {threading.TIMEOUT_MAX:g}, got {shown(value)}"
        )
    return float(value)


# Types of keys that hash and equal what they were stored under, and of which nothing has to be asked.
PLAIN = frozenset((str, int, float, bool, bytes, complex, type(None)))
TUPLE = frozenset((tuple,))
_asked: WeakSet[type[object]] = WeakSet()  # types of which one key was asked, and answered as a key should


def hash_of(key: Hashable, name: str = "key") -> int:
    """`hash(key)`, or an error that names the argument: it is not hashable, or could never be found again."""
    try:
        hashed = hash(key)
    except TypeError as error:
        raise InvalidTypeError(f"{name} must be hashable, got {type(key).__name__}: {error}") from error
    if type(key) not in PLAIN:
        _check_equality(key, name)
    return hashed


def hash_all(keys: Sequence[Hashable], name: str) -> None:
    """As `hash_of`, for every key."""
    try:
        deque(map(hash, keys), maxlen=0)
    except TypeError:
        for key in keys:
            hash_of(key, name)
        raise  # of a key that hashed this time
    if PLAIN.issuperset(map(type, keys)):
        return
    if TUPLE.issuperset(map(type, keys)) and PLAIN.issuperset(map(type, chain.from_iterable(keys))):  # type: ignore[arg-type]
        return
    for key in keys:
        _check_equality(key, name)


def _check_equality(key: object, name: str) -> None:
    """Raise `InvalidTypeError` for keys of which `==` says no True or False, tensors above all; also in tuples.

    A tensor hashes by its identity: it would be stored and never be found again by what equals it.
    """
    kind = type(key)
    if kind in PLAIN or kind in _asked:
        return
    if isinstance(key, (tuple, frozenset)):
        for part in key:
            _check_equality(part, name)
        return
    torch = sys.modules.get("torch")  # where it was never imported, there are no tensors
    if torch is not None and isinstance(key, torch.Tensor):
        raise InvalidTypeError(
            f"{name} must be found again by what equals it, and a torch.Tensor equals no other as a key, "
            f"got one of shape {tuple(key.shape)}; tolist() makes numbers of it, hash_state() a key of its bytes"
        )
    try:
        answer = key == key
    except Exception:  # its own business, where it is compared
        return
    if not isinstance(answer, (bool, np.bool_)):
        raise InvalidTypeError(
            f"{name} must say with == whether it equals another, and a {kind.__name__} answers with a "
            f"{type(answer).__name__}; a tuple of its numbers, or hash_state() of an array, is a key"
        )
    _asked.add(kind)


SINGLE, UNORDERED = (str, bytes), (set, frozenset)  # what can be iterated, and is no sequence of items


def check_keys(keys: Iterable[Hashable], *, minimum: int = 1, ordered: bool = True) -> list[Hashable]:
    """`keys` as a list of at least `minimum` hashables; with `ordered`, each is a row's."""
    if type(keys) is not list:
        if isinstance(keys, SINGLE):
            kind = type(keys).__name__
            raise InvalidTypeError(f"keys must be a sequence of keys, got the single {kind} {shown(keys)}")
        if ordered and isinstance(keys, UNORDERED):
            raise InvalidTypeError(f"keys must be a sequence, one for each row, got the unordered {shown(keys)}")
    try:
        keys = list(keys)
    except TypeError as error:
        raise InvalidTypeError(f"keys must be a sequence of keys, got {type(keys).__name__}") from error
    if len(keys) < minimum:
        raise InvalidArgumentError("keys must name at least one key, got none")
    if not (PLAIN.issuperset(map(type, keys)) if native is None else native.are_plain(keys)):
        hash_all(keys, "keys")
    return keys


def listed(keys: Iterable[Hashable], *, ordered: bool = True) -> list[Hashable]:
    """A copy of `keys`, for an operation that checks them itself; what may be iterated only once is checked here."""
    return list(keys) if type(keys) is list or type(keys) is tuple else check_keys(keys, minimum=0, ordered=ordered)


def check_env_ids(env_ids: Iterable[Hashable], name: str = "env_ids") -> tuple[Hashable, ...]:
    """`env_ids`, an argument of this name, as a tuple of hashables; the items of a tensor or array as plain numbers."""
    if not isinstance(env_ids, (tuple, list, range)) and hasattr(env_ids, "tolist"):
        env_ids = env_ids.tolist()
    try:
        checked = tuple(env_ids)
    except TypeError as error:
        raise InvalidTypeError(f"{name} must be a sequence of environments, got {shown(env_ids)}") from error
    hash_all(checked, name)
    return checked


def sequence_of(name: str, items: object, what: str) -> list[Any]:
    """`items` as a list, or an error that names the argument."""
    if isinstance(items, (*SINGLE, *UNORDERED, Mapping)):
        raise InvalidTypeError(f"{name} must be a sequence of {what}, got {shown(items)}")
    try:
        return list(items)  # type: ignore[call-overload, no-any-return]
    except TypeError as error:
        raise InvalidTypeError(f"{name} must be a sequence of {what}, got {shown(items)}") from error


def list_or_none(name: str, items: Sequence[Any] | None) -> Sequence[Any] | None:
    """`items` as a list, for a caller that may read them twice; None stays None."""
    return None if items is None else sequence_of(name, items, "one item for each key")


def numbers_or_none(name: str, items: Sequence[int] | None) -> Sequence[int] | None:
    """As `list_or_none`; the items of a tensor or array as plain numbers."""
    if items is not None and hasattr(items, "tolist"):
        items = items.tolist()
    return None if items is None else sequence_of(name, items, "whole numbers, one for each row")


def check_sides(sides: Sequence[object] | None, rows: int) -> list[object]:
    """One piece of side data for each row."""
    if sides is None:
        return [None] * rows
    checked = sequence_of("sides", sides, "one item for each key")
    if len(checked) != rows:
        raise InvalidArgumentError(f"sides must have one item for each of {rows} keys, got {len(checked)}")
    return checked


def check_priorities(priorities: Sequence[float] | None, rows: int) -> list[float]:
    """One number for each row; NaN has no place in an order."""
    if priorities is None:
        return [0.0] * rows
    checked = sequence_of("priorities", priorities, "numbers")
    if len(checked) != rows:
        raise InvalidArgumentError(f"priorities must have one number for each of {rows} keys, got {len(checked)}")
    for row, priority in enumerate(checked):
        if isinstance(priority, bool) or not isinstance(priority, Real):
            raise InvalidTypeError(f"priority must be a number, got {shown(priority)}")
        try:
            number = float(priority)
        except OverflowError as error:
            raise InvalidArgumentError("priority must be a number that fits into a float") from error
        if math.isnan(number):
            raise InvalidArgumentError("priority must be a number that can be ordered, got NaN")
        kind: object = type(priority)
        if kind not in (int, float):
            checked[row] = number  # policies compare them under the mutex, where nothing of the caller's runs
    return checked


def last_of_each(keys: Sequence[Hashable]) -> Sequence[int]:
    """Positions of the last occurrence of each key, in ascending order."""
    if len(set(keys)) == len(keys):
        return range(len(keys))
    return sorted({key: position for position, key in enumerate(keys)}.values())
