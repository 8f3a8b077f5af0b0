"""`KVCollector`: a collector of Prometheus' client, and `serve`. Needs `prometheus_client`, the extra `prometheus`."""

from __future__ import annotations

try:
    import prometheus_client  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("prometheus_client",):
        raise
    raise ModuleNotFoundError(
        f"concurrent_kv.metrics.prometheus needs {error.name}, which is not installed: "
        "pip install 'concurrent-kv[prometheus]'",
        name=error.name,
    ) from error

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..device.graphs import keep_out_of_graphs
from .samples import Distribution
from .sources import KVMetrics, Source
from .table import METRICS, Kind, Metric

__all__ = ["KVCollector", "serve"]


class KVCollector(Collector):
    """Numbers of managers, pools and evaluators, read at each scrape: `REGISTRY.register(KVCollector(manager))`.

    Args:
        sources, by_environment, durations: see `KVMetrics`.
        metrics: instead of the others: what it shares with another exporter.

    Attributes:
        metrics: the `KVMetrics` that it reads; `add` and `remove` sources there.
    """

    def __init__(
        self,
        *sources: Source,
        by_environment: bool = False,
        durations: bool = False,
        metrics: KVMetrics | None = None,
    ) -> None:
        self.metrics = metrics or KVMetrics(*sources, by_environment=by_environment, durations=durations)

    def describe(self) -> Iterable[Family]:
        """The names that it may have samples of: none is read to register it."""
        return [_family(metric) for metric in METRICS]

    def collect(self) -> Iterator[Family]:
        """Every number as it is now, family by family."""
        families: dict[Metric, Family] = {}
        for sample in self.metrics.read():
            family = families.get(sample.metric)
            if family is None:
                family = families[sample.metric] = _family(sample.metric)
            if isinstance(sample.value, Distribution):
                assert isinstance(family, HistogramMetricFamily)
                buckets = [(_go(bound), float(count)) for bound, count in sample.value.cumulative]
                family.add_metric(sample.labels, buckets, sample.value.total)
            else:
                assert isinstance(family, (CounterMetricFamily, GaugeMetricFamily))
                family.add_metric(sample.labels, sample.value)
        yield from families.values()


_go: Callable[[float], str] = floatToGoString
_KINDS: dict[Kind, Callable[..., Family]] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


def _family(metric: Metric) -> Family:
    return _KINDS[metric.kind](metric.family, metric.about, labels=metric.labels, unit=metric.unit)


@contextmanager
def serve(metrics: KVMetrics, port: int, *, addr: str = "127.0.0.1") -> Iterator[str]:
    """Serve these numbers, and no others, over HTTP until the `with` is left; gives their URL.

    Args:
        port: 0 stands for any that is free.
        addr: of this machine, where scrapes come in; as it is, from this machine alone.

    Raises:
        OSError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(KVCollector(metrics=metrics))
    server, thread = start_http_server(port, addr=addr, registry=registry)
    try:
        yield f"http://{addr}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


keep_out_of_graphs(__name__)
