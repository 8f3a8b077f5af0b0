"""Countdown: make a target of four numbers, each used once. As text, where every step is a line:

    8 7 3 2 > 13:
    7+3=10
    10/2=5
    8+5=13

`after` judges a step, and steps together: what they leave of a solved puzzle is the target alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple
from zlib import crc32

NUMBERS = 4
STEPS = NUMBERS - 1
LARGEST_GIVEN, LARGEST = 9, 99  # of the numbers that are given; of all, the target and what lies between included
SMALLEST_TARGET = 10
HELD_OUT = 8  # one puzzle in so many is not trained on

STEP = re.compile(r"([1-9]\d?)([-+*/])([1-9]\d?)=([1-9]\d?)\n")
LONGEST_STEP = len("45+45=90\n")
LONGEST_TEXT = len("9 9 9 9 > 99:\n") + STEPS * LONGEST_STEP

Left = tuple[int, ...]
"""Numbers that are left, the largest first."""


class Puzzle(NamedTuple):
    """Numbers, the largest first, and what to make of them."""

    numbers: Left
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.target}:\n"

    @property
    def is_held_out(self) -> bool:
        """Whether no training sees it."""
        return crc32(self.prompt.encode()) % HELD_OUT == 0


def after(left: Left, step: str) -> Left | None:
    """What is left after a step's line; None if it is wrong: no step, a number that is not there, bad arithmetic."""
    match = STEP.fullmatch(step)
    if match is None:
        return None
    first, sign, second, result = int(match[1]), match[2], int(match[3]), int(match[4])
    rest = [*left]
    for number in (first, second):
        if number not in rest:
            return None
        rest.remove(number)
    return _ordered([*rest, result]) if _result(first, sign, second) == result else None


def steps_of(left: Left) -> Iterator[str]:
    """All right steps; of the two orders of a sum or a product, the one with the larger number first."""
    for at, first in enumerate(left):
        for second in left[at + 1 :]:
            for sign in "+-*/":
                result = _result(first, sign, second)
                if result is not None:
                    yield f"{first}{sign}{second}={result}\n"


def solution(puzzle: Puzzle) -> list[str] | None:
    """Steps that solve a puzzle, found by trying all; None if there are none."""
    return _solution(puzzle.numbers, puzzle.target)


def random_puzzle(draw: Random) -> tuple[Puzzle, list[str]]:
    """A puzzle and a solution of it: random numbers, random steps, and the target is what comes of them."""
    while True:
        numbers = left = _ordered([draw.randint(1, LARGEST_GIVEN) for _ in range(NUMBERS)])
        steps = []
        while len(left) > 1:
            steps.append(draw.choice([*steps_of(left)]))
            next_left = after(left, steps[-1])
            assert next_left is not None
            left = next_left
        if left[0] >= SMALLEST_TARGET:
            return Puzzle(numbers, left[0]), steps


def puzzles(number: int, seed: int) -> list[Puzzle]:
    """Different random puzzles, none of which was trained on."""
    draw, drawn = Random(seed), dict[Puzzle, None]()
    while len(drawn) < number:
        puzzle, _ = random_puzzle(draw)
        if puzzle.is_held_out:
            drawn[puzzle] = None
    return [*drawn]


def _ordered(numbers: Sequence[int]) -> Left:
    return tuple(sorted(numbers, reverse=True))


def _result(first: int, sign: str, second: int) -> int | None:
    """What a step makes; None where that is no whole number from 1 to `LARGEST`."""
    if sign == "/":
        return first // second if first % second == 0 else None
    result = first + second if sign == "+" else first - second if sign == "-" else first * second
    return result if 1 <= result <= LARGEST else None


def _solution(left: Left, target: int) -> list[str] | None:
    if len(left) == 1:
        return [] if left[0] == target else None
    for step in steps_of(left):
        next_left = after(left, step)
        assert next_left is not None
        found = _solution(next_left, target)
        if found is not None:
            return [step, *found]
    return None
