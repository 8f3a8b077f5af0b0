"""The library beside what its users would write or take instead, in turns, in one run.

make bench ARGS="--quick"           two minutes, to see that everything runs
make bench ARGS="--record NAME"     the full form; its summary is kept, and RESULTS.md made anew
make bench ARGS="--only 'step/*' --contestants dict rows floor"
make bench ARGS="--beside before=../other-checkout"   this library from another checkout, in the same turns
make bench ARGS="--markdown"        RESULTS.md, and the figures of docs/why.md, from what is recorded, without a run
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.peers.cases import CASES
from benchmarks.peers.contestants import CONTESTANTS, OURS
from benchmarks.peers.crew import Crew
from benchmarks.peers.machine import About
from benchmarks.peers.markdown import RESULTS, markdown_of
from benchmarks.peers.page import PAGE, PICTURE, RUN, page_with, picture_of
from benchmarks.peers.plots import plot
from benchmarks.peers.rounds import Result, run_case
from benchmarks.peers.summary import RECORDS, Summary, read_records, summary_of, with_samples
from benchmarks.peers.tables import by_contestant, calls, case_grid, facts, headline, steps_by_ours
from reporting.arguments import file_to_write
from reporting.progress import Work
from reporting.tables import console_of, origin

WIDE = 6  # measures, from which on they are rows of a table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, write. 1 if a contestant failed or returned other bytes than ours."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.markdown:
        _write_markdown()
        return 0
    console = console_of(stderr=True)
    about = About()
    results = _measure(options, console)
    command = "make bench ARGS=" + shlex.quote(" ".join(sys.argv[1:] if arguments is None else arguments))
    summary = summary_of(results, about.as_dict(command))
    _show(summary)
    if options.json is not None:
        options.json.write_text(json.dumps(with_samples(summary, results)) + "\n", "utf-8")
    if options.plot is not None:
        plot(summary, options.plot)
    if options.record is not None:
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / f"{options.record}.json").write_text(_compact(summary), "utf-8")
        plot(summary, RECORDS / f"{options.record}.svg")
        _write_markdown()
    failures = [f"{result.name}: {who}: {reason}" for result in results for who, reason in result.failed.items()]
    for failure in failures:
        last = "\n".join(failure.splitlines()[:1] + failure.splitlines()[-6:])
        console.print(f"FAILED: {last}", style="bold red", markup=False, highlight=False)
    return 1 if failures else 0


def _measure(options: argparse.Namespace, console: Console) -> list[Result]:
    patterns = options.only or [name for name, case in CASES.items() if case.in_quick or not options.quick]
    names = [name for name in CASES if any(fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise SystemExit(f"--only must name some of {', '.join(CASES)}; got {' '.join(patterns)}")
    contestants = [OURS, *(name for name in options.contestants if name != OURS), *dict(options.beside)]
    results = []
    beside = dict(options.beside)
    with (
        Crew(beside) as crew,
        Crew(beside, retaining=False) as fresh_crew,
        Work("cases", len(names), console=console) as work,
    ):
        for name in names:

            def report(text: str, name: str = name) -> None:
                work.begin(f"{name}: {text}")

            result = run_case(
                name,
                CASES[name],
                fresh_crew if CASES[name].fresh else crew,
                contestants,
                quick=options.quick,
                rounds=options.rounds,
                report=report,
            )
            console.print(f"{name}: {result.rounds} rounds, {result.seconds:.0f} s")
            work.part(name)
            results.append(result)
    return results


def _show(summary: Summary) -> None:
    """Everything, as tables on the terminal."""
    console = console_of()
    for case in summary["cases"]:
        if case["measures"]:
            grid = by_contestant(case) if len(case["measures"]) > WIDE else case_grid(case)
            console.print(grid)
        if case["facts"] and not case["name"].startswith("calls/"):
            console.print(facts(case))
        for who, reason in case["unfit"].items():
            console.print(f"{case['name']}: {who} is not there: {reason}", style="dim", markup=False, highlight=False)
    for grid in (calls({"": summary}), steps_by_ours(summary), headline({"": summary})):
        if grid.rows:
            console.print(grid)
    console.print(origin(summary["about"]))


def _compact(summary: Summary) -> str:
    """A summary with one line for each figure: small, and what changes can be read."""

    def on_one_line(found: re.Match[str]) -> str:
        return re.sub(r"\s+", " ", found.group())

    text = json.dumps(summary, indent=1)
    text = re.sub(r"\[[-\d.,\s]+\]", on_one_line, text)
    return re.sub(r'\{\s+"processor": \[[^{}]+\}', on_one_line, text) + "\n"


def _write_markdown() -> None:
    records = read_records()
    RESULTS.write_text(markdown_of(records), "utf-8")
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), records[RUN]), "utf-8")
    PICTURE.write_text(picture_of(records[RUN]), "utf-8")


def _place(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", name) or name in CONTESTANTS:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER with a name that no contestant has, got {text!r}")
    if not (Path(folder) / "concurrent_kv").is_dir():
        raise argparse.ArgumentTypeError(f"must name a folder with concurrent_kv in it, got {folder!r}")
    return name, Path(folder)


def _record_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"must be a plain name, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few small rounds of everything")
    parser.add_argument("--only", nargs="+", metavar="CASE", help=f"of {', '.join(CASES)}; may have *")
    parser.add_argument(
        "--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME",
        help=f"beside {OURS}: of {', '.join(name for name in CONTESTANTS if name != OURS)}",
    )  # fmt: skip
    parser.add_argument("--beside", nargs="+", type=_place, default=[], metavar="NAME=FOLDER", help="see above")
    parser.add_argument("--rounds", type=int, help="of every case, instead of its own number")
    parser.add_argument(
        "--record", type=_record_name, metavar="NAME", help="keep the summary and a plot under this name"
    )
    parser.add_argument(
        "--json", type=file_to_write, metavar="FILE", help="write the summary and every round's times there"
    )
    parser.add_argument("--plot", type=file_to_write, metavar="FILE", help="draw the steps into this file (SVG or PNG)")
    parser.add_argument(
        "--markdown", action="store_true", help="make RESULTS.md from what is recorded; measure nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
