"""What `tests.mutants` takes out: every edit leaves a module that compiles, and only the guard is gone."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from tests.mutants.places import PACKAGE, all_places, places_of

ROOT = Path(__file__).resolve().parents[1]

TINY = b"""
class Door:
    def enter(self):
        with self.lock:
            if self.closed:
                raise RuntimeError
            self.users += 1
        wake(self.waiters)
"""


def test_each_kind_of_guard_is_found_once_and_named_without_line_numbers():
    assert [(place.kind, place.name) for place in places_of("door.py", TINY)] == [
        ("with", "door.py:Door.enter:with self.lock#1"),
        ("recheck", "door.py:Door.enter:if self.closed#1"),
        ("count", "door.py:Door.enter:self.users += 1#1"),
        ("call", "door.py:Door.enter:wake(self.waiters)#1"),
    ]


def test_names_stay_where_lines_move():
    moved = b"\n\n# a comment\n" + TINY
    assert [place.name for place in places_of("door.py", moved)] == [place.name for place in places_of("door.py", TINY)]


def test_without_its_recheck_a_closed_door_is_entered():
    recheck = next(place for place in places_of("door.py", TINY) if place.kind == "recheck")
    names: dict[str, Any] = {"wake": lambda waiters: None}
    exec(recheck.taken_out(TINY), names)
    door = names["Door"]()
    door.__dict__.update(lock=__import__("contextlib").nullcontext(), closed=True, users=0, waiters=[])
    door.enter()
    assert door.users == 1


def test_every_edit_of_the_library_compiles_and_keeps_the_numbers_of_lines():
    places = all_places(ROOT)
    assert len(places) >= 150
    assert len({place.name for place in places}) == len(places)
    sources = {place.file: (ROOT / PACKAGE / place.file).read_bytes() for place in places}
    trees = {file: ast.dump(ast.parse(source)) for file, source in sources.items()}
    for place in places:
        source = sources[place.file]
        without = place.taken_out(source)
        assert ast.dump(ast.parse(without)) != trees[place.file], place.name
        assert without.count(b"\n") == source.count(b"\n"), place.name
