"""Which of the functions that users compute with give something to await, and need no worker."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Any

__all__ = ["forget", "gives_awaitables", "remember"]

MOST = 256  # functions that are remembered
CALL = "__call__"  # of a class: what its objects are called by

# By identity, and kept alive for that: equal code objects may be of different modules.
_remembered: dict[int, CodeType] = {}


def gives_awaitables(compute: Callable[[], Any]) -> bool:
    """Whether calling `compute` only begins to compute: it is async, or did so the last time, as a lambda may."""
    if inspect.iscoroutinefunction(compute) or inspect.iscoroutinefunction(getattr(type(compute), CALL, None)):
        return True
    return bool(_remembered) and id(_code_of(compute)) in _remembered


def remember(compute: Callable[[], Any]) -> None:
    """Note that `compute` gave an awaitable."""
    code = _code_of(compute)
    if code is not None:
        if len(_remembered) >= MOST:
            _remembered.clear()
        _remembered[id(code)] = code


def forget(compute: Callable[[], Any]) -> None:
    """Note that `compute` gave none."""
    _remembered.pop(id(_code_of(compute)), None)


def _code_of(compute: Any) -> CodeType | None:
    while isinstance(compute, partial):
        compute = compute.func
    code = getattr(compute, "__code__", None)
    if code is None:
        code = getattr(getattr(type(compute), CALL, None), "__code__", None)
    return code if isinstance(code, CodeType) else None
