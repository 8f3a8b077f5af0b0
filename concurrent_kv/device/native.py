"""`native`: loops over tokens, slots and entries as compiled code, or None where the package was built without them.

What it does has a counterpart in Python that leaves the same bytes and books; `CONCURRENT_KV_NATIVE=0` in the
environment, when the package is imported, chooses that.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Viewed", "address_of", "native"]


def _load() -> Any:
    if os.environ.get("CONCURRENT_KV_NATIVE") == "0":
        return None
    try:
        from .. import _native
    except ImportError:
        return None
    return _native


def address_of(tensor: Any) -> int:
    """Where the numbers of a contiguous tensor in host memory lie; 0 if they are not simply there."""
    if tensor.is_neg():  # what lies there has the other sign
        return 0
    try:
        return int(tensor.data_ptr())  # 0: zeros without any memory
    except RuntimeError:  # wrapped by a transform of torch.func
        return 0


class Viewed:
    """An array that compiled code looks into again and again; another one may take its place."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: tuple[Any, Any] | None = None

    def of(self, array: Any) -> Any:
        """What to pass to compiled code for `array`."""
        last = self._last
        if last is None or last[0] is not array:
            # In one piece: several threads may be here, with the old array and the new.
            last = self._last = array, native.View(array)
        return last[1]


native = _load()
