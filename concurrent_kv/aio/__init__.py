"""The async facade: the pools, searches and manager for tasks of asyncio and trio loops, beside threads.

Every operation has the name of the sync one and is awaited. It runs on the loop's own thread where nothing has to wait
and the copy is small, and in a worker thread otherwise; a task that waits for another's computation parks no thread.
Nothing here belongs to an event loop until it is awaited: one facade serves any number of loops.
"""

from .evaluator import AsyncEvaluator, AsyncEvaluatorWorker
from .manager import AsyncKVCacheManager
from .offload import OffloadStats
from .pool import AsyncKVPool
from .search import AsyncSearch

__all__ = [
    "AsyncEvaluator",
    "AsyncEvaluatorWorker",
    "AsyncKVCacheManager",
    "AsyncKVPool",
    "AsyncSearch",
    "OffloadStats",
]
