"""`Handle`: what is closed by leaving its `with`; and `NeverCopied`, what neither copies nor pickles can stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, ClassVar, SupportsIndex, TypeVar
from weakref import ref

from .errors import InvalidTypeError

__all__ = ["Handle", "NeverCopied", "is_owned_elsewhere"]

H = TypeVar("H", bound="Handle")


class NeverCopied:
    """Refuses `copy.copy`, `copy.deepcopy` and pickle with an error that says what would do instead.

    A copy would own what the original owns: to close or drop either would close both.
    """

    __slots__ = ()

    instead_of_copy: ClassVar[str]

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise InvalidTypeError(f"{type(self).__name__} must not be copied or pickled: {self.instead_of_copy}")


class Handle(NeverCopied, ABC):
    """Something that is owned until it is closed, once; closing it again does nothing."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what the handle owns."""

    def __enter__(self: H) -> H:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_owned_elsewhere(owner: ref[Any] | None, handle: object) -> bool:
    """Whether another object than `handle` owns something: `handle` was made of its attributes, without a constructor.

    For finalisers, which must not close what is not theirs. In one that the garbage collector calls, the reference to
    the very handle is dead already.
    """
    alive = None if owner is None else owner()
    return alive is not None and alive is not handle
