"""Where figures are from: the date, the commit, the machine, and what they depend on beside these."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from concurrent_kv import __version__
from concurrent_kv.native import native

__all__ = ["about", "in_words", "said_by_git"]

ROOT = Path(__file__).resolve().parents[1]
SECONDS_OF_GIT = 20.0


def about() -> dict[str, Any]:
    """Everything, by name. `commit` has a plus where the tree has changed since, and is empty outside a checkout."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "concurrent_kv": __version__,
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gil": bool(getattr(sys, "_is_gil_enabled", lambda: True)()),
        "compiled_module": native is not None,
        "torch": _version_of("torch"),
    }
    torch = sys.modules.get("torch")  # not imported for this alone
    if torch is not None:
        found["torch_threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def in_words(found: dict[str, Any]) -> str:
    """What `about` found, to stand beneath figures."""
    commit = f"commit {found['commit']}" if found["commit"] else f"concurrent_kv {found['concurrent_kv']}"
    machine = f"{found.get('gpu', found['processor'])}, {found['cores']} cores, {found['system']}"
    python = f"Python {found['python']}{'' if found['gil'] else ' without the GIL'}"
    compiled = "" if found["compiled_module"] else ", not compiled"
    threads = f", {found['torch_threads']} of its threads" if "torch_threads" in found else ""
    return f"{found['date']}, {commit}{compiled}; {machine}; {python}, torch {found['torch']}{threads}"


def said_by_git(*arguments: str) -> str:
    """What git says of this checkout; nothing where it is none, or where there is no git."""
    if not (ROOT / "concurrent_kv").is_dir():  # the examples alone, perhaps in a repository of somebody's
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=SECONDS_OF_GIT
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _commit() -> str:
    commit = said_by_git("rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and said_by_git("status", "--porcelain", "--untracked-files=no") else commit


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
