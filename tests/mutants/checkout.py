"""A copy of the working tree that one worker may spoil."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mutants.places import PACKAGE, Place

COPIED = ("benchmarks", "concurrent_kv", "docs", "examples", "reporting", "requirements", "stress", "tests")
FILES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py")


class Checkout:
    """The package with its compiled module, the tests, and what they read, in a folder of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            if (root / name).is_file():
                shutil.copy2(root / name, folder / name)

    @contextmanager
    def without(self, place: Place) -> Iterator[None]:
        """The guard is gone within."""
        path = self.folder / PACKAGE / place.file
        source = path.read_bytes()
        self._put(path, place.taken_out(source))
        try:
            yield
        finally:
            self._put(path, source)

    def _put(self, path: Path, source: bytes) -> None:
        path.write_bytes(source)
        # A source of the same size, written in the same second, would be taken for the one that was compiled.
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


@contextmanager
def copied(root: Path) -> Iterator[Checkout]:
    """A copy of the tree at `root`, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        yield Checkout(root, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
