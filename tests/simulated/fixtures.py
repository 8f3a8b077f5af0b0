"""A simulated device of two GPUs for a test, without a scheduler: it runs when it is waited for, or told to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .backend import install
from .gpu import SimGPU

__all__ = ["gpu"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimGPU]:
    """Two devices of five streams each, under torch and under the library."""
    with SimGPU(devices=2) as made:
        install(monkeypatch, made)
        yield made
        assert not made.faults
