"""A function that says "Mutex held." or "shard held" is called where that lock is held, and nowhere else.

Its docstring is the mark; the source says where it is called. A call stands in the `with` block of the lock, or in a
function that has the mark itself; a `partial` of it is made in such a place too, or goes to `Ledger.again`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import concurrent_kv

ROOT = Path(concurrent_kv.__file__).parent
ALL = re.compile(r"[Aa]ll locks held")
KINDS = {
    "mutex": (re.compile(r"\bmutex(es)? (and shards? )?held", re.IGNORECASE), "mutex"),
    "shard": (re.compile(r"\b(mutex and )?shard(s|'s write lock)? held", re.IGNORECASE), "locks."),
}


@dataclass
class Source:
    """The functions of some modules, by name, and those of them that are marked."""

    mark: re.Pattern[str]
    lock: str
    functions: dict[str, list[ast.FunctionDef]] = field(default_factory=dict)
    marked: set[ast.FunctionDef] = field(default_factory=set)
    owners: dict[ast.AST, ast.AST] = field(default_factory=dict)
    trees: dict[str, ast.Module] = field(default_factory=dict)

    def add(self, name: str, text: str) -> None:
        tree = self.trees[name] = ast.parse(text)
        for node in ast.walk(tree):
            self.owners.update(dict.fromkeys(ast.iter_child_nodes(node), node))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
                said = ast.get_docstring(node) or ""
                if self.mark.search(said) or ALL.search(said):
                    self.marked.add(node)

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        while (owner := self.owners.get(node)) is not None:
            yield owner
            node = owner

    def is_held(self, node: ast.AST) -> bool:
        """Whether the lock is held where a function is called, or named."""
        for outer in self.around(node):
            if isinstance(outer, ast.With) and any(self.lock in ast.unparse(item) for item in outer.items):
                return True
            if (
                isinstance(outer, ast.Call)
                and ast.unparse(outer).startswith("partial(")
                and "again" in ast.unparse(outer)
            ):
                return True
            if isinstance(outer, ast.FunctionDef):
                return outer in self.marked
        return False

    def unguarded(self) -> list[str]:
        """Where a function is called, or named, that only marked functions have the name of, without its lock."""
        only_marked = {name for name, all_of in self.functions.items() if self.marked.issuperset(all_of)}
        found = []
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                owner = self.owners.get(node)
                if not isinstance(owner, ast.Call) or (node is not owner.func and ast.unparse(owner.func) != "partial"):
                    continue  # neither called nor passed on
                name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
                if name in only_marked and not self.is_held(node):
                    found.append(f"{file}:{owner.lineno}: {ast.unparse(owner)}")
        return found


def package(kind: str) -> Source:
    source = Source(*KINDS[kind])
    for path in sorted(ROOT.rglob("*.py")):
        if path.parent.name in ("cluster", "ray"):  # which have locks of their own, and other things of the same names
            continue
        source.add(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    return source


@pytest.mark.parametrize("kind", KINDS)
def test_what_says_that_a_lock_is_held_is_called_where_it_is(kind: str) -> None:
    source = package(kind)
    assert len(source.marked) > 5
    assert source.unguarded() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_without_the_lock_is_found(kind: str) -> None:
    said, lock = {
        "mutex": ("Mutex held.", "ledger.mutex"),
        "shard": ("The shard held.", "locks.read(shards, deadline)"),
    }[kind]
    source = Source(*KINDS[kind])
    source.add(
        "planted.py",
        f'''
def guarded():
    """{said}"""

def right():
    with {lock}:
        guarded()

def marked():
    """Also. {said}"""
    guarded()

def later():
    note(partial(ledger.again, partial(guarded)))

def wrong():
    guarded()

def passed_on():
    with other:
        call(partial(guarded))
''',
    )
    assert [place.split(": ")[0] for place in source.unguarded()] == ["planted.py:17", "planted.py:21"]
