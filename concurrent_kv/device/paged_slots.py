"""`PagedSlots`: slots of a tier whose tokens are in host memory as far as that has room, and in a file.

Each slot has a place of its own in the file, and some have a *frame* in host memory. What is stored is stored into
frames; where they are short, the tokens of others are *paged out*, written to the file, by the thread that needs them.
What is read comes from its frame, or from the file, which brings nothing back into memory: a hit that is wanted again
moves up into its pool.

Two arrays name each other: a slot has a frame exactly where `frame_of[slot]` names one whose `slot_of` is the slot.
Only what names each other is believed, so that a thread that is cut off between the two leaves a free frame. A frame
that a slot has is the only place of its tokens. Under the lock frames are looked up, chosen and given away; files and
frames are read and written without it, and meanwhile a `_Copy` keeps its frames what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ClosedError
from ..locks.gate import gate
from .host_slots import HostSlots
from .layout import KVLayout
from .modes import plain_torch_state
from .moving import upload
from .slot_file import Records, SlotFile
from .slot_numbers import SlotArray
from .streams import NO_TICKS, StreamClock, Ticks, merge
from .tensors import SlotTensor

__all__ = ["PagedSlots"]

FRAMES_LOOKED_AT = 1024  # at a time, for those to page out
ATTEMPTS = 8  # to page out what other threads read meanwhile; then the file is written to at once

Bools = npt.NDArray[np.bool_]

NO_FRAMES: SlotArray = np.zeros(0, dtype=np.int64)


class _Copy:
    """A copy under way. Its frames are no other slots' as long as it lives, whatever becomes of its thread."""

    __slots__ = ("__weakref__", "frames")

    def __init__(self, frames: SlotArray) -> None:
        self.frames = frames


class PagedSlots:
    """As `HostSlots`, of more slots than host memory has frames for. Slot 0 is not used.

    Args:
        layout: shapes and dtype of the tokens, and the device that they come from.
        num_slots: usable slots (1 to `num_slots`), each of which has a place in the file.
        num_frames: how many of them can be in host memory.
        folder: where the file is made.
        clock: orders copies from and to a GPU; the host waits for them where a frame becomes another slot's.
        seconds: that it waits at most.
        are_named: which of some slots any entry names. Called with the lock held, and may take the tier's mutex.
        pinned: see `HostSlots`.
        lock: of its own, before the tier's mutex.

    Attributes:
        written_count, read_count: slots that were written to the file, and read from it.

    Raises:
        OSError: no file can be made in `folder`.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_slots: int,
        num_frames: int,
        folder: str,
        clock: StreamClock,
        seconds: float,
        are_named: Callable[[SlotArray], Bools],
        *,
        pinned: bool,
        lock: Any,
    ) -> None:
        self.layout = layout
        self.num_slots = num_slots
        self.num_frames = num_frames
        self.written_count = self.read_count = 0
        self._file = SlotFile(folder, num_slots, layout.bytes_per_token)
        self._host = HostSlots(layout, num_frames, pinned=pinned)
        self._clock = clock
        self._seconds = seconds
        self._are_named = are_named
        self._lock = lock
        self._frame_of: SlotArray = np.zeros(num_slots + 1, dtype=np.int64)
        self._slot_of: SlotArray = np.zeros(num_frames + 1, dtype=np.int64)
        self._was_read: Bools = np.zeros(num_frames + 1, dtype=np.bool_)  # since the hand came by
        self._copy_counts: SlotArray = np.zeros(num_frames + 1, dtype=np.int64)  # that began, into it or from it
        self._hand = 0  # frames up to here have been looked at, in this turn
        self._copies: list[ref[_Copy]] = []
        self._uses: Ticks = NO_TICKS  # of the device, of any frames

    def __getattr__(self, name: str) -> Any:
        if name == "_file":
            raise ClosedError("the storage of this tier was freed by close()")
        raise AttributeError(name)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return self._host.nbytes

    def free(self) -> None:
        """Give memory and file back; copies under way keep theirs until they are done."""
        self._host.free()
        self.__dict__.pop("_file", None)

    def may_block_to_store(self, count: int) -> bool:
        """Whether storing so many slots may write to the file. May take the tier's mutex."""
        number = min(max(2 * count, FRAMES_LOOKED_AT), self.num_frames)
        ahead = (self._hand + np.arange(number, dtype=np.int64)) % self.num_frames + 1
        return int(np.count_nonzero(~self._leaving(ahead))) < count

    def may_block_to_load(self, slots: SlotArray) -> bool:
        """Whether some slots are read from the file. Takes no lock."""
        return not self._frames_in(slots).all()

    # Copies ----------------------------------------------------------------------------------------------------------

    def store(self, tensor: SlotTensor, source: SlotArray, slots: SlotArray) -> tuple[Tensor, ...]:
        """See `HostSlots.store`. Blocks for the disk, and for the device, where frames are short.

        Raises:
            OSError: the disk is full, or fails; what the slots hold then is not known.
            TimeoutError: the device still used the frames after `seconds`.
        """
        file, host = self._file, self._host
        frames, copy = self._frames_for(slots, file, host)
        there = frames > 0
        temporaries: tuple[Tensor, ...] = ()
        try:
            if there.all():
                temporaries = host.store(tensor, source, frames)
            else:  # other threads' copies have all frames
                if there.any():
                    temporaries = host.store(tensor, source[there], frames[there])
                file.write(slots[~there], _as_records(tensor.read_slots(source[~there])))
                with gate.lock, self._lock:
                    self.written_count += int(np.count_nonzero(~there))
        finally:
            self._end(copy, temporaries)
        return temporaries

    def load(self, slots: SlotArray) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `HostSlots.load`. Blocks for the disk, where some are in the file; raises `OSError` where that fails."""
        file, host = self._file, self._host
        frames, copy = self._frames_of(slots)
        temporaries: tuple[Tensor, ...] = ()
        try:
            row, temporaries = self._load(file, host, slots, frames)
        finally:
            self._end(copy, temporaries)
        return row, temporaries

    def restore(self, slots: SlotArray, tensor: SlotTensor, target: SlotArray) -> tuple[Tensor, ...]:
        """See `HostSlots.restore`, and `load`."""
        file, host = self._file, self._host
        frames, copy = self._frames_of(slots)
        temporaries: tuple[Tensor, ...] = ()
        try:
            if frames.all():
                temporaries = host.restore(frames, tensor, target)
            else:
                row, temporaries = self._load(file, host, slots, frames)
                rows, columns = np.zeros(len(slots), dtype=np.int64), np.arange(len(slots), dtype=np.int64)
                temporaries += tensor.scatter(row, rows, columns, target)
        finally:
            self._end(copy, temporaries)
        return temporaries

    def _load(
        self, file: SlotFile, host: HostSlots, slots: SlotArray, frames: SlotArray
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `load`, of slots of which some have frames, and others, 0 there, are in the file."""
        if frames.all():
            return host.load(frames)
        layout, here, absent = self.layout, np.flatnonzero(frames), np.flatnonzero(frames == 0)
        records = file.read(slots[absent])
        with gate.lock, self._lock:
            self.read_count += len(absent)
        with plain_torch_state():
            shape = (len(absent), 2 * layout.num_layers, layout.num_heads, layout.head_dim)
            tokens = torch.from_numpy(records).view(layout.dtype).view(shape).to(layout.device)
            read = tokens.permute(1, 2, 0, 3).contiguous().unsqueeze(1)
            if not len(here):
                return read, (tokens, read)
            found, temporaries = host.load(frames[here])
            sizes = (*read.shape[:3], len(slots), layout.head_dim)
            row = torch.empty(sizes, dtype=layout.dtype, device=layout.device)
            at_read, at_found = upload(absent, layout.device), upload(here, layout.device)
            row.index_copy_(3, at_read, read).index_copy_(3, at_found, found)
        return row, (*temporaries, tokens, read, found, at_read, at_found, row)

    def _end(self, copy: _Copy, temporaries: tuple[Tensor, ...]) -> None:
        """Note what the device does with the frames of a copy, and let go of them."""
        clock = self._clock
        if clock.backend is not None and len(copy.frames):
            done = clock.stamp(clock.current(), temporaries)
            with gate.lock, self._lock:
                self._uses = merge(self._uses, done)
        copy.frames = NO_FRAMES

    # Frames ----------------------------------------------------------------------------------------------------------

    def _frames_in(self, slots: SlotArray) -> SlotArray:
        """The frame of each slot, 0 where it has none."""
        frames = self._frame_of[slots]
        return np.where(self._slot_of[frames] == slots, frames, 0)

    def _new_copy(self, frames: SlotArray) -> _Copy:
        """Have frames stay what they are as long as this lives. The lock held."""
        copy = _Copy(frames[frames > 0])
        self._copies = [*filter(_is_alive, self._copies), ref(copy)]
        return copy

    def _frames_of(self, slots: SlotArray) -> tuple[SlotArray, _Copy]:
        """The frames of slots that are about to be read, 0 for those in the file."""
        with gate.lock, self._lock:
            frames = self._frames_in(slots)
            copy = self._new_copy(frames)
            self._was_read[copy.frames] = True
            self._copy_counts[copy.frames] += 1
        return frames, copy

    def _frames_for(self, slots: SlotArray, file: SlotFile, host: HostSlots) -> tuple[SlotArray, _Copy]:
        """Frames for slots that are about to be stored; 0 for those that there is none for."""
        for _ in range(ATTEMPTS):
            with gate.lock, self._lock:
                uses, frames = self._uses, self._frames_in(slots)
                chosen = self._choose(int(np.count_nonzero(frames == 0)), frames)
                leaving, of_slots = self._leaving(chosen), self._slot_of[chosen]
                copy = self._new_copy(np.concatenate([frames, chosen]))
                if not leaving.any() and (not uses or not of_slots.any()):
                    return self._assign(slots, frames, chosen), copy
                counts = self._copy_counts[chosen]
            try:
                # Others may read what is paged out meanwhile, and store into what nothing named when it was chosen:
                # their copies may be over for the host by the second look, and not for the device.
                # The device may be at what nothing names, too: only slots have ticks that the next stream waits for.
                if not self._clock.synchronize(uses, self._seconds):
                    raise TimeoutError(f"the device still used the tier's memory after {self._seconds:g} s")
                if leaving.any():
                    file.write(of_slots[leaving], _as_records(host.read(chosen[leaving])))
            except BaseException:
                copy.frames = NO_FRAMES
                raise
            with gate.lock, self._lock:
                self.written_count += int(np.count_nonzero(leaving))
                mine, copy.frames = copy.frames, NO_FRAMES
                fit = (self._copy_counts[chosen] == counts) & ~np.isin(chosen, self._in_use())
                self._slot_of[chosen[leaving & fit]] = 0
                if fit.all():
                    copy.frames = mine
                    return self._assign(slots, frames, chosen), copy
        with gate.lock, self._lock:
            frames = self._frames_in(slots)
            return self._assign(slots, frames, NO_FRAMES), self._new_copy(frames)

    def _leaving(self, chosen: SlotArray) -> Bools:
        """Which of some frames have tokens that an entry names: they have to be paged out."""
        of_slots = self._slot_of[chosen]
        leaving: Bools = (of_slots > 0) & (self._frame_of[of_slots] == chosen)
        if leaving.any():
            leaving[leaving] = self._are_named(of_slots[leaving])
        return leaving

    def _choose(self, count: int, but: SlotArray) -> SlotArray:
        """Up to `count` frames that no copy has: those of no tokens, then those not read for a turn. The lock held.

        In the order of a clock whose hand passes over what was read since it last came by (second chance).
        """
        in_use = np.concatenate([self._in_use(), but])
        found: list[SlotArray] = []
        left = 2 * self.num_frames
        while count and left > 0:
            size = min(max(2 * count, FRAMES_LOOKED_AT), self.num_frames - self._hand, left)
            frames = np.arange(self._hand + 1, self._hand + 1 + size, dtype=np.int64)
            can = ~np.isin(frames, in_use)
            has_tokens = self._leaving(frames)
            alive = frames[can & has_tokens & ~self._was_read[frames]]
            fit = np.concatenate([frames[can & ~has_tokens], alive])[:count]
            passed = size if len(fit) < count else int(fit.max()) - self._hand
            self._was_read[frames[:passed]] = False
            self._hand = (self._hand + passed) % self.num_frames
            found.append(fit)
            in_use = np.concatenate([in_use, fit])
            count, left = count - len(fit), left - passed
        return np.concatenate(found) if found else NO_FRAMES

    def _assign(self, slots: SlotArray, frames: SlotArray, chosen: SlotArray) -> SlotArray:
        """Give chosen frames to slots that have none; returns those of all, 0 where they were short. The lock held."""
        without = np.flatnonzero(frames == 0)[: len(chosen)]
        frames = frames.copy()
        frames[without] = chosen
        self._slot_of[chosen] = slots[without]
        self._frame_of[slots[without]] = chosen
        self._copy_counts[frames[frames > 0]] += 1
        return frames

    def _in_use(self) -> SlotArray:
        """Frames of copies under way. The lock held."""
        alive = [copy.frames for made in self._copies if (copy := made()) is not None]
        return np.concatenate([NO_FRAMES, *alive])


def _is_alive(copy: ref[_Copy]) -> bool:
    return copy() is not None


def _as_records(tokens: Tensor) -> Records:
    """Tokens in host memory, contiguous, as bytes: one row for each."""
    return tokens.view(len(tokens), -1).view(torch.uint8).numpy()
