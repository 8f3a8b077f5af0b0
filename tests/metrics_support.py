"""What the tests of metrics share: something that happened, and samples by name and labels."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from concurrent_kv import KVCacheManager
from concurrent_kv.evaluation import Evaluator, Leaf
from concurrent_kv.metrics import METRICS, Distribution, KVMetrics
from concurrent_kv.metrics.prometheus import KVCollector, serve
from tests import evaluating
from tests.support import HANG_SECONDS, append, tokens

parsed: Callable[[str], Iterator[Any]] = text_string_to_metric_families
Found = dict[tuple[str, tuple[str, ...]], Any]


def values_of(metrics: KVMetrics) -> Found:
    """Values by the metric's name in Prometheus and the labels."""
    return {(sample.metric.prometheus, sample.labels): sample.value for sample in metrics.read()}


def numbers_of(metrics: KVMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    """Those that are numbers."""
    return {key: value for key, value in values_of(metrics).items() if not isinstance(value, Distribution)}


def search_once(manager: KVCacheManager, env: int = 0) -> None:
    """One search: a root is put and found, two children are stored, and one row misses."""
    manager.set_init_cache(env, "root", tokens(1, 2))
    with manager.search([env]) as search:
        with search.gather(["root"], [env]) as batch:
            append(batch, [2], 1)
            search.commit(["child"], batch)
        with search.gather(["child", "none"], [env, env]) as batch:
            append(batch, [3, 4], 1)
            search.commit(["grandchild"], batch, rows=[0])


def evaluate_leaves(manager: KVCacheManager, evaluator: Evaluator[int, int], rows: int) -> None:
    """One call of so many leaves, by environment 0."""
    with manager.search([0]) as search:
        evaluator.evaluate_many([Leaf(search, "root", ("child", row), row, 0) for row in range(rows)])


def new_evaluator(manager: KVCacheManager, **options: Any) -> Evaluator[int, int]:
    """Of the model of whole numbers."""
    return Evaluator(manager, evaluating.model, **options)


def served(collector: KVCollector) -> AbstractContextManager[str]:
    """The URL under which a collector's numbers are served over HTTP."""
    return serve(collector.metrics, 0)


def scraped(url: str) -> Found:
    """What a scrape of the OpenMetrics text has, by the sample's name and the values of its labels."""
    request = urllib.request.Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        text = answer.read().decode()
    names = {metric.family: (*metric.labels, "le") for metric in METRICS}
    return {
        (sample.name, tuple(sample.labels[name] for name in names[family.name] if name in sample.labels)): sample.value
        for family in parsed(text)
        for sample in family.samples
    }
