"""Exceptions where asynchronous ones arrive: a function begins, a call of a C function has ended, a loop jumps back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

__all__ = ["Cut", "cut_at"]


class Cut(KeyboardInterrupt):
    """What cuts an operation off."""


def cut_at(
    number: int, work: Callable[[], object], files: Collection[str], again_after: int = 0, *, jumps: bool = False
) -> bool:
    """Run `work`, which is cut off at that place in the code of `files`, and so many places later again where not 0.

    With `jumps` the jumps back of loops are places too. Returns False if there were not so many places.
    """
    seen = 0

    def arrive() -> None:
        nonlocal seen
        seen += 1
        if seen in (number, number + again_after):
            raise Cut

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event in ("call", "c_return") and code.co_filename in files and code.co_name != "__del__":
            arrive()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in files or code.co_name == "__del__":
            return None
        last = frame.f_lasti, 0

        def within(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal last
            before, last = last, (frame.f_lasti, frame.f_lineno)
            if event == "line" and (last[0] < before[0] or last[1] == before[1]):  # the same line: a loop within it
                arrive()
            return within

        return within

    traced = sys.gettrace()
    before, sys.unraisablehook = sys.unraisablehook, lambda args: None  # pytest's keeps what a finaliser is about
    if jumps:
        sys.settrace(trace)
    sys.setprofile(profile)
    try:
        work()
    except Cut:
        return True
    finally:
        sys.setprofile(None)
        if jumps:
            sys.settrace(traced)
        sys.unraisablehook = before
    return seen >= number
