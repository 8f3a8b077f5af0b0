"""The numbers as the real clients see them: Prometheus' over HTTP, OpenTelemetry's, TensorBoard's, and W&B's form."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from markdown_it import MarkdownIt
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

from concurrent_kv import InvalidTypeError, KVCacheManager
from concurrent_kv.evaluation import Evaluator
from concurrent_kv.metrics import METRICS, Distribution, Kind, KVMetrics
from concurrent_kv.metrics.otel import KVInstruments
from concurrent_kv.metrics.prometheus import KVCollector
from tests import evaluating
from tests.metrics_support import evaluate_leaves, new_evaluator, scraped, served, values_of
from tests.support import HANG_SECONDS


@pytest.fixture
def job() -> Iterator[tuple[KVCacheManager, Evaluator[int, int]]]:
    manager = evaluating.new_manager()
    with new_evaluator(manager) as evaluator:
        yield manager, evaluator
        evaluate_leaves(manager, evaluator, 1)  # what was watched can still be used
    manager.check_integrity()
    manager.close()


Job = tuple[KVCacheManager, Evaluator[int, int]]


def test_a_scrape_over_http_says_what_is_counted(job: Job) -> None:
    manager, evaluator = job
    collector = KVCollector(manager, evaluator, durations=True)
    with served(collector) as url:
        evaluate_leaves(manager, evaluator, 5)
        found = scraped(url)
    for (name, labels), value in values_of(collector.metrics).items():
        if not isinstance(value, Distribution):
            assert found[name, labels] == value, name
            continue
        assert found[f"{name}_count", labels] == value.count
        assert found[f"{name}_sum", labels] == value.total
        assert found[f"{name}_bucket", (*labels, "+Inf")] == value.count
        assert len([key for key in found if key[0] == f"{name}_bucket" and key[1][:-1] == labels]) == len(value.counts)
    assert found["concurrent_kv_evaluator_call_rows_bucket", ("cache", "0", "4.0")] == 0
    assert found["concurrent_kv_evaluator_call_rows_bucket", ("cache", "0", "8.0")] == 1


def test_every_scrape_reads_anew(job: Job) -> None:
    manager, evaluator = job
    with served(KVCollector(manager, evaluator)) as url:
        for calls in (1, 2):
            evaluate_leaves(manager, evaluator, 2)
            assert scraped(url)["concurrent_kv_evaluator_calls_total", ("cache", "0")] == calls
            assert scraped(url)["concurrent_kv_queries_total", ("cache", "init", "init")] == 2 * calls


def test_registering_reads_nothing_and_another_collector_of_the_same_names_is_refused(job: Job) -> None:
    class Unread(KVMetrics):
        def read(self) -> Any:
            raise AssertionError("read to register")

    registry = CollectorRegistry()
    registry.register(KVCollector(metrics=Unread(job[0])))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(KVCollector(job[0]))


def collected(reader: InMemoryMetricReader) -> dict[tuple[str, tuple[Any, ...]], Any]:
    """Points by the instrument's name and the values of the attributes."""
    found = {}
    data: Any = reader.get_metrics_data()
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    found[metric.name, tuple(point.attributes.values())] = point.value
                    found[metric.name, ()] = (metric.unit, getattr(metric.data, "is_monotonic", None))
    return found


def test_instruments_of_opentelemetry_say_what_is_counted(job: Job) -> None:
    manager, evaluator = job
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    instruments = KVInstruments(provider.get_meter("test"), manager, evaluator, durations=True)
    evaluate_leaves(manager, evaluator, 3)
    found, by_name = collected(reader), {metric.prometheus: metric for metric in METRICS}
    for (name, labels), value in values_of(instruments.metrics).items():
        metric = by_name[name]
        if isinstance(value, Distribution):
            assert found[f"{metric.otel}.count", labels] == value.count
            assert found[f"{metric.otel}.sum", labels] == value.total
            assert found[f"{metric.otel}.bucket", (*labels, "inf")] == value.count
        else:
            assert found[metric.otel, labels] == value, name
            assert found[metric.otel, ()][1] == (True if metric.kind is Kind.COUNTER else None)
    assert found["concurrent_kv.lock_wait", ()] == ("s", True)
    assert found["concurrent_kv.used", ()][0] == "By"
    provider.shutdown()


def test_a_collection_reads_once_for_all_instruments_and_the_next_reads_anew(job: Job) -> None:
    manager, evaluator = job
    reads: list[None] = []

    class Counted(KVMetrics):
        def read(self) -> Any:
            reads.append(None)
            return super().read()

    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    KVInstruments(provider.get_meter("test"), metrics=Counted(manager, evaluator))
    for calls in (1, 2, 3):
        evaluate_leaves(manager, evaluator, 2)
        assert collected(reader)["concurrent_kv.evaluator_calls", ("cache", "0")] == calls
        assert len(reads) == calls
    provider.shutdown()


def python_blocks() -> list[list[str]]:
    """The Python blocks of the page, line by line."""
    page = (Path(__file__).resolve().parent.parent / "docs" / "metrics.md").read_text("utf-8")
    tokens = [token for token in MarkdownIt().parse(page) if token.type == "fence" and token.info == "python"]
    return [token.content.splitlines() for token in tokens]


class Board:
    """Keeps what TensorBoard's writer is given."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_scalars_have_totals_and_rates_of_what_came_since_the_last_call(job: Job) -> None:
    manager, evaluator = job
    metrics, board = KVMetrics(manager, evaluator), Board()
    evaluate_leaves(manager, evaluator, 2)
    metrics.log_to(board, 1)
    evaluate_leaves(manager, evaluator, 4)
    manager.wm_pool.get("none")
    metrics.log_to(board, 2)
    metrics.log_to(board, 3)
    scalars, place = board.scalars, "concurrent_kv/cache"
    assert [scalars[f"{place}/0/evaluator_calls", step] for step in (1, 2, 3)] == [1, 2, 2]
    assert [scalars.get((f"{place}/0/rows_a_call", step)) for step in (1, 2, 3)] == [2, 4, None]
    assert [scalars.get((f"{place}/init/hit_ratio", step)) for step in (1, 2, 3)] == [1, 1, None]
    assert [scalars.get((f"{place}/wm/hit_ratio", step)) for step in (1, 2, 3)] == [None, 0, None]
    assert [scalars.get((f"{place}/hit_ratio", step)) for step in (1, 2, 3)] == [1, 4 / 5, None]
    assert [scalars.get((f"{place}/0/evaluator_call_rows/mean", step)) for step in (1, 2, 3)] == [2, 4, None]
    assert not any(tag.endswith(("/sum", "cache/hits", "cache/queries")) for tag, _ in scalars)
    assert scalars[f"{place}/0/evaluator_busy/model", 3] > 0
    assert scalars[f"{place}/init/entries", 3] == evaluating.ENVS


def test_a_run_of_wandb_gets_one_dict_a_step(job: Job) -> None:
    logged = []

    class Run:
        def log(self, data: dict[str, Any], step: int | None = None) -> None:
            logged.append((step, data))

    KVMetrics(job[0]).log_to(Run(), 7)
    ((step, data),) = logged
    assert step == 7
    assert data["concurrent_kv/cache/init/entries"] == evaluating.ENVS
    with pytest.raises(InvalidTypeError, match="add_scalar"):
        KVMetrics(job[0]).log_to(object(), 8)


def test_event_files_of_tensorboard_read_back_as_they_were_written(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is in the environment of make metrics")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    manager, evaluator = job
    metrics, board = KVMetrics(manager, evaluator), Board()
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20):
            evaluate_leaves(manager, evaluator, 3)
            metrics.log_to(writer, step)
        KVMetrics(manager, evaluator).log_to(board, 20)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {tag for tag, _ in board.scalars} <= set(tags)
    for (tag, step), value in board.scalars.items():
        if tag.endswith(("hit_ratio", "rows_a_call", "/mean")):  # of another interval
            continue
        assert [event.step for event in events.Scalars(tag)] == [10, 20]
        assert events.Scalars(tag)[-1].step == step
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("block", python_blocks())
def test_the_pages_examples_run(job: Job, block: list[str]) -> None:
    manager, evaluator = job
    names = {"manager": manager, "evaluator": evaluator, "writer": Board(), "step": 1}
    lines = ["import prometheus_client", "prometheus_client.REGISTRY = prometheus_client.CollectorRegistry()"]
    lines += [line.replace("start_http_server(9100)", "served = start_http_server(0, '127.0.0.1')") for line in block]
    before = prometheus_client.REGISTRY
    try:
        exec("\n".join(lines), names)
    finally:
        prometheus_client.REGISTRY = before
    served_by: Any = names.get("served")
    if served_by is not None:
        server, thread = served_by
        server.shutdown()
        server.server_close()
        thread.join(HANG_SECONDS)


def test_the_core_imports_no_client_and_the_numbers_need_none() -> None:
    code = (
        "import sys\n"
        "for name in ('prometheus_client', 'opentelemetry', 'rich', 'tensorboard'): sys.modules[name] = None\n"
        "import concurrent_kv\n"
        "assert not [name for name in sys.modules if name.startswith('concurrent_kv.metrics')]\n"
        "from concurrent_kv.metrics import KVMetrics\n"
        "assert KVMetrics().read() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_SECONDS, cwd=Path(__file__).parent.parent)
