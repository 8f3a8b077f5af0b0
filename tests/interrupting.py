"""Exceptions where asynchronous ones arrive: where a function begins, and where a call of a C function has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import FrameType

__all__ = ["Cut", "cut_at"]


class Cut(KeyboardInterrupt):
    """What cuts an operation off."""


def cut_at(number: int, work: Callable[[], object], files: Collection[str], again_after: int = 0) -> bool:
    """Run `work`, which is cut off at that place in the code of `files`, and so many places later again where not 0.

    Returns False if there were not so many.
    """
    seen = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        code = frame.f_code
        if event in ("call", "c_return") and code.co_filename in files and code.co_name != "__del__":
            seen += 1
            if seen in (number, number + again_after):
                raise Cut

    before, sys.unraisablehook = sys.unraisablehook, lambda args: None  # pytest's keeps what a finaliser is about
    sys.setprofile(profile)
    try:
        work()
    except Cut:
        return True
    finally:
        sys.setprofile(None)
        sys.unraisablehook = before
    return seen >= number
