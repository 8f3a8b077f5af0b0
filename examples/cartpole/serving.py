"""The job's numbers, served to Prometheus while something is played."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.prometheus import serve
from examples.cartpole.job import Watch, Watched, unwatched

__all__ = ["serving"]


@contextmanager
def serving(port: int, watch: Watch | None) -> Generator[tuple[str, Watch], None, None]:
    """Serve them from here on; gives the URL, and what is watched then beside `watch`.

    The evaluators are called by the number of their group. What has been played is let go of: its series end.
    """
    metrics, others = KVMetrics(durations=True), watch or unwatched

    @contextmanager
    def watched_and_served(watched: Watched) -> Generator[None, None, None]:
        with ExitStack() as stack:
            if watched.manager is not None:
                metrics.add(watched.manager)
                stack.callback(metrics.remove, watched.manager)
            for group, evaluator in enumerate(watched.evaluators):
                metrics.add(evaluator, name=str(group))
                stack.callback(metrics.remove, evaluator)
            with others(watched):
                yield

    with serve(metrics, port) as url:
        yield url, watched_and_served
