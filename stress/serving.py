"""The numbers of what is attacked, served to Prometheus meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from weakref import ref

from concurrent_kv import KVCacheManager
from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.prometheus import serve
from stress.monitor import Monitor
from stress.runner import Watch

__all__ = ["serving"]


@contextmanager
def serving(port: int, watch: Watch | None) -> Iterator[tuple[str, Watch]]:
    """Serve them from here on; gives the URL, and what is watched then beside `watch`.

    A profile's manager takes the place of the one before. Nothing is timed: what is attacked stays as it is.
    """
    metrics, latest = KVMetrics(), list[ref[KVCacheManager]]()

    def watched_and_served(monitor: Monitor) -> AbstractContextManager[object]:
        manager = monitor.run.world.manager
        before = latest.pop()() if latest else None
        if before is not None:  # open still, perhaps, where a run was stuck
            metrics.remove(before)
        metrics.add(manager)
        latest.append(ref(manager))
        return nullcontext() if watch is None else watch(monitor)

    with serve(metrics, port) as url:
        yield url, watched_and_served
