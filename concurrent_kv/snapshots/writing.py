"""A snapshot into a file: beside its name, to the disk, then renamed: there is the older file or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count

from ..errors import KVCacheError, SnapshotWriteError
from .contents import Contents, to_parts
from .form import DTYPES, FORMAT, TENSORS, VERSION, header_checksum, layout_form, new_checksum, require_safetensors

try:
    import fcntl
except ImportError:  # not on Windows: what a killed process leaves, stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["write_file"]

_numbers = count()


def write_file(path: str, contents: Contents, tokens: Iterable[memoryview]) -> int:
    """Write a snapshot; `tokens` are the bytes of all slots in their order. Returns the bytes of the file.

    Raises:
        SnapshotWriteError: the system said no; an older file of that name is as it was.
    """
    safetensors = require_safetensors()
    parts = to_parts(contents)
    layout = contents.layout
    dtype = next(name for name, of in DTYPES.items() if of is layout.dtype)
    slots = [contents.slots, 2 * layout.num_layers, layout.num_heads, layout.head_dim]
    shapes = {name: (kind or dtype, [len(parts[name])] if kind else slots) for name, kind in TENSORS.items()}
    sizes = {name: part.nbytes for name, part in parts.items()} | {"slots": contents.slots * layout.bytes_per_token}
    checksums = dict.fromkeys(TENSORS, "0" * 16)

    def header() -> bytes:
        metadata = {"format": FORMAT, "version": str(VERSION), "layout": layout_form(layout)}
        metadata["checksums"] = json.dumps(checksums)
        metadata["checksum"] = header_checksum(metadata, shapes)
        said: dict[str, object] = {"__metadata__": metadata}
        start = 0
        for name, (kind, shape) in shapes.items():
            said[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start := start + sizes[name]]}
        text = json.dumps(said, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    with _beside(path) as (file, name):
        first = header()
        _write_all(file, len(first).to_bytes(8, "little") + first)
        summed = new_checksum()
        for chunk in tokens:
            summed.update(chunk)
            _write_all(file, chunk)
        checksums["slots"] = summed.hexdigest()
        for part, numbers in parts.items():
            data = numbers.data.cast("B") if numbers.nbytes else memoryview(b"")
            checksums[part] = new_checksum(data).hexdigest()
            _write_all(file, data)
        # The checksums are known by now, and have the same length.
        file.seek(8)
        _write_all(file, header())
        os.fsync(file.fileno())
        with safetensors.safe_open(name, "numpy"):  # raises unless it reads as what it is to be
            pass
        return os.fstat(file.fileno()).st_size


def _write_all(file: FileIO, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left.nbytes:
        left = left[file.write(left) :]


@contextmanager
def _beside(path: str) -> Iterator[tuple[FileIO, str]]:
    """A new file in the same folder, which gets the name `path` at the end, if nothing was raised; else it is gone."""
    folder, base = os.path.split(path)
    folder = folder or os.curdir
    try:
        _remove_left_over(folder, base)
        file, name = _new_file(folder, base)
        try:
            yield file, name
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        finally:
            file.close()
        _make_durable(folder)
    except OSError as error:
        if isinstance(error, KVCacheError):  # of the pool, whose waits end with one of the system's
            raise
        raise SnapshotWriteError(
            f"the snapshot {path} could not be written: {error}; an older file of that name is as it was",
            path=path,
            errno=error.errno,
        ) from error


def _new_file(folder: str, base: str) -> tuple[FileIO, str]:
    """A new file, locked for as long as it is open, and its name."""
    while True:
        name = os.path.join(folder, f".{base}.{os.getpid()}-{next(_numbers)}.partial")
        file = FileIO(name, "x+")
        if fcntl is None:
            return file, name
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            # Another save may have taken it for what a killed process left, before it was locked.
            if os.fstat(file.fileno()).st_nlink:
                return file, name
        except BaseException:
            file.close()
            with suppress(OSError):
                os.unlink(name)
            raise
        file.close()


def _make_durable(folder: str) -> None:
    """Have the folder's entries on the disk, where the system can say so."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove_left_over(folder: str, base: str) -> None:
    """Remove what processes that were killed while they wrote this name have left: files that none has locked."""
    if fcntl is None:
        return
    for name in os.listdir(folder):
        if name.startswith(f".{base}.") and name.endswith(".partial"):
            with suppress(OSError), FileIO(os.path.join(folder, name)) as file:  # another save removed it, or has it
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(folder, name))
