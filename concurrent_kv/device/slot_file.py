"""`SlotFile`: a file of one record for each slot, without a name, and gone with its process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from .host_slots import runs_of
from .slot_numbers import SlotArray

__all__ = ["SlotFile"]

Records = npt.NDArray[np.uint8]  # [slots, bytes of a record]


class SlotFile:
    """Records of slots 1 to `num_slots`, each at a place of its own.

    The file has no name, or loses it at once: the system takes it away when its process ends, however that happens. A
    crash leaves nothing behind, and no other process can find it, read it or cut it short. It takes its room on the
    disk when it is made. Any thread may read and write at any time.

    Args:
        folder: where it is made, on the disk that is to have it.
        num_slots: how many records it has room for.
        record_bytes: of one slot.

    Raises:
        OSError: no file can be made there, or there is no room for one so long.
    """

    def __init__(self, folder: str, num_slots: int, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._descriptor = os.dup(file.fileno())
        self._pid, size = os.getpid(), num_slots * record_bytes
        try:
            os.ftruncate(self._descriptor, size)
            if hasattr(os, "posix_fallocate"):  # not on macOS, where room is taken as it is written to
                os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}: a tier's file of {size:,} bytes", folder) from None

    def __del__(self) -> None:
        # Here, and not in a method: while a thread reads, nobody may close it, and have the number be another file's.
        descriptor = self.__dict__.get("_descriptor")
        if descriptor is not None:
            if self.__dict__.get("_pid") == os.getpid():  # forked children have the file, too, and its room
                with suppress(OSError):
                    os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def read(self, slots: SlotArray) -> Records:
        """The records of some slots. Blocks for the disk; raises `OSError` where that fails."""
        records = np.empty((len(slots), self.record_bytes), dtype=np.uint8)
        self._move(os.preadv, slots, records)
        return records

    def write(self, slots: SlotArray, records: Records) -> None:
        """Have the records of some slots, in C order. Blocks for the disk; raises `OSError` where it is full, or fails.

        What the records are then, is not known.
        """
        self._move(os.pwritev, slots, records)

    def _move(self, move: Callable[[int, list[memoryview], int], int], slots: SlotArray, records: Records) -> None:
        for first, last, slot in runs_of(slots):
            left = records[first:last].reshape(-1).data
            at = (slot - 1) * self.record_bytes
            while len(left):
                done = move(self._descriptor, [left], at)
                if not done:
                    raise OSError(errno.EIO, "the file of a tier was cut short")
                left, at = left[done:], at + done
