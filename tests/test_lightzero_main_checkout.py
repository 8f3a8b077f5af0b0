"""`make lightzero-main`: what it says without a checkout; and the checkout's own tests, which pass with ours too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.lightzero_checkout import CHECKOUT
from tests.lightzero_main_support import NEEDS_CHECKOUT

PROJECT = Path(__file__).resolve().parents[1]
SECONDS = 900
OWN_TESTS = (
    "lzero/model/unizero_world_models/tests",
    "lzero/policy/tests/test_unizero_eval_cache_isolation.py",
    "lzero/mcts/tests/test_unizero_reanalysis_context.py",
)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_without_a_checkout_make_says_so_and_ends_well() -> None:
    asked = ["make", "-s", "lightzero-main", "LIGHTZERO="]
    said = subprocess.run(asked, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0
    assert said.stdout.startswith("skipped: no checkout of LightZero")
    assert said.stderr == ""


@pytest.mark.parametrize("folder", ["", str(PROJECT)], ids=["none", "another"])
def test_what_is_no_checkout_is_refused_by_what_it_must_be(folder: str) -> None:
    asked = [sys.executable, "-m", "tests.lightzero_checkout"]
    environment = {**os.environ, "LIGHTZERO": folder}
    said = subprocess.run(asked, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("LIGHTZERO must be the folder of a checkout of LightZero")


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """The checkout's own tests that pass with its manager, and with ours in its place; run beside each other."""
    assert CHECKOUT is not None
    folder = tmp_path_factory.mktemp("own")
    with ExitStack() as ending:
        running = {}
        for cache in ("own", "ours"):
            stream = ending.enter_context((folder / cache).open("wb"))
            running[cache] = subprocess.Popen(
                [
                    *(sys.executable, "-m", "pytest", "-q", "-rpfE", "-o", "addopts=", "-p", "no:cacheprovider"),
                    *("-p", "tests.lightzero_checkout", *OWN_TESTS),
                ],
                cwd=CHECKOUT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(PROJECT),
                    "LIGHTZERO_CACHE": cache,
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            ending.callback(running[cache].wait)
            ending.callback(running[cache].kill)  # the last callback comes first
        found = {}
        for cache, process in running.items():
            process.wait(SECONDS)
            said = (folder / cache).read_text("utf-8")
            assert process.returncode in (0, 1), said[-4000:]  # not interrupted, nor without tests
            found[cache] = set(re.findall(r"^PASSED (\S+)", said, re.MULTILINE))
        yield found


@pytest.mark.skipif(CHECKOUT is None, reason=NEEDS_CHECKOUT)
@pytest.mark.timeout(2 * SECONDS)
def test_the_same_of_the_checkouts_own_tests_pass_with_its_manager_and_with_ours(passed: dict[str, set[str]]) -> None:
    assert passed["own"]
    assert passed["ours"] == passed["own"]
