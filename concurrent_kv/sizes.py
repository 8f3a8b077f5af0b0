"""`positive_int`: sizes and counts that callers give."""

from __future__ import annotations

from numbers import Integral

from .errors import InvalidArgumentError, InvalidTypeError

__all__ = ["positive_int"]


def positive_int(name: str, value: object, *, minimum: int = 1) -> int:
    """`value` as an int of at least `minimum`, or an error that names the argument."""
    if type(value) is int:
        number = value
    elif isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidTypeError(f"{name} must be an int of at least {minimum}, got {value!r}")
    else:
        number = int(value)
    if number < minimum:
        raise InvalidArgumentError(f"{name} must be at least {minimum}, got {number}")
    return number
