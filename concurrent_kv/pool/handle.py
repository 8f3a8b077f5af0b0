"""`Handle`: what is closed by leaving its `with`."""

from __future__ import annotations

from abc import abstractmethod
from types import TracebackType
from typing import TypeVar

from ..never_copied import NeverCopied

__all__ = ["Handle"]

H = TypeVar("H", bound="Handle")


class Handle(NeverCopied):
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
