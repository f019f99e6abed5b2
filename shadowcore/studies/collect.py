"""What sweeps found: a row for each point, as plain types, CSV, Parquet, data frames and in notebooks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from .. import columns, notebook
from ..config import TLB
from ..engine.costs import COMPONENTS, Costs
from ..engine.counters import EXIT_REASONS
from ..engine.levels import Levels
from ..engine.reported import unsync_counts
from ..errors import ConfigError
from ..files import check_path
from .results import write_csv
from .store import MANIFEST, Damaged, Store, unpacked

STATES = ("done", "failed", "missing")
"""Of a point: `missing` has not been run, or not in the folders that were looked at."""
_COUNTERS = {
    "emulated": "pf_emulate",
    "zapped": "mmu_shadow_zapped",
    "flooded": "mmu_flooded",
    "recycled": "mmu_recycled",
    "walk_references": "walk_references",
    "guest_walk_references": "guest_walk_references",
    "tlb_hits": "tlb_hits",
    "tlb_misses": "tlb_misses",
    "accesses": "accesses",
    "faults": "guest_faults",
}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep, or its part that was run, came to.

    manifest: its points and prices, as the store has them. folders: where results are; results: those that are in none,
    by run. there: runs that were done before. seconds: that it took. complete: False if it was interrupted.

    >>> spec = {"sources": ["pingpong"], "designs": ["cached"], "settings": {"pool": [16, 32]}, "operations": 1000}
    >>> found = sc.sweep(spec, jobs=1)
    >>> found.counts()
    {'done': 2, 'failed': 0, 'missing': 0}
    >>> [row["pool"] for row in found.rows()]
    [16, 32]
    """

    manifest: dict[str, Any]
    results: dict[str, bytes] = dataclasses.field(default_factory=dict, repr=False)
    folders: tuple[str, ...] = ()
    there: int = 0
    seconds: float = 0.0
    complete: bool = True

    @property
    def name(self) -> str:
        """What it is called."""
        return str(self.manifest["name"])

    @property
    def axes(self) -> tuple[str, ...]:
        """Columns that take more than one value."""
        return tuple(_column(name) for name in self.manifest["axes"])

    def rows(self) -> list[dict[str, Any]]:
        """A flat row a point, all with the same columns: its labels (source, design, settings, seed, operations asked
        for, costs, prices), `status` (done, failed, missing) and `error`; then what `study` has: exits_total,
        exits_fill, ..., cycles, slow_down against `native`, history_equal (the guest did as under `native`)."""
        return list(self._rows)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        found = _Results(self)
        labels = dict.fromkeys(_column(name) for point in self.manifest["points"] for name in point["labels"])
        rows = [dict.fromkeys(labels) | found.row(point) for point in self.manifest["points"]]
        if found.damaged:
            object.__setattr__(self, "_damaged", len(found.damaged))
        return rows

    @property
    def damaged(self) -> int:
        """Files of results that are cut short or changed, and count as missing."""
        self.rows()
        return int(getattr(self, "_damaged", 0))

    def counts(self) -> dict[str, int]:
        """Points by their status."""
        found = dict.fromkeys(STATES, 0)
        for row in self._rows:
            found[row["status"]] += 1
        return found

    def errors(self) -> list[dict[str, Any]]:
        """The rows of points that failed."""
        return [row for row in self._rows if row["status"] == "failed"]

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        plain = {name: self.manifest[name] for name in ("shadowcore", "results", "name")}
        counted = self.counts() | {"damaged": self.damaged}
        return plain | {"axes": list(self.axes), "points": counted, "complete": self.complete, "rows": self.rows()}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file. OSError where that cannot be done."""
        write_csv(path, self.rows())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """The same in Parquet. ConfigError where pyarrow is not installed."""
        write_parquet(path, self.rows())

    def to_pandas(self) -> Any:
        """The rows as a DataFrame. ConfigError where pandas is not installed."""
        return notebook.pandas().DataFrame(self.rows())

    def _repr_html_(self) -> str:
        named = [*dict.fromkeys(("design", *self.axes)), "exits_total", "cycles", "slow_down"]
        rows = [[_shown(row.get(name)) for name in named] for row in self._rows[:60]]
        more = len(self._rows) - len(rows)
        return notebook.table(_title(self) + (f"; {more:,} more rows" if more else ""), named, rows)

    def __repr__(self) -> str:
        return f"Sweep({_title(self)})"


def collect(*folders: str | os.PathLike[str]) -> Sweep:
    """The results in one or several folders of one sweep. ConfigError: there is none, or they are of several sweeps.

    >>> import tempfile
    >>> spec = {"sources": ["pingpong"], "designs": ["cached"], "seed": [0, 1], "operations": 1000}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = sc.sweep(spec, jobs=1, store=folder)
    ...     sc.collect(folder).counts()
    {'done': 2, 'failed': 0, 'missing': 0}
    """
    if not folders:
        raise ConfigError("collect: at least one folder is needed")
    names = tuple(check_path(folder, "folder") for folder in folders)
    first = None
    for name in names:
        there = Store(name).manifest()
        if there is None:
            raise ConfigError(f"{name}: no sweep is there; its {MANIFEST} is expected")
        if first is None:
            first = there
        elif there != first:
            raise ConfigError(f"{name}: it is of another sweep than {names[0]}")
    assert first is not None
    return Sweep(manifest=first, folders=names)


class _Results:
    """Rows, made of results that are read once."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._stores = [Store(folder) for folder in sweep.folders]
        self._costs = {name: _costs(plain) for name, plain in sweep.manifest["costs"].items()}
        self._natives: dict[str, dict[str, Any] | None] = {}
        self.damaged: set[str] = set()

    def _get(self, key: str) -> dict[str, Any] | None:
        if key in self._sweep.results:
            return unpacked(self._sweep.results[key])
        found = None
        for store in self._stores:
            try:
                found = found or store.read(key)
            except Damaged:
                self.damaged.add(str(store.path(key)))
        return found

    def _native(self, key: str) -> dict[str, Any] | None:
        if key not in self._natives:
            self._natives[key] = self._get(key)
        return self._natives[key]

    def row(self, point: Mapping[str, Any]) -> dict[str, Any]:
        row = {_column(name): value for name, value in point["labels"].items()}
        result, native = self._get(point["run"]), self._native(point["native"])
        if result is None or result["error"] is not None:
            error = None if result is None else "{type}: {message}".format(**result["error"])
            return row | {"status": "missing" if result is None else "failed", "error": error} | dict.fromkeys(FIGURES)
        counters, figures = result["counters"], result["figures"]
        with_native = native is not None and native["error"] is None
        cost = self._costs[point["costs"]].of(counters, native["counters"] if native and with_native else None)
        work = counters.get("instructions") or figures["operations"]
        made: dict[str, Any] = {"operations_done": figures["operations"]}
        made["exits_total"] = counters.get("exits_total", 0)
        made["exits_per_million"] = 1e6 * made["exits_total"] / work if work else 0.0
        made |= {f"exits_{reason}": counters.get(f"exits_{reason}", 0) for reason in EXIT_REASONS}
        made |= {name: counters.get(counter, 0) for name, counter in _COUNTERS.items()}
        made |= unsync_counts(counters)
        made |= {name: figures[name] for name in ("pages_mean", "pages_max", "gpa_mismatches", "history")}
        equal = figures["history"] == native["figures"]["history"] if native and with_native else None
        made["history_equal"] = None if figures["history"] is None else equal
        made |= {"cycles": cost.total, "microseconds": cost.microseconds, "slow_down": cost.slow_down}
        made |= {f"cycles_{name}": cost.components.get(name, 0.0) for name in COMPONENTS}
        made["seconds"] = figures["seconds"]
        return row | {"status": "done", "error": None} | {name: made.get(name) for name in FIGURES}


FIGURES = (
    "operations_done",
    "exits_total",
    "exits_per_million",
    *(f"exits_{reason}" for reason in EXIT_REASONS),
    *_COUNTERS,
    *unsync_counts({}),
    "pages_mean",
    "pages_max",
    "gpa_mismatches",
    "history",
    "history_equal",
    "cycles",
    "microseconds",
    "slow_down",
    *(f"cycles_{name}" for name in COMPONENTS),
    "seconds",
)
"""Columns of what points came to."""
_TAKEN = {"status", "error", *FIGURES}


def _column(label: str) -> str:
    """A label as a column: a parameter of a workload may be called what a figure is."""
    return f"set_{label}" if label in _TAKEN else label


def _costs(plain: Mapping[str, Any]) -> Costs:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    return Costs(**fields | {"tlb": TLB(**plain["tlb"]), "levels": Levels(**plain["levels"])})


def _title(sweep: Sweep) -> str:
    counted = ", ".join(f"{count:,} {state}" for state, count in sweep.counts().items() if count)
    return f"{sweep.name}: {len(sweep.manifest['points']):,} points, {counted or 'none done'}"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)


# ------------------------------------------------------------------------------------------------------------- parquet


def write_parquet(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Rows as a table: columns of numbers where all values are numbers, of texts where they are of several kinds."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns.write_parquet(path, {name: _alike([row.get(name) for row in rows]) for name in names})


def _alike(column: list[Any]) -> list[Any]:
    kinds = {type(value) for value in column if value is not None}
    if len(kinds) <= 1:
        return column
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in column]
    return [None if value is None else str(value) for value in column]


def finite(value: Any) -> bool:
    """A number that a picture can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
