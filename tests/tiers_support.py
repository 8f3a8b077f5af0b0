"""Tiers in memory alone, and with a file behind one window of memory: the same tests for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from concurrent_kv import DiskTier, HostTier, KVLayout
from tests.support import LAYOUT

__all__ = ["TIERS", "host_tier", "tiers_of"]

TIERS = ("memory", "disk")
_folder: list[Path] = []  # where tiers have their files, if they have any


@contextmanager
def tiers_of(kind: str, folder: Path) -> Iterator[None]:
    """Have `host_tier` make tiers of a kind: with files in a folder, or without."""
    _folder[:] = [folder] if kind == "disk" else []
    try:
        yield
    finally:
        _folder.clear()


def host_tier(windows: int, layout: KVLayout = LAYOUT) -> HostTier:
    """A tier of so many windows; one of them in memory, where there is a file behind it."""
    window = layout.bytes_per_entry
    if not _folder:
        return HostTier(windows * window)
    # A file has to be larger than the memory: by a byte that is no token's, where both are a window.
    return HostTier(window, behind=DiskTier(_folder[0], windows * window + (windows == 1)))
