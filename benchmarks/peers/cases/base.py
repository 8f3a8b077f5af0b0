"""What a case is to the process that runs one contestant of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Run"]

Times = dict[str, tuple[float, float]]  # by measure: microseconds of a call, of the processor and of the wall


class Run(ABC):
    """One contestant in one case, made ready by its constructor (which may raise `UnfitError`)."""

    @abstractmethod
    def verify(self) -> dict[str, list[str]] | None:
        """Hashes of what the contestant returns, by what it was asked, or None where there is nothing to compare.

        Where two contestants have an answer to the same, it is the same.
        """

    @abstractmethod
    def turn(self) -> Times:
        """One turn: the same work each time."""

    def facts(self) -> dict[str, float]:
        """What needs no rounds: bytes, calls."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Free everything."""
