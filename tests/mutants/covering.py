"""Which tests reach a place, measured in a marked copy, and kept for as long as the sources stay as they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from reporting.progress import Work
from tests.mutants.checkout import COPIED, Checkout, copied
from tests.mutants.marking import marked
from tests.mutants.places import PACKAGE, Place, all_places
from tests.mutants.trial import Run

KEPT = Path(".mutants", "covering.json")  # git ignores it

# These read the source, or count what it calls: they would see the edit itself, and not what comes of it.
READ_THE_SOURCE = re.compile(
    r"tests/(test_calls_made|test_layers|test_loops_under_locks|test_mutant\w*|test_stream_faults)\.py"
    r"|.*::(test_every_critical_section_enters_the_gate_first|test_all_modules_that_choose_compiled_loops_\w+)"
)
# These run the library in processes of their own, where nothing is measured: they may reach any place.
ELSEWHERE = re.compile(
    r"tests/(test_forked_child|test_imports)\.py|tests/test_aio_loops\.py::test_the_interpreter_shuts_down_\w+"
    r"|tests/test_native\.py::test_a_search_works_where_\w+|tests/test_pool_life\.py::test_a_(forked_child|pool_made)_\w+"
)
SECONDS_OF_ANY_TEST = 0.002  # that pytest takes beside the test
PATIENCE = 600.0  # seconds without a word, while the tests are measured, after which they hang


class Covering:
    """The tests that reach each place, with the seconds that each takes."""

    def __init__(self, digests: dict[str, str]) -> None:
        self.digests = digests
        self.seconds: dict[str, float] = {}
        self.reach: dict[str, list[str]] = {}  # by the test: the names of places
        self.broken: list[str] = []  # tests that fail where nothing is taken out

    def tests_of(self, place: Place) -> list[str]:
        """Those that cover it, in the order to run them in."""
        return self.ordered(
            test for test, names in self.reach.items() if place.name in names or (not names and ELSEWHERE.match(test))
        )

    def ordered(self, tests: Iterable[str]) -> list[str]:
        """The quickest first; of a function with many parameters each further one is put off a little more."""
        cost: dict[str, float] = {}
        before: Counter[str] = Counter()
        for test in sorted(tests, key=lambda test: (self.seconds[test], test)):
            if test not in self.broken and not READ_THE_SOURCE.match(test):
                function = test.partition("[")[0]
                before[function] += 1
                cost[test] = (self.seconds[test] + SECONDS_OF_ANY_TEST) * before[function]
        return sorted(cost, key=lambda test: (cost[test], test))


def covering(root: Path, say: Callable[[str], None], wanted: str = "") -> Covering:
    """What was measured of these sources before, or is measured now: of the files of tests that have changed since.

    Of those that have, only files with `wanted`, a regular expression, in their names are measured, and asked then.
    """
    digests = _digests(root)
    known = _read(root / KEPT)
    now = Covering(digests)
    same = known is not None and known.digests[""] == digests[""]
    for test in known.seconds if known is not None and same else ():
        assert known is not None
        file = test.partition("::")[0]
        if known.digests.get(file) == digests.get(file, "gone"):
            now.seconds[test] = known.seconds[test]
            now.reach[test] = known.reach.get(test, [])
            now.broken += [test] if test in known.broken else []
    old = set(known.digests.items()) if known is not None and same else set()
    if files := [
        file
        for file, digest in digests.items()
        if file and (file, digest) not in old and not READ_THE_SOURCE.match(file) and re.search(wanted, file)
    ]:
        say(f"measuring what {len(files)} files of tests reach: ten minutes for all of them")
        with copied(root) as checkout:
            _measure(checkout, files, all_places(root), now)
        with copied(root) as checkout:
            now.broken = _failing(checkout, now.broken)  # the marks alone fail some that count what is called
    now.digests = {file: digest for file, digest in digests.items() if (file, digest) in old or file in ("", *files)}
    for test in now.broken:
        say(f"fails with all guards in place, and is left out: {test}")
    _write(root / KEPT, now)
    return now


def _digests(root: Path) -> dict[str, str]:
    """One of each file of tests, and under "" one of all that they rest on."""
    found: dict[str, str] = {}
    whole = hashlib.sha256()
    for folder in sorted(COPIED):
        for path in sorted((root / folder).rglob("*.py")):
            name, text = path.relative_to(root).as_posix(), path.read_bytes()
            if path.name.startswith("test_") and folder == "tests":
                found[name] = hashlib.sha256(text).hexdigest()[:16]
            elif not name.startswith(("tests/mutants/", "benchmarks/")):
                whole.update(name.encode() + b"\0" + text)
    return {"": whole.hexdigest()[:16], **found}


def _measure(checkout: Checkout, files: list[str], places: list[Place], into: Covering) -> None:
    for file in {place.file for place in places}:
        path = checkout.folder / PACKAGE / file
        numbers = {place: number for number, place in enumerate(places) if place.file == file}
        path.write_text(marked(path.read_bytes(), numbers), "utf-8")
    running = "the imports"
    left = list(files)
    work = Work("files of tests", len(files))
    for event in Run(checkout.folder, ["-m", "pytest", *files]).events(PATIENCE):
        if "began" in event:
            running = str(event["began"])
            while left and left[0] != running.partition("::")[0] and running.partition("::")[0] in left:
                work.part(left.pop(0))
        elif "ended" in event:
            into.seconds[running] = float(str(event["seconds"]))
            reached = event["reached"]
            assert isinstance(reached, list)
            into.reach[running] = [places[number].name for number in reached]
        elif "failed" in event and event["failed"] not in into.broken:
            into.broken.append(str(event["failed"]))
        elif "silent" in event:
            raise RuntimeError(f"{running} did not end within {PATIENCE:g} seconds while the tests were measured")


def _failing(checkout: Checkout, tests: list[str]) -> list[str]:
    """Those that fail in a copy that is as it is."""
    if not tests:
        return []
    run = Run(checkout.folder, ["-m", "pytest"], list(dict.fromkeys(tests)))
    return list(dict.fromkeys(str(event["failed"]) for event in run.events(PATIENCE) if "failed" in event))


def _read(path: Path) -> Covering | None:
    if not path.is_file():
        return None
    kept = json.loads(path.read_text("utf-8"))
    read = Covering(kept["digests"])
    read.seconds, read.broken = kept["seconds"], kept["broken"]
    read.reach = {test: [kept["places"][number] for number in numbers] for test, numbers in kept["reach"].items()}
    return read


def _write(path: Path, known: Covering) -> None:
    path.parent.mkdir(exist_ok=True)
    places = sorted({name for names in known.reach.values() for name in names})
    number = {name: at for at, name in enumerate(places)}
    kept = {
        "digests": known.digests,
        "seconds": known.seconds,
        "broken": known.broken,
        "places": places,
        "reach": {test: [number[name] for name in names] for test, names in known.reach.items()},
    }
    path.write_text(json.dumps(kept), "utf-8")
