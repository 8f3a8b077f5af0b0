"""`keep_out_of_graphs`: calls of the package inside a function that `torch.compile` compiles break its graph, and work.

Traced, a pool's books would become part of the graph: numpy arrays as fake tensors, locks and counts as constants. Each
function of the package is marked as `torch.compiler.disable` marks its own, and the code of each as not to be compiled
where a graph was broken and it runs. A mark costs a call nothing; `torch.compiler.disable` would wrap every call, and
import torch's compiler with this package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch

__all__ = ["keep_out_of_graphs"]

FOLDER = str(Path(__file__).parent.parent)  # of the package


def keep_out_of_graphs(name: str) -> None:
    """Mark every function of the package or module `name` that was imported so far, methods and properties too."""
    skip = _skip()
    for module_name, module in tuple(sys.modules.items()):
        if module_name == name or module_name.startswith(name + "."):
            for value in tuple(vars(module).values()):
                if getattr(value, "__module__", None) == module_name:
                    _mark(value, skip)


def _mark(value: object, skip: Callable[[CodeType], object]) -> None:
    members = [value]
    if isinstance(value, type):
        members = [part for member in vars(value).values() for part in _functions_in(member)]
    for member in members:
        function = getattr(member, "__wrapped__", member)  # of what a decorator wrapped
        if isinstance(function, FunctionType):
            function._torchdynamo_disable = True  # type: ignore[attr-defined]
            for code in _codes_in(function.__code__):
                if code.co_filename.startswith(FOLDER):
                    skip(code)


def _functions_in(member: object) -> list[object]:
    if isinstance(member, property):
        return [member.fget, member.fset]
    if isinstance(member, (classmethod, staticmethod)):
        return [member.__func__]
    return [member]


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _skip() -> Callable[[CodeType], object]:
    """What keeps code from being compiled, in the versions of torch that have it."""
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if hasattr(frames, "_FrameExecStrategy"):
        # The code itself is skipped, what it calls of the user's is compiled as elsewhere.
        strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        return lambda code: frames.set_code_exec_strategy(code, strategy)
    found: Callable[[CodeType], object] = getattr(frames, "skip_code", lambda code: None)
    return found
