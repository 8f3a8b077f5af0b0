"""Takes guards out of a copy of the library, one at a time, and runs the tests that cover each, until one fails.

Exits with 1 if a guard is missed by no test and is not among the accepted ones.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from queue import SimpleQueue
from textwrap import fill
from time import monotonic

from reporting.machine import about, in_words
from reporting.progress import to_go
from reporting.tables import WIDTH
from tests.mutants.checkout import Checkout, copied
from tests.mutants.choice import chosen
from tests.mutants.covering import covering
from tests.mutants.places import FOLDERS, Place, all_places
from tests.mutants.results import Entry, accepted, record, recorded
from tests.mutants.trial import KILLED, NOTICED, SURVIVED, Verdict, stop_all, tried

ROOT = Path(__file__).resolve().parents[2]
CHOSEN_FROM = ("aio", "books", "evaluation", "flights", "pool", "search")
WHOLE_SECONDS = 600.0  # for the tests of a choice among the recorded, where nothing is taken out
Tests = Callable[[Place], tuple[Sequence[str], dict[str, float]]]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=150, help="how many places, spread over folders and kinds (150)")
    parser.add_argument("--seed", default="1", help="another seed chooses other places (1)")
    parser.add_argument("--places", metavar="PATTERN", help="all whose name has this regular expression in it")
    parser.add_argument("--kind", action="append", help="only guards of this kind; may be given more than once")
    parser.add_argument("--folder", action="append", choices=FOLDERS, help=f"{', '.join(CHOSEN_FROM)}")
    parser.add_argument(
        "--tests", metavar="PATTERN", default="", help="measure only files of tests that have this in them"
    )
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time, each in a copy of its own (1)")
    parser.add_argument("--seconds", type=float, default=240.0, help="for the tests of one mutant (240)")
    parser.add_argument("--list", action="store_true", help="name the places and run nothing")
    parser.add_argument(
        "--new", action="store_true", help="only places that are not recorded as noticed: new ones first, accepted last"
    )
    parser.add_argument("--record", action="store_true", help="write what was found to tests/mutants/result.json")
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="choose among those recorded as killed, and run only the test that killed each: measures nothing",
    )
    options = parser.parse_args(given)
    for name in ("sample", "workers", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be positive, not {getattr(options, name):g}")
    return options


def places_for(options: argparse.Namespace, places: Sequence[Place], known: dict[str, Entry]) -> list[Place]:
    """Those that the options ask for."""
    folders = tuple(options.folder or CHOSEN_FROM)
    wanted = [place for place in places if place.file.split("/")[0] in folders]
    if options.kind:
        wanted = [place for place in wanted if place.kind in options.kind]
    if options.recorded:
        killed = {name for name, entry in known.items() if entry.outcome == KILLED and "::" in entry.by}
        wanted = [place for place in wanted if place.name in killed]
    if options.places:
        return [place for place in wanted if re.search(options.places, place.name)]
    choice = chosen(wanted, options.sample, options.seed)
    if options.new:
        choice = [place for place in choice if place.name not in known or known[place.name].outcome not in NOTICED]
        may_live = accepted()
        choice.sort(key=lambda place: (place.name in known, place.name in may_live))
    return choice


def verdicts(
    places: Sequence[Place], checkouts: Sequence[Checkout], tests: Tests, seconds: float
) -> Iterator[tuple[Place, Verdict]]:
    """What becomes of each place, in the order in which they end."""
    free: SimpleQueue[Checkout] = SimpleQueue()
    for checkout in checkouts:
        free.put(checkout)

    def one(place: Place) -> tuple[Place, Verdict]:
        checkout = free.get()
        try:
            with checkout.without(place):
                return place, tried(checkout.folder, *tests(place), seconds)
        finally:
            free.put(checkout)

    with ThreadPoolExecutor(len(checkouts)) as pool:
        running = [pool.submit(one, place) for place in places]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()


def commit_of(root: Path) -> str:
    """The short name of the commit that is checked out, with a plus where the tree has changed since."""
    git = ["git", "-C", str(root)]
    named = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "concurrent_kv"], capture_output=True, text=True)
    return named.stdout.strip() + ("+" if changed.stdout.strip() else "")


def say(what: str, end: str = "\n") -> None:
    print(what, end=end, flush=True)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    known, may_live, start = recorded(), accepted(), monotonic()
    places = places_for(options, all_places(ROOT), known)
    if options.list:
        for place in places:
            say(f"{place.kind:18} {place.name}")
        say(f"{len(places)} places")
        return 0
    commit = commit_of(ROOT)
    found: dict[str, Verdict] = {}
    with ExitStack() as stack:
        checkouts = [stack.enter_context(copied(ROOT)) for _ in range(min(options.workers, max(len(places), 1)))]
        tests = tests_for(options, checkouts[0], [known[place.name] for place in places] if options.recorded else [])
        begun = monotonic()
        for number, (place, verdict) in enumerate(verdicts(places, checkouts, tests, options.seconds), 1):
            found[place.name] = verdict
            left = to_go(number / len(places), monotonic() - begun)
            say(f"[{number}/{len(places)}, {left}] {told(place, verdict, may_live)}")
            if options.record:
                date = datetime.now(timezone.utc).date().isoformat()
                known[place.name] = Entry(
                    place.name, place.kind, verdict.outcome, verdict.by, verdict.tests, verdict.seconds, commit, date
                )
                record(known)
    lives = [name for name, verdict in found.items() if verdict.lives]
    missed = [name for name in lives if name not in may_live]
    minutes, noticed = (monotonic() - start) / 60, len(found) - len(lives)
    say(f"{len(found)} guards taken out in {minutes:.1f} minutes: {noticed} noticed, ", end="")
    say(f"{len(lives) - len(missed)} accepted, {len(missed)} missed")
    for name in missed:
        say(f"missed ({found[name].outcome} after {found[name].tests} tests): {name}")
    say(fill(in_words(about()), WIDTH))
    return 1 if missed else 0


def tests_for(options: argparse.Namespace, checkout: Checkout, entries: Sequence[Entry]) -> Tests:
    """What gives the tests to run for a place, and the seconds that they usually take."""
    if not options.recorded:
        measured = covering(ROOT, say, options.tests)
        return lambda place: (measured.tests_of(place), measured.seconds)
    by = {entry.place: entry.by for entry in entries}
    whole = tried(checkout.folder, [*dict.fromkeys(by.values())], {}, WHOLE_SECONDS)
    if whole.outcome != SURVIVED:
        raise SystemExit(f"with all guards in place: {whole.outcome} by {whole.by or 'no test'}: {whole.why}")
    return lambda place: ([by[place.name]], {})


def told(place: Place, verdict: Verdict, may_live: dict[str, str]) -> str:
    what = f"{verdict.outcome} in {verdict.seconds:.0f} s ({verdict.tests} tests): {place.name}"
    if verdict.lives:
        return f"{what}\n    {may_live.get(place.name, 'not accepted')}"
    return f"{what}\n    by {verdict.by}: {verdict.why}"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no test is left running
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
