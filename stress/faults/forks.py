"""Forks while the cache is in use: the child hears `WrongProcessError` wherever it touches it, and does not hang."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from time import monotonic

from concurrent_kv import KVPool, WrongProcessError

__all__ = ["fork_now_and_then"]

PAUSE_SECONDS = 1.0
WRONG = 3  # what the child exits with


def fork_now_and_then(
    pool: KVPool,
    over: threading.Event,
    count: Callable[[str], None],
    fail: Callable[[str], None],
    bound_seconds: float,
) -> None:
    """Until `over`."""
    while not over.wait(PAUSE_SECONDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks is the point
            child = os.fork()
        if not child:
            _child(pool)
        status = _wait(child, bound_seconds)
        if status is None:
            fail(f"a forked child was not over within {bound_seconds:g} s")
        elif status != 0:
            fail(f"a forked child could use the pool, or heard another error (exit status {status})")
        else:
            count("fork")


def _child(pool: KVPool) -> None:
    """Everything raises before it takes a lock that another thread may have held."""
    status = WRONG
    try:
        heard = 0
        for touch in (lambda: pool.get("key"), pool.clear, pool.stats, lambda: len(pool), pool.close):
            try:
                touch()
            except WrongProcessError:
                heard += 1
        status = 0 if heard == 5 else WRONG
    finally:
        os._exit(status)


def _wait(child: int, bound_seconds: float) -> int | None:
    deadline = monotonic() + bound_seconds
    waiting = threading.Event()
    while monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        waiting.wait(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None
