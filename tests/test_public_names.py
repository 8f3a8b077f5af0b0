"""What `dir()` and `help()` show of the public classes: what users call, and all of it: `public_names.json`."""

from __future__ import annotations

import importlib
import inspect
import json
import pydoc
import re
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from concurrent_kv.never_copied import NeverCopied

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "concurrent_kv",
    "concurrent_kv.aio",
    "concurrent_kv.cluster",
    "concurrent_kv.compat.lightzero",
    "concurrent_kv.compat.transformers",
    "concurrent_kv.evaluation",
    "concurrent_kv.eviction",
    "concurrent_kv.metrics",
    "concurrent_kv.metrics.otel",
    "concurrent_kv.metrics.prometheus",
    "concurrent_kv.ray",
    "concurrent_kv.snapshots",
)
PUBLIC = {name: set(names) for name, names in json.loads((ROOT / "tests/public_names.json").read_text()).items()}


def imported() -> dict[str, ModuleType]:
    """Those whose packages are here: transformers and Ray have environments of their own."""
    found = {}
    for name in MODULES:
        with suppress(ImportError):
            found[name] = importlib.import_module(name)
    return found


def classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in imported().values():
        found |= {name: getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}
    return {name: cls for name, cls in found.items() if not issubclass(cls, tuple)}


def hidden_of(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in vars(base).get("_internal", ())}


def own_names_of(cls: type) -> set[str]:
    """What the package's own classes define: what is derived from elsewhere is documented there."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("concurrent_kv.")]
    return {name for base in own for name in vars(base)}


CLASSES = classes()


def test_the_list_has_every_public_class_and_no_other() -> None:
    assert set(CLASSES) <= set(PUBLIC)
    missing = [find_spec(name) for name in set(MODULES) - set(imported())]
    sources = [Path(spec.origin).read_text("utf-8") for spec in missing if spec is not None and spec.origin is not None]
    named = {name for source in sources for name in re.findall(r'"(\w+)"', source)}
    assert set(PUBLIC) - set(CLASSES) <= named


@pytest.mark.parametrize("name", CLASSES)
def test_dir_shows_what_users_call_and_all_of_it(name: str) -> None:
    cls = CLASSES[name]
    shown = {each for each in dir(cls) if not each.startswith("_")}
    assert shown & own_names_of(cls) == PUBLIC[name]


@pytest.mark.parametrize("name", CLASSES)
def test_help_shows_nothing_internal_and_every_method_has_a_text(name: str) -> None:
    cls = CLASSES[name]
    page = re.sub(r".\x08", "", pydoc.render_doc(cls))  # what is bold is said twice
    assert not [each for each in hidden_of(cls) if re.search(rf"^ \|  {each}\b", page, re.MULTILINE)]
    for each in PUBLIC[name]:
        assert re.search(rf"^ \|  (async )?{each}\b", page, re.MULTILINE), f"help() does not show {name}.{each}"
        member = inspect.getattr_static(cls, each, None)
        if inspect.isroutine(member) or isinstance(member, property):
            assert inspect.getdoc(member), f"{name}.{each}"


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if hidden_of(cls)])
def test_what_is_hidden_exists(name: str) -> None:
    cls = CLASSES[name]
    for base in cls.__mro__:
        assert all(hasattr(base, each) for each in vars(base).get("_internal", ()) if base is not NeverCopied)


def test_the_reference_hides_the_same() -> None:
    """But for names that are public of another class; those the page of the class leaves out."""
    filters = re.findall(r'- "!(\^[^"]+)"', (ROOT / "mkdocs.yml").read_text("utf-8"))
    hidden = set().union(*map(hidden_of, CLASSES.values()))
    shown = set().union(*PUBLIC.values())
    assert {each for each in hidden - shown if not any(re.search(pattern, each) for pattern in filters)} == set()
    assert {each for each in shown if any(re.search(pattern, each) for pattern in filters)} == set()
