"""Arguments of programs, checked before work begins that may take long."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["file_to_write", "port"]

LAST_PORT = 65535


def file_to_write(text: str) -> Path:
    """A path for `add_argument(type=...)`, in a folder that is made if need be; an error where that cannot be."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, and {text} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a file that can be written: {error}") from error
    return path


def port(text: str) -> int:
    """The number of a TCP port for `add_argument(type=...)`; 0: any that is free."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port, 0 to {LAST_PORT}, got {text}")
    return number
