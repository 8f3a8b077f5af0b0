"""Packages that the tests of a free-threaded CPython may have to do without, as there is no wheel of them for it.

Imported by `conftest`: there a module that imports one of them is skipped, and says why. Elsewhere that is an error.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.util import find_spec

import pytest

MISSING = frozenset(name for name in ("greenlet", "safetensors") if find_spec(name) is None)


class NoWheel:
    """Skips the module that imports one of them."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in MISSING:
            pytest.skip(f"there is no {name} for this interpreter", allow_module_level=True)


if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.meta_path.insert(0, NoWheel)
