"""The example of a thread and a loop that hand each other results, on both event loops."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.threads_and_loops import main
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_each_result_is_computed_once_where_it_was_claimed_and_reaches_the_other_side(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--backend", backend]) == 0
    computed = [line for line in capsys.readouterr().out.splitlines() if "is computed in" in line]
    assert sorted(line.split(" is ")[0] for line in computed) == ["'next root'", "'root'", "'shared'"]
    assert "'root' is computed in the search thread_0" in computed
    assert "'next root' is computed in MainThread" in computed


def test_the_example_runs_as_its_docstring_says() -> None:
    command = [sys.executable, "-m", "examples.threads_and_loops", "--backend", "trio"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    assert "3 results stored" in done.stdout
