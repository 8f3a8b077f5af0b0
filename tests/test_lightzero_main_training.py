"""The main branch's own training entries end normally with each cache: `tests.lightzero_main_training`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from concurrent_kv.compat.lightzero import DEFECTS
from tests.lightzero_checkout import CHECKOUT, trees_of
from tests.lightzero_main_support import NEEDS_CHECKOUT

PROJECT = Path(__file__).resolve().parents[1]
SECONDS = 900
CACHES = ("off", "on", "validate", "import")

pytestmark = [
    pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT),
    pytest.mark.skipif(
        CHECKOUT is not None and not trees_of(CHECKOUT).is_dir(),
        reason="needs the checkout's search trees: python -m tests.lightzero_main_trees",
    ),
    pytest.mark.timeout(2 * SECONDS),
    pytest.mark.parametrize("what", ["episodes", "segments"]),
]

Results = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def result_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """What a training run says at its end. They run two at a time, in the order in which the tests ask."""
    folder = tmp_path_factory.mktemp("training")

    def train(what: str, cache: str) -> dict[str, Any]:
        made = subprocess.run(
            [sys.executable, "-m", "tests.lightzero_main_training", what, cache, str(folder / f"{what}-{cache}")],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(PROJECT), "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
        said: dict[str, Any] = json.loads(made.stdout.splitlines()[-1])
        return said

    with ThreadPoolExecutor(2) as pool:
        asked = [(what, cache) for cache in CACHES for what in ("episodes", "segments")]
        running: dict[tuple[str, str], Future[dict[str, Any]]] = {each: pool.submit(train, *each) for each in asked}
        try:
            yield lambda what, cache: running[what, cache].result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    shutil.rmtree(folder)


def test_training_ends_normally_with_its_legacy_cache(what: str, result_of: Results) -> None:
    model = result_of(what, "off")["model"]
    assert model["queries"] == model["hits"] > 500
    assert "requests" not in model


def test_training_with_reanalysis_ends_normally_with_ours_attached(what: str, result_of: Results) -> None:
    result = result_of(what, "on")
    assert result["model"]["queries"] == result["model"]["hits"] > 500
    assert result["model"]["root_total_query_cnt"] > 50
    assert result["model"]["requests"] >= result["model"]["queries"]
    assert result["target"]["requests"] >= result["target"]["queries"] > 100
    seeds = result["target"]["reanalysis_root_seed_count"]
    assert result["target"]["reanalysis_root_seed_hit_count"] == seeds
    assert (seeds > 0) == (what == "segments")


def test_training_with_reanalysis_in_validation_differs_by_the_main_branchs_defects_only(
    what: str, result_of: Results
) -> None:
    result = result_of(what, "validate")
    for name in ("model", "target"):
        compared = result[name]
        assert compared["unexplained"] == 0, compared["first_unexplained"]
        assert compared["calls"] > 20
        assert compared["contexts"] > 100
        assert set(compared["defects"]) <= set(DEFECTS)
    # Training begins with heads of zeros, and so with equal latent states.
    assert result["model"]["defects"]["environments collide"] > 0
    assert result["model"]["entries"] > 500


def test_training_ends_normally_with_ours_through_the_one_import(what: str, result_of: Results) -> None:
    result = result_of(what, "import")
    for name in ("model", "target"):
        assert result[name]["manager"] == "LightZeroKVCacheManager"
        assert result[name]["queries"] > 100
    assert result["model"]["hits"] == result["model"]["queries"]
