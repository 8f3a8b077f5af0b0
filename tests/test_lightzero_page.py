"""Every block of the pages about LightZero does what it says: a page's Python ones, in their order, are one program."""

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
PAGES = {name: (ROOT / "docs" / name).read_text("utf-8") for name in ("lightzero.md", "lightzero-details.md")}
BLOCKS = {
    name: [(token.info, token.content) for token in MarkdownIt().parse(page) if token.type == "fence"]
    for name, page in PAGES.items()
}
SECONDS = 1800


def test_every_block_is_python_that_runs_or_a_command_that_exists() -> None:
    blocks = [block for of_a_page in BLOCKS.values() for block in of_a_page]
    assert {language for language, _ in blocks} == {"python", "sh"}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for language, block in blocks:
        if language == "sh":
            for command in block.splitlines():
                target = re.match(r"make ([\w-]+)", command)
                assert target is not None
                assert re.search(rf"^{target[1]}:", makefile, re.MULTILINE)


@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("name", PAGES)
def test_the_python_blocks_of_a_page_are_one_program_that_runs(name: str, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n".join(block for language, block in BLOCKS[name] if language == "python"), "utf-8")
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


def test_a_page_names_every_defect_that_validation_recognises() -> None:
    rows = set(re.findall(r"^\| `([a-z ]+)` \| ", PAGES["lightzero-details.md"], re.MULTILINE))
    assert set(DEFECTS) <= rows


def test_every_file_that_the_pages_name_exists() -> None:
    named = {name for page in PAGES.values() for name in re.findall(r"`(\w+/[\w/]*\.\w+)`", page)}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_link_of_the_pages_leads_to_a_page_and_a_heading() -> None:
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", page):
            path, _, anchor = target.partition("#")
            text = (ROOT / "docs" / (path or name)).read_text("utf-8")
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{name}: {target}"
