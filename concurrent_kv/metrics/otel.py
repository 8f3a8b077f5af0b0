"""`KVInstruments`: observable instruments of OpenTelemetry. Needs `opentelemetry-api`, the extra `otel`."""

from __future__ import annotations

try:
    import opentelemetry.metrics  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("opentelemetry", "opentelemetry.metrics"):
        raise
    raise ModuleNotFoundError(
        f"concurrent_kv.metrics.otel needs {error.name}, which is not installed: pip install 'concurrent-kv[otel]'",
        name=error.name,
    ) from error

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from ..device.graphs import keep_out_of_graphs
from ..locks.gate import gate
from .samples import Distribution, Sample
from .sources import KVMetrics, Source
from .table import METRICS, Kind, Metric

__all__ = ["KVInstruments"]

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1", "": "1"}
# OpenTelemetry has no observable histogram: its parts are counters, as a Prometheus histogram's are.
_PARTS = ("count", "sum", "bucket")


class KVInstruments:
    """Numbers of managers, pools and evaluators as instruments of a meter, read once at each collection.

    Args:
        meter: `opentelemetry.metrics.get_meter("my training")`, say. An instrument stays with its meter: make one
            `KVInstruments` for each meter.
        sources, by_environment, durations: see `KVMetrics`.
        metrics: instead of the others: what it shares with another exporter.

    Attributes:
        metrics: the `KVMetrics` that it reads; `add` and `remove` sources there.
    """

    def __init__(
        self,
        meter: Meter,
        *sources: Source,
        by_environment: bool = False,
        durations: bool = False,
        metrics: KVMetrics | None = None,
    ) -> None:
        self.metrics = metrics or KVMetrics(*sources, by_environment=by_environment, durations=durations)
        self._lock = threading.Lock()
        self._samples: dict[Metric, list[Sample]] = {}
        self._given: set[str] = set()  # instruments that had their part of these
        for metric in METRICS:
            if metric.kind is Kind.HISTOGRAM:
                for part in _PARTS:
                    unit = _UNITS[metric.unit] if part == "sum" else "1"
                    self._observe(meter.create_observable_counter, metric, f"{metric.otel}.{part}", unit, part)
            else:
                create = (
                    meter.create_observable_counter if metric.kind is Kind.COUNTER else meter.create_observable_gauge
                )
                self._observe(create, metric, metric.otel, _UNITS[metric.unit])

    def _observe(
        self, create: Callable[..., object], metric: Metric, name: str, unit: str, part: str | None = None
    ) -> None:
        create(name, callbacks=[partial(self._observations, metric, name, part)], unit=unit, description=metric.about)

    def _observations(
        self, metric: Metric, name: str, part: str | None, options: CallbackOptions
    ) -> Iterable[Observation]:
        """What one instrument has at this collection."""
        found = list[Observation]()
        for sample in self._samples_for(metric, name):
            labels = dict(zip(metric.labels, sample.labels, strict=True))
            if isinstance(sample.value, Distribution):
                found += _of_histogram(sample.value, labels, part)
            else:
                found.append(Observation(sample.value, labels))
        return found

    def _samples_for(self, metric: Metric, name: str) -> list[Sample]:
        """Of one reading for all instruments: the next is taken when one of them comes for the second time."""
        with gate.lock, self._lock:
            if name not in self._given and self._samples:
                self._given.add(name)
                return self._samples.get(metric, [])
        samples: dict[Metric, list[Sample]] = {}
        for sample in self.metrics.read():
            samples.setdefault(sample.metric, []).append(sample)
        with gate.lock, self._lock:
            self._samples, self._given = samples, {name}
        return samples.get(metric, [])


def _of_histogram(value: Distribution, labels: dict[str, str], part: str | None) -> Iterator[Observation]:
    if part == "count":
        yield Observation(value.count, labels)
    elif part == "sum":
        yield Observation(value.total, labels)
    else:
        for bound, count in value.cumulative:
            yield Observation(count, {**labels, "le": f"{bound:g}"})


keep_out_of_graphs(__name__)
