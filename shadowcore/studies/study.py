"""Studies: one source run under several designs, at one value of a setting or at several. What they found is in
`results`."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import (
    DEFAULT_DESIGNS,
    TLB,
    Design,
    Native,
    Nested,
    Shadow,
    check_bool,
    check_int,
    design,
    parse_count,
    parse_size,
)
from ..engine.costs import Costs
from ..engine.costs import find as find_costs
from ..engine.levels import of_design
from ..engine.tlbs import ProcessorTLB, label
from ..errors import AuditError, ConfigError, ShadowcoreError
from ..recording.guest import Recording, RecordingFile
from . import settings
from .results import Study, StudyDesign, Swept
from .source import Outcome, Report, Setup, Source, find

Given = str | os.PathLike[str] | Recording | RecordingFile | Source | Sequence[str | os.PathLike[str]] | None
"""What a study can be of."""
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C in a study; `study` has the designs that were done by then, or, over several values, is a Swept of
    those.

    >>> issubclass(sc.StudyInterrupted, KeyboardInterrupt)
    True
    """

    def __init__(self, study: Study | Swept) -> None:
        super().__init__("interrupted")
        self.study = study

    __reduce__ = ShadowcoreError.__reduce__


def study(
    source: Given = None,
    designs: Iterable[str | Design] = DEFAULT_DESIGNS,
    *,
    costs: Costs | str = "modern",
    windows: int | None = None,
    operations: int | None = None,
    seed: int | None = None,
    skip_boot: bool = False,
    warm_up: int | str = 0,
    log_exits: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Study:
    """Run a workload, or a recording of a guest, of operations, or of programs, under each design.

    source: the name of a workload, the path of a recording, paths of several recordings of programs, which run side by
        side, a recording, or None for the one in the package; or what source.find made of one of these, so that several
        studies open it once.
    designs: names of designs, or Native and Shadow objects. costs: a preset of Costs, by its name, or Costs.
    windows: count by windows of this many operations; None: about 200 windows; 0: none.
    operations: of a workload (None: a million, after the warm-up), or of a recording, at most (None: all). They are
        records of a guest's recording, accesses of a program's.
    seed: of a workload or programs (None: 0). skip_boot: replay a guest from its first user-mode access on, with a new
        shadow.
    warm_up: of the operations, those that come first: they warm what there is to warm, and all figures are from there
        on. Or the name of a phase of the recording, which begins there; `boot` ends there.
    parameters, settings: of the workload (WORKLOADS[name].parameters) or of programs (turn, fold), of the guest kernel
        (KernelOptions), of shadow MMUs (pool, min_free, refill, flood_threshold, flood_reset), and of the machine:
        memory, vcpus, host_page_size, backing, outer_backing, levels (Levels, or the name of one: what lies below the
        guest), tlb (entries for small pages, a processor by name, a TLB, or None; a guest kernel has the TLB of the
        costs unless told otherwise, a recording of a guest none, for what it holds are the accesses that missed one).
        Settings win; they can have any name. One that nothing here uses is an error.
    log_exits: keep a log of every exit that is counted: StudyDesign.exit_log. Its operations are records of a guest's
        recording, operations of a workload from the end of its setup on, and of the processor that runs programs.
        Without a modelled TLB it takes several times as long.
    progress: called with the name of each design, gives a context manager whose value, unless None, is called with
        operations done, and all.

    ConfigError, TraceError. Ctrl-C raises StudyInterrupted.

    >>> study = sc.study("fork-storm", ["native", "flush", "cached"], operations=5000, windows=0)
    >>> study.designs["cached"].exits["emulate"] > 0
    True
    >>> study.verdict.split(":")[0]
    'At these prices the guest is fastest under flush'
    """
    given = parameters | dict(settings or {})
    job = _Job(find(source), designs, find_costs(costs), given, operations, seed, skip_boot, warm_up, windows)
    job.setup = dataclasses.replace(job.setup, log_exits=check_bool("log_exits", log_exits))
    return job.run(progress or (lambda _: nullcontext()))


def compare(
    source: Given = None,
    designs: Iterable[str | Design] = DEFAULT_DESIGNS,
    *,
    over: Mapping[str, Iterable[Any]] | None = None,
    base: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Study | Swept:
    """What `shadowcore compare` does: a study, or with `over` one at each value of a setting.

    source, designs, options: as of `study`. over: settings (or seed, operations, warm_up), each with its values; of
        several every combination is run.
    base: of a setting of the guest kernel (isolation, mode, ...) the value, one of those, whose native run all
        slow-downs are against (None: the first). Of other settings each study's are against native of its own.
    ConfigError, TraceError. Ctrl-C raises StudyInterrupted.

    >>> sc.compare("pingpong", over={"pool": [16, 32]}, operations=1000)
    Swept('pool', 2 studies of 'pingpong')
    """
    if over is None:
        if base is not None:
            raise ConfigError("base: values to compare with it are needed: over")
        return study(source, designs, progress=progress, **options)
    if not isinstance(over, Mapping) or not over:
        raise ConfigError("over: settings with their values are needed")
    if options.pop("log_exits", False):
        raise ConfigError("log_exits: it is for one study, and with `over` there are several")
    series = {str(name): list(values) for name, values in over.items()}
    return _sweep(find(source), list(designs), series, base, progress, options)


DIRECT = ("seed", "operations", "warm_up")
"""What a sweep can be over that is no setting."""


def _sweep(
    source: Source,
    designs: list[str | Design],
    series: dict[str, list[Any]],
    base: Any,
    progress: Progress | None,
    options: dict[str, Any],
) -> Swept:
    names = tuple(series)
    fixed = dict(options.pop("settings", None) or {})
    for name, values in series.items():
        if not values:
            raise ConfigError(f"over: at least one value of {name} is needed")
        if name in fixed or (name in options and options[name] not in (None, 0)):
            raise ConfigError(f"over: {name} is set to one value as well")
    ofguest = [name for name in names if source.guest and name in settings.GUEST]
    if base is not None and len(ofguest) != 1:
        which = f"one is needed, not {' and '.join(ofguest)}" if ofguest else f"{names[0]} of {source.called} is none"
        raise ConfigError(f"base: it is for a setting of the guest kernel; {which}")
    if base is not None and base not in series[ofguest[0]]:
        known = ", ".join(map(settings.written, series[ofguest[0]]))
        raise ConfigError(f"base: one of the values of {ofguest[0]} is needed, {known}, not {settings.written(base)}")
    bases = {name: series[name][0] if base is None else base for name in ofguest}
    done: list[tuple[dict[str, Any], Study]] = []

    def told(chosen: Mapping[str, Any]) -> str:
        return ", ".join(f"{name}={settings.written(value)}" for name, value in chosen.items())

    def labelled(chosen: Mapping[str, Any]) -> Progress | None:
        return None if progress is None else lambda design: progress(f"{told(chosen)} {design}")

    def swept(complete: bool) -> Swept:
        points = []
        for chosen, made in done:
            against = next((each for other, each in done if other == chosen | bases), None) if ofguest else None
            value = tuple(chosen.values()) if len(names) > 1 else chosen[names[0]]
            points.append((value, made.against(against, told(bases)) if against else made))
        return Swept(names if len(names) > 1 else names[0], points, told(bases) if ofguest else None, complete)

    # Nothing is run before all of it can be.
    plain = {key: value for key, value in options.items() if key not in ("windows", "costs", "skip_boot", *DIRECT)}
    points = []
    for each in itertools.product(*series.values()):
        chosen = dict(zip(names, each, strict=True))
        direct = {name: value for name, value in chosen.items() if name in DIRECT}
        more = {name: value for name, value in chosen.items() if name not in DIRECT}
        asked = options | direct
        job = _Job(
            source,
            designs,
            find_costs(asked.get("costs", "modern")),
            plain | fixed | more,
            asked.get("operations"),
            asked.get("seed"),
            asked.get("skip_boot", False),
            asked.get("warm_up", 0),
            asked.get("windows"),
        )
        points.append((chosen, job))
    try:
        for chosen, job in points:
            done.append((chosen, job.run(labelled(chosen) or (lambda _: nullcontext()))))
    except StudyInterrupted as stop:
        if isinstance(stop.study, Study) and stop.study.designs:
            done.append((chosen, stop.study))
        if not done:
            raise
        raise StudyInterrupted(swept(complete=False)) from None
    return swept(complete=True)


@dataclasses.dataclass(frozen=True)
class Audited:
    """What `audit` found. source: its name; operations: done, in `unit`s, of `total`, until the audit that found
    violations, if one did; audits: made; violations: (operation, violation). outcome: in plain types, as of a
    StudyDesign, where it came to an end.
    """

    source: str
    design: str
    unit: str
    operations: int
    total: int
    audits: int
    violations: tuple[tuple[int, Any], ...]
    recording_complete: bool
    outcome: dict[str, Any] | None


def audit(
    source: Given = None,
    mmu: str | Design = "cached",
    *,
    every: int = 100_000,
    at: Sequence[str] = (),
    progress: Progress | None = None,
    operations: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Audited:
    """Run one design, and check every invariant after so many operations, at the end, and at points of VM.audit_points.

    The rest as of `study`.
    """
    found = find(source)
    job = _Job(found, [mmu], find_costs("modern"), dict(settings or {}), operations, seed, False, 0, 0)
    job.setup = dataclasses.replace(job.setup, audit_every=every, audit_at=tuple(at))
    name, made = next(iter(job.designs.items()))
    try:
        with (progress or (lambda _: nullcontext()))(name) as report:
            outcome = found.run(made, job.setup, report)
    except AuditError as error:
        record = error.record or 0
        violations = tuple((record, violation) for violation in error.violations)
        told = (found.name, name, found.unit, record, job.setup.total, error.audits)
        return Audited(*told, violations, found.complete, None)
    plain = job.made(name, made, outcome, None, None).as_dict()
    told = (found.name, name, found.unit, outcome.operations, job.setup.total, outcome.audits)
    return Audited(*told, outcome.violations, found.complete, plain)


def prepared(
    source: Source,
    which: str | Design,
    given: Mapping[str, Any],
    *,
    costs: Costs,
    operations: int | None = None,
    seed: int | None = None,
    skip_boot: bool = False,
    warm_up: int | str = 0,
) -> Prepared:
    """One design alone, without one to be measured against: everything checked, nothing run. Errors as of `study`."""
    return Prepared(_Job(source, (which,), costs, given, operations, seed, skip_boot, warm_up, 0))


class _Job:
    """A study that is being made: everything checked, nothing run."""

    def __init__(
        self,
        source: Source,
        designs: Iterable[str | Design],
        costs: Costs,
        given: Mapping[str, Any],
        operations: int | None,
        seed: int | None,
        skip_boot: bool,
        warm_up: int | str,
        windows: int | None,
    ) -> None:
        self.source = source
        if seed is not None and not source.seeded:
            raise ConfigError("seed: a workload is needed; a recording has nothing random")
        seed = 0 if seed is None else check_int("seed", seed, 0, (1 << 64) - 1)
        self.split = settings.split(given, source)
        if isinstance(designs, (str, Native, Shadow, Nested)):
            designs = (designs,)
        wanted = [(design(which), self.split.made(which)) for which in designs]
        if not wanted:
            raise ConfigError("designs: at least one is needed")
        self.split.check_used(made for _, made in wanted)
        levels = self.split.machine.get("levels")
        self.costs = costs if levels is None else costs.replace(levels=levels)
        for _, made in wanted:
            self.split.check_levels(self._costs(made).levels, (made,))
        self.designs: dict[str, Design] = {}
        for _, made in wanted:
            if made.name in self.designs and self.designs[made.name] != made:
                raise ConfigError(f"designs: two are called {made.name!r}; give them names")
            self.designs[made.name] = made
        self.given = dict(given)
        limit = None if operations is None else check_int("operations", operations, 1, 1 << 62)
        parameters = source.checked(self.split.parameters)
        start = source.begin(skip_boot)
        warm = self._warm_up(warm_up, start)
        total = source.length(warm) - start
        if limit is not None:
            total = limit if source.kind == "workload" else min(total, limit)
        if warm >= total:
            raise ConfigError(f"warm_up: fewer than the {total:,} {source.unit} that are run are needed, not {warm:,}")
        counted = total - warm
        default = source.window(counted) if windows == 0 else max(1, counted // 200)
        self.window = default if windows is None else check_int("windows", windows, 0, 1 << 62)
        self.setup = Setup(
            start=start,
            total=total,
            warm_up=warm,
            window=self.window or default,
            seed=seed,
            tlb=settings.tlb(self.split.machine.get("tlb", source.tlb), costs.tlb),
            options=self.split.options,
            parameters=parameters,
            machine={name: value for name, value in self.split.machine.items() if name not in ("tlb", "levels")},
        )
        self.command = self._command(wanted, operations, skip_boot, warm_up)

    def _warm_up(self, given: int | str, start: int) -> int:
        """Operations from `start` on that are not counted. ConfigError for a phase that there is not."""
        count = parse_count(given) if isinstance(given, str) else given
        if count is not None:
            return check_int("warm_up", count, 0, 1 << 62)
        phases = self.source.phases
        if given not in phases:
            near = difflib.get_close_matches(str(given), phases, 1)
            known = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(phases)}" if phases else ""
            what = "" if phases else f"; {self.source.name} has none"
            expected = f"a number of {self.source.unit}, or the name of a phase, is needed"
            raise ConfigError(f"warm_up: {expected}, not {given!r}{known}{what}")
        if phases[str(given)] < start:
            raise ConfigError(
                f"warm_up: a phase after record {start:,}, where the replay begins, is needed, not {given!r}"
            )
        return phases[str(given)] - start

    def _command(
        self,
        wanted: list[tuple[Design, Design]],
        operations: int | None,
        skip: bool,
        warm_up: int | str,
    ) -> str:
        words = ["shadowcore", "compare", *self.source.words]
        for chosen, _ in wanted:
            words += ["--mmu", chosen.name]
        for name, value in self.given.items():
            words += ["--set", f"{name}={settings.written(value)}"]
        if operations is not None:
            words += ["--operations", str(operations)]
        if self.setup.seed:
            words += ["--seed", str(self.setup.seed)]
        if self.costs.name != Costs.modern().name:
            words += ["--costs", self.costs.name]
        if skip:
            words += ["--skip-boot"]
        if self.setup.warm_up:
            words += ["--warm-up", str(warm_up)]
        return shlex.join(words)

    def run(self, progress: Progress) -> Study:
        done: dict[str, StudyDesign] = {}
        native = None
        first: Outcome | None = None
        baseline = {"native": Native()} if "native" not in self.designs else {}
        # Native first: the others are measured against it.
        order = sorted((baseline | self.designs).items(), key=lambda item: not isinstance(item[1], Native))
        try:
            for name, made in order:
                with progress(name) as report:
                    outcome = self._one(made, report)
                if isinstance(made, Native) and native is None:
                    native = outcome.counters
                if name not in baseline:
                    first = first or outcome
                    done[name] = self.made(name, made, outcome, native, next(iter(done.values()), None))
        except KeyboardInterrupt:
            raise StudyInterrupted(self._study(done, first, complete=False)) from None
        return self._study({name: done[name] for name in self.designs}, first, complete=True)

    def _one(self, made: Design, report: Report) -> Outcome:
        return self.source.run(made, self.setup, report)

    def _study(self, done: dict[str, StudyDesign], first: Outcome | None, complete: bool) -> Study:
        source, setup = self.source, self.setup
        shown: dict[str, Any] = {"costs": self.costs.name, "tlb": label(setup.tlb)}
        if "levels" in self.split.machine:
            shown["levels"] = self.costs.levels.name
        shown |= source.shown(setup) | {"operations": setup.total}
        if setup.warm_up:
            shown |= {"warm_up": setup.warm_up}
        shown |= {name: getattr(setup.options, name) for name in self.split.guest} | self.split.design
        boot = source.phases.get("boot", 0) - setup.start if setup.warm_up == 0 else 0
        return Study(
            workload=source.name,
            recording=source.recording,
            kind=source.kind,
            stream=source.stream,
            unit=source.unit,
            per=source.per,
            operations=setup.total if source.kind == "workload" else source.length(0),
            warm_up=setup.warm_up,
            designs=done,
            costs=self.costs,
            settings=shown,
            command=self.command,
            window=self.window,
            complete=complete,
            recording_complete=source.complete,
            holdings=None if first is None else source.holdings(first),
            caption="" if first is None else first.caption,
            settles="boot" if 0 < boot < setup.total else str(setup.warm_up + (setup.total - setup.warm_up) // 2),
        )

    def made(
        self,
        name: str,
        made: Design,
        outcome: Outcome,
        native: dict[str, int] | None,
        first: StudyDesign | None,
    ) -> StudyDesign:
        """What a design did. native: counters that it is measured against; first: the design that was first."""
        history = outcome.history
        equal = None if history is None else first is None or history == first.history
        return StudyDesign(
            name=name,
            design=made,
            counters=outcome.counters,
            cost=self._costs(made).of(outcome.counters, native),
            seconds=outcome.seconds,
            operations=outcome.operations,
            windows=self._windows(outcome, self._costs(made)) if self.window else {},
            pages_mean=outcome.pages_mean,
            pages_max=outcome.pages_max,
            gpa_mismatches=outcome.gpa_mismatches if history is None else 0 if equal else None,
            history=history,
            history_equal=equal,
            result=outcome.result,
            guest=outcome.guest,
            details=outcome.details,
            halves=_halves(outcome.windows),
            work=outcome.work,
            exit_log=outcome.exit_log,
        )

    def _costs(self, made: Design) -> Costs:
        """Prices, with levels that have a place for the design where nobody said which."""
        if "levels" in self.split.machine:
            return self.costs
        return self.costs.replace(levels=of_design(self.costs.levels, made.engine), sources=self.costs.sources)

    def _windows(self, outcome: Outcome, costs: Costs) -> dict[str, NDArray[np.uint64]]:
        """Those of the outcome, with `cycles`."""
        windows = dict(outcome.windows)
        operations = np.diff(windows["operation"], prepend=np.uint64(0))
        known = {name: column.tolist() for name, column in windows.items() if not name.startswith("pages_")}
        known = {"operations": operations.tolist()} | known
        known |= {"guest_faults": known["faults"], "guest_invlpg": known["invlpg"]}
        rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
        windows["cycles"] = np.array([round(costs.of(row).total) for row in rows], dtype=np.uint64)
        return windows


class Prepared:
    """One design of a study that can be run, as often as one likes."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        ((self._name, self._made),) = job.designs.items()

    @property
    def made(self) -> Design:
        """The design, with its settings."""
        return self._made

    @property
    def setup(self) -> Setup:
        """How the source is run."""
        return self._job.setup

    @property
    def tlb(self) -> TLB | ProcessorTLB | None:
        """The TLB that is modelled."""
        return self._job.setup.tlb

    @property
    def warm_up(self) -> int:
        """Operations that are not counted."""
        return self._job.setup.warm_up

    @property
    def costs(self) -> Costs:
        """The prices, with the levels that are asked for."""
        return self._job.costs

    def determined(self) -> dict[str, Any]:
        """All that determines what a run comes to, but for the source itself and the engine."""
        setup, source = self._job.setup, self._job.source
        design = dataclasses.asdict(self._made)
        del design["name"]
        found: dict[str, Any] = {"design": design, "start": setup.start, "operations": setup.total, "tlb": setup.tlb}
        if setup.warm_up:
            found["warm_up"] = setup.warm_up
        if source.guest:
            memory = source.shown(setup).get("memory")
            machine = {name: value for name, value in setup.machine.items() if name != "memory"}
            found |= {"seed": setup.seed, "memory": memory and parse_size(memory), "machine": machine}
            found |= {"parameters": dict(setup.parameters), "guest": dataclasses.asdict(setup.options)}
        return found

    def run(self, report: Report = None) -> StudyDesign:
        """Run it."""
        outcome = self._job.source.run(self._made, self._job.setup, report)
        return self._job.made(self._name, self._made, outcome, None, None)


def _halves(windows: Mapping[str, NDArray[np.uint64]]) -> tuple[int, int] | None:
    """Exits in the first half of the operations, and in the second; a window that has both is parted. None where a
    single window has most of them."""
    ends = windows.get("operation", np.zeros(0, dtype=np.uint64)).astype(np.float64)
    if not len(ends) or np.diff(ends, prepend=0.0).max() > 0.6 * ends[-1]:
        return None
    exits = np.cumsum(windows["exits_total"].astype(np.float64))
    first = int(np.interp(ends[-1] / 2, np.append(0.0, ends), np.append(0.0, exits)))
    return first, int(exits[-1]) - first
