"""The recurrent step of LightZero's world model on a device, with its own cache and with ours; needs LightZero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

__all__ = ["COLUMNS", "measure_steps", "missing"]

MADE = ("cartpole", "lunarlander", "atari", "dmc")  # the workloads whose models LightZero makes without a download
COLUMNS = ("workload", "rows", "step_ms", "cache_ms", "cache_calls", "cache_copies_to_host", "step_speed_up", "differ")


def missing(workloads: Sequence[str], searches: int) -> str | None:
    """Why no step is measured; None if steps are."""
    if not searches or not set(MADE).intersection(workloads):
        return "LightZero's recurrent step was left out"
    if find_spec("lzero") is None:
        return "LightZero's recurrent step was not measured: LightZero is not installed here (see make lightzero)"
    return None


def measure_steps(
    workloads: Sequence[str], rows: Sequence[int], device: str, searches: int
) -> Iterator[dict[str, Any]]:
    """Each workload at each number of environments; a pair of figures has those of both sides by name.

    `differ`: searches that led to other states than the released cache's. Bit for bit, which another device than a CPU
    does not promise: its matrix products may depend on where their operands lie.
    """
    from benchmarks.benchmark_kv_cache import compare  # it imports LightZero

    for workload in filter(MADE.__contains__, workloads):
        for environments in rows:
            found = compare(workload, environments, 1, searches, device)
            old, new = found["released"], found["ours"]
            yield {
                "workload": workload,
                "rows": environments,
                "step_ms": _both(old, new, "step_ms"),
                "cache_ms": _both(old, new, "cache_ms"),
                "cache_calls": _both(old, new, "operator_calls"),
                "cache_copies_to_host": _both(old, new, "copies_to_host"),
                "step_speed_up": round(found["step_speed_up"], 2),
                "differ": found["searches_that_differ"],
            }


def _both(released: dict[str, Any], ours: dict[str, Any], name: str) -> dict[str, float]:
    return {"released": round(released[name], 3), "ours": round(ours[name], 3)}
