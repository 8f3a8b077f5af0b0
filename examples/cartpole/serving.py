"""The job's numbers, and those of its hosts on a cluster, served to Prometheus while something is played."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress

from concurrent_kv.cluster import HostParts
from concurrent_kv.metrics import KVMetrics
from concurrent_kv.metrics.prometheus import serve
from examples.cartpole.job import Watch, Watched, unwatched

__all__ = ["serving", "serving_host"]

PORTS = 64  # that hosts of one machine may try for their numbers


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


@contextmanager
def serving_host(parts: HostParts, first_port: int) -> Generator[str, None, None]:
    """Serve a host's numbers from its process, on the first port from there on that is free; gives the URL."""
    sources = [parts.manager] + ([] if parts.evaluator is None else [parts.evaluator])
    metrics = KVMetrics(*sources, durations=True)
    with ExitStack() as stack:
        for port in range(first_port, first_port + PORTS):
            with suppress(OSError):
                url = stack.enter_context(serve(metrics, port))
                break
        else:
            raise OSError(f"no port from {first_port} to {first_port + PORTS - 1} is free")
        yield url
