"""A thread-safe, stream-aware key/value cache for parallel tree search over transformer world models."""

from .aio import AsyncKVCacheManager, AsyncKVPool, AsyncSearch
from .batch import Batch
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
    SearchEndedError,
    StreamCaptureError,
    WaitTimeoutError,
    WindowOverflowError,
    WrongProcessError,
)
from .flights import Claim
from .integrity import IntegrityReport, RepairReport
from .keys import hash_state, hash_states
from .kv import KeysValues
from .layout import KVLayout
from .manager import KVCacheManager
from .overflow import DropAndCorrect, DropLazily, DropOldest, PositionTable, RaiseOnOverflow
from .pin import Pin
from .pool import KVPool
from .search import Search
from .stats import PoolStats, StatsSummary
from .storage import KVStorage

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
    "PositionTable",
    "RaiseOnOverflow",
    "RecursiveComputationError",
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
