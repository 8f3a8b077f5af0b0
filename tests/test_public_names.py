"""What `dir()` and `help()` show of the public classes: what users call, and all of it: `public_names.json`."""

from __future__ import annotations

import importlib
import inspect
import json
import pydoc
import re
from pathlib import Path

import pytest

from concurrent_kv.never_copied import NeverCopied

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("concurrent_kv", "concurrent_kv.aio", "concurrent_kv.evaluation", "concurrent_kv.eviction")
PUBLIC = {name: set(names) for name, names in json.loads((ROOT / "tests/public_names.json").read_text()).items()}


def classes() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in map(importlib.import_module, MODULES):
        found |= {name: getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))}
    return {name: cls for name, cls in found.items() if not issubclass(cls, tuple)}


def hidden_of(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in vars(base).get("_internal", ())}


CLASSES = classes()


def test_the_list_has_every_public_class() -> None:
    assert set(PUBLIC) == set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_dir_shows_what_users_call_and_all_of_it(name: str) -> None:
    cls = CLASSES[name]
    of_builtin = set(dir(TimeoutError)) | set(dir(KeyError)) if issubclass(cls, Exception) else set()
    shown = {each for each in dir(cls) if not each.startswith("_")} - of_builtin
    assert shown == PUBLIC[name]


@pytest.mark.parametrize("name", CLASSES)
def test_help_shows_nothing_internal_and_every_method_has_a_text(name: str) -> None:
    cls = CLASSES[name]
    page = re.sub(r".\x08", "", pydoc.render_doc(cls))  # what is bold is said twice
    assert not [each for each in hidden_of(cls) if re.search(rf"^ \|  {each}\b", page, re.MULTILINE)]
    for each in PUBLIC[name]:
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
