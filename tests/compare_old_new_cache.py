"""Runs LightZero's released cache and ours on the same searches and prints a table of what was compared.

    python -m tests.compare_old_new_cache [--searches N] [--simulations N] [--replay SHARE] [--only NAME ...]

Needs LightZero (make lightzero). Exits with 1 on any difference that is not one of the released code's own defects in
a case that is there to meet it, and where a context of this cache is not what its tokens compute.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from concurrent_kv.compat.lightzero import Attachment, ValidationReport, attach, detach
from reporting.progress import track
from reporting.tables import Grid, console_of, origin
from tests.lightzero_support import SHAPES, Shape, Walk, make_world_model


@dataclass(frozen=True)
class Case:
    """Searches of one model. `meets` are the released code's defects that it is there to meet."""

    shape: Shape
    zero_heads: bool = False
    disturb: Callable[[Walk, int], None] = lambda walk, search: None
    meets: tuple[str, ...] = ()


def lose_a_root(walk: Walk, search: int) -> None:
    walk.lose_root(search % walk.rows)


def finish_one(walk: Walk, search: int) -> None:
    if search % 2 and walk.rows > 1:
        walk.finish(search % walk.rows)


def move_up(walk: Walk, search: int) -> None:
    """The first environment has finished, and what the others saw and did last moves up with them."""
    if search % 2 and walk.rows > 1:
        walk.finish(0)
        walk.observation, walk.action = walk.observation[1:], walk.action[1:]


class RepeatAnObservation:
    """What the first search began from comes again after two others."""

    def __call__(self, walk: Walk, search: int) -> None:
        if search == 0:
            self.first = walk.observation
        elif search == 3:
            walk.observation = self.first


SMALL = replace(SHAPES["cartpole"], env_num=4)
ABSOLUTE = replace(SHAPES["lunarlander"], env_num=4)
CASES = {
    **{name: Case(shape) for name, shape in SHAPES.items()},
    "roots not found, rotary": Case(SMALL, disturb=lose_a_root),
    "roots not found, absolute": Case(ABSOLUTE, disturb=lose_a_root),
    "environments finish, rotary": Case(SMALL, disturb=finish_one),
    "environments finish, absolute": Case(ABSOLUTE, disturb=finish_one),
    "rows move up": Case(SMALL, disturb=move_up, meets=("roots by row",)),
    "heads of zeros": Case(SMALL, zero_heads=True, meets=("environments collide",)),
    "an observation again": Case(SMALL, disturb=RepeatAnObservation(), meets=("stale root",)),
}


def compare(case: Case, searches: int, simulations: int, replay: float) -> ValidationReport:
    """Run a case on both caches; the released one answers."""
    model = make_world_model(case.shape, zero_heads=case.zero_heads)
    attachment = attach(model, "validate", answer="off", replay=replay)
    assert isinstance(attachment, Attachment)
    assert attachment.report is not None
    walk = Walk(case.shape, case.shape.env_num)
    for search in range(searches):
        walk.root([model])
        for _ in range(min(simulations, case.shape.num_simulations)):
            walk.simulate([model])
        walk.act()
        case.disturb(walk, search)
    attachment.manager.check_integrity()
    detach(model)
    return attachment.report


def is_equal(case: Case, report: ValidationReport) -> bool:
    """Whether nothing differed but what the case is there to meet, and that was met."""
    return report.unexplained == 0 and set(report.defects) == set(case.meets)


def table_of(reports: dict[str, ValidationReport]) -> Grid:
    columns = ("calls", "contexts", "entries", "outputs", "different", "replayed", "the released code's own defects")
    table = Grid("LightZero's released cache and concurrent_kv on the same searches", ("case", *columns))
    for name, report in reports.items():
        met = ", ".join(f"{defect}: {count}" for defect, count in sorted(report.defects.items()))
        numbers = (report.calls, report.contexts, report.entries, report.outputs, report.unexplained, report.replayed)
        table.rows.append((name, *(f"{number:,}" for number in numbers), met or "none met"))
    return table


def main(arguments: Sequence[str] | None = None, console: Any = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=5)
    parser.add_argument("--simulations", type=int, default=12)
    parser.add_argument("--replay", type=float, default=0.1, help="share of contexts computed anew (default: 0.1)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME")
    options = parser.parse_args(arguments)
    reports = {
        name: compare(CASES[name], options.searches, options.simulations, options.replay)
        for name in track(options.only, "cases")
    }
    console = console or console_of()
    console.print(table_of(reports), origin())
    wrong = [name for name, report in reports.items() if not is_equal(CASES[name], report)]
    for name in wrong:
        report = reports[name]
        console.print(f"{name}: {report.first_unexplained or report.first or 'the defects to be met were not met'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    logging.getLogger("concurrent_kv").setLevel(logging.CRITICAL)  # the table says it all
    sys.exit(main())
