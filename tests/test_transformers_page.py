"""Every block of docs/transformers.md runs, one after the other, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs transformers: make transformers")

import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"


def test_the_blocks_of_the_page_run_as_one_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    names["pool"].check_integrity()
    printed = capsys.readouterr().out
    rounding = re.search(r"tensor\((\S+)\)", printed)
    assert rounding is not None
    assert float(rounding[1]) < 5e-6
    text, stored = map(int, re.search(r"(\d+) tokens of text, (\d+) stored", printed).groups())  # type: ignore[union-attr]
    assert text > 3 * stored
