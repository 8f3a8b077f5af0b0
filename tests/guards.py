"""Showing that a promise holds because of its guard: with the guard it does, with the guard taken out it does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from concurrent_kv import ClosedError, IntegrityError, RecursiveComputationError, WaitTimeoutError
from concurrent_kv.flights.table import Flight
from tests.async_support import join_workers
from tests.support import HANG_SECONDS

Removal = Callable[[pytest.MonkeyPatch], None]

SHORT = 0.2  # seconds that are waited out where a guard is taken out
_patience = HANG_SECONDS


def patience() -> float:
    """Seconds that a scenario may wait for what a guard brings about; few where it is taken out, as they pass then."""
    return _patience


def seen_by(scenario: Callable[[], object]) -> object:
    """What a scenario gives, or the type of the error that it ends with."""
    try:
        return scenario()
    except (IntegrityError, WaitTimeoutError, RecursiveComputationError, ClosedError) as error:
        return type(error)


def shown_by(scenario: Callable[[], object], promised: object, guard_off: Removal) -> None:
    """The promise holds with the guard, and is broken without it."""
    assert seen_by(scenario) == promised
    with pytest.MonkeyPatch.context() as patch:
        # Who waited in vain would find out at the end of its time: that it was not woken is what is to be seen.
        patch.setattr(Flight, "over_unheard", lambda self: False)
        patch.setattr("tests.guards._patience", SHORT)
        guard_off(patch)
        assert seen_by(scenario) != promised, "without its guard the promise should have been broken"
    join_workers()
