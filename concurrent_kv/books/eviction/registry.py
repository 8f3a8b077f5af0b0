"""From what a caller names to a policy object."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from ...errors import InvalidArgumentError, shown
from .base import E, EvictionPolicy
from .clock import Clock
from .fifo import FIFO
from .lru import LRU
from .priority import Priority
from .s3fifo import S3FIFO

P_co = TypeVar("P_co", bound=EvictionPolicy[Any], covariant=True)


class PolicyFactory(Protocol[P_co]):
    """Makes a fresh policy for a pool of `capacity` entries; every policy class is one."""

    def __call__(self, *, capacity: int) -> P_co:
        """Return an empty policy that nothing else uses."""


_in_use: WeakSet[EvictionPolicy[Any]] = WeakSet()


POLICIES: dict[str, type[EvictionPolicy[Any]]] = {
    "fifo": FIFO,
    "lru": LRU,
    "priority": Priority,
    "clock": Clock,
    "s3fifo": S3FIFO,
}


def make_policy(
    policy: str | EvictionPolicy[E] | PolicyFactory[EvictionPolicy[E]] | None, capacity: int
) -> EvictionPolicy[E]:
    """Return the policy that `policy` stands for, empty, for a pool of `capacity` entries.

    Args:
        policy: a name ("fifo", "lru", "priority", "clock", "s3fifo"), a policy class or another callable that takes
            `capacity` by keyword, a policy object, which is used as it is and serves one pool only, or None for FIFO.
        capacity: entries of the pool; not looked at where `policy` is an object.

    Raises:
        InvalidArgumentError: an unknown name, an object that holds entries already, a callable that returns no policy,
            a `policy` that is none of these, a `capacity` below 1. What a callable raises passes through.
        InvalidTypeError: a `capacity` that is no int.
    """
    if policy is None:
        return FIFO(capacity=capacity)
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise InvalidArgumentError(f"policy must be one of {', '.join(map(repr, POLICIES))}, got {shown(policy)}")
        return POLICIES[policy](capacity=capacity)
    if isinstance(policy, EvictionPolicy):
        if len(policy) > 0:
            raise InvalidArgumentError(
                f"policy must be an empty policy object that no other pool uses; this {type(policy).__name__} holds "
                f"{len(policy)} entries"
            )
        return _owned(policy)
    if not callable(policy):
        raise InvalidArgumentError(
            f"policy must be one of {', '.join(map(repr, POLICIES))}, an EvictionPolicy, a callable of capacity "
            f"that returns one, or None, got {shown(policy)}"
        )
    made = policy(capacity=capacity)
    if not isinstance(made, EvictionPolicy):
        raise InvalidArgumentError(
            f"policy must return an EvictionPolicy when called; {shown(policy)} returned {shown(made)}"
        )
    return _owned(made)


def _owned(policy: EvictionPolicy[E]) -> EvictionPolicy[E]:
    """`policy`, if no pool has it yet."""
    if policy in _in_use:
        raise InvalidArgumentError(f"policy must be an object that no other pool uses, got {shown(policy)} again")
    _in_use.add(policy)
    return policy
