"""Errors raised on purpose, and how they are told from others."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Interrupt", "LoaderError", "injected", "marked"]

E = TypeVar("E", bound=BaseException)


class Interrupt(KeyboardInterrupt):
    """What cuts an operation off at any point; `except Exception` does not catch it."""


class LoaderError(Exception):
    """What a computation raises on purpose."""


def marked(error: E) -> E:
    """Say of an error that it was made on purpose."""
    error.stress_injected = True  # type: ignore[attr-defined]
    return error


def injected(error: BaseException) -> bool:
    """Whether it was."""
    return getattr(error, "stress_injected", False)
