"""Copies that fail in the middle, and copies that take long."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

from concurrent_kv.device.tensors import SlotTensor
from stress.faults.errors import marked

__all__ = ["disturb_copies"]

FAILING, SLOW = 0.004, 0.01  # shares of the copies
LONGEST_SECONDS = 0.004
NOT_THERE = float("nan")


def disturb_copies(tensor: SlotTensor, *, fail: bool, slow: bool, seed: int, count: Callable[[str], None]) -> None:
    """From now on some gathers and scatters of `tensor` fail half way, and some take milliseconds."""
    rng = Random(f"{seed} copies")
    errors = _real_errors()  # made once: torch looks up its own stack for the message, which takes a second
    gather, scatter = tensor.gather, tensor.scatter

    def disturbed(half: Callable[[], object]) -> None:
        chance = rng.random()
        if slow and chance < SLOW:
            count("slow copy")
            time.sleep(rng.random() * LONGEST_SECONDS)  # the trouble itself; nothing relies on its length
        elif fail and chance > 1 - FAILING:
            count("failed copy")
            if chance > 1 - FAILING / 2:
                half()
            error = rng.choice(errors)
            raise marked(type(error)(*error.args))

    def disturbed_gather(tables: Any, rows: list[int], end: int, out: Tensor, **options: Any) -> tuple[Tensor, ...]:
        disturbed(lambda: out.fill_(NOT_THERE))
        return gather(tables, rows, end, out, **options)

    def disturbed_scatter(source: Tensor, rows: Any, columns: Any, slots: Any, *how: Any, **options: Any) -> Any:
        part = len(slots) // 2
        disturbed(lambda: part and scatter(source, rows[:part], columns[:part], slots[:part]))
        return scatter(source, rows, columns, slots, *how, **options)

    vars(tensor).update(gather=disturbed_gather, scatter=disturbed_scatter)


def _real_errors() -> list[RuntimeError]:
    """What torch raises when memory is short, and when a tensor is on the wrong device."""
    found = []
    attempts: tuple[Callable[[], object], ...] = (
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: torch.zeros(1).index_copy_(0, torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1)),
    )
    for attempt in attempts:
        try:
            attempt()
        except RuntimeError as error:
            found.append(error)
    return found
