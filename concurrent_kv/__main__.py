"""`python -m concurrent_kv`: what a report of a bug needs to say of an installation."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from . import __version__
from .native import native

__all__ = ["describe", "main"]

BESIDE = ("anyio", "numpy", "readerwriterlock", "xxhash", "trio", "ray", "transformers", "LightZero")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    try:
        import torch
    except ModuleNotFoundError:
        return ["none: torch is not installed"]
    found = [f"cpu, {torch.get_num_threads()} threads of torch"]
    found += [f"cuda:{index}, {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return found


def describe() -> dict[str, str]:
    """Versions, compiled or not, and devices, by name. May take a second: torch looks for devices."""
    is_gil_enabled = getattr(sys, "_is_gil_enabled", lambda: True)
    described = {
        "concurrent_kv": __version__,
        "compiled module": "no" if native is None else "yes",
        "Python": f"{platform.python_implementation()} {platform.python_version()}, "
        f"{'with' if is_gil_enabled() else 'without'} the GIL",
        "platform": platform.platform(),
        "torch": _installed("torch") or "not installed",
    }
    described |= {name: found for name in BESIDE if (found := _installed(name)) is not None}
    return described | {f"device {number}": device for number, device in enumerate(_devices())}


def main() -> None:
    """Print it, a line each."""
    described = describe()
    width = max(map(len, described))
    for name, value in described.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
