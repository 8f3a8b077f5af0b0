"""Keys whose hashes collide."""

from __future__ import annotations

__all__ = ["CollidingKey"]


class CollidingKey:
    """A key that falls into one shard and one bucket with every other of its kind; only `__eq__` tells them apart."""

    __slots__ = ("_named",)

    def __init__(self, kind: str, number: int) -> None:
        self._named = (kind, number)

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CollidingKey) and self._named == other._named

    def __repr__(self) -> str:
        return f"CollidingKey{self._named}"
