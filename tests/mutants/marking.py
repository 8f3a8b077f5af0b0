"""A package that says which of its places are reached: a call of a C function before each statement that has one.

coverage.py would do, but for tests that interrupt a thread at any point: an exception inside of its tracer leaves its
own lock taken. Adding a number to a set is one call in C, which nothing cuts in two, and needs no lock.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from tests.mutants.places import Place

REACHED = "_mutants_reached"  # a builtin that the plugin of pytest sets; elsewhere it is as good as none
PREAMBLE = f"import builtins as _builtins\n{REACHED} = getattr(_builtins, '{REACHED}', id)\n"


def marked(source: bytes, numbers: Mapping[Place, int]) -> str:
    """The source of one file with its places marked by their numbers."""
    tree = ast.parse(source)
    wanted: defaultdict[ast.stmt, list[int]] = defaultdict(list)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    for place, number in numbers.items():
        around = [each for each in statements if each.lineno <= place.line and place.last <= (each.end_lineno or 0)]
        wanted[max(around, key=lambda each: (each.lineno, each.col_offset))].append(number)
    for body in list(_bodies(tree)):
        body[:] = [each for statement in body for each in (*_calls(wanted.get(statement, ())), statement)]
    after = next((number for number, each in enumerate(tree.body) if not _is_first(each)), len(tree.body))
    tree.body[after:after] = ast.parse(PREAMBLE).body
    return ast.unparse(ast.fix_missing_locations(tree))


def _bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                yield body


def _calls(numbers: Iterable[int]) -> list[ast.stmt]:
    return [each for number in numbers for each in ast.parse(f"{REACHED}({number})").body]


def _is_first(statement: ast.stmt) -> bool:
    """Whether it has to stay ahead of everything: the docstring, and what is imported from the future."""
    if isinstance(statement, ast.ImportFrom):
        return statement.module == "__future__"
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
