"""No loop stands in the `with` block of a plain lock.

CPython 3.13, with its GIL and without, can raise an asynchronous exception at the jump back of a loop outside of the
block's exception table: the `with` is left and the lock stays taken, which nobody can mend. In a function that the
block calls, the same loop does no harm.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import concurrent_kv

PACKAGE = pathlib.Path(concurrent_kv.__file__).parent
MAKERS = {"Lock", "RLock", "lock_factory"}
LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)
CODE_OF_ITS_OWN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp)


def name_of(node: ast.expr) -> str:
    """The last name of `a.b.c`, and of a call of it."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def lock_names(trees: list[ast.Module]) -> set[str]:
    """Attributes that plain locks are assigned to."""
    return {
        name_of(target)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Call)
        and name_of(node.value) in MAKERS
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


def loops_in(node: ast.AST) -> Iterator[ast.AST]:
    """Loops and comprehensions that run in the frame of `node`."""
    if isinstance(node, CODE_OF_ITS_OWN):
        return
    if isinstance(node, LOOPS):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from loops_in(child)


def found_in(tree: ast.AST, locks: set[str]) -> Iterator[int]:
    """Lines of loops under one of `locks`."""
    for block in ast.walk(tree):
        if isinstance(block, ast.With) and any(name_of(item.context_expr) in locks for item in block.items):
            for statement in block.body:
                yield from (loop.lineno for loop in loops_in(statement) if isinstance(loop, ast.stmt | ast.expr))


def test_no_loop_stands_in_the_with_block_of_a_plain_lock() -> None:
    files = {path: ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    locks = lock_names(list(files.values())) | {"lock"}  # the gate's
    assert {"mutex", "_lock", "_replacing"} <= locks
    found = [f"{path.name}:{line}" for path, tree in files.items() for line in found_in(tree, locks)]
    assert not found


def test_a_loop_under_a_lock_is_found() -> None:
    text = "with a.read(), self.mutex:\n    x = [each for each in y if each]\n    f(each for each in y)"
    assert [*found_in(ast.parse(text), {"mutex"})] == [2]
