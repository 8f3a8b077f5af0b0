"""What the documentation has to have: every public name in the reference, every page in the navigation."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# What users import from; found in the source, as some of it needs packages that are not installed here.
PUBLIC = [
    "concurrent_kv",
    "concurrent_kv.aio",
    "concurrent_kv.cluster",
    "concurrent_kv.evaluation",
    "concurrent_kv.eviction",
    "concurrent_kv.metrics",
    "concurrent_kv.ray",
    "concurrent_kv.snapshots",
    "concurrent_kv.compat.lightzero",
    "concurrent_kv.compat.transformers",
]
# Said where they are used: a type of an argument, or what the page of a guide explains.
ELSEWHERE = {"DEFECTS", "NO_PARENT", "PolicyFactory", "Walk"}


def names_of(module: str) -> list[str]:
    source = ROOT / module.replace(".", "/")
    path = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    for statement in ast.parse(path.read_text("utf-8")).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return [str(name) for name in ast.literal_eval(value)]
    raise AssertionError(f"{module} says nothing of what is public")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    pages = "\n".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    if "errors" in shown:
        shown |= set(names_of("concurrent_kv.errors"))
    assert set(names_of(module)) - shown - ELSEWHERE == set()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert {page for page in pages if f": {page}\n" not in navigation} == set()
