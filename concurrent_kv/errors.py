"""The exceptions of the package.

Each derives from `KVCacheError`, and from the builtin that a caller would expect to catch. Messages name the argument
or the resource, what it was, and what would do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CapacityError",
    "ClosedError",
    "IntegrityError",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KVCacheError",
    "KeyNotFoundError",
    "RecursiveComputationError",
    "ReentrantCallError",
    "SearchEndedError",
    "SnapshotContentError",
    "SnapshotDamagedError",
    "SnapshotError",
    "SnapshotMismatchError",
    "SnapshotVersionError",
    "SnapshotWriteError",
    "StreamCaptureError",
    "WaitTimeoutError",
    "WindowOverflowError",
    "WrongProcessError",
    "shown",
]


def shown(value: object) -> str:
    """The `repr` of something of the caller's, for a message: where it raises, the message says so and is still heard.

    Runs the caller's code: no lock may be held.
    """
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__} object, whose repr raised {type(error).__name__}>"


class KVCacheError(Exception):
    """Base of every exception raised by this package.

    Pickled and copied whole: type, message and attributes, whatever the signature of its constructor; without its
    traceback, `__cause__` and `__context__`, as Python does with every exception.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructor is not called again: it would take the finished message for what the message is made of.
        reduced: Any = super().__reduce__()
        kind, arguments, *state = reduced
        return (_remade, (kind, *arguments), *state)


def _remade(kind: type[KVCacheError], *arguments: object) -> KVCacheError:
    """An error of `kind` with these `args`; its attributes are set by the code that unpickles or copies it."""
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    return error


class InvalidArgumentError(KVCacheError, ValueError):
    """An argument has a value that cannot work: a wrong shape, dtype, device, length, name or number."""


class InvalidTypeError(KVCacheError, TypeError):
    """An argument is of a type that cannot work, for example a key that is not hashable."""


class KeyNotFoundError(KVCacheError, KeyError):
    """A key that has to be there is not. (Lookups that may miss return `None` instead.)"""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put a whole message between quotes.
        return str(self.args[0]) if self.args else ""


class RecursiveComputationError(KVCacheError, RuntimeError):
    """The computation of a key asked for that same key, and would have waited for its own end."""


class ReentrantCallError(KVCacheError, RuntimeError):
    """A pool was called from inside a critical section of the calling thread itself: by a finaliser that the garbage
    collector ran there, a signal handler, a key's `__eq__` or `__hash__`, or an eviction policy; or an evaluator by its
    own model. Nothing has happened.
    """


class CapacityError(KVCacheError, RuntimeError):
    """The request cannot fit into the pool, whatever is evicted.

    Attributes:
        required_entries: entries that the pool would have to hold for the request to fit.
        required_slots: slots (tokens) that the pool would have to hold for the request to fit.
    """

    def __init__(self, message: str, *, required_entries: int, required_slots: int) -> None:
        super().__init__(message)
        self.required_entries = required_entries
        self.required_slots = required_slots


class WindowOverflowError(KVCacheError, ValueError):
    """A row would grow past the window, and the caller stated no overflow policy that allows it."""


class WaitTimeoutError(KVCacheError, TimeoutError):
    """A bounded wait ended without what it waited for; the message names the pool, the shard and the thing."""


class ClosedError(KVCacheError, RuntimeError):
    """The pool, manager, search, batch or pin was closed before."""


class SearchEndedError(ClosedError):
    """The search was ended from outside: its pool closed, or the weights version was bumped."""


class WrongProcessError(KVCacheError, RuntimeError):
    """A pool was used in a process other than the one that made it (a forked child, for example).

    What needs no lock and no slot does not raise it: `closed`, `held`, `hits` and other plain facts, views of a batch's
    buffer (a fork has a copy of it, on a CPU), and `abandon`, which only leaves a note that the child never reads.
    """


class IntegrityError(KVCacheError, RuntimeError):
    """`check_integrity()` found state that contradicts itself; `problems` lists every finding."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("the storage contradicts itself: " + "; ".join(problems))
        self.problems = problems


class StreamCaptureError(KVCacheError, RuntimeError):
    """A stream that an operation would use, or wait for, is being captured into a CUDA graph; nothing has happened."""


class SnapshotError(KVCacheError, RuntimeError):
    """Base of what goes wrong with the file of a pool or manager; neither has changed.

    Attributes:
        path: the file's.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class SnapshotContentError(SnapshotError):
    """A key, a name of a scope or side data cannot be in a file; none was written."""


class SnapshotDamagedError(SnapshotError):
    """The file is cut short or changed, or no snapshot at all."""


class SnapshotMismatchError(SnapshotError):
    """What the file holds does not go into this pool or manager as it is."""


class SnapshotVersionError(SnapshotError):
    """The file is of a later format than this version of the package reads.

    Attributes:
        version: of the file.
        readable: the latest that can be read.
    """

    def __init__(self, message: str, *, path: str = "", version: int = 0, readable: int = 0) -> None:
        super().__init__(message, path=path)
        self.version = version
        self.readable = readable


class SnapshotWriteError(SnapshotError):
    """The file could not be written: the disk is full, say. The older file is as it was, if there was one.

    Attributes:
        errno: the system's number for what went wrong.
    """

    def __init__(self, message: str, *, path: str = "", errno: int | None = None) -> None:
        super().__init__(message, path=path)
        self.errno = errno
