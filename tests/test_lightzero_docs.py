"""Every Python block of docs/lightzero.md runs as it stands, where a `world_model` and a `search` are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lzero", reason="needs LightZero 0.2.0: make lightzero")

from markdown_it import MarkdownIt

from concurrent_kv.compat.lightzero import DEFECTS, attachment_of, uninstall
from tests.lightzero_support import SHAPES, Walk, make_world_model

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "lightzero.md").read_text("utf-8")
BLOCKS = [block for block in MarkdownIt().parse(TEXT) if block.type == "fence"]
SHAPE = replace(SHAPES["cartpole"], env_num=2)


def search(world_model: Any) -> None:
    walk = Walk(SHAPE, SHAPE.env_num)
    for _ in range(2):
        walk.root([world_model])
        walk.simulate([world_model])
        walk.act()


@pytest.mark.parametrize("code", [pytest.param(block.content, id=f"line {block.map[0] + 1}") for block in BLOCKS])  # type: ignore[index]
def test_a_block_runs_as_it_stands(code: str) -> None:
    world_model = make_world_model(SHAPE)
    try:
        exec(compile(code, "docs/lightzero.md", "exec"), {"world_model": world_model, "search": search})
    finally:
        uninstall()
    assert attachment_of(world_model) is None


def test_every_defect_that_validation_recognises_is_in_the_table() -> None:
    assert all(f"| {name} |" in TEXT for name in DEFECTS)
