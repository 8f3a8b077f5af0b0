"""The numbers of what is attacked, served to Prometheus meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.prometheus import serve
from stress.monitor import Monitor
from stress.runner import Watch

__all__ = ["serving"]


@contextmanager
def serving(port: int, watch: Watch | None) -> Iterator[tuple[str, Watch]]:
    """Serve them from here on; gives the URL, and what is watched then beside `watch`.

    With the end of a profile its series end. Nothing is timed: what is attacked stays as it is.
    """
    metrics = KVMetrics()

    @contextmanager
    def watched_and_served(monitor: Monitor) -> Iterator[None]:
        manager = monitor.run.world.manager
        metrics.add(manager)
        try:
            with nullcontext() if watch is None else watch(monitor):
                yield
        finally:
            metrics.remove(manager)

    with serve(metrics, port) as url:
        yield url, watched_and_served
