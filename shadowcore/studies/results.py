"""What studies found: each design's counters, cost and windows, as plain types, rows, data frames and in notebooks."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import notebook
from ..config import Design
from ..engine.costs import CostBreakdown, Costs
from ..engine.exitlog import write_exits
from ..engine.reported import UNSYNC, unsync_counts
from ..errors import ConfigError
from ..files import replace
from ..recording.format import INCOMPLETE
from ..recording.guest import Recording, RecordingFile
from ..recording.holdings import told
from . import verdict
from .source import DETAILS, Result

STEADY = 1.2
"""Exits of a half of a run by those of the other, at most, for the run to be steady."""
FEW = 100
"""Exits of both halves that are too few to say so."""


@dataclasses.dataclass(frozen=True)
class StudyDesign:
    """What one design did.

    design: it, with its settings. counters: those of VM.stats, and of the guest: instructions (recordings),
        operations, guest_cr3_loads, guest_invlpg, guest_faults. guest: what it did, by names of its own.
        All of them, windows and pages are from the end of the warm-up on.
    cost: cycles. seconds: that the engine took. operations: counted, in the study's unit.
    windows: name -> uint64 array with one element a window: counters, exits_total, pages_mean, pages_max, and
        `operation`, the number of operations done at its end; `cycles`, estimated. Empty if there are no windows.
    pages_mean, pages_max: shadow pages in use.
    gpa_mismatches: accesses that reached another gpa than the recorded one. Of what has no recorded gpas: 0 if its
        history is that of the first design, else None, for how many differ is not known.
    history: the checksum over all that the guest saw, from the first operation; history_equal: the same as that of the
        first design. None for recordings of guests, which gpa_mismatches tells of.
    halves: exits in the first and the second half, None where that is not known. work: accesses of user code, of which
        settings of the guest make neither more nor less.
    exit_log: every exit that is counted, as `ExitLog.rows` has them; None where no log was asked for.
    details: what only a source of this kind has, in plain types. result: of the run itself: a trace.ReplayResult,
        workload.WorkloadResult, programs.ProgramResult or OperationsResult.

    >>> study = sc.study("pingpong", ["native", "cached"], operations=2000, windows=0)
    >>> design = study.designs["cached"]
    >>> design.exits_total == sum(design.exits.values())
    True
    >>> design.cost.slow_down > 1
    True
    """

    name: str
    design: Design
    counters: dict[str, int]
    cost: CostBreakdown
    seconds: float
    operations: int
    windows: dict[str, NDArray[np.uint64]] = dataclasses.field(repr=False)
    pages_mean: float
    pages_max: int
    gpa_mismatches: int | None
    history: int | None
    history_equal: bool | None
    result: Result
    guest: dict[str, int] = dataclasses.field(default_factory=dict, repr=False)
    details: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    halves: tuple[int, int] | None = None
    work: int | None = None
    exit_log: NDArray[np.void] | None = dataclasses.field(default=None, compare=False, repr=False)

    def _repr_html_(self) -> str:
        return notebook.counters(f"{self.name}: {self.operations:,} operations", self.counters)

    @property
    def exits(self) -> dict[str, int]:
        """VM exits by reason."""
        prefix = "exits_"
        return {k.removeprefix(prefix): n for k, n in self.counters.items() if k.startswith(prefix) and k != _TOTAL}

    @property
    def exits_total(self) -> int:
        """VM exits, whatever the reason."""
        return self.counters[_TOTAL]

    @property
    def exits_per_million(self) -> float:
        """VM exits per million guest instructions, or operations where instructions are not known."""
        work = self.counters.get("instructions") or self.operations
        return 1e6 * self.exits_total / work if work else 0.0

    @property
    def steady(self) -> bool:
        """Neither half has more than a fifth more exits than the other, or there are too few to tell."""
        low, high = sorted(self.halves or (0, 0))
        return low + high < FEW or high <= STEADY * low

    def as_dict(self) -> dict[str, Any]:
        """All but the windows in plain types: the same names whatever was studied, None for what it has not."""
        n = self.counters
        plain: dict[str, Any] = {
            "operations": self.operations,
            "instructions": n.get("instructions"),
            "exits_total": self.exits_total,
            "exits": self.exits,
            "exits_per_million": self.exits_per_million,
            "emulated": n["pf_emulate"],
            "zapped": n["mmu_shadow_zapped"],
            "flooded": n["mmu_flooded"],
            "recycled": n["mmu_recycled"],
            **unsync_counts(n),
            "walk_references": n["walk_references"],
            "guest_walk_references": n["guest_walk_references"],
            "tlb_hits": n["tlb_hits"],
            "tlb_misses": n["tlb_misses"],
            "accesses": n["accesses"],
            "table_stores": self.guest.get("table_stores"),
            "cr3_loads": n["guest_cr3_loads"],
            "faults": n["guest_faults"],
            "pages_mean": self.pages_mean,
            "pages_max": self.pages_max,
            "gpa_mismatches": self.gpa_mismatches,
            "history": None if self.history is None else f"{self.history:#018x}",
            "history_equal": self.history_equal,
            "exits_by_half": None if self.halves is None else list(self.halves),
            "operations_per_second": self.operations / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "audits": 0,
            "violations": [],
        }
        return plain | dict.fromkeys(DETAILS) | self.details | self.cost.as_dict()


_TOTAL = "exits_total"


@dataclasses.dataclass(frozen=True)
class Study:
    """One workload or recording under several designs.

    workload: its name; kind: "workload" or "recording"; stream: of a recording, guest, operations or program.
    operations: asked for, or that a recording has; unit: what they are called; per: what exits are told per million
    of. warm_up: how many of those that were run were not counted.
    designs: by name. costs: the prices. settings: all that were not left out, by name. command: the shell command that
    repeats it. window: operations in a window, 0 if there are none.
    complete: False if it was interrupted; the designs are then those that were done.
    recording: of a guest, that was replayed, or None. recording_complete: False if what was recorded ended before its
    time. holdings: what a recording has and lacks, by name. caption: what the guest did, as a text. settles: the
    warm-up that leaves out the boot, or the first half of what is counted.

    >>> study = sc.study("pingpong", ["native", "cached"], operations=2000, windows=0)
    >>> list(study.designs)
    ['native', 'cached']
    >>> study.designs["cached"].exits_total > 0
    True
    """

    workload: str
    kind: str
    operations: int
    designs: dict[str, StudyDesign]
    costs: Costs
    settings: dict[str, Any]
    command: str
    window: int
    complete: bool = True
    recording: Recording | RecordingFile | None = None
    recording_complete: bool = True
    stream: str | None = None
    unit: str = "operations"
    per: str = "operations"
    warm_up: int = 0
    holdings: Mapping[str, Any] | None = None
    caption: str = ""
    settles: str = ""

    @property
    def title(self) -> str:
        """What was run, and what of it is counted."""
        counted = f", counted from {self.warm_up:,} on" if self.warm_up else ""
        return f"{self.workload}: {self.operations:,} {self.unit}{counted}"

    @property
    def cold_start(self) -> str:
        """A sentence where the halves of the run differ by more than STEADY in exits, under some design; else
        nothing."""
        unsteady = [each for each in self.designs.values() if not each.steady]
        if not unsteady:
            return ""
        worst = max(unsteady, key=lambda each: max(each.halves or (0, 0)) / max(min(each.halves or (0, 0)), 1))
        first, second = worst.halves or (0, 0)
        return (
            f"Cold start, or a change of phase: of {worst.name}'s exits {first:,} are in the first half, {second:,} in "
            f"the second. --warm-up {self.settles} counts from there on."
        )

    @property
    def notes(self) -> list[str]:
        """Sentences that belong under every figure: a cold start, what a recording has and lacks, that it is
        incomplete."""
        held = "" if self.holdings is None else told(self.holdings)
        return [*filter(None, (self.cold_start, held, "" if self.recording_complete else f"{INCOMPLETE}."))]

    @property
    def verdict(self) -> str:
        """Which design the guest is fastest under, and by how much: a sentence. Nothing where there is no choice."""
        return verdict.of_study(self)

    def against(self, base: Study, name: str) -> Study:
        """The same figures, with slow-downs against native of another study, of the same work by another guest.

        Work is told by accesses of user code: kernels with other settings make other accesses of their own, and how
        many operations a piece of work takes differs. name: what the base is called, such as "isolation=false".
        """
        native = next((each.cost.native_total for each in base.designs.values() if each.cost.native_total), None)
        there = next((each.work for each in base.designs.values() if each.work), None)
        made = {}
        for key, design in self.designs.items():
            known = native is not None and there and design.work
            total = native * design.work / there if known else None  # type: ignore[operator]
            cost = dataclasses.replace(design.cost, native_total=total, base=name)
            made[key] = dataclasses.replace(design, cost=cost)
        return dataclasses.replace(self, designs=made)

    def as_dict(self) -> dict[str, Any]:
        """All but the windows in plain types, as `shadowcore compare --json` prints it."""
        return {
            "workload": self.workload,
            "kind": self.kind,
            "stream": self.stream,
            "unit": self.unit,
            "warm_up": self.warm_up,
            "operations": self.operations,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "command": self.command,
            "costs": self.costs.as_dict(),
            "complete": self.complete,
            "recording_complete": self.recording_complete,
            "holdings": None if self.holdings is None else dict(self.holdings),
            "verdict": self.verdict,
            "unsteady": [name for name, design in self.designs.items() if not design.steady],
            "designs": {name: design.as_dict() for name, design in self.designs.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a design: what `--csv` writes and to_pandas has. Names of nested fields are joined by `_`."""
        return [
            {
                "workload": self.workload,
                "recording_complete": self.recording_complete,
                "warm_up": self.warm_up,
                "design": name,
            }
            | _flat(design.as_dict())
            for name, design in self.designs.items()
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file. OSError where that cannot be done."""
        write_csv(path, self.rows())

    def write_exits(self, path: str | os.PathLike[str]) -> None:
        """Write the logs of exits to a file, CSV or Parquet by its name, with a column `design`. ConfigError where no
        log was asked for, or pyarrow is missing; OSError."""
        if any(each.exit_log is None for each in self.designs.values()):
            raise ConfigError("write_exits: a study with log_exits=True is needed")
        write_exits(path, {name: each.exit_log for name, each in self.designs.items() if each.exit_log is not None})

    def to_pandas(self) -> Any:
        """The rows as a DataFrame with designs as its index. ConfigError where pandas is not installed."""
        return notebook.pandas().DataFrame(self.rows()).set_index("design")

    def windows_to_pandas(self) -> Any:
        """Counters by windows as a DataFrame with (design, operation at the window's end) as its index."""
        frames = [notebook.pandas().DataFrame(d.windows).assign(design=name) for name, d in self.designs.items()]
        return notebook.pandas().concat(frames).set_index(["design", "operation"])

    def unsync_rows(self) -> dict[str, str]:
        """Of the counters in `reported.UNSYNC` those that some design has not 0, with what reports call them."""
        designs = self.designs.values()
        return {key: label for key, label in UNSYNC.items() if any(each.counters[key] for each in designs)}

    def _repr_html_(self) -> str:
        names = list(self.designs)
        picked: list[tuple[str, Callable[[StudyDesign], str]]] = [
            ("VM exits", lambda d: f"{d.exits_total:,}"),
            ("emulated stores", lambda d: f"{d.counters['pf_emulate']:,}"),
            ("shadow pages zapped", lambda d: f"{d.counters['mmu_shadow_zapped']:,}"),
            *((label, partial(_count, key)) for key, label in self.unsync_rows().items()),
            ("shadow pages in use, mean", lambda d: f"{d.pages_mean:,.1f}"),
            ("cycles, millions", lambda d: f"{d.cost.total / 1e6:,.1f}"),
            ("slow-down", lambda d: "" if d.cost.slow_down is None else f"{d.cost.slow_down:.3f}"),
        ]
        rows = [(label, *(show(self.designs[name]) for name in names)) for label, show in picked]
        return notebook.table(". ".join([self.title, *self.notes]), ("", *names), rows)

    def __repr__(self) -> str:
        return f"Study({self.workload!r}, {self.operations} operations, {', '.join(self.designs)})"


@dataclasses.dataclass(frozen=True)
class Swept:
    """One source at several values of a setting, or of several settings.

    over: the setting, or a tuple of several. points: (value, study), in the order in which they were made; of several
    settings the value is a tuple. base: of a setting of the guest, the one whose native run slow-downs are against, as
    "isolation=false"; None: each study's are against its own.
    complete: False if it was interrupted; the points are then those that were done.

    >>> swept = sc.compare("pingpong", ["cached"], over={"pool": [16, 32]}, operations=1000)
    >>> [(value, study.designs["cached"].exits_total) for value, study in swept.points]
    [(16, 64), (32, 44)]
    """

    over: str | tuple[str, ...]
    points: Sequence[tuple[Any, Study]]
    base: str | None = None
    complete: bool = True

    def as_dict(self) -> dict[str, Any]:
        """In plain types, as `shadowcore compare --over ... --json` prints it."""
        first = self.points[0][1]
        return {
            "workload": first.workload,
            "operations": first.operations,
            "over": self.over if isinstance(self.over, str) else list(self.over),
            "values": [_plain(value) for value, _ in self.points],
            "base": self.base,
            "complete": self.complete,
            "verdict": self.verdict,
            "studies": [study.as_dict() for _, study in self.points],
        }

    @property
    def notes(self) -> list[str]:
        """Those of the first study whose halves differ, or of the first; that it was interrupted."""
        studies = [study for _, study in self.points]
        notes = next((study for study in studies if study.cold_start), studies[0]).notes
        return notes if self.complete else [*notes, "Interrupted: values that were not done are left out."]

    @property
    def names(self) -> tuple[str, ...]:
        """The settings."""
        return (self.over,) if isinstance(self.over, str) else self.over

    @property
    def verdict(self) -> str:
        """Which design, or value, is best: a sentence. Of runs with several seeds it says what is within their
        spread."""
        return verdict.of_sweep(self)

    def labels(self, value: Any) -> dict[str, Any]:
        """The settings at a point, by name."""
        return dict(zip(self.names, (value,) if isinstance(self.over, str) else value, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the studies, each with the settings before it; one that is called as a column of theirs is
        `set_NAME`."""
        found = []
        for value, study in self.points:
            for row in study.rows():
                labels = {f"set_{k}" if k in row and row[k] != v else k: v for k, v in self.labels(value).items()}
                found.append(labels | row)
        return found

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file. OSError where that cannot be done."""
        write_csv(path, self.rows())

    def to_pandas(self) -> Any:
        """The rows as a DataFrame with (value, design) as its index. ConfigError where pandas is not installed."""
        rows = self.rows()
        names = [name if name in rows[0] else f"set_{name}" for name in self.names]
        return notebook.pandas().DataFrame(rows).set_index([*names, "design"])

    def __repr__(self) -> str:
        return f"Swept({self.over!r}, {len(self.points)} studies of {self.points[0][1].workload!r})"


def _count(name: str, design: StudyDesign) -> str:
    return f"{design.counters[name]:,}"


def write_csv(path: str | os.PathLike[str], rows: list[dict[str, Any]]) -> None:
    """Rows with one header line; fields that a row has not are left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    replace(path, file.getvalue().encode("utf-8"))


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif isinstance(value, list):
            parts = any(isinstance(each, Mapping) for each in value)
            flat[prefix + name] = len(value) if parts else " ".join(map(str, value))
        else:
            flat[prefix + name] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
