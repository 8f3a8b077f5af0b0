"""The simulated device has teeth: each wait, tick and protection left out, and each rule bent, shows as wrong bytes."""

from __future__ import annotations

import pytest

from tests.explorer.search import replay, sample
from tests.simulated.faults import FAULTS
from tests.simulated.lagging import RandomLag
from tests.simulated.programs import GPU_PROGRAMS
from tests.simulated.sites import Fault, sites

PROGRAMS = {program.name: program for program in GPU_PROGRAMS}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}, in {fault.program}")
def test_fault_is_found(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.plant(monkeypatch)
    program = PROGRAMS[fault.program]
    found = sample(program, schedules=300, seed=1, chooser=RandomLag).failure
    assert found is not None, f"no order of {fault.program!r} showed it"
    again = replay(program, found.schedule)
    assert again is not None, "the schedule that failed does not fail again"
    assert (type(again.error), again.trace) == (type(found.error), found.trace)


def test_every_wait_tick_and_protection_in_the_source_has_its_fault() -> None:
    assert set(sites()) == {fault.site for fault in FAULTS if fault.site is not None}
