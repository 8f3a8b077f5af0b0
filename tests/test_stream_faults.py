"""The simulated device has teeth: each wait, tick and protection left out, and each rule bent, shows as wrong bytes."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st

from tests.explorer.search import execute, replay, sample
from tests.simulated.faults import FAULTS
from tests.simulated.lagging import DrawnLag, RandomLag
from tests.simulated.programs import GPU_PROGRAMS
from tests.simulated.random_searches import search_programs
from tests.simulated.sites import Fault, sites
from tests.simulated.tier_programs import TIER_GPU_PROGRAMS

PROGRAMS = {program.name: program for program in [*GPU_PROGRAMS, *TIER_GPU_PROGRAMS]}


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


BY_SEARCHES = (
    "order_after left out of gather_entries in reading.py",
    "stamp left out of gather_entries in reading.py",
    "stamp left out of write in writing.py",
    "use_here left out of commit_batch in committing.py",
    "use_here left out of fill in batch.py",
    "finish left out of end_rows in batch.py",
    "writes not told to readers",
    "shared writes not told to readers",  # only a promotion shares slots without a copy
    "seen without a wait",
)


@pytest.mark.parametrize("name", BY_SEARCHES)
def test_fault_is_found_by_random_searches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    next(fault for fault in FAULTS if fault.name == name).plant(monkeypatch)
    quickly = settings(
        max_examples=400, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    # Raises where none is found.
    find(
        st.tuples(search_programs(), st.binary(max_size=300)),
        lambda drawn: execute(drawn[0], DrawnLag(drawn[1])) is not None,
        settings=quickly,
        random=random.Random(1),
    )
