"""`Answer`: what a method returned or raised, as it goes to another process; errors keep their type and fields."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..device.graphs import keep_out_of_graphs
from .errors import PlannerError

__all__ = ["Answer", "Pickler"]


class Pickler:
    """How errors are pickled: as pickle does, or with another's functions."""

    def __init__(self, dumps: Callable[[Any], bytes], loads: Callable[[bytes], Any]) -> None:
        self.dumps = dumps
        self.loads = loads


@dataclass(frozen=True)
class Answer:
    """Of one call.

    Attributes:
        value: what was returned.
        error: what was raised, pickled; None where nothing was.
        kind, text: of the error, for whoever cannot unpickle it.
    """

    value: Any = None
    error: bytes | None = None
    kind: str = ""
    text: str = ""

    @classmethod
    async def of(cls, call: Awaitable[Any], pickler: Pickler) -> Answer:
        """That of a call that is awaited here."""
        try:
            return cls(await call)
        except Exception as error:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            return cls(error=_pickled(error, pickler), kind=type(error).__name__, text=text)

    def result(self, pickler: Pickler) -> Any:
        """What was returned; raises what was raised, with the other process' traceback as its cause."""
        if self.error is None:
            return self.value
        there = PlannerError(f"in the process of the host:\n{self.text}", kind=self.kind)
        try:
            error = pickler.loads(self.error)
            if isinstance(error, tuple):
                error = _remade(*error)
        except Exception:  # a type that is not known here, say
            raise there from None
        raise error from there


def _pickled(error: Exception, pickler: Pickler) -> bytes:
    """An error that pickles whole is pickled as it says; another by its type, arguments and attributes.

    An exception whose constructor takes something else than its `args` can be pickled, and not unpickled.
    """
    try:
        pickled = pickler.dumps(error)
        copied = pickler.loads(pickled)
        if (type(copied), str(copied), vars(copied).keys()) == (type(error), str(error), vars(error).keys()):
            return pickled
    except Exception:  # its own business
        pass
    try:
        return pickler.dumps((type(error), error.args, vars(error)))
    except Exception:
        return b""  # which cannot be unpickled: its words are what is heard


def _remade(kind: type[Exception], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


keep_out_of_graphs(__name__)
