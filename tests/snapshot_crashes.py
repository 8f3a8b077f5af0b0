"""Processes that are killed, or find the disk full, while they save over an older snapshot; one folder for each.

    python -m tests.snapshot_crashes FOLDER

Each child makes its own pool after the fork. Prints how each ended, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from concurrent_kv import KVPool, SnapshotWriteError
from concurrent_kv.pool import saving
from concurrent_kv.snapshots import writing
from tests.support import LAYOUT, tokens

NAME = "pool.snapshot"
ENTRIES = 40


def made(value: int) -> KVPool:
    """A pool of which every entry says `value`."""
    pool = KVPool(LAYOUT, ENTRIES)
    for number in range(ENTRIES):
        pool.put(number, tokens(value, 4))
    return pool


def killed_at(module: Any, name: str, nth: int) -> Callable[[], None]:
    """Kills this process in the stead of the `nth` call of a function, counted from 1."""

    def arrange() -> None:
        real, calls = getattr(module, name), 0

        def counted(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        setattr(module, name, counted)

    return arrange


def limited(nbytes: int) -> Callable[[], None]:
    """No file of this process gets larger."""

    def arrange() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return arrange


# Writes: the header, eight chunks of tokens, five other tensors, and the header once more.
CASES: dict[str, Callable[[], None]] = {
    **{f"write {nth}": killed_at(writing, "_write_all", nth) for nth in (1, 2, 5, 9, 12, 15)},
    "fsync of the file": killed_at(os, "fsync", 1),
    "rename": killed_at(os, "replace", 1),
    "fsync of the folder": killed_at(os, "fsync", 2),
    "limit in the header": limited(100),
    "limit in the tokens": limited(5000),
    "limit in the last tensor": limited(18_000),
}


def child(folder: Path, arrange: Callable[[], None]) -> int:
    torch.set_num_threads(1)
    made(1).save(folder / NAME)
    pool = made(2)
    arrange()
    try:
        pool.save(folder / NAME)
    except SnapshotWriteError as error:
        pool.check_integrity()
        return 10 if "could not be written" in str(error) and error.errno is not None else 11
    return 0


def main(folder: Path) -> None:
    vars(saving)["CHUNK_BYTES"] = 20 * LAYOUT.bytes_per_token
    ended = {}
    for name, arrange in CASES.items():
        (folder / name).mkdir()
        pid = os.fork()
        if not pid:
            code = 99
            try:
                code = child(folder / name, arrange)
            finally:
                os._exit(code)
        ended[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
