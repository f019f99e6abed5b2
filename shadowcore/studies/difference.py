"""Two saved studies, or sweeps: what changed from one to the other.

A saved study is what `shadowcore compare --json` prints, with `--over` or without; a saved sweep what `sweep --json`
and `collect --json` print, or a folder of results. They are compared case by case: a case is a design on a workload or
recording with one set of settings.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from ..files import check_path
from .collect import FIGURES, collect
from .settings import near, written

GATED = ("exits_total", "cycles", "slow_down")
"""Figures by which a change is judged, where nothing else is said."""
_UNTIMED = ("seconds", "microseconds", "operations_done", "operations_per_second", "clock_ghz")
"""Figures that say nothing of a design, or the same as another one."""
_SAME = ("history", "history_equal", "gpa_mismatches", "status")
"""What the guest did: a change of these is one whatever its size."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure of a case that is not what it was: None where it is not there. share: of the first, None without one."""

    case: str
    figure: str
    first: Any
    second: Any

    @property
    def share(self) -> float | None:
        """By how much it grew, as a share of the first."""
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (self.first, self.second))
        return (self.second - self.first) / abs(self.first) if numbers and self.first else None


@dataclasses.dataclass(frozen=True)
class Difference:
    """What changed. cases, figures: compared. settings: of the studies as a whole, as (name, first, second).
    first_only, second_only: cases that the other one has not."""

    cases: int
    figures: int
    changes: tuple[Change, ...]
    settings: tuple[tuple[str, Any, Any], ...]
    first_only: tuple[str, ...]
    second_only: tuple[str, ...]

    def over(self, share: float, figures: Iterable[str] = GATED) -> tuple[Change, ...]:
        """Changes that are too much: a figure that grew by more than this share, one that is gone or came from 0, and
        whatever says that the guest did something else."""
        gated = set(figures)
        found = []
        for change in self.changes:
            if change.figure in _SAME:
                found.append(change)
            elif change.figure in gated:
                grown = change.share
                if grown is None:
                    numbers = isinstance(change.first, (int, float)) and isinstance(change.second, (int, float))
                    bad = not numbers or change.second > change.first
                else:
                    bad = grown > share
                if bad:
                    found.append(change)
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        changes = [dataclasses.asdict(change) | {"share": change.share} for change in self.changes]
        settings = [dict(zip(("name", "first", "second"), each, strict=True)) for each in self.settings]
        plain = {"cases": self.cases, "figures": self.figures, "changes": changes, "settings": settings}
        return plain | {"first_only": list(self.first_only), "second_only": list(self.second_only)}


def difference(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> Difference:
    """Compare two saved studies. ConfigError: one cannot be read, or they have nothing in common."""
    one, two = (_Saved(check_path(path, "path")) for path in (first, second))
    if one.kind != two.kind:
        raise ConfigError(f"{second}: {one.kind} is needed to compare with {first}, this is {two.kind}")
    common = [case for case in one.cases if case in two.cases]
    if not common:
        raise ConfigError(
            f"{second}: it has no case in common with {first}: {_some(two.cases)} there, {_some(one.cases)} here"
        )
    changes, figures = [], 0
    for case in common:
        a, b = one.cases[case], two.cases[case]
        for name in dict.fromkeys((*a, *b)):
            figures += 1
            if a.get(name) != b.get(name):
                changes.append(Change(case, name, a.get(name), b.get(name)))
    names = dict.fromkeys((*one.settings, *two.settings))
    settings = [
        (n, one.settings.get(n), two.settings.get(n)) for n in names if one.settings.get(n) != two.settings.get(n)
    ]
    return Difference(
        cases=len(common),
        figures=figures,
        changes=tuple(changes),
        settings=tuple(each for each in settings if each[1] != each[2]),
        first_only=tuple(case for case in one.cases if case not in two.cases),
        second_only=tuple(case for case in two.cases if case not in one.cases),
    )


def check_figures(names: Iterable[str], found: Difference, first: str, second: str) -> None:
    """ConfigError for a figure that no case has."""
    known = _Saved(first).figures() | _Saved(second).figures()
    for name in names:
        if name not in known:
            raise ConfigError(f"figure: there is no {name!r}; {near(name, sorted(known))}")


def _some(cases: Iterable[str]) -> str:
    listed = list(cases)
    return ", ".join(listed[:2]) + (", ..." if len(listed) > 2 else "")


class _Saved:
    """Figures by case, and settings."""

    def __init__(self, path: str) -> None:
        self.cases: dict[str, dict[str, Any]] = {}
        self.settings: dict[str, Any] = {}
        self.kind = "a study"
        if os.path.isdir(path):
            plain: Any = collect(path).as_dict()
        else:
            try:
                with open(path, "rb") as file:
                    plain = json.load(file)
            except OSError as error:
                raise ConfigError(f"{path}: it cannot be read: {error.strerror or error}") from None
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: no JSON: {error}") from None
        try:
            self._take(plain)
        except (KeyError, TypeError, AttributeError, ValueError):
            self.cases = {}
        if not self.cases:
            raise ConfigError(
                f"{path}: a study is needed, as `shadowcore compare --json` or `collect --json` prints it"
            )

    def figures(self) -> set[str]:
        return {name for case in self.cases.values() for name in case}

    def _take(self, plain: dict[str, Any]) -> None:
        if "rows" in plain:
            self.kind = "a sweep"
            labels = [name for row in plain["rows"][:1] for name in row if name not in FIGURES]
            varied = [name for name in labels if name in ("source", "design", *plain["axes"])]
            self.settings = {"results": plain["results"]}
            for name in labels:
                if name not in (*varied, "status", "error"):
                    self.settings[name] = plain["rows"][0][name]
            for row in plain["rows"]:
                case = _case({name: row[name] for name in varied})
                self.cases[case] = _figures({n: row[n] for n in row if n in FIGURES or n == "status"})
            return
        if "studies" in plain:
            self.kind = "a study over values"
            over = plain["over"]
            names = [over] if isinstance(over, str) else list(over)
            for value, study in zip(plain["values"], plain["studies"], strict=True):
                values = [value] if isinstance(over, str) else value
                self._study(study, dict(zip(names, values, strict=True)), set(names))
            return
        self._study(plain, {}, set())

    def _study(self, study: Mapping[str, Any], labels: Mapping[str, Any], varied: set[str]) -> None:
        self.settings |= {name: value for name, value in study["settings"].items() if name not in varied}
        for name, design in study["designs"].items():
            case = _case({"source": study["workload"], "design": name} | dict(labels))
            self.cases[case] = _figures(dict(_flat(design)))


def _case(labels: Mapping[str, Any]) -> str:
    source, design = labels["source"], labels["design"]
    more = [f"{n}={written(v)}" for n, v in labels.items() if n not in ("source", "design") and v is not None]
    return " ".join((f"{source}, {design}", *more))


def _flat(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}_")
        elif not isinstance(value, list):
            yield prefix + name, value


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in _UNTIMED and (number or name in _SAME) and value is not None:
            kept[name] = value
    return kept
