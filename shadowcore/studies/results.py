"""What studies found: each design's counters, cost and windows, as plain types, rows, data frames and in notebooks."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import notebook, workload
from ..config import Native, Shadow
from ..engine.costs import CostBreakdown, Costs
from ..engine.reported import UNSYNC, unsync_counts
from ..files import replace
from ..recording import replay as trace
from ..recording.format import INCOMPLETE
from ..recording.guest import Recording, RecordingFile


@dataclasses.dataclass(frozen=True)
class StudyDesign:
    """What one design did.

    design: it, with its settings. counters: those of VM.stats, and of the guest: instructions (recordings),
        operations, guest_cr3_loads, guest_invlpg, guest_faults.
    cost: cycles. seconds: that the engine took. operations: done (records of a recording).
    windows: name -> uint64 array with one element a window: counters, exits_total, pages_mean, pages_max, and
        `operation`, the number of operations done at its end; `cycles`, estimated. Empty if there are no windows.
    pages_mean, pages_max: shadow pages in use.
    gpa_mismatches: accesses that reached another gpa than the recorded one. Of a workload: 0 if its history is that of
        the first design, else None, for how many differ is not known.
    history: of a workload, the checksum over all of the guest's accesses; history_equal: the same as that of the first
        design. None for recordings.
    result: of the run itself, a trace.ReplayResult or workload.WorkloadResult.
    """

    name: str
    design: Native | Shadow
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
    result: trace.ReplayResult | workload.WorkloadResult

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

    def as_dict(self) -> dict[str, Any]:
        """All but the windows in plain types."""
        n = self.counters
        if isinstance(self.result, trace.ReplayResult):
            return self.result.as_dict() | self.cost.as_dict()
        plain = {
            "operations": self.operations,
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
            "faults": n["guest_faults"],
            "pages_mean": self.pages_mean,
            "pages_max": self.pages_max,
            "gpa_mismatches": self.gpa_mismatches,
            "history": f"{self.history:#018x}",
            "history_equal": self.history_equal,
            "kernel": dict(self.result.counters),
            "operations_per_second": self.result.operations_per_second,
            "seconds": self.seconds,
        }
        return plain | self.cost.as_dict()


_TOTAL = "exits_total"


@dataclasses.dataclass(frozen=True)
class Study:
    """One workload or recording under several designs.

    workload: its name; kind: "workload" or "recording". operations: asked for (records of the recording).
    designs: by name. costs: the prices. settings: all that were not left out, by name. command: the shell command that
    repeats it. window: operations in a window, 0 if there are none.
    complete: False if it was interrupted; the designs are then those that were done.
    recording: that was replayed, or None. recording_complete: False if that ended before its time.
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

    @property
    def recording_complete(self) -> bool:
        """What was recorded did not end before its time; True of a workload."""
        return self.recording is None or self.recording.complete

    def as_dict(self) -> dict[str, Any]:
        """All but the windows in plain types, as `shadowcore compare --json` prints it."""
        return {
            "workload": self.workload,
            "kind": self.kind,
            "operations": self.operations,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "command": self.command,
            "costs": self.costs.as_dict(),
            "complete": self.complete,
            "recording_complete": self.recording_complete,
            "designs": {name: design.as_dict() for name, design in self.designs.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a design: what `--csv` writes and to_pandas has. Names of nested fields are joined by `_`."""
        return [
            {"workload": self.workload, "recording_complete": self.recording_complete, "design": name}
            | _flat(design.as_dict())
            for name, design in self.designs.items()
        ]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file. OSError where that cannot be done."""
        write_csv(path, self.rows())

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
        title = f"{self.workload}: {self.operations:,} operations"
        return notebook.table(title + ("" if self.recording_complete else f". {INCOMPLETE}"), ("", *names), rows)

    def __repr__(self) -> str:
        return f"Study({self.workload!r}, {self.operations} operations, {', '.join(self.designs)})"


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
            flat[prefix + name] = " ".join(map(str, value))
        else:
            flat[prefix + name] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
