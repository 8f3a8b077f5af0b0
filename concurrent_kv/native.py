"""`native`: compiled code, or None where the package was built without it.

It has the locks of the shards, and loops over tokens, slots, entries and keys.

What it does has a counterpart in Python that leaves the same bytes and books; `CONCURRENT_KV_NATIVE=0` in the
environment, when the package is imported, chooses that.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["address_of", "native"]


def _load() -> Any:
    if os.environ.get("CONCURRENT_KV_NATIVE") == "0":
        return None
    try:
        from . import _native
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


native = _load()
