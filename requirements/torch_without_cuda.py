"""Install torch from its CUDA wheel on a machine without CUDA, less two gigabytes of CUDA libraries.

    python torch_without_cuda.py torch       # with the interpreter that torch is for; arguments go to pip install

PyPI has no CPU wheel of torch for Linux on x86. On such a machine torch never calls the CUDA libraries, but the dynamic
loader looks for each of them, and for every name that torch takes from them. So torch is installed without what it
requires; then its requirements in Python, and the two small CUDA libraries that it does call when it is imported. The
others are made here: empty functions, under the names and versions that torch asks for. They lie last on torch's own
search path, so that real libraries are found before them. Where there is a GPU, torch is installed whole.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from importlib.metadata import requires
from pathlib import Path

OF_CUDA = re.compile(r"(cuda-|nvidia-|triton\b)")  # what torch requires and a machine without CUDA does not
LIBRARY_OF_CUDA = re.compile(r"lib(cu|nv|nccl)")
NAME_OF_CUDA = re.compile(r"(cu|nv|nccl)")
SITE = Path(sysconfig.get_path("platlib"))
Wanted = dict[str, dict[str, set[str]]]  # names by library and version; the version is "" where none is asked for


def run(*command: str | Path) -> str:
    """What a command prints; its failure ends this program, and says why on stderr."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def install(*arguments: str) -> None:
    """Let pip of this interpreter install something."""
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-warn-conflicts", "--root-user-action=ignore", *arguments)


def wanted_by(library: Path) -> Wanted:
    """Which CUDA libraries a library links, and what it takes from each."""
    linked = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-dW", library))
    wanted: Wanted = {name: defaultdict(set) for name in linked if LIBRARY_OF_CUDA.match(name)}
    home = {}  # the library that has a version
    for part in re.split(r"\bFile: ", run("readelf", "-VW", library))[1:]:
        home.update(dict.fromkeys(re.findall(r"Name: (\S+)", part), part.split()[0]))
    for symbol in re.findall(r"\bUND (\S+)", run("readelf", "--dyn-syms", "-W", library)):
        name, _, version = symbol.partition("@")
        if version and home.get(version) in wanted:
            wanted[home[version]][version].add(name)
        elif not version and NAME_OF_CUDA.match(name):
            for of_library in wanted.values():  # the loader takes it from whichever has it
                of_library[""].add(name)
    return wanted


def make_stand_in(path: Path, names_by_version: dict[str, set[str]]) -> None:
    """A shared library of functions that do nothing."""
    names = sorted(set().union(*names_by_version.values()))
    versions = [
        f"{version} {{ {' '.join(f'{name};' for name in sorted(names))} }};"
        for version, names in names_by_version.items()
        if version
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stand_in.c"), Path(folder, "versions")
        source.write_text("int stands_in_for_cuda;\n" + "".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("\n".join(versions))
        by_version = [f"-Wl,--version-script={script}"] if versions else []
        run("cc", "-w", "-shared", "-fPIC", source, "-o", path, f"-Wl,-soname,{path.name}", *by_version)


def main() -> None:
    """Install torch, and see that it can be imported."""
    what = sys.argv[1:] or ["torch"]
    if shutil.which("nvidia-smi") is not None:
        install(*what)
        return
    install("--no-deps", "--only-binary", ":all:", *what)
    install(*(line for line in requires("torch") or () if not OF_CUDA.match(line) and "extra ==" not in line))
    cuda = re.search(r"^cuda\b.*= '(\d+\.\d+)'", (SITE / "torch/version.py").read_text(), re.MULTILINE)
    named = [line for line in requires("torch") or () if re.match(r"nvidia-cuda-(runtime|cupti)\b", line)]
    if named or cuda is not None:  # before torch 2.10 it names them itself
        install("--no-deps", *(named or [f"nvidia-cuda-{part}=={cuda[1]}.*" for part in ("runtime", "cupti") if cuda]))
    wanted: Wanted = defaultdict(lambda: defaultdict(set))
    for library in (SITE / "torch/lib").glob("*.so"):
        for name, by_version in wanted_by(library).items():
            for version, names in by_version.items():
                wanted[name][version] |= names
            wanted[name][""] |= set()
    there = {path.name for path in (SITE / "nvidia").glob("*/lib/*")}
    there.add("libcuda.so.1")  # the driver, which torch loads by name: it must not find one
    for name, by_version in wanted.items():
        if name not in there:
            make_stand_in(SITE / "torch/lib" / name, by_version)
    run(sys.executable, "-c", "import torch; torch.ones(2) + 1")


if __name__ == "__main__":
    main()
