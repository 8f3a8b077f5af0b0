"""`remembered`: results kept for the next call of the same arguments, as far as they fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["remembered"]

T = TypeVar("T")


def remembered(
    *, most_bytes: int, most: int, size_of: Callable[[T], int]
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator for functions of positional, hashable arguments; the oldest results go first.

    What alone takes more than a quarter of `most_bytes` is not kept. For any number of threads, and for finalisers,
    which may come in the middle of anything: it takes no lock, and what is lost where they meet is made again.

    Args:
        most_bytes: bytes of all results that are kept.
        most: their number.
        size_of: the bytes of one.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        kept: dict[tuple[Any, ...], tuple[T, int]] = {}

        @wraps(function)
        def call(*key: Any) -> T:
            found = kept.get(key)
            if found is not None:
                return found[0]
            made = function(*key)
            size = size_of(made)
            if 4 * size <= most_bytes:
                kept[key] = made, size
                _forget_oldest(kept, most_bytes, most)
            return made

        call.kept = kept  # type: ignore[attr-defined]  # for tests
        return call

    return decorate


def _forget_oldest(kept: dict[tuple[Any, ...], tuple[Any, int]], most_bytes: int, most: int) -> None:
    try:
        total = sum([size for _, size in kept.values()])
        while kept and (total > most_bytes or len(kept) > most):
            gone = kept.pop(next(iter(kept)), None)
            total -= 0 if gone is None else gone[1]
    except (RuntimeError, StopIteration):  # another thread, or a finaliser, changed it meanwhile
        kept.clear()
