"""Attack the cache from threads and tasks at once, check every read, and say what did not hold."""

from __future__ import annotations

import argparse
import faulthandler
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import inf, nan
from typing import TypeVar

import torch

from concurrent_kv.books.eviction.registry import POLICIES
from reporting.arguments import file_to_write, port
from reporting.tables import console_of, origin
from stress.faults.plan import FAULTS, parse_faults
from stress.operations import MOST_ROWS
from stress.profiles import OPERATIONS, PROFILES, parse_mix
from stress.results import as_json, summary_of
from stress.runner import ProfileResult, Watch, run_profile
from stress.summary import failure_texts, live_watch, outcome, summary
from stress.workloads import POSITIONS, WORKLOADS
from stress.world import Settings

__all__ = ["main"]

FAILED, INTERRUPTED = 1, 130  # 130 as a shell reports SIGINT
MOST_ACTORS, MOST_SHARDS = 1000, 1024
BOUNDS_TO_END = 15  # how many bounds a run may take beyond its seconds; every wait of its own end is over before
DEFAULT = "default: %(default)s"
T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, show, write what was asked for. 0 if everything held."""
    parser = _parser()
    options = parser.parse_args(arguments)
    profiles = _settings(parser, options)
    if options.report is not None:
        try:
            import stress.report  # noqa: F401  (matplotlib and jinja2, which nothing else needs)
        except ImportError as error:
            parser.error(f"argument --report: {error}; it comes with the extra `stress`")
    console = console_of()
    # Of calls that were interrupted between being made and being awaited.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    torch.set_num_threads(1)  # the parallelism is that of the actors
    watch = live_watch(console, profiles) if options.progress else None
    with ExitStack() as stack:
        if options.metrics is not None:
            from stress.serving import serving  # what serves is not needed otherwise

            try:
                url, watch = stack.enter_context(serving(options.metrics, watch))
            except OSError as error:
                parser.error(f"argument --metrics: {error}")
            console.print(f"metrics: {url}", highlight=False)
        return _attack(profiles, options, arguments, watch)


def _attack(
    profiles: Sequence[Settings],
    options: argparse.Namespace,
    arguments: Sequence[str] | None,
    watch: Watch | None,
) -> int:
    console, errors = console_of(), console_of(stderr=True)
    results: list[ProfileResult] = []
    interrupted = False
    try:
        for settings in profiles:
            with _ends_for_sure(2 * settings.seconds + BOUNDS_TO_END * settings.bound_seconds):
                result = run_profile(settings, watch)
            results.append(result)
            console.print(outcome(result))
            if result.interrupted:
                interrupted = True
                break
    except KeyboardInterrupt:
        interrupted = True
    if results:
        shown = " ".join(["python -m stress", *map(shlex.quote, sys.argv[1:] if arguments is None else arguments)])
        document = as_json(results, shown)
        console.print(*summary(results), origin(document["about"]))
        if options.json is not None:
            options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        if options.summary is not None:
            options.summary.write_text(json.dumps(summary_of(document), indent=1) + "\n", "utf-8")
        if options.report is not None:
            from stress.report import write_report

            write_report(document, options.report)
    for text in failure_texts(results):
        errors.print(f"FAILED: {text}", style="red", markup=False, highlight=False)
    if interrupted:
        errors.print("interrupted")
        return INTERRUPTED
    return FAILED if any(result.failures for result in results) else 0


@contextmanager
def _ends_for_sure(seconds: float) -> Iterator[None]:
    """After so many seconds every thread's stack goes to stderr and the process exits with 1, whoever waits for what.

    The main thread may be an actor, and what it waits for need not hear that the run is over.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # stderr itself, whatever stands in for it
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _settings(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Settings]:
    """One for each profile."""
    names = list(PROFILES) if options.profile == "all" else options.profile.split(",")
    found = []
    for name in names:
        if name not in PROFILES:
            parser.error(f"argument --profile: {name!r} is none of {', '.join(PROFILES)}, all")
        profile = PROFILES[name].changed(
            threads=options.threads,
            tasks=options.tasks,
            mix=options.mix,
            capacity=options.capacity,
            keys=options.keys,
        )
        if not profile.threads and not profile.tasks:
            parser.error("argument --threads: with no tasks there must be threads")
        settings = Settings(profile, WORKLOADS[options.workload])
        changes = {
            field: getattr(options, field)
            for field in ("seconds", "backend", "policy", "shards", "seed", "positions", "faults", "bound_seconds")
        }
        found.append(replace(settings, **changes))
    return found


def _parser() -> argparse.ArgumentParser:
    default = Settings(PROFILES["mixed"], WORKLOADS["cartpole"])
    parser = argparse.ArgumentParser(
        prog="python -m stress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = "\n\n".join(
        f"{title}\n" + "\n".join(f"  {name:10} {about}" for name, about in names.items())
        for title, names in (
            ("profiles:", {name: profile.about for name, profile in PROFILES.items()}),
            ("operations of a mix:", OPERATIONS),
            ("faults:", FAULTS),
        )
    )
    add = parser.add_argument
    add("--profile", default="mixed", metavar="NAMES", help=f"one or more, or all ({DEFAULT})")
    add("--seconds", type=_checked(_seconds), default=default.seconds, help=f"of each profile ({DEFAULT})")
    add("--threads", type=_checked(_whole(0, MOST_ACTORS)), metavar="N", help="the profile's own if left out")
    add("--tasks", type=_checked(_whole(0, MOST_ACTORS)), metavar="N", help="the profile's own if left out")
    add("--backend", choices=("asyncio", "trio"), default=default.backend, help=f"event loop of the tasks ({DEFAULT})")
    add("--workload", choices=list(WORKLOADS), default="cartpole", help=f"shapes of the entries ({DEFAULT})")
    add("--positions", choices=POSITIONS, help="how rows are shortened at the window's end; the workload's if left out")
    add("--mix", type=_checked(parse_mix), metavar="NAME=WEIGHT,...", help="operations; the profile's if left out")
    add(
        "--capacity",
        type=_checked(_whole(MOST_ROWS)),
        metavar="N",
        help=f"entries of the shared pool, {MOST_ROWS} or more; the profile's if left out (--faults tiny: 1 entry)",
    )
    add("--keys", type=_checked(_whole(1, 1000)), metavar="N", help="keys of each scope; the profile's if left out")
    add("--policy", choices=sorted(POLICIES), default=default.policy, help=f"eviction ({DEFAULT})")
    add("--shards", type=_checked(_whole(1, MOST_SHARDS)), default=default.shards, help=f"of the locks ({DEFAULT})")
    add("--seed", type=_checked(_whole(0)), default=default.seed, help=f"of what the actors choose ({DEFAULT})")
    add("--faults", type=_checked(parse_faults), default=frozenset(), metavar="NAMES", help="some, all or none")
    add(
        "--bound",
        dest="bound_seconds",
        type=_checked(_seconds),
        default=default.bound_seconds,
        metavar="SECONDS",
        help=f"what an operation may take before it counts as stuck ({DEFAULT})",
    )
    add("--json", type=file_to_write, metavar="FILE", help="write every figure there")
    add("--summary", type=file_to_write, metavar="FILE", help="write the figures without their course over time there")
    add("--report", type=file_to_write, metavar="FILE", help="write a page with plots there")
    add(
        "--metrics",
        type=port,
        metavar="PORT",
        help="serve the cache's numbers to Prometheus there, from this machine; 0: any port that is free",
    )
    add("--progress", action=argparse.BooleanOptionalAction, default=True, help="show what is going on")
    return parser


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """With the message of a `ValueError` shown as it is."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _whole(least: int, most: float = inf) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() else None
        if number is None or not least <= number <= most:
            bounds = f"from {least} to {most:g}" if most < inf else f"of at least {least}"
            raise ValueError(f"must be a whole number {bounds}, not {text!r}")
        return number

    return parse


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = nan
    if not 0 < number < inf:
        raise ValueError(f"must be a number of seconds above 0, not {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
