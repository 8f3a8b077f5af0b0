"""A thread-safe, stream-aware key/value cache for parallel tree search over transformer world models."""

from .books.records import Scope
from .books.stats import PoolStats, StatsSummary, TierStats
from .errors import (
    CapacityError,
    ClosedError,
    IntegrityError,
    InvalidArgumentError,
    InvalidTypeError,
    KeyNotFoundError,
    KVCacheError,
    RecursiveComputationError,
    ReentrantCallError,
    SearchEndedError,
    SnapshotContentError,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotMismatchError,
    SnapshotVersionError,
    SnapshotWriteError,
    StreamCaptureError,
    WaitTimeoutError,
    WindowOverflowError,
    WrongProcessError,
)
from .flights.table import Claim

try:
    from .aio import AsyncKVCacheManager, AsyncKVPool, AsyncSearch
    from .books.integrity import IntegrityReport, RepairReport
    from .device.graphs import keep_out_of_graphs
    from .device.layout import KVLayout
    from .device.positions import PositionSteps, PositionTable
    from .manager import KVCacheManager
    from .model.hashing import hash_state, hash_states
    from .model.kv import KeysValues
    from .model.overflow import DropAndCorrect, DropLazily, DropOldest, RaiseOnOverflow
    from .pool.batch import Batch
    from .pool.pin import Pin
    from .pool.pool import KVPool
    from .pool.storage import KVStorage
    from .pool.tier import DiskTier, HostTier
    from .search.search import Search

    keep_out_of_graphs(__name__)
    del keep_out_of_graphs
except ModuleNotFoundError as error:
    # Without torch the parts that need none can be imported one by one: `concurrent_kv.locks`, `.flights`, `.eviction`.
    if error.name != "torch":
        raise

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"concurrent_kv.{name} needs torch, which is not installed")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AsyncKVCacheManager",
    "AsyncKVPool",
    "AsyncSearch",
    "Batch",
    "CapacityError",
    "Claim",
    "ClosedError",
    "DiskTier",
    "DropAndCorrect",
    "DropLazily",
    "DropOldest",
    "HostTier",
    "IntegrityError",
    "IntegrityReport",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KVCacheError",
    "KVCacheManager",
    "KVLayout",
    "KVPool",
    "KVStorage",
    "KeyNotFoundError",
    "KeysValues",
    "Pin",
    "PoolStats",
    "PositionSteps",
    "PositionTable",
    "RaiseOnOverflow",
    "RecursiveComputationError",
    "ReentrantCallError",
    "RepairReport",
    "Scope",
    "Search",
    "SearchEndedError",
    "SnapshotContentError",
    "SnapshotDamagedError",
    "SnapshotError",
    "SnapshotMismatchError",
    "SnapshotVersionError",
    "SnapshotWriteError",
    "StatsSummary",
    "StreamCaptureError",
    "TierStats",
    "WaitTimeoutError",
    "WindowOverflowError",
    "WrongProcessError",
    "hash_state",
    "hash_states",
]

__version__ = "0.1.0"
