"""Where memory or frames run out in the middle of an operation, nothing is lost, and no repair is needed.

`python -m tests.failing_calls` does the same at every place.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests import failing_calls
from tests.failing_calls import DEEPEST, OPERATIONS, OneFailure, Operation, check_whole, prepare, run_with_frames

SAMPLE = 40  # places of each operation, another choice for each


@pytest.fixture(autouse=True)
def cheap_collections() -> Iterator[None]:
    """What is here before a test is no garbage of its own, and need not be looked at by each of its collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def places_of(operation: Operation) -> int:
    """Calls of the package's functions in one run."""
    with failing_calls.make_manager() as manager:
        prepare(manager)
        counting = OneFailure(0)
        counting.run(operation, manager)
    return counting.seen


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_that_fails_for_want_of_memory_loses_nothing(operation: Operation) -> None:
    places = places_of(operation)
    step = max(1, places // SAMPLE)
    for number in range(1 + OPERATIONS.index(operation) % step, places + 1, step):
        with failing_calls.make_manager() as manager:
            prepare(manager)
            OneFailure(number).run(operation, manager)
            check_whole(manager)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_does_not_fit_on_the_stack_loses_nothing(operation: Operation) -> None:
    for frames in range(1, DEEPEST):
        with failing_calls.make_manager() as manager:
            prepare(manager)
            enough = run_with_frames(frames, operation, manager)
            check_whole(manager)
        if enough:
            break
    assert 5 < frames < DEEPEST - 1


def test_a_write_that_did_not_fit_leaves_all_room_to_the_next() -> None:
    with failing_calls.make_manager() as manager:
        prepare(manager)
        for frames in range(1, 30):
            run_with_frames(frames, failing_calls.insert_many, manager)
            run_with_frames(frames, failing_calls.replace, manager)
        check_whole(manager)
