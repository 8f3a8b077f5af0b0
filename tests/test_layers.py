"""Imports point one way: from the top of the house to the ground, those for types alone included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import concurrent_kv

ROOT = Path(concurrent_kv.__file__).parent
# From the ground up: each may import what stands before it. `docs/design.md` says what each is about.
LAYERS = (
    "errors",
    "internal",
    "never_copied",
    "native",
    "_checks",
    "locks",
    "device",
    "model",
    "books",
    "flights",
    "snapshots",
    "pool",
    "search",
    "manager",
    "evaluation",
    "aio",
    "metrics",
    "top",
    "cluster",
    "ray",
    "compat",
    "examples",
)
FACADES = {"__init__", "__main__", "eviction"}  # they gather what users import, from everywhere
FREE_OF_TORCH = ("errors", "internal", "never_copied", "native", "_checks", "locks", "books")


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it; a folder's `__init__` by that of the folder."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported_by(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever and for whatever."""
    path = MODULES[name]
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("concurrent_kv")):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = (node.module or "").split(".") if node.module else []
            of = ".".join([*base, *(parts if node.level else parts[1:])])
            inside = [f"{of}.{alias.name}" if of else alias.name for alias in node.names]
            submodules = [each for each in inside if each in MODULES]
            yield from submodules or ([of] if of in MODULES else [])


def layer_of(name: str) -> str:
    return name.split(".")[0]


def arrows() -> dict[str, set[str]]:
    return {name: set(imported_by(name)) - {name} for name in MODULES if layer_of(name) not in FACADES}


def test_every_module_stands_in_a_layer() -> None:
    assert {layer_of(name) for name in MODULES} - FACADES == set(LAYERS)


def test_imports_point_from_each_layer_to_those_below() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in others
        if layer_of(other) in FACADES or LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(name))
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    left = arrows()
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


def test_the_books_know_nothing_of_torch() -> None:
    for name, path in MODULES.items():
        if layer_of(name) in FREE_OF_TORCH:
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(each.split(".")[0] == "torch" for each in names), f"{name} imports torch"


def test_an_import_for_types_alone_is_seen() -> None:
    assert "device.positions" in arrows()["books.records"]
