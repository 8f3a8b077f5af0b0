"""Pools in files: what a snapshot is made of, and `describe`, which says what one holds. See `docs/snapshots.md`.

`KVPool.save` and `load`, and those of a manager, write and read them.
"""

from .contents import PoolInfo, SideCodec, SnapshotInfo
from .reading import describe

__all__ = ["PoolInfo", "SideCodec", "SnapshotInfo", "describe"]
