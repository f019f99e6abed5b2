"""Studies: one workload or recording run under several designs. What they found is in `results`."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import workload
from ..config import DEFAULT_DESIGNS, TLB, Features, Native, Shadow, check_int, design, parse_size
from ..engine.costs import Costs
from ..engine.costs import find as find_costs
from ..engine.machine import VM
from ..errors import ConfigError, ShadowcoreError
from ..recording import replay as trace
from ..recording.format import SUFFIX
from ..recording.guest import Recording, RecordingFile
from . import settings
from .results import Study, StudyDesign

OPERATIONS = 1_000_000
"""Of a workload, where nothing else is said."""
_MACHINE = ("vcpus", "host_page_size", "backing")
"""Settings of a VM that are only shown where they are set."""
WINDOWS = 200
"""Windows in a study, about, where nothing else is said."""

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study; `study` has the designs that were done by then."""

    def __init__(self, study: Study) -> None:
        super().__init__("interrupted")
        self.study = study

    __reduce__ = ShadowcoreError.__reduce__


def study(
    source: str | os.PathLike[str] | Recording | RecordingFile | Source | None = None,
    designs: Iterable[str | Native | Shadow] = DEFAULT_DESIGNS,
    *,
    costs: Costs | str = "modern",
    windows: int | None = None,
    operations: int | None = None,
    seed: int | None = None,
    skip_boot: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Study:
    """Run a workload, or replay a recording, under each design.

    source: the name of a workload, the path of a recording, a recording, or None for the one in the package; or what
        Source.find made of one of these, so that several studies open it once.
    designs: names of designs, or Native and Shadow objects. costs: a preset of Costs, by its name, or Costs.
    windows: count by windows of this many operations (records); None: about 200 windows; 0: none.
    operations: of a workload (None: a million), or records of a recording, at most (None: all).
    seed: of a workload (None: 0). skip_boot: replay a recording from its first user-mode access on.
    parameters, settings: of the workload (WORKLOADS[name].parameters), of the guest kernel (KernelOptions), of shadow
        MMUs (pool, min_free, refill, flood_threshold, flood_reset), and of the machine: memory, vcpus, host_page_size,
        backing, levels (Levels, or the name of one: what lies below the guest), tlb (entries for small pages, a TLB, or
        None; a workload has the TLB of the costs unless told otherwise, a recording none, for what it holds are the
        accesses that missed one). Settings win; they can have any name. One
        that nothing here uses is an error.
    progress: called with the name of each design, gives a context manager whose value, unless None, is called with
        operations done, and all.

    ConfigError, TraceError. Ctrl-C raises StudyInterrupted.
    """
    found = Source.find(source)
    given = parameters | dict(settings or {})
    job = _Job(found, designs, find_costs(costs), given, operations, seed, skip_boot, windows)
    return job.run(progress or (lambda _: nullcontext()))


@dataclasses.dataclass(frozen=True)
class Source:
    """What is studied: `workload`, or else `recording`; argument: how the command line calls it (None: not at all)."""

    workload: workload.Workload | None
    recording: Recording | RecordingFile | None
    argument: str | None

    @classmethod
    def find(cls, source: Any) -> Source:
        """See `study`. ConfigError, TraceError."""
        if isinstance(source, cls):
            return source
        if isinstance(source, (Recording, RecordingFile)):
            path = getattr(source, "path", None)
            bundled = source.name == trace.BUNDLED and path is None
            return cls(None, source, None if bundled else str(path or f"{source.name}.npz"))
        if isinstance(source, workload.Workload):
            return cls(source, None, source.name)
        if source is None:
            return cls(None, trace.open_recording(None), None)
        if isinstance(source, str) and source in workload.WORKLOADS:
            return cls(workload.find(source), None, source)
        if not isinstance(source, (str, os.PathLike)):
            raise ConfigError(f"workload: a name, a path or a recording is needed, not {source!r:.60}")
        path = Path(source)
        looks_like_a_file = path.suffix in (".npz", SUFFIX) or len(path.parts) > 1 or isinstance(source, os.PathLike)
        if looks_like_a_file or path.is_file():
            return cls(None, trace.open_recording(source), str(source))
        workload.find(str(source))
        raise AssertionError  # find has refused it

    @property
    def name(self) -> str:
        if self.workload:
            return self.workload.name
        assert self.recording is not None
        return self.recording.name


def prepared(
    source: Source,
    which: str | Native | Shadow,
    given: Mapping[str, Any],
    *,
    costs: Costs,
    operations: int | None = None,
    seed: int | None = None,
    skip_boot: bool = False,
) -> Prepared:
    """One design alone, without one to be measured against: everything checked, nothing run. Errors as of `study`."""
    return Prepared(_Job(source, (which,), costs, given, operations, seed, skip_boot, 0))


class _Job:
    """A study that is being made: everything checked, nothing run."""

    def __init__(
        self,
        source: Source,
        designs: Iterable[str | Native | Shadow],
        costs: Costs,
        given: Mapping[str, Any],
        operations: int | None,
        seed: int | None,
        skip_boot: bool,
        windows: int | None,
    ) -> None:
        self.source = source
        if seed is not None and not source.workload:
            raise ConfigError("seed: a workload is needed; a recording has nothing random")
        self.seed = 0 if seed is None else check_int("seed", seed, 0, (1 << 64) - 1)
        self.split = settings.split(given, source.workload)
        if isinstance(designs, (str, Native, Shadow)):
            designs = (designs,)
        wanted = [(design(which), self.split.made(which)) for which in designs]
        if not wanted:
            raise ConfigError("designs: at least one is needed")
        self.split.check_used(made for _, made in wanted)
        levels = self.split.machine.get("levels")
        self.costs = costs if levels is None else costs.replace(levels=levels)
        self.split.check_levels(self.costs.levels, (made for _, made in wanted))
        self.designs: dict[str, Native | Shadow] = {}
        for _, made in wanted:
            if made.name in self.designs and self.designs[made.name] != made:
                raise ConfigError(f"designs: two are called {made.name!r}; give them names")
            self.designs[made.name] = made
        self.given = dict(given)
        limit = 1 << 62 if operations is None else check_int("operations", operations, 1, 1 << 62)
        if source.workload:
            if skip_boot:
                raise ConfigError("skip_boot: a recording is needed; a workload begins after its setup")
            self.start = 0
            self.total = OPERATIONS if operations is None else limit
            self.parameters = source.workload.checked(self.split.parameters)
            self.options = self.split.options
            self.tlb = settings.tlb(self.split.machine.get("tlb", "costs"), costs.tlb)
            self.memory = self.split.machine.get("memory", source.workload.memory)
            self.machine = {name: self.split.machine[name] for name in _MACHINE if name in self.split.machine}
        else:
            assert source.recording is not None
            user = source.recording.first_user if skip_boot else 0
            if user is None:
                raise ConfigError("skip_boot: a recording with user-mode accesses is needed, this one has none")
            self.start = user
            self.total = min(source.recording.operations - self.start, limit)
            self.tlb = settings.tlb(self.split.machine.get("tlb"), costs.tlb)
        self.window = max(1, self.total // WINDOWS) if windows is None else check_int("windows", windows, 0, 1 << 62)
        self.command = self._command(wanted, operations, skip_boot)

    def _command(
        self, wanted: list[tuple[Native | Shadow, Native | Shadow]], operations: int | None, skip: bool
    ) -> str:
        words = ["shadowcore", "compare", *([self.source.argument] if self.source.argument else [])]
        for chosen, _ in wanted:
            words += ["--mmu", chosen.name]
        for name, value in self.given.items():
            words += ["--set", f"{name}={settings.written(value)}"]
        if operations is not None:
            words += ["--operations", str(operations)]
        if self.seed:
            words += ["--seed", str(self.seed)]
        if self.costs.name != Costs.modern().name:
            words += ["--costs", self.costs.name]
        if skip:
            words += ["--skip-boot"]
        return shlex.join(words)

    def run(self, progress: Progress) -> Study:
        done: dict[str, StudyDesign] = {}
        native = None
        baseline = {"native": Native()} if "native" not in self.designs else {}
        # Native first: the others are measured against it.
        order = sorted((baseline | self.designs).items(), key=lambda item: not isinstance(item[1], Native))
        try:
            for name, made in order:
                with progress(name) as report:
                    result = self._one(made, report, 0 if name in baseline else self.window)
                counters = _counters(result)
                if isinstance(made, Native) and native is None:
                    native = counters
                if name not in baseline:
                    done[name] = self._design(name, made, result, counters, native, next(iter(done.values()), None))
        except KeyboardInterrupt:
            raise StudyInterrupted(self._study(done, complete=False)) from None
        return self._study({name: done[name] for name in self.designs}, complete=True)

    def _study(self, done: dict[str, StudyDesign], complete: bool) -> Study:
        recording = self.source.recording
        shown: dict[str, Any] = {"costs": self.costs.name, "tlb": None if self.tlb is None else self.tlb.small_entries}
        if "levels" in self.split.machine:
            shown["levels"] = self.costs.levels.name
        if self.source.workload:
            shown |= {"operations": self.total, "seed": self.seed, "memory": self.memory}
            shown |= self.machine | self.parameters | {name: getattr(self.options, name) for name in self.split.guest}
        else:
            shown |= {"start": self.start, "operations": self.total}
        shown |= self.split.design
        return Study(
            workload=self.source.name,
            recording=recording,
            kind="workload" if self.source.workload else "recording",
            operations=self.total if recording is None else recording.operations,
            designs=done,
            costs=self.costs,
            settings=shown,
            command=self.command,
            window=self.window,
            complete=complete,
        )

    def _one(
        self, made: Native | Shadow, report: Callable[[int, int], None] | None, window: int
    ) -> trace.ReplayResult | workload.WorkloadResult:
        if self.source.workload:
            vm = VM(self.memory, made, tlb=self.tlb, features=Features(), **self.machine)
            return workload.run(
                self.source.workload.name,
                vm,
                seed=self.seed,
                operations=self.total,
                options=self.options,
                progress=report,
                window=window or max(1, self.total // WINDOWS),  # pages in use are sampled by windows
                **cast("dict[str, Any]", self.parameters),
            )
        assert self.source.recording is not None
        stop = self.start + self.total
        return trace.replay(
            self.source.recording, made, start=self.start, stop=stop, progress=report, window=window, tlb=self.tlb
        )

    def _design(
        self,
        name: str,
        made: Native | Shadow,
        result: trace.ReplayResult | workload.WorkloadResult,
        counters: dict[str, int],
        native: dict[str, int] | None,
        first: StudyDesign | None,
    ) -> StudyDesign:
        history = getattr(result, "history", None)
        equal = None if history is None else first is None or history == first.history
        mismatches = result.gpa_mismatches if isinstance(result, trace.ReplayResult) else 0 if equal else None
        return StudyDesign(
            name=name,
            design=made,
            counters=counters,
            cost=self.costs.of(counters, native),
            seconds=result.seconds,
            operations=counters["operations"],
            windows=self._windows(result) if self.window else {},
            pages_mean=float(result.pages_mean or 0),
            pages_max=int(result.pages_max or 0),
            gpa_mismatches=mismatches,
            history=history,
            history_equal=equal,
            result=result,
        )

    def _windows(self, result: trace.ReplayResult | workload.WorkloadResult) -> dict[str, NDArray[np.uint64]]:
        """Those of the result, with `cycles`."""
        windows = dict(result.windows or {})
        operations = np.diff(windows["operation"], prepend=np.uint64(0))
        known = {name: column.tolist() for name, column in windows.items() if not name.startswith("pages_")}
        known |= {"operations": operations.tolist(), "guest_faults": known["faults"], "guest_invlpg": known["invlpg"]}
        rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
        windows["cycles"] = np.array([round(self.costs.of(row).total) for row in rows], dtype=np.uint64)
        return windows


class Prepared:
    """One design of a study that can be run, as often as one likes."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        ((self._name, self._made),) = job.designs.items()

    @property
    def tlb(self) -> TLB | None:
        """The TLB that is modelled."""
        return self._job.tlb

    @property
    def costs(self) -> Costs:
        """The prices, with the levels that are asked for."""
        return self._job.costs

    def determined(self) -> dict[str, Any]:
        """All that determines what a run comes to, but for the source itself and the engine."""
        job = self._job
        design = dataclasses.asdict(self._made)
        del design["name"]
        found = {"design": design, "start": job.start, "operations": job.total, "tlb": job.tlb}
        if job.source.workload:
            guest = dataclasses.asdict(job.options)
            found |= {"seed": job.seed, "memory": parse_size(job.memory), "machine": job.machine}
            found |= {"parameters": job.parameters, "guest": guest}
        return found

    def run(self, report: Callable[[int, int], None] | None = None) -> StudyDesign:
        """Run it."""
        result = self._job._one(self._made, report, 0)
        return self._job._design(self._name, self._made, result, _counters(result), None, None)


def _counters(result: trace.ReplayResult | workload.WorkloadResult) -> dict[str, int]:
    """Counters of the engine with those of the guest that costs are made of."""
    if isinstance(result, trace.ReplayResult):
        return result.whole.counters | {
            "operations": result.whole.records,
            "instructions": result.whole.instructions,
            "guest_cr3_loads": result.cr3_loads,
            "guest_invlpg": result.whole.counters["invlpg"],
            "guest_faults": result.faults,
        }
    return result.stats | {
        "operations": result.operations,
        "guest_cr3_loads": result.counters["cr3_loads"],
        "guest_invlpg": result.counters["invlpg"],
        "guest_faults": result.counters["faults"],
    }
