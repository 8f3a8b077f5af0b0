"""A plugin of pytest that tells the runner about each test, through a pipe: in the process that tests a mutant."""

from __future__ import annotations

import builtins
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import settings

reached: set[int] = set()  # places of a marked package, by their numbers
vars(builtins)["_mutants_reached"] = reached.add  # before the package is imported

import concurrent_kv  # noqa: E402
from tests.mutants.trial import ORDER, SAYS  # noqa: E402


def say(**what: object) -> None:
    os.write(int(os.environ[SAYS]), json.dumps(what).encode() + b"\n")


def pytest_configure(config: pytest.Config) -> None:
    at = Path(concurrent_kv.__file__).resolve()
    if not at.is_relative_to(config.rootpath):
        raise pytest.UsageError(
            f"the package is imported from {at}, which is not the copy: no guard is taken out there"
        )
    # A shell that runs the mutants in the background ignores it, and tests that interrupt a wait would hang.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before the test modules are imported: each test takes its settings from the profile that is loaded by then.
    settings.register_profile("mutants", database=None, derandomize=True, deadline=None)
    settings.load_profile("mutants")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ORDER in os.environ:
        order = {name: number for number, name in enumerate(Path(os.environ[ORDER]).read_text("utf-8").splitlines())}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in order])
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    reached.clear()
    say(began=item.nodeid)
    start = perf_counter()
    try:
        return (yield)
    finally:
        seconds = round(perf_counter() - start, 4)
        say(ended=item.nodeid, seconds=seconds, reached=list(reached))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        say(failed=report.nodeid, why=_short(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        say(failed=report.nodeid, why=_short(report))


def pytest_sessionfinish() -> None:
    say(finished=True)


def _short(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(report.longrepr if crash is None else crash.message).strip().splitlines()
    return (lines[0] if crash is not None else lines[-1])[:160] if lines else ""
