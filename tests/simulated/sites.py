"""Every place of the library that waits, ticks or protects, found in its source, and faults that leave one out."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import concurrent_kv
from concurrent_kv.device.streams import NO_TICKS

__all__ = ["Fault", "Plant", "Site", "left_out", "sites"]

Patch = pytest.MonkeyPatch
Plant = Callable[[Patch], None]
Site = tuple[str, str, str, int]  # file, function, what it calls, and which of its calls of that, from 0

# What keeps an order, and what stands in for a call that is left out.
CALLS: dict[str, Any] = {
    "order_after": None,
    "stamp": NO_TICKS,
    "protect": None,
    "share": None,
    "synchronize": True,
    "everything": NO_TICKS,
    "join": None,
    "finish": NO_TICKS,
    "use_here": None,
    "settle": None,
    "_protect": None,
}
OWNERS = {
    "order_after": ("concurrent_kv.device.streams.StreamClock.order_after",),
    "stamp": ("concurrent_kv.device.streams.StreamClock.stamp",),
    "share": ("concurrent_kv.device.streams.StreamClock.share",),
    "everything": ("concurrent_kv.device.streams.StreamClock.everything",),
    "protect": ("concurrent_kv.device.streams.StreamClock.protect", "tests.simulated.backend.SimStreams.protect"),
    "synchronize": (
        "concurrent_kv.device.streams.StreamClock.synchronize",
        "tests.simulated.backend.SimStreams.synchronize",
    ),
    "join": ("concurrent_kv.device.stream_uses.StreamUses.join",),
    "finish": ("concurrent_kv.device.stream_uses.StreamUses.finish",),
    "use_here": ("concurrent_kv.pool.padded_rows.PaddedRows.use_here",),
    "settle": ("concurrent_kv.model.overflow.settle", "concurrent_kv.device.positions.settle"),
    "_protect": ("concurrent_kv.device.moving._protect",),
}
OF_OTHERS = {
    ("table.py", "settle"),
    ("loading.py", "join"),
    ("room.py", "join"),
    ("model.py", "share"),
    ("plan.py", "share"),
    ("attach.py", "share"),
    ("call.py", "settle"),
    ("joint.py", "settle"),
    ("evaluator.py", "finish"),
    ("queue.py", "finish"),
    ("queue.py", "join"),
    ("prometheus.py", "join"),
    ("writing.py", "join"),  # of paths, in snapshots
    ("trees.py", "settle"),
    ("cache.py", "use_here"),  # for models of transformers, which are not here
}  # other things of the same names, and what no program can do


@cache
def sites() -> dict[Site, range]:
    """Every place of the library that waits, ticks or protects, and its lines."""
    found: dict[Site, range] = {}
    for path in sorted(Path(concurrent_kv.__file__).parent.glob("**/*.py")):
        for function, call in _calls(ast.parse(path.read_text()), ""):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            of_text = isinstance(call.func, ast.Attribute) and isinstance(
                call.func.value, (ast.Constant, ast.JoinedStr)
            )
            if name in CALLS and not of_text and (path.name, name) not in OF_OTHERS:
                number = sum(site[:3] == (path.name, function, name) for site in found)
                found[path.name, function, name, number] = range(call.lineno, (call.end_lineno or call.lineno) + 1)
    return found


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield function, child
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        yield from _calls(child, inner)


class Fault:
    """A fault, where it is, and who notices.

    Args:
        program: name of the program.
        plant: plants it.
        site: the call that it leaves out or spoils, if it is about one.
    """

    def __init__(self, name: str, program: str, plant: Plant, site: Site | None = None) -> None:
        self.name = name
        self.program = program
        self.plant = plant
        self.site = site


def left_out(file: str, function: str, call: str, program: str, number: int = 0) -> Fault:
    """One call at one place does nothing."""
    site = (file, function, call, number)

    def plant(patch: Patch) -> None:
        for owner in OWNERS[call]:
            original = _resolve(owner)

            def maybe(*arguments: Any, original: Any = original, **options: Any) -> Any:
                frame = sys._getframe(1)
                here = (Path(frame.f_code.co_filename).name, frame.f_code.co_name)
                if here == (file, function) and frame.f_lineno in sites()[site]:
                    return CALLS[call]
                return original(*arguments, **options)

            patch.setattr(owner, maybe)

    which = f" ({number})" if number else ""
    return Fault(f"{call} left out of {function} in {file}{which}", program, plant, site)


def _resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module in sys.modules:
        return getattr(sys.modules[module], name)
    return getattr(_resolve(module), name)
