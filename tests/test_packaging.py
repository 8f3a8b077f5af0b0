"""What is installed, said and shipped: metadata, the report of an installation, the sdist; a dependency's inside."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from importlib.metadata import metadata, requires
from pathlib import Path

import pytest
from readerwriterlock import rwlock

import concurrent_kv
from concurrent_kv.__main__ import describe
from release.tag import version_of, why_not
from tests.support import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent
VERSION = concurrent_kv.__version__


def test_the_version_is_the_same_wherever_it_is_said() -> None:
    assert metadata("concurrent-kv")["Version"] == VERSION
    assert version_of((ROOT / "concurrent_kv/__init__.py").read_text("utf-8")) == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


@pytest.mark.parametrize(
    ("tag", "changelog", "citation", "wrong"),
    [
        ("v1.2.3", "## 1.2.3 - 2026-12-01\n", "version: 1.2.3\n", None),
        ("v1.2.4", "## 1.2.3\n", "version: 1.2.3\n", "v1.2.3 would do"),
        ("1.2.3", "## 1.2.3\n", "version: 1.2.3\n", "v1.2.3 would do"),
        ("v1.2.3", "## 1.2.30\n", "version: 1.2.3\n", "CHANGELOG.md"),
        ("v1.2.3", "## 1.2.3\n", "version: 1.2.2\n", "CITATION.cff"),
    ],
)
def test_a_tag_that_is_not_the_version_is_refused(tag: str, changelog: str, citation: str, wrong: str | None) -> None:
    said = why_not(tag, "1.2.3", changelog, citation)
    assert (said is None) if wrong is None else (said is not None and wrong in said)


def test_the_hosted_workflow_runs_what_a_merge_needs_and_every_python_that_is_promised() -> None:
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    everything, tests = workflow.split("\n  tests:\n")
    assert everything.endswith("\n      - run: .ci/run")
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(re.findall(r'"(3\.\d+)"', workflow)) == set(promised)
    assert "pip install -c constraints.txt" in tests


def test_a_report_names_version_interpreter_torch_devices_and_whether_code_is_compiled() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "concurrent_kv"], capture_output=True, text=True, timeout=HANG_SECONDS, check=True
    )
    printed = dict(re.split(r" {2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert printed["concurrent_kv"] == VERSION
    assert printed["compiled module"] in ("yes", "no")
    assert {"Python", "torch", "anyio", "numpy", "readerwriterlock", "xxhash", "device 0"} <= set(printed)
    assert printed.keys() == describe().keys()


def test_the_sdist_has_what_a_build_and_the_tests_need_and_no_results(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.so", "*.egg-info", "results")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    (tree / "benchmarks/results").mkdir()
    (tree / "benchmarks/results/figures.json").write_text("{}", "utf-8")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", "--dist-dir", tmp_path],
        cwd=tree,
        capture_output=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "Makefile",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "release/smoke.py",
        "tests/conftest.py",
    }
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "concurrent_kv").rglob("*.[chp]*")
        if path.suffix in {".c", ".h", ".py", ".pyi"}
    }
    assert needed | sources <= names
    assert not [name for name in names if "/results/" in name or name.endswith(".so")]


def test_a_wheel_has_the_examples_which_run_where_they_are_written(tmp_path: Path) -> None:
    tree, built, folder = tmp_path / "tree", tmp_path / "built", tmp_path / "elsewhere"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.so", "*.egg-info", "results")
    shutil.copytree(ROOT, tree, ignore=unwanted)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(command, cwd=tree, capture_output=True, timeout=HANG_SECONDS, check=True)
    shutil.rmtree(tree)
    assert not (built / "examples").exists()  # they are no package of their own, which others might have

    def run(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(built)}
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
            timeout=HANG_SECONDS,
        )  # fmt: skip

    written = run("concurrent_kv.examples", str(folder))
    assert written.returncode == 0, written.stderr
    assert "python -m examples.cartpole" in written.stdout
    short = ["--envs", "1", "--episodes", "1", "--max-steps", "3", "--no-cache-steps", "0", "--no-progress"]
    played = run("examples.cartpole", *short, cwd=folder)
    assert played.returncode == 0, played.stderr
    assert f"UTC, concurrent_kv {VERSION}" in played.stdout  # of no commit
    again = run("concurrent_kv.examples", str(folder))
    assert again.returncode == 1
    assert "must be a new folder or an empty one" in again.stderr


def test_the_dependency_whose_inside_the_locks_rest_on_is_bounded_above() -> None:
    (wanted,) = [line for line in requires("concurrent-kv") or () if line.startswith("readerwriterlock")]
    assert "<1.1" in wanted


def test_locks_of_readerwriterlock_have_what_sharded_locks_take_from_them() -> None:
    """`locks/sharded.py` replaces a lock that an exception tore: it knows whose a handle is, and frees its counter."""
    made: list[object] = []

    def make() -> threading.Lock:
        lock = threading.Lock()
        made.append(lock)
        return lock

    fair = rwlock.RWLockFair(lock_factory=make)
    assert made
    reading, writing = fair.gen_rlock(), fair.gen_wlock()
    assert reading.c_rw_lock is fair
    assert writing.c_rw_lock is fair
    assert not fair.c_lock_read_count.locked()
    fair.c_lock_read_count.acquire()
    assert fair.c_lock_read_count.locked()
    fair.c_lock_read_count.release()
    with pytest.raises(RuntimeError):
        reading.release()  # not held: what says that a thread was torn out of it
    assert reading.acquire(True, 1.0)
    assert not writing.acquire(False)
    reading.release()
    assert writing.acquire(False)
    writing.release()
