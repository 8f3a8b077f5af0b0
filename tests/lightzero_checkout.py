"""A checkout of LightZero's main branch in front of the installed 0.2.0: import this before anything of `lzero`.

`LIGHTZERO` is its folder (make lightzero-main LIGHTZERO=...). What it has not compiled, its trees above all, comes from
`tests.lightzero_main_trees`, or else from the 0.2.0 that is installed beside it. `python -m tests.lightzero_checkout`
says which commit it is at, or that it is no checkout of LightZero's. As a pytest plugin (`-p tests.lightzero_checkout`)
it does the same for the checkout's own tests, and `LIGHTZERO_CACHE` says with which cache: "legacy", "own" (its
manager) or "ours".
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["CACHES", "CHECKOUT", "commit_of", "trees_of", "use_cache"]

CHECKOUT = os.environ.get("LIGHTZERO") or None
CACHES = ("legacy", "own", "ours")
INSTALLED = Path(sysconfig.get_paths()["platlib"])


class CompiledTrees(importlib.abc.MetaPathFinder):
    """Finds what the checkout has not compiled where its trees were, and then among what is installed."""

    def __init__(self, checkout: str) -> None:
        self.places = (trees_of(checkout), INSTALLED)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Extension modules of LightZero's own packages."""
        package, *parents = fullname.split(".")[:-1] or [""]
        if package not in ("lzero", "zoo"):
            return None
        folders = [str(place.joinpath(package, *parents)) for place in self.places]
        spec = importlib.machinery.PathFinder.find_spec(fullname, folders)
        is_compiled = spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
        return spec if is_compiled else None


def commit_of(checkout: str) -> str:
    """The commit that a checkout is at; "unknown" where git does not say."""
    asked = ["git", "-C", checkout, "rev-parse", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def trees_of(checkout: str) -> Path:
    """Where the trees of a checkout's commit are compiled to."""
    return Path(sys.prefix, "lightzero-main-trees", commit_of(checkout))


def use_cache(cache: str) -> None:
    """Let every world model of the checkout use one of `CACHES`, whatever its configuration says."""
    from functools import wraps

    from lzero.model.unizero_world_models import kv_cache_manager, world_model

    from concurrent_kv.compat.lightzero import LightZeroKVCacheManager

    if cache == "ours":
        kv_cache_manager.KVCacheManager = LightZeroKVCacheManager
    original = world_model.WorldModel.__init__

    @wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config.use_new_cache_manager = cache != "legacy"
        original(self, config, *args, **kwargs)

    world_model.WorldModel.__init__ = init


if CHECKOUT is not None:
    sys.path.insert(0, CHECKOUT)
    sys.meta_path.append(CompiledTrees(CHECKOUT))
    if "LIGHTZERO_CACHE" in os.environ:
        use_cache(os.environ["LIGHTZERO_CACHE"])


def main() -> None:
    if CHECKOUT is None:
        sys.exit("LIGHTZERO must be the folder of a checkout of LightZero, and is not set")
    if not Path(CHECKOUT, "lzero", "model", "unizero_world_models", "world_model.py").is_file():
        sys.exit(f"LIGHTZERO must be the folder of a checkout of LightZero, and {CHECKOUT} has no UniZero world model")
    print(f"LightZero at commit {commit_of(CHECKOUT)}")


if __name__ == "__main__":
    main()
