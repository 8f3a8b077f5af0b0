"""Host threads and streams at once on a simulated device: whatever runs late, reads see what they should."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.explorer.search import execute, sample
from tests.simulated.lagging import DrawnLag, RandomLag
from tests.simulated.programs import GPU_PROGRAMS
from tests.simulated.random_programs import gpu_programs
from tests.simulated.random_searches import search_programs
from tests.simulated.tier_programs import TIER_GPU_PROGRAMS
from tests.simulated.world import GpuProgram


@pytest.mark.parametrize("program", [*GPU_PROGRAMS, *TIER_GPU_PROGRAMS], ids=lambda program: program.name)
def test_reads_see_what_they_should_in_every_order_of_streams(program: GpuProgram) -> None:
    failure = sample(program, schedules=15, seed=1, chooser=RandomLag).failure
    assert failure is None, str(failure)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=gpu_programs(), choices=st.binary(max_size=300))
def test_random_programs_read_what_they_should_in_orders_that_hypothesis_draws(
    program: GpuProgram, choices: bytes
) -> None:
    failure = execute(program, DrawnLag(choices))
    assert failure is None, f"{program.name}\n{failure}"


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=search_programs(), choices=st.binary(max_size=300))
def test_random_searches_read_what_they_should_in_orders_that_hypothesis_draws(
    program: GpuProgram, choices: bytes
) -> None:
    failure = execute(program, DrawnLag(choices))
    assert failure is None, f"{program.name}\n{failure}"
