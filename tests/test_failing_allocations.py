"""Where an allocation fails inside C, nothing is lost, and no repair is needed.

A spread of them is tried; `CONCURRENT_KV_ALL_ALLOCATIONS=1` in the environment tries each, in minutes, and so does
`python -m tests.failing_allocations`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.failing_allocations import CAN_FAIL, OPERATIONS
from tests.support import LOOPS

ROOT = Path(__file__).parent.parent
SAMPLE = "80"  # of each operation
IN_TORCH = (" in gather", " in scatter")  # of `device/tensors.py`, where torch copies without the compiled module
WHOLE = os.environ.get("CONCURRENT_KV_ALL_ALLOCATIONS") == "1"
MOST_SECONDS = 3600.0 if WHOLE else 600.0


@pytest.mark.skipif(not CAN_FAIL, reason="this interpreter has no _testcapi, which fails them")
@pytest.mark.timeout(MOST_SECONDS)
@pytest.mark.parametrize("loops", LOOPS)
def test_an_allocation_that_fails_inside_c_loses_nothing(loops: str) -> None:
    """In a process of its own: CPython, numpy and torch may end it where they do not expect the failure."""
    sample = [] if WHOLE else ["--sample", SAMPLE]
    environment = {**os.environ, "CONCURRENT_KV_NATIVE": "1" if loops == "compiled" else "0", "PYTHONPATH": str(ROOT)}
    names = [operation.__name__ for operation in OPERATIONS]
    while names:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.failing_allocations", *sample, *names],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
        )
        where = re.search(r"most recent call first\):\n +(.*)", ended.stderr)
        line = "" if where is None else where[1]
        if ended.returncode == -signal.SIGSEGV and "device/tensors.py" in line and line.endswith(IN_TORCH):
            # torch does not look whether it got its memory there; the operations that follow are tried all the same.
            last = re.split("[:,]", ended.stdout.splitlines()[-1])[0]
            del names[: names.index(last) + 1]
            continue
        assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-4000:]
        return
