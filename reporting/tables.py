"""Tables that fit 80 columns, whatever they hold: those that do not are shown in parts."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from reporting.machine import about, in_words

__all__ = ["WIDTH", "Grid", "console_of", "origin", "pairs"]

WIDTH = 80  # columns
NARROWEST_HEADING = 10  # columns, which a heading may have however short its figures are
WIDEST_NAME, WIDEST_CELL = 34, 42  # columns, from which on a row's name, and what it says, are broken at their spaces
INDENT = "  "


def console_of(*, stderr: bool = False) -> Console:
    """A console of 80 columns, or fewer where the terminal has fewer."""
    console = Console(stderr=stderr, highlight=False)
    return Console(stderr=stderr, highlight=False, width=min(WIDTH, console.width) if console.is_terminal else WIDTH)


def origin(found: dict[str, Any] | None = None) -> Padding:
    """Date, commit and machine, as they stand beneath what is printed; of now if left out."""
    return beneath(Text(in_words(about() if found is None else found), style="dim"))


def beneath(shown: RenderableType) -> Padding:
    """With an empty line after it."""
    return Padding(shown, (0, 0, 1, 0), expand=False)


@dataclass
class Grid:
    """A table of names and figures.

    Where it is wider than the console, its columns stand in several parts, each of which has the names again. Nothing
    is cut off; long names and headings are broken at their spaces, figures never.

    Attributes:
        keys: how many columns, from the left, name a row: 1 or 2. Of two the first stands above its rows.
        legend: what abbreviations mean, beneath it.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    keys: int = 1
    legend: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        if self.rows:
            yield from self._parts(console, options)
        if self.legend:
            yield Text(self.legend, style="dim")

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[Padding]:
        unbounded = options.update(max_width=10_000)

        def fits(columns: Sequence[int]) -> bool:
            return Measurement.get(console, unbounded, self._part(columns)).maximum <= options.max_width

        chosen: list[int] = []
        for column in range(self.keys, len(self.columns)):
            if chosen and not fits([*chosen, column]):
                yield beneath(self._part(chosen))
                chosen = []
            chosen.append(column)
        yield beneath(self._part(chosen))

    def _part(self, columns: Sequence[int]) -> Table:
        """The names, and some of the columns."""
        name = self.keys - 1
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column(_broken(self.columns[name], WIDEST_NAME), no_wrap=True)
        for column in columns:
            longest = min(max(len(row[column]) for row in self.rows), WIDEST_CELL)
            longest = max(longest, NARROWEST_HEADING)
            table.add_column(_broken(self.columns[column], longest), justify="right", no_wrap=True)
        above = None
        for row in self.rows:
            if self.keys == 2 and row[0] != above:
                above = row[0]
                table.add_row(Text(_broken(above, WIDEST_NAME), style="bold"))
            indent = INDENT if self.keys == 2 else ""
            cells = [Text(_broken(row[column], WIDEST_CELL)) for column in columns]
            table.add_row(Text(textwrap.indent(_broken(row[name], WIDEST_NAME), indent)), *cells)
        return table

    def as_markdown(self) -> str:
        """Without the title, in one part."""
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|" + "|".join("---:" if number else "---" for number in range(len(self.columns))) + "|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def pairs(title: str) -> Table:
    """A table of what and how much, to which rows are added; long ones go on in the next line."""
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _broken(text: str, width: int) -> str:
    """At its spaces, into lines of so many columns where its words allow it."""
    longest_word = max(map(len, re.split(r"\s+", text)), default=0)
    return "\n".join(textwrap.wrap(text, max(width, longest_word, 1), break_on_hyphens=False)) or text
