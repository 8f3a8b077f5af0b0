"""The program of docs/ray.md runs as it stands, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs Ray: make ray")

from tests.support import HANG_SECONDS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ray.md"


def test_the_program_of_the_page_prints_what_it_says(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    script = tmp_path / "program.py"
    script.write_text(program, "utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    assert done.stdout.split("\n")[:4] == ["(0.0, 0)", "0.0", "(2.0, 1)", "10"]
