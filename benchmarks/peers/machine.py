"""What a run has to say about itself: machine, versions, commit, and what else ran meanwhile."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from concurrent_kv.native import native

__all__ = ["About"]

PACKAGES = ("torch", "numpy", "readerwriterlock", "cachetools", "cachebox", "moka-py", "theine")
ROOT = Path(__file__).resolve().parents[2]


class About:
    """Begun with a run, asked when it is over."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._load = _load()
        self._busy = _busy_seconds()

    def as_dict(self, command: str) -> dict[str, Any]:
        """Everything, by name."""
        seconds = time.monotonic() - self._began
        cores = psutil.cpu_count() or 1
        others = max(0.0, _busy_seconds() - self._busy) / (seconds * cores)
        return {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": _git("rev-parse", "--short", "HEAD"),
            "library": _git("log", "-1", "--format=%h", "--", "concurrent_kv", "setup.py"),
            "library_changed": bool(_git("status", "--porcelain", "--", "concurrent_kv", "setup.py")),
            "command": command,
            "seconds": round(seconds),
            "processor": _processor(),
            "cores": cores,
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "gil": bool(getattr(sys, "_is_gil_enabled", lambda: True)()),
            "compiled_module": native is not None,
            "torch_threads": torch.get_num_threads(),
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


def _git(*arguments: str) -> str:
    """What git says, or nothing."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20.0
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
