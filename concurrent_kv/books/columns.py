"""Small tables for a terminal: what `print` shows of statistics and of plans."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["in_columns", "shown_bytes"]


def in_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each, below each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def shown_bytes(nbytes: int) -> str:
    """A number of bytes in the largest unit of which there is one: "1.5 MiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{nbytes} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
