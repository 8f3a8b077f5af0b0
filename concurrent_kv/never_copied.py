"""`NeverCopied`: what neither copies nor pickles can stand for."""

from __future__ import annotations

from typing import Any, ClassVar, SupportsIndex
from weakref import ref

from .errors import InvalidTypeError
from .internal import ShowsPublic

__all__ = ["NeverCopied", "is_owned_elsewhere"]


class NeverCopied(metaclass=ShowsPublic):
    """Refuses `copy.copy`, `copy.deepcopy` and pickle with an error that says what would do instead.

    A copy would own what the original owns: to close or drop either would close both.
    """

    __slots__ = ()

    _internal: ClassVar[frozenset[str]] = frozenset(("instead_of_copy",))  # what `dir()` and `help()` leave out
    instead_of_copy: ClassVar[str]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise InvalidTypeError(f"{type(self).__name__} must not be copied or pickled: {self.instead_of_copy}")


def is_owned_elsewhere(owner: ref[Any] | None, handle: object) -> bool:
    """Whether another object than `handle` owns something: `handle` was made of its attributes, without a constructor.

    For finalisers, which must not close what is not theirs. In one that the garbage collector calls, the reference to
    the very handle is dead already.
    """
    alive = None if owner is None else owner()
    return alive is not None and alive is not handle
