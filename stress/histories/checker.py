"""Whether a history is linearizable: a search for an order of its calls that explains what each call saw.

In the manner of Wing and Gong, with the memory of Lowe: calls are placed one after the other, the next always one that
began before every unplaced call ended, and what was tried once (which calls are placed, and the state) is not tried
again. A call that never returned may be placed anywhere after its beginning, or not at all.

[Wing and Gong 1993, "Testing and verifying concurrent objects"; Lowe 2017, "Testing for linearizability"]
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["Call", "Model", "Verdict", "check"]

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Call:
    """One operation, from its caller's side.

    Attributes:
        process: who called.
        action: what was asked for; `subject` and `argument`: of what, and with what.
        result: what was answered.
        began, ended: times in any unit, the same for all; `ended` is None for a call that never returned.
    """

    process: str
    action: str
    subject: Hashable
    argument: Hashable
    result: Hashable
    began: int
    ended: int | None

    def __str__(self) -> str:
        span = f"{self.began}..{'' if self.ended is None else self.ended}"
        argument = "" if self.argument is None else f" {self.argument}"
        return f"{self.process} [{span}] {self.action} {self.subject}{argument} -> {self.result}"


class Model(Protocol[S]):
    """What the object does when it is used by one caller at a time."""

    initial: S

    def after(self, state: S, call: Call) -> Iterable[S]:
        """The states that `call` may lead to from `state`; none if it cannot have been answered as it was."""


@dataclass(frozen=True)
class Verdict:
    """Of one history.

    Attributes:
        order: where it is linearizable, an order of its calls; otherwise the longest one that was found.
        stuck: where it is not, the calls that could have come next, none of which the state allows.
    """

    linearizable: bool
    order: tuple[Call, ...]
    stuck: tuple[Call, ...] = ()

    def __str__(self) -> str:
        if self.linearizable:
            return "linearizable: " + "; ".join(map(str, self.order))
        placed, stuck = "; ".join(map(str, self.order)) or "nothing", "; ".join(map(str, self.stuck))
        return f"not linearizable: after {placed} none of these can follow: {stuck}"


class _Search(Generic[S]):
    def __init__(self, calls: Sequence[Call], model: Model[S]) -> None:
        self.calls = calls
        self.model = model
        self.required = sum(1 << number for number, call in enumerate(calls) if call.ended is not None)
        # For each call, those that had ended when it began: they come first.
        self.before = [
            sum(1 << other for other, earlier in enumerate(calls) if _precedes(earlier, call)) for call in calls
        ]
        self.tried: set[tuple[int, S]] = set()
        self.order: list[int] = []
        self.longest: list[int] = []
        self.stuck: list[int] = []

    def run(self, placed: int, state: S) -> bool:
        if placed & self.required == self.required:
            return True
        if (placed, state) in self.tried:
            return False
        self.tried.add((placed, state))
        candidates = [
            number
            for number in range(len(self.calls))
            if not placed >> number & 1 and self.before[number] & placed == self.before[number]
        ]
        if len(self.order) >= len(self.longest):
            self.longest, self.stuck = list(self.order), candidates
        for number in candidates:
            for after in self.model.after(state, self.calls[number]):
                self.order.append(number)
                if self.run(placed | 1 << number, after):
                    return True
                self.order.pop()
        return False


def _precedes(earlier: Call, later: Call) -> bool:
    return earlier.ended is not None and earlier.ended < later.began


def check(calls: Sequence[Call], model: Model[S]) -> Verdict:
    """Search for an order of `calls` in which `model` answers every call as it was answered."""
    calls = sorted(calls, key=lambda call: call.began)
    search = _Search(calls, model)
    if search.run(0, model.initial):
        return Verdict(True, tuple(calls[number] for number in search.order))
    return Verdict(
        False, tuple(calls[number] for number in search.longest), tuple(calls[number] for number in search.stuck)
    )
