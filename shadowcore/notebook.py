"""What notebooks show: small tables; and pandas, where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .errors import ConfigError


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table: the first column to the left, the others to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ""
    for first, *others in rows:
        cells = "".join(f'<td style="text-align:right">{escape(str(value))}</td>' for value in others)
        body += f'<tr><td style="text-align:left">{escape(str(first))}</td>{cells}</tr>'
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f"<table><caption>{escape(title)}</caption>{head}<tbody>{body}</tbody></table>"


def counters(title: str, counts: Mapping[str, int]) -> str:
    """A table of the counters that are not 0."""
    rows = [(name, f"{count:,}") for name, count in counts.items() if count]
    return table(title, ("counter", "count"), rows or [("all", 0)])


def pandas() -> Any:
    """The package; ConfigError that says what to do where it is not installed."""
    try:
        return importlib.import_module("pandas")
    except ImportError:
        raise ConfigError("pandas: it is not installed; pip install pandas") from None


_TOP = '<td style="text-align:left;vertical-align:top">{}</td>'


def columns(title: str, cells: Mapping[str, Sequence[str]]) -> str:
    """An HTML table of columns of any lengths: by the header of each its cells, which are HTML already."""
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in cells)
    body = ""
    for row in range(max(map(len, cells.values()), default=0)):
        found = (column[row] if row < len(column) else "" for column in cells.values())
        body += f"<tr>{''.join(_TOP.format(cell) for cell in found)}</tr>"
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tree(
    title: str, labels: Mapping[int, str], below: Mapping[int, Sequence[int]], tops: Iterable[int], most: int = 40
) -> str:
    """A tree as nested HTML lists, of `most` lines at most; what is in several places is shown whole at the first."""
    shown: set[int] = set()
    left = most

    def branch(nodes: Iterable[int]) -> str:
        nonlocal left
        lines = ""
        for node in nodes:
            if not left:
                break
            left -= 1
            again = node in shown
            shown.add(node)
            inner = " (above)" if again and below.get(node) else "" if again else branch(below.get(node, ()))
            lines += f"<li>{escape(labels[node])}{inner}</li>"
        return f"<ul>{lines}</ul>" if lines else ""

    body = branch(tops)
    rest = len(labels) - len(shown)
    more = f"<p>and {rest:,} more</p>" if rest else ""
    return f"<p><b>{escape(title)}</b></p>{body}{more}"
