"""The runner of mutants, on a door of a few lines: what its tests notice, miss, wait for, and do not reach."""

from __future__ import annotations

import builtins
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.mutants.__main__ import main
from tests.mutants.checkout import Checkout
from tests.mutants.choice import chosen
from tests.mutants.covering import Covering, covering
from tests.mutants.marking import REACHED, marked
from tests.mutants.places import Place, all_places, places_of
from tests.mutants.results import Entry, accepted, record, recorded
from tests.mutants.trial import CUT_SHORT, HUNG, KILLED, NOTICED, SURVIVED, UNREACHED, Verdict, kill_group, tried

ROOT = Path(__file__).resolve().parents[1]

DOOR = """
import threading


class Door:
    def __init__(self):
        self.closed, self.opened, self.users = False, threading.Event(), 0

    def enter(self):
        if self.closed:
            raise RuntimeError
        self.users += 1

    def open(self):
        self.opened.set()

    def wait(self):
        self.opened.wait()

    def leave(self):
        self.users -= 1
"""
TESTS = """
import pytest
from concurrent_kv.books.door import Door


def test_an_open_door_is_entered():
    Door().enter()


def test_a_closed_door_is_not_entered():
    door = Door()
    door.closed = True
    with pytest.raises(RuntimeError):
        door.enter()


def test_an_opened_door_keeps_no_thread_waiting():
    door = Door()
    door.open()
    door.wait()
"""
USUAL = {"tests/test_door.py::test_an_opened_door_keeps_no_thread_waiting": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has a door, its tests, and the plugin."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("concurrent_kv/books", "tests/mutants"):
        (root / folder).mkdir(parents=True)
    for package in ("concurrent_kv", "concurrent_kv/books", "tests/mutants"):
        (root / package / "__init__.py").touch()
    for module in ("in_pytest.py", "trial.py"):
        shutil.copy(ROOT / "tests/mutants" / module, root / "tests/mutants")
    (root / "concurrent_kv/books/door.py").write_text(DOOR, "utf-8")
    (root / "tests/test_door.py").write_text(TESTS, "utf-8")
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(root, tmp_path_factory.mktemp("copy"))


@pytest.fixture(scope="module")
def measured(root: Path) -> Covering:
    return covering(root, lambda what: None)


def place_in(root: Path, text: str) -> Place:
    return next(place for place in all_places(root) if place.text == text)


def verdict_without(text: str, root: Path, checkout: Checkout, measured: Covering) -> Verdict:
    place = place_in(root, text)
    with checkout.without(place):
        return tried(checkout.folder, measured.tests_of(place), USUAL, 60.0, patience=3.0)


def test_a_guard_that_a_test_is_about_is_noticed(root: Path, checkout: Checkout, measured: Covering) -> None:
    verdict = verdict_without("if self.closed:", root, checkout, measured)
    assert (verdict.outcome, verdict.by) == (KILLED, "tests/test_door.py::test_a_closed_door_is_not_entered")
    assert "RuntimeError" in verdict.why


def test_a_guard_that_no_assertion_sees_survives_the_test_that_covers_it(
    root: Path, checkout: Checkout, measured: Covering
) -> None:
    verdict = verdict_without("self.users += 1", root, checkout, measured)
    assert (verdict.outcome, verdict.tests, verdict.lives) == (SURVIVED, 1, True)


def test_a_test_that_waits_for_ever_is_noticed(root: Path, checkout: Checkout, measured: Covering) -> None:
    verdict = verdict_without("self.opened.set()", root, checkout, measured)
    assert (verdict.outcome, verdict.by) == (HUNG, *USUAL)


def test_a_place_that_no_test_reaches_is_told_apart(root: Path, checkout: Checkout, measured: Covering) -> None:
    assert verdict_without("self.users -= 1", root, checkout, measured) == Verdict(UNREACHED)


def test_the_time_for_one_mutant_has_an_end(root: Path, checkout: Checkout, measured: Covering) -> None:
    place = place_in(root, "self.users += 1")
    assert tried(checkout.folder, measured.tests_of(place), USUAL, 0.0).outcome == CUT_SHORT


def test_the_guard_is_back_afterwards_and_nothing_compiled_without_it_is_left(root: Path, checkout: Checkout) -> None:
    path = checkout.folder / "concurrent_kv/books/door.py"
    cache = path.parent / "__pycache__"
    cache.mkdir(exist_ok=True)
    stale = cache / "door.cpython-311.pyc"
    with checkout.without(place_in(root, "if self.closed:")):
        assert "if False:" in path.read_text("utf-8")
        stale.touch()
    assert path.read_text("utf-8") == DOOR
    assert not stale.exists()


def test_what_was_measured_is_kept_while_the_sources_stay(root: Path, measured: Covering) -> None:
    said: list[str] = []
    again = covering(root, said.append)
    assert not said
    assert again.reach == measured.reach


def test_only_files_that_are_wanted_are_measured_and_the_others_later(tmp_path: Path, root: Path) -> None:
    own = tmp_path / "project"
    shutil.copytree(root, own, ignore=shutil.ignore_patterns(".mutants"))
    (own / "tests/test_other.py").write_text(TESTS, "utf-8")
    said: list[str] = []
    first = covering(own, said.append, "_door")
    assert {test.partition("::")[0] for test in first.seconds} == {"tests/test_door.py"}
    both = covering(own, said.append)
    assert {test.partition("::")[0] for test in both.seconds} == {"tests/test_door.py", "tests/test_other.py"}
    assert ["1 files" in each for each in said] == [True, True]
    covering(own, said.append)
    assert len(said) == 2


ENTER = b'''"""A door."""
from __future__ import annotations


def enter(door):
    if door.closed:
        return None
    elif door.ended:
        raise RuntimeError
    with door.lock, door.shard:
        door.users += 1
    return door.users
'''


def test_a_marked_package_does_the_same_and_says_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    places = places_of("door.py", ENTER)
    reached: set[int] = set()
    monkeypatch.setattr(builtins, REACHED, reached.add, raising=False)
    names: dict[str, Any] = {}
    exec(marked(ENTER, {place: number for number, place in enumerate(places)}), names)
    door = SimpleNamespace(closed=True, ended=False, lock=nullcontext(), shard=nullcontext(), users=0)
    assert names["enter"](door) is None
    assert [places[number].text for number in sorted(reached)] == ["if door.closed:"]
    door.closed = False
    assert names["enter"](door) == 1
    assert len(reached) == len(places) == 5
    assert names["__doc__"] == "A door."


def test_a_package_from_elsewhere_is_not_tested_in_the_copys_stead(checkout: Checkout, tmp_path: Path) -> None:
    shutil.copytree(checkout.folder / "tests", tmp_path / "tests")
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\npythonpath = ['{ROOT}']\n", "utf-8")
    verdict = tried(tmp_path, ["tests/test_door.py::test_an_open_door_is_entered"], USUAL, 60.0)
    assert (verdict.outcome, verdict.tests) == (KILLED, 0)


def test_the_quickest_test_comes_first_further_parameters_later_and_readers_of_the_source_not_at_all() -> None:
    covering = Covering({})
    covering.seconds = {
        "a.py::f[1]": 2.0,
        "a.py::f[2]": 1.0,
        "a.py::g": 3.0,
        "a.py::h": 0.0,
        "tests/test_layers.py::i": 0.0,
    }
    covering.broken = ["a.py::h"]
    assert covering.ordered(covering.seconds) == ["a.py::f[2]", "a.py::g", "a.py::f[1]"]


def test_a_choice_hears_every_folder_and_kind_and_fewer_are_its_beginning() -> None:
    places = [place for place in all_places(ROOT) if not place.file.startswith("locks")]
    choice = chosen(places, 150, "1")
    assert len({place.name for place in choice}) == 150
    assert {(place.file.split("/")[0], place.kind) for place in choice} == {
        (place.file.split("/")[0], place.kind) for place in places
    }
    assert chosen(places[::-1], 60, "1") == choice[:60]
    assert chosen(places, 150, "2") != choice


def test_the_group_of_a_process_ends_with_it() -> None:
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()']).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True)
    kill_group(process)
    assert process.returncode is not None


def test_entries_are_written_one_a_line_and_read_again(tmp_path: Path) -> None:
    entries = {
        name: Entry(name, "with", outcome, "", 3, 60.0, "abc", "2026-01-01")
        for name, outcome in (("b", KILLED), ("a", SURVIVED))
    }
    record(entries, tmp_path / "result.json")
    assert recorded(tmp_path / "result.json") == entries
    lines = (tmp_path / "result.json").read_text("utf-8").splitlines()
    assert '"killed": 1, "survived": 1, "minutes": 2.0' in lines[1]
    assert [line.split('"')[3] for line in lines[3:5]] == ["a", "b"]


def test_a_number_that_is_not_positive_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sample", "0"])
    assert "--sample must be positive, not 0" in capsys.readouterr().err


def test_every_recorded_place_is_noticed_or_accepted_with_a_reason() -> None:
    may_live = accepted()
    assert all(may_live.values())
    entries = recorded()
    assert len(entries) >= 150
    assert not [entry for entry in entries.values() if entry.outcome not in NOTICED and entry.place not in may_live]


def test_every_test_that_is_recorded_for_a_guard_is_there() -> None:
    """A test that was renamed, or whose arguments were: record its place anew."""
    there = {place.name for place in all_places(ROOT)}
    by = {entry.by for entry in recorded().values() if entry.outcome == KILLED and entry.place in there}
    files = sorted({name.partition("::")[0] for name in by})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert by <= {*collected.stdout.splitlines()}
