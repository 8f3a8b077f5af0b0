"""`Slots`: which slots an operation is about, as one range where they follow each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["SlotArray", "Slots", "as_array"]

SlotArray = npt.NDArray[np.int64]
Slots = range | SlotArray  # a range where each is the one after the last


def as_array(slots: Slots) -> SlotArray:
    """Some slots as an array."""
    return np.arange(slots.start, slots.stop, dtype=np.int64) if type(slots) is range else np.asarray(slots)
