"""`docs/compiled.md` names every static of the compiled module and every function that uses borrowed references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "compiled.md").read_text("utf-8")
FILES = [ROOT / "concurrent_kv" / "_native.c", *sorted((ROOT / "concurrent_kv" / "csrc").glob("*.h"))]
SOURCE = re.sub(r"/\*.*?\*/", "", "".join(path.read_text("utf-8") for path in FILES), flags=re.DOTALL)

# At the left margin, as clang-format writes it.
FUNCTION = re.compile(r"^\w[^\n#;={}]*?\b(?P<name>\w+)\([^;{}]*\)\n\{\n(?P<body>.*?)^\}$", re.MULTILINE | re.DOTALL)
STATIC = re.compile(r"^ *static (?!inline\b)(?P<declared>[^;={(]+?)(?:;| = )", re.MULTILINE)
# What gives out a reference that is another's, or reads one where it lies; `slot` is that of an entry by its offset.
BORROWING = re.compile(
    r"\b(?:Py(?:List|Tuple)_(?:GET_ITEM|GetItem)|PySequence_Fast_(?:GET_ITEM|ITEMS)|PyDict_(?:GetItem|SetDefault)(?!Ref)\w*"
    r"|PyDict_Next|PyCell_GET|PyWeakref_G\w+|PySys_GetObject|PyImport_AddModule|PyModule_GetDict|slot)\(|->ob_item\b"
)

FUNCTIONS = {found["name"]: found["body"] for found in FUNCTION.finditer(SOURCE)}


def named_under(heading: str) -> set[str]:
    """The names in the first column of the table under a heading of the page."""
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\|([^|]*)\|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def statics() -> set[str]:
    return {
        re.sub(r"\[.*", "", one).split()[-1].lstrip("*")
        for found in STATIC.finditer(SOURCE)
        for one in found["declared"].split(",")
    }


def test_every_function_of_the_source_is_read() -> None:
    assert len(FUNCTIONS) == len(re.findall(r"\)\n\{\n", SOURCE)) > 100


def test_the_page_names_every_static_and_no_other() -> None:
    assert named_under("Statics") == statics()


def test_the_page_names_every_function_that_borrows_and_no_other() -> None:
    assert named_under("Borrowed references") == {name for name, body in FUNCTIONS.items() if BORROWING.search(body)}


@pytest.mark.parametrize("kind", ["tables", "uses"])
def test_every_method_of_tables_works_in_their_section(kind: str) -> None:
    methods = re.findall(rf"METHOD\({kind}, (\w+),", SOURCE)
    fields = re.findall(rf"\(getter\){kind}_(\w+),", SOURCE)
    without = [
        name
        for name in methods + fields
        if f"INSIDE_{kind.upper()}({name})" not in SOURCE
        and not re.search(rf"NUMBER_INSIDE\({kind}, \w+, [\w>-]+, {name}\)", SOURCE)
        and "Py_BEGIN_CRITICAL_SECTION(tables)" not in FUNCTIONS.get(f"{kind}_{name}", "")
    ]
    assert methods
    assert fields
    assert not without
