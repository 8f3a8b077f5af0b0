"""`Attached`: what the parts of an attachment need to know of the whole."""

from __future__ import annotations

from typing import Any, Protocol

from ...device.layout import KVLayout
from ...manager import KVCacheManager
from ...model.overflow import Overflow
from .kinds import Kind
from .session import SearchSession

__all__ = ["Attached", "replaced_class"]


class Attached(Protocol):
    """A world model's cache, in the role of the calling thread; see `Attachment`."""

    @property
    def kind(self) -> Kind:
        """What the world model is."""

    @property
    def env_ids(self) -> tuple[int, ...]:
        """The environments of its manager that it uses, by the model's own number."""

    @property
    def layout(self) -> KVLayout:
        """Of its pools."""

    @property
    def session(self) -> SearchSession:
        """The calling thread's search."""

    @property
    def manager(self) -> KVCacheManager:
        """Whose pools hold its entries."""

    @property
    def role_name(self) -> str:
        """The calling thread's role."""

    def overflow(self, world_model: Any) -> Overflow:
        """What becomes of a full window."""

    def count(self, world_model: Any, **counts: int) -> None:
        """Add to the model's own counters."""

    def note_misses(self, missing: int, rows: int) -> None:
        """Warn, once, of contexts that begin anew."""

    def note_moved_rows(self) -> None:
        """Warn, once, of roots that are stored for other environments than those of their rows."""

    def users(self) -> list[Any]:
        """The world models that are attached by this."""


def replaced_class(attached: type[Any]) -> type[Any]:
    """The class of a world model before it was attached, by its class now."""
    return next(each for each in attached.__mro__ if "_is_attached" not in vars(each))
