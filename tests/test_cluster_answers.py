"""Answers: what was returned or raised in one process is returned or raised in another, whole."""

from __future__ import annotations

import asyncio
import pickle
import threading
from typing import Any

import pytest

from concurrent_kv import CapacityError, WaitTimeoutError
from concurrent_kv.cluster import HostLostError, PlannerError, QueueFullError
from concurrent_kv.cluster.answers import Answer, Pickler
from tests.cluster_support import LoadError, OddError

PICKLER = Pickler(pickle.dumps, pickle.loads)


class TwiceError(Exception):
    """Pickles, and is something else afterwards: its constructor is called again, with the finished message."""

    def __init__(self, word: str, code: int = 0) -> None:
        super().__init__(f"{word}!")
        if code:
            self.code = code


def travelled(error: BaseException) -> Any:
    async def fail() -> None:
        raise error

    answer = pickle.loads(pickle.dumps(asyncio.run(Answer.of(fail(), PICKLER))))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        answer.result(PICKLER)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        CapacityError("too many", required_entries=3, required_slots=24),
        HostLostError("gone", host="host-1", attempts=3),
        QueueFullError("full", host="host-2", limit=7),
        WaitTimeoutError("late"),
        LoadError(3, "weights"),
        OddError(7, reason="odd"),
        TwiceError("once", 3),
        KeyError("key"),
        FileNotFoundError(2, "not there", "a file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_with_its_type_message_and_fields(error: Exception) -> None:
    arrived = travelled(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)
    assert isinstance(arrived.__cause__, PlannerError)
    assert "in fail" in str(arrived.__cause__)


def test_an_error_that_cannot_travel_arrives_in_words() -> None:
    error = OddError(7, reason="odd")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    arrived = travelled(error)
    assert type(arrived) is PlannerError
    assert arrived.kind == "OddError"
    assert "odd: 7" in str(arrived)
