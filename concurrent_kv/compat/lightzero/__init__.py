"""LightZero's UniZero world model on `concurrent_kv`: attach to the released model, or import its manager from here."""

from .attach import attach, detach
from .attachment import Attachment

__all__ = ["Attachment", "attach", "detach"]
