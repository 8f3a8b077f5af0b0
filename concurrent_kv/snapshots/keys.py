"""Keys as JSON and back, each of the type that it had. Nothing but plain data is ever made of a file."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np

from ..errors import KVCacheError, shown

__all__ = ["UnfitKeyError", "decoded", "encoded"]

DEEPEST = 32  # tuples in tuples
PLAIN_INT = 2**53  # from here on, other readers of JSON would round
NUMBERS = ("?", "b", "B", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16")
KINDS = {np.dtype(name).str: np.dtype(name) for name in NUMBERS}


class UnfitKeyError(KVCacheError):
    """A key cannot be in a file; says what of it."""


def encoded(key: Hashable, depth: int = 0) -> object:
    """A key as what JSON has: itself, or a dict of one item that names its type.

    Raises:
        UnfitKeyError: it is of a type that has no such form, or could never be found again.
    """
    kind = type(key)
    if key is None or kind is bool or kind is str:
        return key
    if isinstance(key, np.generic):
        return _encoded_scalar(key)
    if kind is int:
        return key if abs(key) < PLAIN_INT else {"int": hex(key)}  # type: ignore[arg-type]
    if kind is float:
        if math.isnan(key):  # type: ignore[arg-type]
            raise UnfitKeyError("NaN, which no key equals")
        return {"float": key.hex()}  # type: ignore[attr-defined]
    if kind is bytes:
        return {"bytes": key.hex()}  # type: ignore[attr-defined]
    if kind is tuple:
        if depth == DEEPEST:
            raise UnfitKeyError(f"tuples more than {DEEPEST} deep")
        return {"tuple": [encoded(part, depth + 1) for part in key]}  # type: ignore[attr-defined]
    raise UnfitKeyError(f"{shown(key)} of the type {kind.__module__}.{kind.__qualname__}")


def _encoded_scalar(key: np.generic) -> object:
    if type(key) is np.str_:
        return {"numpy.str": str(key)}
    if type(key) is np.bytes_:
        return {"numpy.bytes": bytes(key).hex()}
    dtype = key.dtype.newbyteorder("<")
    if dtype.str not in KINDS:
        raise UnfitKeyError(f"{shown(key)} of the type numpy.{type(key).__name__}")
    if key != key:
        raise UnfitKeyError("NaN, which no key equals")
    return {"numpy": [dtype.str, key.astype(dtype).tobytes().hex()]}


def decoded(form: Any) -> Hashable:
    """The key that was `encoded` as this.

    Raises:
        ValueError, TypeError, KeyError: it is no such form.
    """
    if form is None or type(form) in (bool, str, int):
        return form  # type: ignore[no-any-return]
    if type(form) is not dict or len(form) != 1:
        raise ValueError(f"{form!r:.80} is no key")
    ((kind, value),) = form.items()
    if kind == "numpy":
        dtype, digits = value
        (scalar,) = np.frombuffer(bytes.fromhex(digits), dtype=KINDS[dtype])
        made: Hashable = scalar
    elif kind == "tuple":
        if type(value) is not list:
            raise TypeError("a tuple must be a list")
        made = tuple([decoded(part) for part in value])
    else:
        made = _OF_TEXT[kind](value)
    if made != made:  # NaN
        raise ValueError("NaN is no key")
    return made


def _int(digits: str) -> int:
    return int(digits, 16)


_OF_TEXT: dict[str, Any] = {
    "int": _int,
    "float": float.fromhex,
    "bytes": bytes.fromhex,
    "numpy.str": np.str_,
    "numpy.bytes": lambda digits: np.bytes_(bytes.fromhex(digits)),
}
