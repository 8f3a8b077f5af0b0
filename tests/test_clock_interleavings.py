"""The stream clock in every interleaving of a few host threads; and that each rule broken on purpose is found there."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.explorer.clock_programs import CLOCK_PROGRAMS
from tests.explorer.planted_clock import PLANTED_IN_THE_CLOCK
from tests.explorer.programs import Program
from tests.explorer.search import explore, replay

PROGRAMS = {program.name: program for program in CLOCK_PROGRAMS}


@pytest.mark.parametrize("program", CLOCK_PROGRAMS, ids=lambda program: program.name)
def test_work_comes_after_what_it_uses_in_every_interleaving(program: Program) -> None:
    failure = explore(program, preemptions=program.preemptions).failure
    assert failure is None, str(failure)


@pytest.mark.parametrize(
    ("plant", "program"), PLANTED_IN_THE_CLOCK.items(), ids=lambda item: getattr(item, "__name__", "")
)
def test_fault_in_the_clock_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = explore(PROGRAMS[program], preemptions=2).failure
    assert found is not None, f"no schedule of {program!r} noticed"
    again = replay(PROGRAMS[program], found.schedule)
    assert again is not None
    assert type(again.error) is type(found.error)
