"""Pools and managers that every test leaves sound: `check_integrity()` runs when the test ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Protocol

import pytest

from concurrent_kv import KVCacheManager, KVLayout, KVPool
from tests import no_wheels  # noqa: F401  (before what imports them)
from tests.support import HANG_SECONDS, LAYOUT, LOOPS, config, loops_of

with suppress(ModuleNotFoundError):  # not every environment has it
    from hypothesis import settings as of_hypothesis

    of_hypothesis.register_profile("no deadline", deadline=None)  # a busy machine takes longer for an example
    of_hypothesis.load_profile("no deadline")


class MakePool(Protocol):
    def __call__(self, max_entries: int = 4, layout: KVLayout = LAYOUT, **settings: Any) -> KVPool: ...


class MakeManager(Protocol):
    def __call__(self, env_num: int = 2, *, settings: object = None, **arguments: Any) -> KVCacheManager: ...


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    made: list[KVPool] = []

    def make(max_entries: int = 4, layout: KVLayout = LAYOUT, **settings: Any) -> KVPool:
        made.append(KVPool(layout, max_entries, **{"wait_timeout": HANG_SECONDS, **settings}))
        return made[-1]

    yield make
    for pool in made:
        pool.check_integrity()
        pool.close()


@pytest.fixture
def make_manager() -> Iterator[MakeManager]:
    made: list[KVCacheManager] = []

    def make(env_num: int = 2, *, settings: object = None, **arguments: Any) -> KVCacheManager:
        settings = config() if settings is None else settings
        made.append(KVCacheManager(settings, env_num, **{"wait_timeout": HANG_SECONDS, **arguments}))
        return made[-1]

    yield make
    for manager in made:
        manager.check_integrity()
        manager.close()
        manager.check_integrity()


@pytest.fixture
def pool(make_pool: MakePool) -> KVPool:
    """Four entries of the small layout, first in first out."""
    return make_pool()


@pytest.fixture
def manager(make_manager: MakeManager) -> KVCacheManager:
    """Two environments, four simulations."""
    return make_manager()


# Of the module's scope, as each test that hypothesis runs many times has to be under one of them throughout.
@pytest.fixture(scope="module", params=LOOPS)
def loops(request: pytest.FixtureRequest) -> Iterator[str]:
    """The tests of a module that uses this run with each kind of loops that the package has."""
    with loops_of(request.param):
        yield request.param


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as in a terminal: a shell that runs the tests in the background ignores it.

    Python then leaves SIGINT ignored, as it was when it began, and so does every child that it starts.
    """
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def torch_loops() -> Iterator[None]:
    """Loops of numpy and torch, as on an accelerator, whether or not there are compiled ones."""
    with loops_of("torch"):
        yield
