"""Checks of what callers pass in; each error names the argument, what it was, and what would do."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from .errors import InvalidArgumentError, InvalidTypeError, shown

__all__ = [
    "check_env_ids",
    "check_keys",
    "check_priorities",
    "check_seconds",
    "check_sides",
    "hash_all",
    "hash_of",
    "last_of_each",
    "list_or_none",
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


def check_seconds(name: str, value: object) -> float:
    """`value` as a finite number of seconds of at least 0, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidTypeError(f"{name} must be a number of seconds, got {shown(value)}")
    if not math.isfinite(value) or not 0 <= float(value) <= threading.TIMEOUT_MAX:
        raise InvalidArgumentError(
            f"{name} must be a finite number of seconds from 0 to {threading.TIMEOUT_MAX:g}, got {shown(value)}"
        )
    return float(value)


def hash_of(key: Hashable, name: str = "key") -> int:
    """`hash(key)`, or an error that names the argument."""
    try:
        return hash(key)
    except TypeError as error:
        raise InvalidTypeError(f"{name} must be hashable, got {type(key).__name__}: {error}") from error


def hash_all(keys: Sequence[Hashable], name: str) -> None:
    """Run the `__hash__` of every key, or raise an error that names the argument."""
    try:
        deque(map(hash, keys), maxlen=0)
    except TypeError:
        for key in keys:
            hash_of(key, name)
        raise  # of a key that hashed this time


def check_keys(keys: Iterable[Hashable], *, minimum: int = 1) -> list[Hashable]:
    """`keys` as a list of at least `minimum` hashables."""
    if isinstance(keys, (str, bytes)):
        raise InvalidTypeError(f"keys must be a sequence of keys, got the single {type(keys).__name__} {shown(keys)}")
    try:
        keys = list(keys)
    except TypeError as error:
        raise InvalidTypeError(f"keys must be a sequence of keys, got {type(keys).__name__}") from error
    if len(keys) < minimum:
        raise InvalidArgumentError("keys must name at least one key, got none")
    hash_all(keys, "keys")
    return keys


def check_env_ids(env_ids: Iterable[Hashable]) -> tuple[Hashable, ...]:
    """`env_ids` as a tuple of hashables; the items of a tensor or array as plain numbers."""
    if not isinstance(env_ids, (tuple, list, range)) and hasattr(env_ids, "tolist"):
        env_ids = env_ids.tolist()
    try:
        checked = tuple(env_ids)
    except TypeError as error:
        raise InvalidTypeError(f"env_ids must be a sequence of environments, got {shown(env_ids)}") from error
    hash_all(checked, "env_ids")
    return checked


def sequence_of(name: str, items: object, what: str) -> list[Any]:
    """`items` as a list, or an error that names the argument."""
    try:
        return list(items)  # type: ignore[call-overload, no-any-return]
    except TypeError as error:
        raise InvalidTypeError(f"{name} must be a sequence of {what}, got {shown(items)}") from error


def list_or_none(name: str, items: Sequence[Any] | None) -> Sequence[Any] | None:
    """`items` as a list, for who may read them twice; None stays None."""
    return None if items is None else sequence_of(name, items, "one item for each key")


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
