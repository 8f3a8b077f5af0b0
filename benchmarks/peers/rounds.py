"""One case: its contestants made ready, compared, and timed in turns, round after round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.peers.cases import Case
from benchmarks.peers.contestants import OURS
from benchmarks.peers.crew import Crew, FailedError, Member, UnfitHereError

__all__ = ["QUICK_ROUNDS", "Result", "run_case"]

ROUNDS_AT_LEAST, QUICK_ROUNDS = 5, 3

Samples = tuple[list[float], list[float]]  # of each round: microseconds of the processor, of the wall


@dataclass
class Result:
    """What a case gave.

    Attributes:
        samples: by measure and contestant.
        facts: by contestant and name.
        unfit: contestants that did not take part, with the reason.
        failed: those that should have.
    """

    name: str
    case: Case
    rounds: int = 0
    seconds: float = 0.0
    samples: dict[str, dict[str, Samples]] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def run_case(
    name: str,
    case: Case,
    crew: Crew,
    contestants: Sequence[str],
    *,
    quick: bool = False,
    rounds: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run a case.

    Args:
        contestants: who takes part; what the others return is compared with what `ours` does, where that is among them.
        rounds: instead of the case's own.
        report: is told what is being done.
    """
    result = Result(name, case)
    began = time.monotonic()
    taking_part = [who for who in contestants if not case.ours_only or crew.is_ours(who)]
    members = crew.members([who for who in taking_part if who not in case.without])
    result.unfit |= {who: case.without[who] for who in taking_part if who in case.without}
    report("getting ready")
    members = _ready(case, members, result, crew, quick=quick)
    _take_turns(case, members, result, crew, quick=quick, rounds=rounds, report=report)
    report("facts")
    for member in list(members):
        if member.name not in result.failed:
            found = _asked(member, "facts", result, crew)
            if isinstance(found, dict) and found:
                result.facts[member.name] = found
    for member in members:
        if member.name not in result.failed:
            _asked(member, "finish", result, crew)
    result.seconds = time.monotonic() - began
    return result


def _ready(case: Case, members: Sequence[Member], result: Result, crew: Crew, *, quick: bool) -> list[Member]:
    """Those that are ready and return what `ours` does."""
    arguments = dict(case.quick if quick else case.full)
    for member in members:
        member.ask("prepare", kind=case.kind, arguments=arguments)
    hashes = {}
    for member in members:
        try:
            hashes[member.name] = member.answer()
        except UnfitHereError as error:
            result.unfit[member.name] = str(error)
        except FailedError as error:
            _failed(member, str(error), result, crew)
    expected = hashes.get(OURS) or {}
    ready = []
    for member in members:
        if member.name not in hashes:
            continue
        found = hashes[member.name] or {}
        differing = [what for what in found if what in expected and found[what] != expected[what]]
        if differing:
            _failed(member, f"returned other bytes than {OURS}: {', '.join(differing)}", result, crew)
        else:
            ready.append(member)
    return ready


def _take_turns(
    case: Case,
    members: Sequence[Member],
    result: Result,
    crew: Crew,
    *,
    quick: bool,
    rounds: int | None,
    report: Callable[[str], None],
) -> None:
    """Every round asks each contestant once, in an order of its own; one that fails is asked no more."""
    wanted = rounds or (QUICK_ROUNDS if quick else case.rounds)
    began = time.monotonic()
    for number in range(wanted):
        if number >= ROUNDS_AT_LEAST and time.monotonic() - began > case.seconds:
            break
        report(f"round {number + 1} of {wanted}")
        order = [member for member in members if member.name not in result.failed]
        random.Random(number).shuffle(order)
        timed = False
        for member in order:
            times = _asked(member, "turn", result, crew)
            if isinstance(times, dict):
                timed = timed or bool(times)
                for measure, (processor, wall) in times.items():
                    samples = result.samples.setdefault(measure, {}).setdefault(member.name, ([], []))
                    samples[0].append(processor)
                    samples[1].append(wall)
        if not timed:  # a case of facts alone
            break
        result.rounds = number + 1
    for by_contestant in result.samples.values():
        for who in result.failed:
            by_contestant.pop(who, None)


def _asked(member: Member, do: str, result: Result, crew: Crew) -> object:
    try:
        return member.call(do)
    except UnfitHereError as error:
        result.unfit[member.name] = str(error)
    except FailedError as error:
        _failed(member, str(error), result, crew)
    return None


def _failed(member: Member, reason: str, result: Result, crew: Crew) -> None:
    result.failed[member.name] = reason
    crew.drop(member)
