"""What the pictures of a sweep show: rows, gathered into panels. Nothing is drawn here.

Lines go over the setting with most numbers, one line a design; another setting with numbers makes a heat map with it;
what else varies makes small multiples. Seeds are not an axis: a point is their mean, with the standard deviation as its
bar.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import parse_size
from ..studies.collect import finite
from ..studies.settings import written

METRICS = {
    "slow_down": ("Slow-down against native, estimated", "times"),
    "exits_total": ("VM exits", "exits"),
    "pages_mean": ("Shadow pages in use, mean", "pages"),
}
"""Figures that are drawn: title, and what an axis calls it."""
PANELS = 12
"""Small multiples of a figure, at most."""


@dataclasses.dataclass(frozen=True)
class Spot:
    """A mean over `count` seeds. x: None if the setting makes no difference. spread: standard deviation."""

    x: float | None
    label: str
    y: float
    spread: float
    low: float
    high: float
    count: int


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines: by design its spots, in the order of x. names: of x where it is no number."""

    title: str
    axis: str
    log: bool
    names: tuple[str, ...]
    lines: Mapping[str, Sequence[Spot]]


@dataclasses.dataclass(frozen=True)
class Map:
    """A heat map: rows of y down, columns of x across, None where there is no point."""

    title: str
    x_axis: str
    y_axis: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


NONE = "none"
"""A setting that is set to nothing; None in a row is one that the design has not."""


def number(value: Any) -> float | None:
    """A setting as a number: a size as its bytes."""
    if finite(value):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"\d+ ?[KMGT]i?B", value):
        return float(parse_size(value))
    return None


class Shown:
    """The rows of a sweep with the part that each axis has in pictures. across: the axis of lines, or None; down: the
    other one of heat maps, or None; apart: those of small multiples."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], axes: Iterable[str]) -> None:
        self.rows = [row for row in rows if row["status"] == "done"]
        varied = [name for name in axes if name not in ("design", "seed")]
        counts = {name: len({row[name] for row in self.rows if row[name] not in (None, NONE)}) for name in varied}
        # Also an axis of one number, where the others have none: its values are then one and "makes no difference".
        numeric = [n for n in varied if counts[n] and all(_numeric(row[n]) for row in self.rows)]
        numeric.sort(key=lambda name: -counts[name])
        self.across = numeric[0] if numeric and counts[numeric[0]] > 1 else None
        self.down = numeric[1] if len(numeric) > 1 and counts[numeric[1]] > 1 and self.across else None
        self.apart = [name for name in varied if name not in (self.across,)]
        self.designs = list(dict.fromkeys(str(row["design"]) for row in self.rows))

    def panels(self, metric: str) -> list[Panel]:
        """Lines of a figure, a panel for each combination of what is apart."""
        found = []
        for title, rows in self._facets(self.apart if self.across else []):
            found.append(self._panel(title, rows, metric))
        return [panel for panel in found if any(panel.lines.values())]

    def maps(self, metric: str) -> list[Map]:
        """Heat maps of a figure, one for each design and combination of what is neither across nor down."""
        if self.down is None or self.across is None:
            return []
        found = []
        for title, rows in self._facets([name for name in self.apart if name != self.down]):
            for design in self.designs:
                mine = [row for row in rows if row["design"] == design]
                made = self._map(", ".join(filter(None, (design, title))), mine, metric)
                if made is not None:
                    found.append(made)
        return found

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Header and rows: a row for each design and combination, seeds taken together."""
        labels = ["design", *(name for name in (self.across, *self.apart) if name)]
        head = [*labels, "seeds"]
        for title, _ in METRICS.values():
            head += [title, "\u00b1"]
        made = []
        for key, rows in _grouped(self.rows, labels).items():
            line: list[Any] = [*key, len(rows)]
            for metric in METRICS:
                spot = _spot(rows, metric, None, "")
                line += [None, None] if spot is None else [spot.y, spot.spread if spot.count > 1 else None]
            made.append(line)
        return head, made

    def _facets(self, names: Sequence[str]) -> list[tuple[str, list[Mapping[str, Any]]]]:
        grouped = _grouped(self.rows, names)
        found = []
        for key, rows in grouped.items():
            title = ", ".join(
                str(value) if name in ("source", "costs") else f"{name} {written(value)}"
                for name, value in zip(names, key, strict=True)
                if value is not None
            )
            # What has not the setting of a panel belongs to each of them: native, whatever the pool.
            free = [name for name, value in zip(names, key, strict=True) if value is None]
            if free and len(grouped) > 1 and self._covered(names, key, free, grouped):
                continue
            mine = list(rows)
            for other, more in grouped.items():
                if other != key and _covers(names, other, key):
                    mine += more
            found.append((title, mine))
        return found

    @staticmethod
    def _covered(names: Sequence[str], key: tuple[Any, ...], free: Sequence[str], grouped: Mapping[Any, Any]) -> bool:
        return any(other != key and _covers(names, key, other) for other in grouped)

    def _panel(self, title: str, rows: Sequence[Mapping[str, Any]], metric: str) -> Panel:
        if self.across is None:
            return self._bars(title, rows, metric)
        values = sorted({x for row in rows if (x := number(row[self.across])) is not None})
        lines: dict[str, list[Spot]] = {}
        for design in self.designs:
            mine = [row for row in rows if row["design"] == design]
            spots = []
            for (value,), same in _grouped(mine, [self.across]).items():
                spot = _spot(same, metric, number(value), "" if value is None else f"{self.across} {written(value)}")
                if spot is not None:
                    spots.append(spot)
            lines[design] = sorted(spots, key=lambda spot: -math.inf if spot.x is None else spot.x)
        log = len(values) > 2 and values[0] > 0 and values[-1] / values[0] >= 16
        return Panel(title, self.across, log, (), lines)

    def _bars(self, title: str, rows: Sequence[Mapping[str, Any]], metric: str) -> Panel:
        """No setting with numbers: what varies stands side by side."""
        names = self.apart
        keys = list(_grouped(rows, names))
        labels = [
            ", ".join(
                str(v) if n in ("source", "costs") else f"{n} {written(v)}" for n, v in zip(names, key, strict=True)
            )
            for key in keys
        ]
        lines: dict[str, list[Spot]] = {}
        for design in self.designs:
            spots = []
            for place, key in enumerate(keys):
                same = [row for row in rows if row["design"] == design and tuple(row[n] for n in names) == key]
                # Side by side, so that none covers another.
                beside = 0.6 * ((self.designs.index(design) + 0.5) / len(self.designs) - 0.5)
                spot = _spot(same, metric, place + beside, labels[place])
                if spot is not None:
                    spots.append(spot)
            lines[design] = spots
        return Panel(title, ", ".join(names), False, tuple(labels) or ("",), lines)

    def _map(self, title: str, rows: Sequence[Mapping[str, Any]], metric: str) -> Map | None:
        assert self.across is not None
        assert self.down is not None
        found = {}
        for (x, y), same in _grouped(rows, [self.across, self.down]).items():
            spot = _spot(same, metric, 0, "")
            if spot is not None and x is not None and y is not None:
                found[x, y] = spot.y
        columns = sorted({x for x, _ in found}, key=_order)
        down = sorted({y for _, y in found}, key=_order)
        if len(columns) < 2 or len(down) < 2:
            return None
        values = tuple(tuple(found.get((x, y)) for x in columns) for y in down)
        return Map(title, self.across, self.down, tuple(map(written, columns)), tuple(map(written, down)), values)


def _numeric(value: Any) -> bool:
    return value in (None, NONE) or number(value) is not None


def _order(value: Any) -> float:
    found = number(value)
    return math.inf if found is None else found


def _covers(names: Sequence[str], general: tuple[Any, ...], special: tuple[Any, ...]) -> bool:
    """The one has no value, or the same, wherever the other has one."""
    return all(a is None or a == b for a, b in zip(general, special, strict=True)) and len(names) > 0


def _grouped(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _spot(rows: Sequence[Mapping[str, Any]], metric: str, x: float | None, label: str) -> Spot | None:
    values = [float(row[metric]) for row in rows if finite(row[metric])]
    if not values:
        return None
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else 0.0
    return Spot(x, label, mean, spread, min(values), max(values), len(values))
