"""A snapshot from its file: opened, checked against its checksums, and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from io import FileIO
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..device.layout import KVLayout
from ..errors import InvalidArgumentError, InvalidTypeError, SnapshotDamagedError, SnapshotVersionError
from .contents import Contents, Numbers, SnapshotInfo, from_parts
from .form import (
    DTYPES,
    FORMAT,
    TENSORS,
    VERSION,
    header_checksum,
    layout_of,
    nbytes_of,
    new_checksum,
    require_safetensors,
)

__all__ = ["CHUNK_BYTES", "SnapshotFile", "describe", "path_of"]

CHUNK_BYTES = 8 << 20
OPENED_AT_MOST = 16  # times, where a save gives the name to another file just then
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError)


def path_of(path: object) -> str:
    """A path as text, or an error that names the argument."""
    try:
        found = os.fspath(path)  # type: ignore[call-overload]
    except TypeError as error:
        raise InvalidTypeError(f"path must be a str or a path, got {type(path).__name__}") from error
    if not isinstance(found, str):
        raise InvalidTypeError(f"path must be a str or a path, got {type(path).__name__}")
    if not found or "\0" in found:
        raise InvalidArgumentError(f"path must name a file, got {found!r}")
    return found


def describe(path: str | os.PathLike[str]) -> SnapshotInfo:
    """What a snapshot holds, its tokens unread: the layout, and each pool's entries, slots and sizes.

    Raises:
        SnapshotError: it is damaged, no snapshot, or of a later format. OSError: there is no such file.
        ImportError: safetensors is not installed.
    """
    with SnapshotFile(path_of(path)) as file:
        return file.contents().info(file.format_version)


class SnapshotFile:
    """An open snapshot, one file from the beginning to the end, whatever gets its name meanwhile.

    Args:
        path: its name.

    Attributes:
        layout: of its tokens, on a CPU.
        slots: how many it has.
        format_version: of the file.

    Raises:
        SnapshotDamagedError, SnapshotVersionError: as `describe`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._safetensors = require_safetensors()
        self._file = FileIO(path)
        try:
            metadata, shapes = self._header()
            self._check_header(metadata, shapes)
            self._checksums = self._checked_checksums(metadata)
            dtype, shape = shapes["slots"]
            self.slots = shape[0]
            try:
                self.layout: KVLayout = layout_of(metadata["layout"], dtype)
            except MALFORMED as error:
                self._refuse(f"its layout is none: {error}", error)
            layout = self.layout
            if shape[1:] != [2 * layout.num_layers, layout.num_heads, layout.head_dim]:
                self._refuse(f"its slots have the shape {shape}, which is not that of its layout")
            self._shapes = shapes
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> tuple[dict[str, str], dict[str, tuple[str, list[int]]]]:
        """Metadata, and dtype and shape of each tensor, as safetensors finds them in the file that is open."""
        for _ in range(OPENED_AT_MOST):
            try:
                with self._safetensors.safe_open(self.path, "numpy") as opened:
                    metadata = opened.metadata() or {}
                    slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                    shapes = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
            except self._safetensors.SafetensorError as error:
                if self._is_at_path():
                    self._refuse(f"safetensors says: {error}", error)
            else:
                if self._is_at_path():
                    return metadata, shapes
            self._file.close()
            self._file = FileIO(self.path)
        self._refuse("its name was given to other files again and again while it was opened")

    def _is_at_path(self) -> bool:
        """Whether the name is still that of the open file: a save may have given it to another one just now."""
        here, there = os.fstat(self._file.fileno()), os.stat(self.path)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def _check_header(self, metadata: dict[str, str], shapes: dict[str, tuple[str, list[int]]]) -> None:
        if metadata.get("format") != FORMAT:
            self._refuse("it is no snapshot of a pool or manager")
        version = metadata.get("version", "")
        if not version.isdecimal() or not 0 < len(version) < 10:
            self._refuse("it states no version of its format")
        self.format_version = int(version)
        if self.format_version > VERSION:
            raise SnapshotVersionError(
                f"the snapshot {self.path} is of version {version} of the format, and this package reads up to "
                f"{VERSION}: a later version of concurrent_kv reads it",
                path=self.path,
                version=self.format_version,
                readable=VERSION,
            )
        if metadata.get("checksum") != header_checksum(metadata, shapes):
            self._refuse("its header is not what was written")
        # One without bytes is where the next begins: those have no order.
        filled = [name for name, (_, shape) in shapes.items() if 0 not in shape]
        if {*shapes} != {*TENSORS} or filled != [name for name in TENSORS if name in filled]:
            self._refuse("its tensors are not those of a snapshot")
        if any(
            dtype != (TENSORS[name] or dtype) or len(shape) != (1 if TENSORS[name] else 4)
            for name, (dtype, shape) in shapes.items()
        ):
            self._refuse("its tensors are of other dtypes and dimensions than those of a snapshot")
        if shapes["slots"][0] not in DTYPES:
            self._refuse(f"its slots are of the dtype {shapes['slots'][0]}")
        begin = 8 + int.from_bytes(self._read_at(0, 8), "little")
        self._begins = {}
        for name in TENSORS:
            self._begins[name] = begin
            begin += nbytes_of(*shapes[name])
        if begin != os.fstat(self._file.fileno()).st_size:
            self._refuse("it has another size than its header says")

    def _checked_checksums(self, metadata: dict[str, str]) -> dict[str, str]:
        try:
            found = {name: str(text) for name, text in json.loads(metadata["checksums"]).items()}
        except MALFORMED as error:
            self._refuse("its checksums are none", error)
        if list(found) != list(TENSORS):
            self._refuse("its checksums are not those of its tensors")
        return found

    def contents(self) -> Contents:
        """All but the tokens, checked."""
        parts = {name: self._part(name) for name in TENSORS if name != "slots"}
        try:
            return from_parts(self.layout, self.slots, parts)
        except MALFORMED as error:
            self._refuse(str(error), error)

    def _part(self, name: str) -> npt.NDArray[Any]:
        dtype, shape = self._shapes[name]
        data = self._read_at(self._begins[name], nbytes_of(dtype, shape))
        if new_checksum(data).hexdigest() != self._checksums[name]:
            self._refuse(f"its {name} are not what was written")
        return np.frombuffer(data, dtype="<i4" if dtype == "I32" else np.uint8)

    def check_tokens(self) -> None:
        """Raise unless the tokens are what was written. Reads all of them."""
        summed, chunk = new_checksum(), bytearray(CHUNK_BYTES)
        begin, left = self._begins["slots"], self.slots * self.layout.bytes_per_token
        while left:
            part = memoryview(chunk)[: min(left, CHUNK_BYTES)]
            self._read_into(begin, part)
            summed.update(part)
            begin, left = begin + len(part), left - len(part)
        if summed.hexdigest() != self._checksums["slots"]:
            self._refuse("its tokens are not what was written")

    def tokens(self, numbers: Numbers) -> Iterator[tuple[int, Tensor]]:
        """The tokens of some slots, ascending numbers, in chunks: where each begins in `numbers`, and its tokens.

        Each is `[slots, 2 * layers, heads, head_dim]` in host memory, which the next one takes.
        """
        layout = self.layout
        per_chunk = max(1, CHUNK_BYTES // layout.bytes_per_token)
        shape = (2 * layout.num_layers, layout.num_heads, layout.head_dim)
        buffer = torch.empty(per_chunk * layout.bytes_per_token, dtype=torch.uint8, device="cpu")
        at = 0
        while at < len(numbers):
            ahead = numbers[at : at + per_chunk]
            run = int(np.searchsorted(ahead - ahead[0] != np.arange(len(ahead)), True))
            part = buffer[: run * layout.bytes_per_token]
            begin = self._begins["slots"] + int(ahead[0]) * layout.bytes_per_token
            self._read_into(begin, part.numpy().data)
            yield at, part.view(layout.dtype).view(run, *shape)
            at += run

    def _read_at(self, begin: int, size: int) -> bytearray:
        data = bytearray(size)
        self._read_into(begin, memoryview(data))
        return data

    def _read_into(self, begin: int, data: memoryview) -> None:
        self._file.seek(begin)
        while len(data):
            read = self._file.readinto(data)
            if not read:
                self._refuse("it is cut short")
            data = data[read:]

    def _refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise SnapshotDamagedError(
            f"the snapshot {self.path} cannot be read: {what}; it is damaged, or no snapshot: take an older one",
            path=self.path,
        ) from cause

    def __enter__(self) -> SnapshotFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
