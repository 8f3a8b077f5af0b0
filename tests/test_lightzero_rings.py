"""`make bench`'s contestant from LightZero: its rings give the batches that the library gives, bit for bit."""

from __future__ import annotations

import pytest

pytest.importorskip("lzero", reason="needs LightZero: make lightzero")

from benchmarks.peers.cases.steps import StepRun
from benchmarks.peers.contestants import CONTESTANTS, OURS
from benchmarks.peers.contestants.base import UnfitError
from benchmarks.peers.shapes import Shape, Trees


@pytest.mark.parametrize("root_tokens", [1, 5])
@pytest.mark.parametrize("workload", ["cartpole", "lunarlander"])
def test_its_batches_are_the_librarys(workload: str, root_tokens: int) -> None:
    rings, ours = (
        StepRun(
            CONTESTANTS[name],
            shape={"workload": workload},
            rows=3,
            simulations=10,
            root_tokens=root_tokens,
            turn_ms=0.1,
        )
        for name in ("lightzero", OURS)
    )
    found = rings.verify()
    assert found == ours.verify()
    assert rings.turn()["step"][0] > 0
    window = Shape.of(workload).window * Shape.of(workload).token_bytes
    assert rings.facts()["K/V bytes a node"] == window
    ours.close()


def test_a_shape_without_a_world_model_and_a_second_thread_are_refused() -> None:
    shape = Shape(layers=1, heads=1, head_dim=4, window=8, limit=7)
    with pytest.raises(UnfitError, match="no world model of this shape"):
        CONTESTANTS["lightzero"].searches(shape, Trees(shape, 2, 2, 1, 2))
    with pytest.raises(UnfitError, match="for one thread"):
        CONTESTANTS["lightzero"].searches(shape, Trees(shape, 2, 2, 1, 2), 2)
