"""What becomes of the error of a computation: each waiter has its own, and nothing of it outlives those who hear it."""

from __future__ import annotations

import builtins
import copy
import gc
import sysconfig
import traceback
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from concurrent_kv import AsyncKVPool, InvalidTypeError, KeysValues, KVPool
from concurrent_kv.flights.error_copies import copy_of
from tests.async_support import LOOPS, run_on
from tests.flight_support import Computation, counted_waiters
from tests.threading_support import JOIN_SECONDS, Background

WAITERS = 8
GROUP: Any = getattr(builtins, "ExceptionGroup", RuntimeError)  # from Python 3.11 on


class Local:
    """Stands for what a computation has in its variables."""


class BrokenModelError(Exception):
    """Its constructor takes something else than its `args`."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"broken with {code}")
        self.code, self.detail = code, detail


class GrowingError(Exception):
    """Its constructor takes its message for what the message is made of."""

    def __init__(self, what: str) -> None:
        super().__init__(f"failed: {what}")


class UncopiableError(Exception):
    """Neither copied nor made anew."""

    def __new__(cls, *arguments: object, allowed: bool = False) -> UncopiableError:
        if not allowed:
            raise TypeError("not allowed")
        return super().__new__(cls, *arguments)

    def __init__(self, *arguments: object, allowed: bool = False) -> None:
        super().__init__(*arguments)


COPIABLE = (
    ValueError("a", 1),
    OSError(2, "no file", "name"),
    KeyError("key"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ImportError("no module", name="module", path="path"),
    GROUP("several", [ValueError("one")]),
    BrokenModelError(3, detail="weights"),
    GrowingError("x"),
)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# Copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", COPIABLE, ids=lambda error: type(error).__name__)
def test_a_copy_has_the_type_arguments_attributes_and_notes_of_an_error(error: Exception) -> None:
    error = copy_of(error)
    error.__notes__ = ["a note"]
    try:
        raise error from LookupError()
    except Exception:
        made = copy_of(error)
    assert made is not error
    assert type(made) is type(error)
    assert (str(made), made.args, vars(made)) == (str(error), error.args, vars(error))
    assert (made.__traceback__, made.__cause__, made.__context__) == (None, None, None)
    made.__notes__.append("another")
    assert error.__notes__ == ["a note"]


def test_of_a_class_that_does_not_allow_it_no_copy_is_made() -> None:
    error = UncopiableError("x", allowed=True)
    assert copy_of(error) is error


def test_what_is_compared_of_an_error_is_never_asked_whether_it_is_equal() -> None:
    class Asked:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("asked")

        __hash__ = None  # type: ignore[assignment]

    error = ValueError(Asked())
    assert copy_of(error).args[0] is error.args[0]


# Waiters -------------------------------------------------------------------------------------------------------------


def heard_by(pool: KVPool, computation: Computation) -> list[Exception]:
    """The errors that the caller which computes, and so many that wait for it, hear."""
    heard: list[Exception] = []  # not given back by a thread, which its own error would keep alive

    def call() -> None:
        try:
            pool.get_or_compute("key", computation)
        except Exception as error:
            heard.append(error)

    with counted_waiters() as waiting:
        threads = [Background(call)]
        assert computation.gate.entered.wait(JOIN_SECONDS)
        threads += [Background(call) for _ in range(WAITERS)]
        waiting.wait_for(WAITERS)
        computation.gate.opened.set()
        for thread in threads:
            thread.result()
    return heard


@pytest.mark.parametrize("error", COPIABLE, ids=lambda error: type(error).__name__)
def test_each_waiter_hears_an_error_of_its_own_that_names_the_original(pool: KVPool, error: Exception) -> None:
    error = copy_of(error)
    heard = heard_by(pool, Computation(error=error))
    assert len({id(each) for each in heard}) == WAITERS + 1
    assert sum(each is error for each in heard) == 1
    others = [each for each in heard if each is not error]
    for each in others:
        assert (type(each), str(each), each.args) == (type(error), str(error), error.args)
        assert each.__cause__ is error
        frames = [frame.name for frame in traceback.extract_tb(each.__traceback__)]
        assert frames.count("get_or_compute") == 1  # of this one waiter
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] == "__call__"
    assert "__call__" in "".join(traceback.format_exception(others[0]))


def test_an_error_that_cannot_be_copied_is_heard_by_all_as_it_is(pool: KVPool) -> None:
    error = UncopiableError("x", allowed=True)
    heard = heard_by(pool, Computation(error=error))
    assert len(heard) == WAITERS + 1
    assert all(each is error for each in heard)


def test_a_claim_is_failed_with_an_exception_only(pool: KVPool) -> None:
    claim = pool.try_claim("key")
    for error in ("text", ValueError, KeyboardInterrupt(), None):
        with pytest.raises(InvalidTypeError, match="error must be an Exception"):
            claim.fail(error)  # type: ignore[arg-type]
    assert not claim.over
    claim.fail(ValueError())


# What is left --------------------------------------------------------------------------------------------------------


class Failing:
    """A computation that fails with a local variable in its frame, of which a weak reference is kept."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.local: weakref.ref[Local]

    def __call__(self) -> KeysValues:
        local = Local()
        self.local = weakref.ref(local)
        raise copy_of(self.error)

    async def asynchronous(self) -> KeysValues:
        await anyio.lowlevel.checkpoint()
        with anyio.move_on_after(1000.0):  # its timer keeps the context that it was made in
            return self()
        raise AssertionError


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("error", COPIABLE, ids=lambda error: type(error).__name__)
def test_the_variables_of_a_failed_computation_go_with_its_error(pool: KVPool, error: Exception) -> None:
    computation = Failing(error)
    with pytest.raises(type(error)):
        pool.get_or_compute("key", computation)
    assert computation.local() is None


@pytest.mark.usefixtures("no_collector")
def test_the_variables_of_a_failed_computation_go_with_the_last_who_hears(pool: KVPool) -> None:
    error: Exception | None = ValueError("x")
    error.local = Local()  # type: ignore[union-attr]
    local = weakref.ref(error.local)  # type: ignore[union-attr]
    computation = Computation(error=error)
    heard = heard_by(pool, computation)
    error = computation.error = None
    while heard:
        assert local() is not None
        heard.pop()
    assert local() is None


@pytest.mark.usefixtures("no_collector")
def test_who_fails_a_claim_and_raises_leaves_nothing(pool: KVPool) -> None:
    def work() -> weakref.ref[Local]:
        claim, local = pool.try_claim("key"), Local()
        try:
            raise ValueError
        except ValueError as error:
            claim.fail(error)
        return weakref.ref(local)

    def raising(found: list[weakref.ref[Local]]) -> None:
        claim, local = pool.try_claim("key"), Local()
        found.append(weakref.ref(local))
        try:
            raise ValueError
        except ValueError as error:
            claim.fail(error)
            raise

    assert work()() is None
    found: list[weakref.ref[Local]] = []
    with pytest.raises(ValueError):  # noqa: PT011
        raising(found)
    assert found[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_variables_of_a_failed_computation_on_a_loop_go_with_its_error(pool: KVPool, loop: str, form: str) -> None:
    if form == "sync" and sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("what a worker thread made goes when that thread next runs")
    computation = Failing(ValueError("x"))

    async def work() -> bool:
        compute: Any = computation if form == "sync" else computation.asynchronous
        with pytest.raises(ValueError, match="x"):
            await AsyncKVPool(pool).get_or_compute("key", compute)
        await anyio.sleep(0)  # what the loop has of the worker that has ended
        return computation.local() is None

    assert run_on(loop, work)


def test_copies_of_the_standard_library_lose_what_ours_keep() -> None:
    """Where this no longer holds, `_without_constructor` is not needed."""
    with pytest.raises(TypeError):
        copy.copy(BrokenModelError(3, detail="weights"))
    assert copy.copy(GrowingError("x")).args != GrowingError("x").args
