"""Tables on a terminal: no number is ever cut, for a number that is cut looks like a number.

Columns of figures keep their width, labels wrap between words. Where that does not fit, the table is printed in parts,
one below the other, each with the labels before it. Where there is no terminal, a row stays one line of any width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

WIDTH = 100
"""Columns of a table that does not go to a terminal, at least."""
LABEL = 24
"""To how many columns a label may shrink before the table is printed in parts."""
_WIDE = 1 << 14


class Fitting(Console):
    """A console that prints each table so that it fits."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As Console.print, a table in parts where it is too wide. labels: its columns that each part has, 1 if left
        out."""
        labels = options.pop("labels", 1)
        if len(objects) == 1 and isinstance(objects[0], Table):
            self._table(objects[0], labels)
        else:
            super().print(*objects, **options)

    def _table(self, table: Table, labels: int) -> None:
        told = self.width if self.is_terminal else max(self.width, WIDTH)
        made = parts(table, told if self.is_terminal else _WIDE, told, labels)
        style = Style.parse("dim italic")
        if table.title:
            super().print(_text(table.title), style=table.title_style or "bold", width=told)
        for number, part in enumerate(made):
            if number:
                super().print()
            width = self.width
            self.width = max(told, measured(part))
            super().print(part, crop=False)
            self.width = width
        if table.caption:
            super().print()
            super().print(_text(table.caption), style=style, width=told)


def console() -> Fitting:
    """Standard output: the terminal's width, or WIDTH."""
    made = Fitting(highlight=False)
    return made if made.is_terminal else Fitting(highlight=False, width=WIDTH)


def parts(table: Table, width: int, told: int, labels: int = 1) -> list[Table]:
    """The table in as many parts as it takes for each to be no wider than `width`, or than it has to be.

    labels: the columns that each part begins with. told: how wide a part grows for words that would wrap.
    """
    widths = [_widths(column, figures) for column, figures in zip(table.columns, _figures(table), strict=True)]
    groups: list[list[int]] = [[]]
    for number in range(labels, len(widths)):
        tried = [*range(labels), *groups[-1], number]
        if groups[-1] and measured(_part(table, tried, [widths[n][0] for n in tried])) > width:
            groups.append([])
        groups[-1].append(number)
    made = []
    for group in groups:
        chosen = [*range(labels), *group]
        sizes = [widths[n][0] for n in chosen]
        room = min(width, told) - measured(_part(table, chosen, sizes))
        for at, number in enumerate(chosen):
            more = max(min(widths[number][1] - sizes[at], room), 0)
            sizes[at] += more
            room -= more
        made.append(_part(table, chosen, sizes))
    return made


def measured(table: Table) -> int:
    """Columns that it takes."""
    wide = Console(width=_WIDE)
    return Measurement.get(wide, wide.options, table).maximum


def _text(of: Any) -> Text:
    return of if isinstance(of, Text) else Text.from_markup(str(of))


def _figures(table: Table) -> list[bool]:
    """Which columns are never wrapped."""
    return [column.justify == "right" or (column.no_wrap and number > 0) for number, column in enumerate(table.columns)]


def _widths(column: Column, figures: bool) -> tuple[int, int]:
    """To how little the column may shrink, and how much it needs: the same for figures, of which only the title
    wraps."""
    cells = [_text(cell) for cell in column.cells]
    whole = max((line.cell_len for cell in cells for line in cell.split()), default=0)
    title = _text(column.header)
    words = max((len(word) for text in (title, *([] if figures else cells)) for word in text.plain.split()), default=0)
    if figures:
        size = max(whole, words if column.justify == "right" else title.cell_len)
        return size, size
    whole = max(whole, title.cell_len)
    return max(min(whole, LABEL), min(words, whole)), whole


def _part(table: Table, chosen: list[int], sizes: list[int]) -> Table:
    """Some of the columns, as wide as is said, without title and caption, and as all tables look."""
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), show_header=table.show_header)
    for place, (number, size) in enumerate(zip(chosen, sizes, strict=True)):
        column = table.columns[number]
        copied = dataclasses.replace(
            column, _index=place, _cells=list(column._cells), width=size, no_wrap=False, overflow="fold"
        )
        made.columns.append(copied)
    made.rows.extend(table.rows)
    return made
