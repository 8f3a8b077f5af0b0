"""The explorer notices: each bug, planted, breaks a promise in some schedule, and that schedule breaks it again."""

from __future__ import annotations

import pytest

from tests.explorer.planted import PLANTED, Plant
from tests.explorer.pool_programs import POOL_PROGRAMS
from tests.explorer.search import explore, replay
from tests.explorer.search_programs import SEARCH_PROGRAMS

PROGRAMS = {program.name: program for program in [*POOL_PROGRAMS, *SEARCH_PROGRAMS]}


@pytest.mark.parametrize(("plant", "program"), PLANTED.items(), ids=lambda item: getattr(item, "__name__", ""))
def test_planted_bug_is_found(plant: Plant, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    found = explore(PROGRAMS[program], preemptions=2).failure
    assert found is not None, f"no schedule of {program!r} noticed"
    again = replay(PROGRAMS[program], found.schedule)
    assert again is not None
    assert type(again.error) is type(found.error)
