"""The contract between a pool and its eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Generic, NoReturn, Protocol, TypeVar

from ..._checks import positive_int
from ...errors import InvalidTypeError


class Evictable(Protocol):
    """What a policy asks of an entry, which it compares by identity.

    Neither value may change while the entry is held.
    """

    @property
    def fingerprint(self) -> int:
        """Stands for the entry's key after the entry is gone; equal keys have equal fingerprints."""

    @property
    def priority(self) -> float:
        """The lowest goes first under `Priority`; never NaN, which has no place in an order."""


E = TypeVar("E", bound=Evictable)


class EvictionPolicy(ABC, Generic[E]):
    """An order over the entries that may be evicted, empty when made.

    An entry is *held* from `add` or `give_back` until `remove`, `pop_victim` or `clear`. The
    pool calls everything under its mutex; a policy never calls back, and returns soon: nothing cuts it off, and
    while it runs, whoever needs the storage's mutex waits, without a bound.

    A policy may fail without harm to the pool. What `add` or `pop_victim` raises is raised by the write, or by the
    opening of the search, that needed it, of which nothing has taken effect; where the very next call of that method
    raises too, it is logged, and so is what the other methods raise. The pool does not ask a policy of yours
    what it holds: an entry that the policy lost stays a candidate, and where the policy names no entry of the pool
    though there are candidates, the one that was written first goes.

    Args:
        capacity: entries of the pool. The pool enforces it: a policy only proportions its parts by it, and holds
            whatever it is given.

    Raises:
        InvalidArgumentError: a capacity below 1.
        InvalidTypeError: a capacity that is no int.
    """

    observes_hits: ClassVar[bool] = True
    """False where hits change nothing: the pool then does not call `touch`."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = positive_int("capacity", capacity)

    def __copy__(self) -> NoReturn:
        # Two policies over the same containers would serve two pools.
        raise InvalidTypeError(
            f"{type(self).__name__} must not be copied with copy.copy(), as one policy serves one pool: "
            "pass its class, or copy.deepcopy() of one that is empty"
        )

    @abstractmethod
    def add(self, entry: E) -> None:
        """Hold a newly written entry, as the youngest; one already held becomes the youngest.

        A replaced key is a new entry: remove the old one, add the new one.
        """

    @abstractmethod
    def touch(self, entry: E) -> None:
        """Note a hit; nothing happens if the entry is not held (it may be parked, or gone since the hit)."""

    @abstractmethod
    def remove(self, entry: E) -> None:
        """Forget an entry that left the pool, perhaps after `pop_victim` gave it out; fine if it is not held."""

    @abstractmethod
    def pop_victim(self) -> E | None:
        """Take out and return the entry to evict next, or None if none is held.

        It is no longer held. A pool that cannot evict it parks it, and owes a `give_back` once it can.
        """

    @abstractmethod
    def give_back(self, entry: E) -> None:
        """Hold again a popped victim that could not be evicted then and can be now.

        It is the next candidate: the next `pop_victim` returns it, unless something is touched, added, removed or given
        back in between. Among several given back, those of `FIFO` and `LRU` come in the order of their age, as if they
        had never been given out; elsewhere the latest comes first.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget every entry and all history."""

    @abstractmethod
    def __contains__(self, entry: object) -> bool:
        """Whether the entry is held."""

    @abstractmethod
    def __iter__(self) -> Iterator[E]:
        """Every held entry once, in any order; the policy must not change meanwhile."""

    def in_order(self) -> list[E]:
        """Every held entry, the next victim first as far as there is an order; for snapshots.

        What was given out and not given back may be among them, where it would come back to.
        """
        return list(self)

    @abstractmethod
    def __len__(self) -> int:
        """How many entries are held."""
