"""The contestants' processes, from outside: started, asked in turns, ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.contestants import CONTESTANTS, OURS, start_of
from benchmarks.peers.contestants.ours import Ours

__all__ = ["Crew", "FailedError", "Member", "UnfitHereError"]

ROOT = Path(__file__).resolve().parents[2]  # of the repository
ANSWER_SECONDS = 600.0
# What a search frees stays with its process, up to blocks of 32 MiB. glibc would give it back to the system at the end
# of a search, or not, by what happens to lie above it; taking it again costs a fault a page, which can be ten steps.
RETAINING = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


class UnfitHereError(Exception):
    """The contestant cannot take part, and says why."""


class FailedError(Exception):
    """The contestant's process failed, or did not answer in time; with what it said."""


class Member:
    """One contestant's process.

    Args:
        name: in tables.
        contestant: which it is; the name if left out.
        library: a checkout to take `concurrent_kv` from, this one's if left out.
        retaining: whether its allocator keeps what is freed.
    """

    def __init__(
        self, name: str, contestant: str | None = None, library: Path | None = None, *, retaining: bool = True
    ) -> None:
        self.name = name
        contestant = contestant or name
        start = start_of(contestant)
        command = [str(start.python or sys.executable), "-m", "benchmarks.peers.worker", contestant]
        if library is not None:
            command += ["--library", str(library.resolve())]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**(RETAINING if retaining else {}), **os.environ, "PYTHONPATH": str(ROOT), **start.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def ask(self, do: str, **arguments: Any) -> None:
        """Send a request; `answer` waits for what comes back."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: `answer` says so
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self, seconds: float = ANSWER_SECONDS) -> Any:
        """The answer to the last request.

        Raises:
            UnfitHereError, FailedError.
        """
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise FailedError(f"{self.name} had not answered within {seconds:g} s") from None
        if not line:
            self._errors.seek(0)
            raise FailedError(f"{self.name}'s process ended: {self._errors.read()[-2000:].strip()}")
        found = json.loads(line)
        if "unfit" in found:
            raise UnfitHereError(found["unfit"])
        if "failed" in found:
            raise FailedError(f"{self.name}: {found['failed'].strip()}")
        return found["answer"]

    def call(self, do: str, **arguments: Any) -> Any:
        """Ask and wait."""
        self.ask(do, **arguments)
        return self.answer()

    def end(self) -> None:
        """End the process: by the end of its input, or else by force."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


class Crew:
    """Members by name, started when they are first asked for; leaving its `with` ends them.

    Args:
        beside: this library from other checkouts, by name.
        retaining: see `Member`.
    """

    def __init__(self, beside: dict[str, Path] | None = None, *, retaining: bool = True) -> None:
        self._beside, self._retaining = beside or {}, retaining
        self._members: dict[str, Member] = {}

    def is_ours(self, name: str) -> bool:
        """Whether it is this library, in whatever form."""
        return name in self._beside or isinstance(CONTESTANTS[name], Ours)

    def members(self, names: Sequence[str]) -> list[Member]:
        """Those of these names, in this order."""
        for name in names:
            if name not in self._members:
                library = self._beside.get(name)
                self._members[name] = Member(name, OURS if library else None, library, retaining=self._retaining)
        return [self._members[name] for name in names]

    def drop(self, member: Member) -> None:
        """End one that failed; it is started anew when it is asked for again."""
        if self._members.get(member.name) is member:
            del self._members[member.name]
        member.end()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in list(self._members.values()):
            self.drop(member)
