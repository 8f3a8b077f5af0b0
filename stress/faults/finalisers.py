"""Finalisers and signal handlers that call the pools, at any point of any thread.

Cycles of objects die wherever the collector runs, which is at every allocation here: inside the pools' own critical
sections too. What they call has to work or to raise `ReentrantCallError`, and must not wait for its own thread.
"""

from __future__ import annotations

import gc
import itertools
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from concurrent_kv import ClosedError, KeyNotFoundError, KeysValues, KVPool, ReentrantCallError, WaitTimeoutError
from stress.faults.errors import injected
from stress.gate import Gate

__all__ = ["CallsFromInside"]

KEYS = 8
PAUSE_SECONDS = 0.002


class _Cycle:
    """What only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


class CallsFromInside:
    """Calls of a pool by finalisers, while it is used by others; in a scope of their own.

    Args:
        pool: what is called.
        kv: one row that fits it.
        gate: while it is shut, nothing is called that is under way for a while.

    Attributes:
        heard: what happened to each call. (A counter under a lock would stop a finaliser that runs inside that lock.)
    """

    def __init__(self, pool: KVPool, kv: KeysValues, gate: Gate) -> None:
        self._gate = gate
        self._pool = pool
        self._kv = kv
        self.heard: deque[str] = deque()
        self._wrong: deque[str] = deque()
        self._handles = False  # whether signals may be sent; under `_sending`
        self._sending = threading.Lock()
        self._scope = pool.scope("cycles")
        self._calls = itertools.cycle(("stats", "len", "discard", "get", "pop", "pin", "repr"))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Have the collector run at every allocation, and signals be handled by a call. Of the main thread."""
        thresholds = gc.get_threshold()
        before: Any = None
        if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGUSR1, lambda number, frame: self._call("a signal handler"))
            self._handles = True
        gc.set_threshold(1)
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)
            if self._handles:
                with self._sending:
                    self._handles = False
                # One that is still on its way would end the process. Ignored, it is dropped.
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
                signal.signal(signal.SIGUSR1, before)

    def work(self, over: threading.Event, fail: Callable[[str], None]) -> None:
        """Make cycles, alone and as side data, and send signals to the main thread, until `over`."""
        main = threading.main_thread().ident or 0
        number = 0
        self._gate.enter()
        try:
            while not over.wait(PAUSE_SECONDS):
                if self._gate.shut:
                    self._gate.park()
                    continue
                number += 1
                self._trouble(number, main)
                while self._wrong:
                    fail(self._wrong.popleft())
        finally:
            self._gate.leave()

    def _trouble(self, number: int, main: int) -> None:
        for _ in range(16):
            self._drop_one()
        if sys.platform != "win32":
            with self._sending:
                if self._handles:
                    signal.pthread_kill(main, signal.SIGUSR1)
        try:
            side = _Cycle()
            weakref.finalize(side, self._call, "side data")
            self._pool.put(number % KEYS, self._kv, side=side, scope=self._scope)
        except (WaitTimeoutError, ClosedError):
            self.heard.append("cycle without room")
        except Exception as error:
            if not injected(error):
                raise

    def _drop_one(self) -> None:
        weakref.finalize(_Cycle(), self._call, "a finaliser")

    def _call(self, where: str) -> None:
        """What a finaliser does. It must not raise: nothing hears it."""
        name, pool, scope = next(self._calls), self._pool, self._scope
        if self._gate.shut and name in ("get", "pop", "pin"):
            return
        try:
            if name == "stats":
                pool.stats()
            elif name == "len":
                len(pool)
            elif name == "repr":
                repr(pool)
            elif name == "discard":
                pool.discard(1, scope=scope)
            elif name == "get":
                pool.get(2, scope=scope)
            elif name == "pop":
                pool.pop(3, scope=scope)
            else:
                pool.pin(4, scope=scope).close()
        except ReentrantCallError:
            self.heard.append("call from inside refused")
            if name in ("stats", "len", "repr", "discard"):
                self._wrong.append(f"{name} was refused to {where}")
        except (KeyNotFoundError, WaitTimeoutError, ClosedError):
            self.heard.append("call from a finaliser in vain")
        except Exception as error:
            if not injected(error):
                raise
            self.heard.append("call from a finaliser that another fault hit")
        else:
            self.heard.append("call from a finaliser")
