"""Numbers of managers, pools and evaluators for whoever collects them; docs/metrics.md lists them.

`KVMetrics` reads them, and needs nothing but the library. `concurrent_kv.metrics.prometheus` has a collector of
Prometheus' client (extra `prometheus`), `concurrent_kv.metrics.otel` instruments of OpenTelemetry (extra `otel`).
"""

from ..device.graphs import keep_out_of_graphs
from .samples import Distribution, Sample
from .sources import KVMetrics
from .table import METRICS, Kind, Metric, Subject

__all__ = ["METRICS", "Distribution", "KVMetrics", "Kind", "Metric", "Sample", "Subject"]

keep_out_of_graphs(__name__)
