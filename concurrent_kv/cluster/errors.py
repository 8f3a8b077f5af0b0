"""What a caller of a cluster hears beside the errors of the package and of its own planner."""

from __future__ import annotations

from ..errors import KVCacheError, WaitTimeoutError

__all__ = [
    "HostLostError",
    "NoAnswerError",
    "NoHostError",
    "NotHereError",
    "PlannerError",
    "PlannersOwnError",
    "QueueFullError",
]


class HostLostError(KVCacheError, RuntimeError):
    """A host ended (its process was killed, its machine is gone) before it answered, as often as was tried.

    Attributes:
        host: its name.
        attempts: how often the request was made; each may have been worked on.
    """

    def __init__(self, message: str, *, host: str = "", attempts: int = 1) -> None:
        super().__init__(message)
        self.host = host
        self.attempts = attempts


class QueueFullError(KVCacheError, RuntimeError):
    """As many requests wait at a host as it lets wait; this one was not taken, and can be made again later.

    Attributes:
        host: its name.
        limit: how many it lets wait.
    """

    def __init__(self, message: str, *, host: str = "", limit: int = 0) -> None:
        super().__init__(message)
        self.host = host
        self.limit = limit


class NoHostError(KVCacheError, RuntimeError):
    """No host has room for one more environment."""


class NoAnswerError(WaitTimeoutError):
    """A host, or the router, had not answered in time: whether it did what it was asked is not known."""


class NotHereError(KVCacheError, LookupError):
    """A host was asked for an environment that it does not have (any more); the cluster's handles look again then."""


class PlannersOwnError(Exception):
    """Around a planner's error on its way to the handle, where the host could have raised one of that type itself."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error
        self.__cause__ = error  # whose traceback is told in other processes


class PlannerError(KVCacheError, RuntimeError):
    """A planner's error that cannot travel to its caller, in words.

    Attributes:
        kind: the name of its type.
    """

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind
