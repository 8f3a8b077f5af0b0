"""`ShowsPublic`: classes whose `dir()` and `help()` leave out what only other modules of the package call."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterable

__all__ = ["ShowsPublic"]


class ShowsPublic(ABCMeta):
    """A metaclass. A class names in `_internal` what users do not call; so do those that it derives from."""

    def __dir__(cls) -> Iterable[str]:
        hidden = {name for base in cls.__mro__ for name in vars(base).get("_internal", ())}
        return [name for name in super().__dir__() if name not in hidden]
