"""Every block of docs/lightzero.md does what it says: the Python ones, in their order, are one program that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from concurrent_kv.compat.lightzero import DEFECTS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "lightzero.md").read_text("utf-8")
BLOCKS = [(token.info, token.content) for token in MarkdownIt().parse(PAGE) if token.type == "fence"]
SECONDS = 600


def test_every_block_is_python_that_runs_or_a_command_that_exists() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for language, block in BLOCKS:
        if language == "sh":
            for command in block.splitlines():
                target = re.match(r"make ([\w-]+)", command)
                assert target is not None
                assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE)


@pytest.mark.timeout(SECONDS + 20)
def test_the_python_blocks_are_one_program_that_runs(tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(block for language, block in BLOCKS if language == "python"), "utf-8")
    run = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_the_page_names_every_defect_that_validation_recognises() -> None:
    rows = set(re.findall(r"^\| `([a-z ]+)` \| ", PAGE, re.MULTILINE))
    assert set(DEFECTS) <= rows


def test_every_file_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(\w+/[\w/]*\.\w+)`", PAGE))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
