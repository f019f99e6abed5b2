"""What a sweep is asked to do: its specification, read and checked, as a list of points. Nothing is run here.

A point is one design on one source with one set of settings, a seed and a list of prices. What determines its counters
is its run: points that differ in prices alone, or in settings that their design has not, share one. Each run has a key,
the digest of all that determines it, and one of the design `native` to be measured against.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..config import DEFAULT_DESIGNS, TLB, Design, Native, Nested, Shadow, design
from ..engine.costs import Costs
from ..engine.costs import find as find_costs
from ..errors import ConfigError, TraceError
from ..files import check_path
from ..recording.guest import Recording, RecordingFile
from . import settings
from .series import Condition, values
from .source import Source
from .source import find as find_source
from .study import prepared

RESULTS = 1
"""Version of what runs come to: one more whenever a counter of the same run comes out otherwise."""

KEYS = (
    "name",
    "sources",
    "designs",
    "costs",
    "seed",
    "operations",
    "skip_boot",
    "warm_up",
    "settings",
    "prices",
    "points",
    "when",
)
"""Of a specification."""
LABELS = ("source", "design", "seed", "operations", "costs")
"""Columns of every point, beside its settings and prices."""
_OF_A_POINT = {"source": "sources", "design": "designs", "seed": "seed", "operations": "operations", "costs": "costs"}
_PRICES = tuple(f.name for f in dataclasses.fields(Costs) if f.name not in ("name", "tlb", "levels", "sources"))
MOST = 1_000_000
"""Points of a sweep."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What determines the counters of a point: enough to run it in another process.

    source: number of it in Plan.sources. design: with its settings. given: other settings by name.
    """

    key: str
    source: int
    design: Design
    given: dict[str, Any]
    operations: int | None
    seed: int | None
    skip_boot: bool
    warm_up: int


@dataclasses.dataclass(frozen=True)
class Point:
    """labels: source, design, its settings, seed, operations, costs, prices, by name. run, native: keys."""

    labels: dict[str, Any]
    run: str
    native: str
    costs: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep, all of it checked.

    axes: labels that take more than one value, in the order in which they are given. costs: prices by label.
    runs: by key, in the order in which they are done. sources: what Run.source numbers.
    """

    name: str
    axes: tuple[str, ...]
    points: tuple[Point, ...]
    runs: dict[str, Run]
    costs: dict[str, Costs]
    sources: tuple[Source, ...]
    digests: tuple[str, ...]


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A specification in TOML, as it stands there; paths of recordings start where the file is. ConfigError."""
    name = check_path(path, "spec")
    try:
        with open(name, "rb") as file:
            spec = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{name}: it cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{name}: no TOML: {error}") from None
    beside = os.path.dirname(name)
    listed = spec.get("sources")
    if isinstance(listed, (str, dict)):
        listed = [listed]
    if isinstance(listed, list):
        spec["sources"] = [
            each | {"source": _beside(beside, each["source"])}
            if isinstance(each, dict) and "source" in each
            else _beside(beside, each)
            for each in listed
        ]
    spec.setdefault("name", os.path.splitext(os.path.basename(name))[0])
    return spec


def _beside(folder: str, source: Any) -> Any:
    """A recording that is named relative to the specification."""
    if isinstance(source, list):
        return [_beside(folder, each) for each in source]
    if isinstance(source, str) and folder and not os.path.isabs(source):
        there = os.path.join(folder, source)
        if os.path.isfile(there):
            return there
    return source


# ---------------------------------------------------------------------------------------------------------- the grid


def planned(spec: Mapping[str, Any]) -> Plan:
    """Every point of a specification, checked. ConfigError names the key or the point; TraceError the recording."""
    for key in spec:
        if key not in KEYS:
            raise ConfigError(f"spec: there is no {key!r}; {settings.near(str(key), KEYS)}")
    return _Planner(spec).plan()


class _Planner:
    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.spec = spec
        self.sources: list[Source] = []
        self.digests: list[str] = []
        self.labels: list[str] = []
        self.costs: dict[str, Costs] = {}
        self.runs: dict[str, Run] = {}
        self.natives: dict[str, Run] = {}
        self.points: dict[str, Point] = {}
        self.used: set[str] = set()
        self.keys: dict[str, str] = {}
        name = spec.get("name", "sweep")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"name: a text is needed, not {name!r:.60}")
        self.name = name
        skip = spec.get("skip_boot", False)
        if not isinstance(skip, bool):
            raise ConfigError(f"skip_boot: true or false is needed, not {skip!r:.60}")
        self.skip_boot = skip
        self.warm_up = spec.get("warm_up", 0)

    def _table(self, key: str) -> dict[str, Any]:
        table = self.spec.get(key, {})
        if not isinstance(table, Mapping):
            raise ConfigError(f"{key}: a table of names and values is needed, not {table!r:.60}")
        return {str(name): value for name, value in table.items()}

    def _sources(self) -> list[tuple[int, str, dict[str, Any]]]:
        """(number, label, its own settings) of each."""
        listed = self.spec.get("sources")
        if listed is None:
            listed = [None]
        if isinstance(listed, (str, Mapping, os.PathLike, Recording, RecordingFile, Source)) or not isinstance(
            listed, Iterable
        ):
            listed = [listed]
        found = []
        for place, each in enumerate(listed):
            own: dict[str, Any] = {}
            if isinstance(each, Mapping):
                own = {str(name): value for name, value in each.items()}
                if "source" not in own:
                    raise ConfigError(f"sources[{place}]: 'source' is needed, a workload or a recording")
                each = own.pop("source")
            found.append((*self._source(each), own))
        if not found:
            raise ConfigError("sources: at least one workload or recording is needed")
        return found

    def _source(self, given: Any) -> tuple[int, str]:
        opened = find_source(given)
        found = digest(opened)
        if found in self.digests:
            number = self.digests.index(found)
            return number, self.labels[number]
        label = opened.name if opened.name not in self.labels else str(opened.argument)
        if label in self.labels:
            raise ConfigError(f"sources: two are called {label!r}; give them other names")
        self.sources.append(opened)
        self.digests.append(found)
        self.labels.append(label)
        return len(self.sources) - 1, label

    def _designs(self, given: Any) -> list[Design]:
        if isinstance(given, str):
            given = given.split(",")
        elif isinstance(given, (Native, Shadow, Nested)) or not isinstance(given, Iterable):
            given = (given,)
        made = [design(which.strip() if isinstance(which, str) else which) for which in given]
        if not made:
            raise ConfigError("designs: at least one is needed")
        return made

    def _costs(self, given: Any, prices: Mapping[str, Any]) -> list[tuple[str, dict[str, Any], Costs]]:
        """(label of the costs, labels of the prices, the prices) of each combination."""
        if isinstance(given, str):
            given = given.split(",")
        elif isinstance(given, Costs) or not isinstance(given, Iterable):
            given = (given,)
        for name in prices:
            if name not in _PRICES:
                raise ConfigError(f"prices: there is no {name!r}; {settings.near(name, _PRICES)}")
        made = []
        for each in given:
            found = find_costs(each.strip() if isinstance(each, str) else each)
            name = each.strip() if isinstance(each, str) else found.name
            for labels in _grid(prices):
                made.append((name, labels, found.replace(**labels) if labels else found))
        if not made:
            raise ConfigError("costs: at least one list of prices is needed")
        return made

    def plan(self) -> Plan:
        grid, prices = self._table("settings"), self._table("prices")
        sources = self._sources()
        listed = self.spec.get("points", [{}])
        if isinstance(listed, Mapping) or not isinstance(listed, Iterable) or isinstance(listed, str):
            raise ConfigError("points: a list of tables is needed, each with settings of its own")
        conditions = self.spec.get("when", ())
        tests = [Condition(text) for text in ([conditions] if isinstance(conditions, str) else conditions)]
        names: dict[str, None] = dict.fromkeys(LABELS)
        tables = []
        for place, table in enumerate(listed):
            if not isinstance(table, Mapping):
                raise ConfigError(f"points[{place}]: a table of settings is needed, not {table!r:.60}")
            table = {str(name): value for name, value in table.items()}
            for label, key in _OF_A_POINT.items():
                if label != key and key in table:
                    raise ConfigError(f"points[{place}]: there is no {key!r}; did you mean {label!r}?")
            tables.append(table)
            names |= dict.fromkeys(table)
        for _, _, own in sources:
            names |= dict.fromkeys(own)
        names |= dict.fromkeys(grid) | dict.fromkeys(prices)
        for test in tests:
            test.check(names)
        for table in tables:
            here = [(*self._source(table["source"]), {})] if "source" in table else sources
            for number, label, own in here:
                merged = grid | own | {name: value for name, value in table.items() if name not in _OF_A_POINT}
                self._add(number, label, merged, prices, table, tests)
        for name in grid:
            if name not in self.used:
                raise ConfigError(f"settings: {name}: no design of the sweep has it; a design that has it is needed")
        if not self.points:
            raise ConfigError("when: no point is left" if tests else "points: at least one is needed")
        self.runs |= {key: run for key, run in self.natives.items() if key not in self.runs}
        points = tuple(self.points.values())
        axes = [
            name
            for name in names
            if len({repr(point.labels.get(name)) for point in points if name in point.labels}) > 1
        ]
        return Plan(self.name, tuple(axes), points, self.runs, self.costs, tuple(self.sources), tuple(self.digests))

    def _add(
        self,
        number: int,
        label: str,
        grid: Mapping[str, Any],
        prices: Mapping[str, Any],
        table: Mapping[str, Any],
        tests: list[Condition],
    ) -> None:
        spec, source = self.spec, self.sources[number]
        designs = self._designs(table.get("design", spec.get("designs", DEFAULT_DESIGNS)))
        costs = self._costs(table.get("costs", spec.get("costs", "modern")), prices)
        seeds = values(table.get("seed", spec.get("seed", 0)), "seed")
        if not source.seeded:
            several = any(each.seeded for each in self.sources)
            if ("seed" in table or "seed" in spec) and not several:
                raise ConfigError("seed: a workload is needed; a recording has nothing random")
            seeds = (None,)
        counts = values(table.get("operations", spec.get("operations")), "operations")
        for which, chosen in itertools.product(designs, _grid(grid)):
            for operations, (name, priced, cost), seed in itertools.product(counts, costs, seeds):
                # A setting that the design has not makes no difference, and no point of its own.
                effective = settings.effective(chosen, which)
                self.used |= effective.keys()
                labels = {"source": label, "design": which.name} | effective
                labels |= {"seed": seed, "operations": operations, "costs": name} | priced
                if all(test(labels) for test in tests):
                    self._point(labels, number, which, effective, operations, seed, cost)

    def _point(
        self,
        labels: dict[str, Any],
        source: int,
        which: Design,
        given: dict[str, Any],
        operations: int | None,
        seed: int | None,
        cost: Costs,
    ) -> None:
        identity = json.dumps(labels, sort_keys=True, default=str)
        if identity in self.points:
            return
        if len(self.points) >= MOST:
            raise ConfigError(f"spec: more than {MOST:,} points")
        run = self._run(self.runs, labels, source, which, given, operations, seed, cost)
        if "levels" in given:
            cost = cost.replace(levels=given["levels"])
        for number in itertools.count():
            name = cost.name if not number else f"{cost.name} ({number})"
            if self.costs.setdefault(name, cost) == cost:
                break
        plain = {key: value for key, value in given.items() if key not in settings.DESIGN}
        native = self._run(self.natives, labels, source, Native(), plain, operations, seed, cost)
        self.points[identity] = Point(labels, run, native, name)

    def _run(
        self,
        runs: dict[str, Run],
        labels: Mapping[str, Any],
        source: int,
        which: Design,
        given: dict[str, Any],
        operations: int | None,
        seed: int | None,
        cost: Costs,
    ) -> str:
        """The key of a run, which is checked and put among `runs`."""
        opened = self.sources[source]
        asked = repr((source, which, given, operations, seed, cost.tlb))
        if asked in self.keys and self.keys[asked] in runs:
            return self.keys[asked]
        try:
            made = prepared(
                opened,
                which,
                given,
                costs=cost,
                operations=operations,
                seed=seed,
                skip_boot=self.skip_boot,
                warm_up=self.warm_up,
            )
        except (ConfigError, TraceError) as error:
            if len(self.points) or len(labels) > len(LABELS):
                where = ", ".join(
                    f"{key}={settings.written(value)}" for key, value in labels.items() if value is not None
                )
                raise ConfigError(f"{error} (at {where})") from None
            raise
        document = made.determined() | {"results": RESULTS, "source": self.digests[source]}
        key = hashlib.sha256(_canonical(document)).hexdigest()[:32]
        self.keys[asked] = key
        if key not in runs:
            with_tlb = dict(given) | {"tlb": made.tlb}
            runs[key] = Run(key, source, which, with_tlb, operations, seed, self.skip_boot, made.warm_up)
        return key


def _grid(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of each setting."""
    series = {name: _values(value, name) for name, value in table.items()}
    total = 1
    for each in series.values():
        total *= len(each)
    if total > MOST:
        raise ConfigError(f"spec: {total:,} combinations of {', '.join(series)}; {MOST:,} are allowed")
    return [dict(zip(series, each, strict=True)) for each in itertools.product(*series.values())]


def _values(value: Any, name: str) -> tuple[Any, ...]:
    return (value,) if isinstance(value, TLB) else values(value, name)


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), default=_plain).encode("utf-8")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic):
        return value.item()
    return str(value)


def digest(source: Source) -> str:
    """What tells one source from another: a workload's name, the bytes of a recording."""
    if source.workload is not None:
        return f"workload {source.workload.name}"
    hashed = hashlib.sha256()
    recording = source.recording
    if recording is None or isinstance(recording, RecordingFile):
        for path in source.files:
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    hashed.update(piece)
        return f"recording {hashed.hexdigest()}"
    for name, array in recording.arrays.items():
        hashed.update(name.encode() + np.ascontiguousarray(array).view(np.uint8).data)
    scalars = {name: getattr(recording, name) for name in ("cr0", "cr4", "efer", "nframes", "vcpus", "complete")}
    hashed.update(_canonical(scalars))
    return f"recording {hashed.hexdigest()}"
