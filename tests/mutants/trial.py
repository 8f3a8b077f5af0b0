"""Running tests in a process of their own, and what they say about the tree that they run in."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

SAYS = "MUTANTS_SAYS"  # a file descriptor that the plugin writes lines of JSON to
ORDER = "MUTANTS_ORDER"  # a file of test names: these are run, in this order
KILLED, HUNG, SURVIVED, CUT_SHORT, UNREACHED = "killed", "hung", "survived", "cut short", "unreached"
NOTICED = (KILLED, HUNG)
TO_BEGIN = 90.0  # seconds until the first test begins: the imports and the collection


@dataclass(frozen=True)
class Verdict:
    """What became of one guard that was taken out.

    Args:
        outcome: `killed` by a test that failed, `hung` where a test did not come to its end, `survived` all tests that
            cover the place, `cut short` where the time was up before them, or `unreached` where no test covers it.
        by: the test that failed or hung.
        tests: how many tests ran.
        seconds: how long they took.
        why: the message of the failure.
    """

    outcome: str
    by: str = ""
    tests: int = 0
    seconds: float = 0.0
    why: str = ""

    @property
    def lives(self) -> bool:
        """No test noticed."""
        return self.outcome not in NOTICED


class Run:
    """Tests of pytest in a group of processes of its own, which is killed at the end, whatever they do."""

    def __init__(self, folder: Path, arguments: Sequence[str], order: Sequence[str] = ()) -> None:
        self.folder, self.arguments, self.order = folder, arguments, order

    def events(self, patience: float, until: float | None = None) -> Iterator[dict[str, object]]:
        """What the plugin says, line by line.

        The reader sends no word back, but may set `patience` anew before each event. After that many seconds without
        a word there is `{"silent": True}`, after the time `until` there is `{"late": True}`, and that is the last.
        """
        self.patience = patience
        reader, writer = os.pipe()
        with tempfile.TemporaryDirectory(prefix="mutants-run-") as folder:
            environment = dict(os.environ, PYTHONPATH=str(self.folder), PYTHONDONTWRITEBYTECODE="1")
            environment[SAYS] = str(writer)
            if self.order:
                Path(folder, "order").write_text("\n".join(self.order), "utf-8")
                environment[ORDER] = str(Path(folder, "order"))
            plugin = ["-q", "-p", "tests.mutants.in_pytest", "-p", "no:cacheprovider"]
            process = subprocess.Popen(
                [sys.executable, *self.arguments, *plugin, *dict.fromkeys(name.split("::")[0] for name in self.order)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writer,),
                start_new_session=True,
            )
            os.close(writer)
            _running.add(process)
            try:
                yield from self._read(reader, until)
            finally:
                os.close(reader)
                kill_group(process)
                _running.discard(process)

    def _read(self, reader: int, until: float | None) -> Iterator[dict[str, object]]:
        rest = b""
        while True:
            left = self.patience if until is None else min(self.patience, max(until - monotonic(), 0.0))
            if not select.select([reader], [], [], left)[0]:
                yield {"late": True} if left < self.patience else {"silent": True}
                return
            got = os.read(reader, 65536)
            if not got:
                return
            *lines, rest = (rest + got).split(b"\n")
            for line in lines:
                yield json.loads(line)


_running: set[subprocess.Popen[bytes]] = set()


def stop_all() -> None:
    """Ends what runs in other threads, which hear of it."""
    for process in tuple(_running):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started in its group."""
    with suppress(ProcessLookupError):  # all may have ended by themselves
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tried(
    folder: Path, order: Sequence[str], usual: dict[str, float], seconds: float, patience: float = 20.0
) -> Verdict:
    """Runs these tests of the tree in `folder` until one fails or hangs.

    Args:
        order: names of tests.
        usual: seconds that each takes where nothing is taken out; one that takes far more hangs.
        seconds: for all of them.
        patience: seconds that every test has beyond five times the usual.
    """
    if not order:
        return Verdict(UNREACHED)
    start = monotonic()
    run = Run(folder, ["-m", "pytest"], order)
    running, ended, finished = "the imports", 0, False

    def verdict(outcome: str, by: object = "", why: object = "") -> Verdict:
        return Verdict(outcome, str(by), ended, round(monotonic() - start, 1), str(why))

    for event in run.events(TO_BEGIN, start + seconds):
        if "began" in event:
            running = str(event["began"])
            run.patience = patience + 5.0 * usual.get(running, 1.0)
        elif "ended" in event:
            ended += 1
        elif "failed" in event:
            return verdict(KILLED, event["failed"], event["why"])
        elif "silent" in event:
            return verdict(HUNG, running)
        elif "late" in event:
            return verdict(CUT_SHORT)
        elif "finished" in event:
            finished = True
            break
    if not finished:
        return verdict(KILLED, running, "the process ended")
    if ended == 0:
        raise RuntimeError(f"order names no test of {folder}: {order[0]}, ...")
    return verdict(SURVIVED)
