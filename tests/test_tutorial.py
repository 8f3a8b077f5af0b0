"""The tutorial is one program that does what it says, in each of its languages."""

from __future__ import annotations

import re
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from tests.support import HANG_SECONDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(path.name for path in DOCS.glob("tutorial*.md"))


def program_of(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


def test_the_program_runs_as_it_stands_shares_calls_and_agrees_with_a_run_from_scratch(tmp_path: Path) -> None:
    script = tmp_path / "tutorial.py"
    script.write_text(program_of("tutorial.md"), "utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    rows_of_calls = literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert rows_of_calls[4] > 10
    differences = re.findall(r"^\d \(.*\) (\S+)$", done.stdout, re.MULTILINE)
    assert len(differences) == 4
    assert all(float(difference) < 1e-6 for difference in differences)


@pytest.mark.parametrize("page", PAGES)
def test_each_language_has_the_same_program(page: str) -> None:
    assert program_of(page) == program_of("tutorial.md")
    assert "tutorial.zh.md" in PAGES
