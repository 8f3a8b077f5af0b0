"""What a run has to say about itself: where its figures are from, versions, and what else ran meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

import psutil

from reporting.machine import about, said_by_git

__all__ = ["About"]

PACKAGES = ("torch", "numpy", "readerwriterlock", "cachetools", "cachebox", "moka-py", "theine")


class About:
    """Begun with a run, asked when it is over."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._load = _load()
        self._busy = _busy_seconds()

    def as_dict(self, command: str) -> dict[str, Any]:
        """Everything, by name."""
        found = about()
        seconds = time.monotonic() - self._began
        others = max(0.0, _busy_seconds() - self._busy) / (seconds * found["cores"])
        return {
            **found,
            "library": said_by_git("log", "-1", "--format=%h", "--", "concurrent_kv", "setup.py"),
            "library_changed": bool(said_by_git("status", "--porcelain", "--", "concurrent_kv", "setup.py")),
            "command": command,
            "seconds": round(seconds),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "versions": _versions(),
            "load_at_start": self._load,
            "load_at_end": _load(),
            "other_work_percent": round(100 * others),
        }


def _busy_seconds() -> float:
    """Processor seconds that others than this process and its children have used, of all cores."""
    times = psutil.cpu_times()
    busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
    own = psutil.Process().cpu_times()
    used = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            running = child.cpu_times()
        except psutil.Error:
            continue
        used += running.user + running.system
    return float(busy - used)


def _load() -> float | None:
    """Load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
