"""Numbers as plain scalars, for TensorBoard and for Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import InvalidTypeError
from .samples import Distribution, Sample
from .table import PREFIX

__all__ = ["write_scalars"]

# (numerator, denominator, name): rates of what came between two calls
RATES = (("hits", "queries", "hit_ratio"), ("evaluator_rows", "evaluator_calls", "rows_a_call"))
OF_ALL_POOLS = ("hits", "queries")  # summed for the rate of their manager


def write_scalars(writer: Any, step: int, samples: Iterable[Sample], before: dict[str, float]) -> dict[str, float]:
    """See `KVMetrics.log_to`; `before` is what the last call returned."""
    samples = list(samples)
    now, rates, sums = dict[str, float](), dict[str, float](), dict[str, float]()
    places = dict.fromkeys(_place(sample) for sample in samples)
    for sample in samples:
        tag, value = _place(sample) + sample.metric.name, sample.value
        if sample.metric.label is not None:
            tag += f"/{sample.labels[-1]}"
        if isinstance(value, Distribution):
            now[f"{tag}/count"] = value.count
            sums[f"{tag}/sum"] = value.total
            number = value.count - before.get(f"{tag}/count", 0)
            if number > 0:
                rates[f"{tag}/mean"] = (value.total - before.get(f"{tag}/sum", 0.0)) / number
        else:
            now[tag] = value
            if sample.metric.name in OF_ALL_POOLS:
                of_manager = f"{PREFIX}/{sample.labels[0]}/"
                places[of_manager] = None
                sums[of_manager + sample.metric.name] = sums.get(of_manager + sample.metric.name, 0.0) + value
    counted = sums | now
    for place in places:
        for part, whole, name in RATES:
            number = counted.get(place + whole, 0.0) - before.get(place + whole, 0.0)
            if number > 0:
                rates[place + name] = (counted[place + part] - before.get(place + part, 0.0)) / number
    scalars = now | rates
    if hasattr(writer, "add_scalar"):
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
    elif hasattr(writer, "log"):
        writer.log(scalars, step=step)
    else:
        raise InvalidTypeError(
            "writer must have add_scalar(tag, value, step), as TensorBoard's SummaryWriter, or log(dict, step=step), "
            f"as a run of W&B's; {type(writer).__name__} has neither"
        )
    return counted


def _place(sample: Sample) -> str:
    """The beginning of its tag: what it is of."""
    metric = sample.metric
    of = sample.labels[: len(metric.labels) - (metric.label is not None)]
    by_name = dict(zip(metric.labels, of, strict=False))
    by_name.pop("role", None)
    return "/".join([PREFIX, *by_name.values(), ""])
