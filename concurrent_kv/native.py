"""`native`: compiled code, or None where the package was built without it.

It has the locks of the shards, and loops over tokens, slots, entries and keys.

What it does has a counterpart in Python that leaves the same bytes and books; `CONCURRENT_KV_NATIVE=0` in the
environment, when the package is imported, chooses that.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["compiled", "in_python", "lookup", "native"]

F = TypeVar("F", bound=Callable[..., Any])
in_python: dict[str, Callable[..., Any]] = {}  # what `compiled` has replaced, or would have


def _load() -> Any:
    if os.environ.get("CONCURRENT_KV_NATIVE") == "0":
        return None
    try:
        from . import _native
    except ImportError:
        return None
    return _native


native = _load()
_free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# `dict.get`; without the GIL one that does not wait for other threads that read. For dicts that several threads look at
# often, by keys that are no text and no small numbers.
lookup: Callable[[Any, Any], Any] = native.lookup if _free_threaded and native is not None else dict.get


def compiled(function: F) -> F:
    """The compiled function of the same name, where there is compiled code: a call less than one that chooses."""
    in_python[function.__name__] = function
    return function if native is None else getattr(native, function.__name__)
