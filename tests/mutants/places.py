"""Where guards stand in the source, found by walking it: each place is one edit that takes one guard out."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "concurrent_kv"
FOLDERS = ("aio", "books", "evaluation", "flights", "locks", "pool", "search")
ONLY = {"aio": ("evaluator.py",)}  # of these folders

# An `if` is a guard where it leaves early, or where it asks for one of these.
ASKED = re.compile(r"\b(pins|ended|closed|released|generation|epoch|version|users|refs|place|spent|state|waiters?)\b")
# A call whose result is not looked at is a guard where its name is one of these.
CALLED = re.compile(
    r"^(wake|set|step|retain|extend|use|end_use|add|discard|remove|forget_\w+|let_go|drop\w*|check\w*|leave\w*|release"
    r"|cancel\w*|give_\w+|set_aside|withdraw|return_\w+|_?un?park|_park|hold|unpublish|drain_\w+|_?wake\w*|_?count\w*|_?extend|abandon|settle|end|stamp_\w+"
    r"|part|finish|_?fail_\w+|_end\w*|_put_back|_take_out|_withdraw|use_here)$"
)
# An attribute that says how far a thing has come.
MARKED = re.compile(
    r"^_?(place|spent|released|ended|closed|generation|ticks|state|finished|refs|pins|users|batches|settled|is_over)$"
)


@dataclass(frozen=True)
class Place:
    """One guard, and the edit that takes it out: `new` in place of the bytes `start` to `end` of the file."""

    name: str  # stable while lines move: file, function, what stands there, and which of several alike
    kind: str
    file: str  # within the package
    line: int
    last: int
    text: str
    start: int
    end: int
    new: str

    @property
    def lines(self) -> range:
        """Those that it stands on."""
        return range(self.line, self.last + 1)

    def taken_out(self, source: bytes) -> bytes:
        """The source without this guard; its lines keep their numbers."""
        lost = b"\n" * source[self.start : self.end].count(b"\n")
        new = self.new.encode()
        if lost and self.kind in ("with", "recheck", "part of a recheck", "wake-up"):
            new, lost = b"(" + new + lost + b")", b""  # an expression goes on over lines only within brackets
        return source[: self.start] + new + lost + source[self.end :]


def places_of(file: str, source: bytes) -> list[Place]:
    """All guards of one file, in the order of its lines."""
    return list(_Finder(file, source).found())


def all_places(root: Path) -> list[Place]:
    """All guards of the folders that are looked at, in the order of files and lines."""
    package = root / PACKAGE
    return [
        place
        for folder in FOLDERS
        for path in sorted((package / folder).rglob("*.py"))
        if path.name in ONLY.get(folder, (path.name,))
        for place in places_of(path.relative_to(package).as_posix(), path.read_bytes())
    ]


class _Finder:
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.seen: Counter[str] = Counter()

    def found(self) -> Iterator[Place]:
        yield from self._within(ast.parse(self.source), "")

    def _within(self, node: ast.AST, function: str) -> Iterator[Place]:
        for child in ast.iter_child_nodes(node):
            inside = function
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inside = f"{function}.{child.name}" if function else child.name
            elif function:  # nothing at the level of the module is a guard
                yield from self._of(child, function)
            yield from self._within(child, inside)

    def _of(self, node: ast.AST, function: str) -> Iterator[Place]:
        if isinstance(node, (ast.With, ast.AsyncWith)):
            yield from self._with(node, function)
        elif isinstance(node, ast.If):
            yield from self._if(node, function)
        elif isinstance(node, ast.AugAssign) and not isinstance(node.target, ast.Name):
            yield self._place("count", node, "pass", function)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if CALLED.match(_name(node.value.func)):
                yield self._place("call", node, "pass", function)
        elif isinstance(node, ast.Call) and _name(node.func) == "take_waiters":
            yield self._place("wake-up", node, "[]", function)
        elif isinstance(node, ast.Assign) and not function.endswith("__init__"):
            target = node.targets[0]
            if isinstance(target, ast.Attribute) and MARKED.match(target.attr):
                yield self._place("mark", node, "pass", function)

    def _with(self, node: ast.With | ast.AsyncWith, function: str) -> Iterator[Place]:
        plain = [item for item in node.items if item.optional_vars is None]
        for item in plain:
            what = ast.unparse(item.context_expr)
            if not what.startswith(("suppress", "torch", "nullcontext")):
                new = "__import__('contextlib').nullcontext()"
                yield self._place("with", item.context_expr, new, function, f"with {what}")

    def _if(self, node: ast.If, function: str) -> Iterator[Place]:
        last, asked = node.body[-1], ast.unparse(node.test)
        if isinstance(last, (ast.Return, ast.Raise, ast.Continue, ast.Break)) or ASKED.search(asked):
            yield self._place("recheck", node.test, "False", function, f"if {asked}")
            if isinstance(node.test, ast.BoolOp):
                without = "False" if isinstance(node.test.op, ast.Or) else "True"
                for part in node.test.values:
                    if ASKED.search(ast.unparse(part)):
                        yield self._place(
                            "part of a recheck", part, without, function, f"if {asked}: {ast.unparse(part)}"
                        )

    def _place(self, kind: str, where: ast.expr | ast.stmt, new: str, function: str, what: str = "") -> Place:
        what = " ".join((what or ast.unparse(where)).split())
        what = what if len(what) <= 100 else what[:97] + "..."
        key = f"{self.file}:{function}:{what}"
        self.seen[key] += 1
        assert where.end_lineno is not None
        assert where.end_col_offset is not None
        start = self.starts[where.lineno - 1] + where.col_offset
        end = self.starts[where.end_lineno - 1] + where.end_col_offset
        text = self.source.splitlines()[where.lineno - 1].decode().strip()
        return Place(f"{key}#{self.seen[key]}", kind, self.file, where.lineno, where.end_lineno, text, start, end, new)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
