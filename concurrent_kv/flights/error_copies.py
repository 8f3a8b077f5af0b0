"""`copy_of`: one error for each of several callers that are to hear the same.

An error that several threads raise collects the frames of all of them, and each keeps the locals of the others alive.
So each raises a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

__all__ = ["copy_of"]

E = TypeVar("E", bound=Exception)


def copy_of(error: E) -> E:
    """An error of the same type with the same `args`, attributes and notes, and no traceback, cause or context yet.

    Made as `copy.copy` makes it; where that fails or gives other `args`, as of a class whose constructor takes
    something else, without the constructor. Where a class allows neither, it is `error` itself. Runs code of the
    error's class.
    """
    ways: tuple[Callable[[E], E], ...] = (copy.copy, _without_constructor)
    for way in ways:
        try:
            made = way(error)
            if made is not error and _is_like(made, error):
                notes = getattr(made, "__notes__", None)
                if notes is not None:
                    made.__notes__ = list(notes)
                return made
        except Exception:  # of the user's class, which is asked in another way or not at all
            continue
    return error


def _without_constructor(error: E) -> E:
    made = type(error).__new__(type(error), *error.args)
    made.args = error.args
    vars(made).update(vars(error))
    return made


def _is_like(made: E, error: E) -> bool:
    """Whether `made` has the type and the very arguments of `error`."""
    return (
        type(made) is type(error)
        and len(made.args) == len(error.args)
        and all(mine is its for mine, its in zip(made.args, error.args, strict=True))
    )
