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


def write_scalars(writer: Any, step: int, samples: Iterable[Sample], before: dict[str, float]) -> dict[str, float]:
    """See `KVMetrics.log_to`; `before` is what the last call returned."""
    now, rates = dict[str, float](), dict[str, float]()
    places = dict.fromkeys(_place(sample) for sample in samples)
    for sample in samples:
        tag, value = _place(sample) + sample.metric.name, sample.value
        if sample.metric.label is not None:
            tag += f"/{sample.labels[-1]}"
        if isinstance(value, Distribution):
            now[f"{tag}/count"] = value.count
            now[f"{tag}/mean"] = value.total / value.count if value.count else 0.0
        else:
            now[tag] = value
    for place in places:
        for part, whole, name in RATES:
            number = now.get(place + whole, 0.0) - before.get(place + whole, 0.0)
            if number > 0:
                rates[place + name] = (now[place + part] - before.get(place + part, 0.0)) / number
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
    return now


def _place(sample: Sample) -> str:
    """The beginning of its tag: what it is of."""
    metric = sample.metric
    of = sample.labels[: len(metric.labels) - (metric.label is not None)]
    by_name = dict(zip(metric.labels, of, strict=False))
    by_name.pop("role", None)
    return "/".join([PREFIX, *by_name.values(), ""])
