"""A thread-safe, stream-aware key/value cache for parallel tree search over transformer world models."""

from .entry import Scope
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
    StreamCaptureError,
    WaitTimeoutError,
    WindowOverflowError,
    WrongProcessError,
)
from .flights import Claim
from .stats import PoolStats, StatsSummary

try:
    from .aio import AsyncKVCacheManager, AsyncKVPool, AsyncSearch
    from .batch import Batch
    from .integrity import IntegrityReport, RepairReport
    from .keys import hash_state, hash_states
    from .kv import KeysValues
    from .layout import KVLayout
    from .manager import KVCacheManager
    from .overflow import DropAndCorrect, DropLazily, DropOldest, RaiseOnOverflow
    from .pin import Pin
    from .pool import KVPool
    from .positions import PositionSteps, PositionTable
    from .search import Search
    from .storage import KVStorage
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
    "DropAndCorrect",
    "DropLazily",
    "DropOldest",
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
    "StatsSummary",
    "StreamCaptureError",
    "WaitTimeoutError",
    "WindowOverflowError",
    "WrongProcessError",
    "hash_state",
    "hash_states",
]

__version__ = "0.1.0"
