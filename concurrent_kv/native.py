"""`native`: the loops over tokens and slots as compiled code, or None where the package was built without them.

What it does has a counterpart in Python that leaves the same bytes; `CONCURRENT_KV_NATIVE=0` in the environment, when
the package is imported, chooses that.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["native"]


def _load() -> Any:
    if os.environ.get("CONCURRENT_KV_NATIVE") == "0":
        return None
    try:
        from . import _native
    except ImportError:
        return None
    return _native


native = _load()  # typed by `_native.pyi` where it is called
