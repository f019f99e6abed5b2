"""What a study runs under designs: a workload, or a recording of a guest, of operations, or of programs.

Each is a `Source`: it says which settings it takes and how long it is, and runs under one design. A study, and all that
reports write, know no more of it than that.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .. import programs, workload
from ..config import TLB, Design, Features, Shadow, check_bool, check_int, parse_size
from ..engine.future import Future, recorder_of
from ..engine.machine import VM
from ..engine.tlbs import ProcessorTLB
from ..errors import ConfigError, TraceError
from ..guest.options import KernelOptions
from ..programs import spaces
from ..programs.survey import TURN
from ..recording import operations as recorded
from ..recording import replay as trace
from ..recording.format import GUEST, OPERATIONS, PROGRAM, SUFFIX
from ..recording.guest import Recording, RecordingFile
from ..recording.reader import Reader, is_recording

Result = trace.ReplayResult | recorded.OperationsResult | workload.WorkloadResult
Report = Callable[[int, int], None] | None
"""Called with operations done, and all."""

DEFAULT_OPERATIONS = 1_000_000
"""Of a workload, where nothing else is said."""
WINDOWS = 200
"""Windows in a study, about, where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a source is run, under whatever design.

    start: where it begins. total: operations from there on, warm_up the first of them, which are not counted.
    window: of the others, in each window. record_uses: Outcome.future is wanted.
    seed, options: of the guest kernel; parameters, machine: settings by name. log_exits: Outcome.exit_log is wanted.
    """

    start: int
    total: int
    warm_up: int
    window: int
    seed: int
    tlb: TLB | ProcessorTLB | None
    options: KernelOptions
    parameters: Mapping[str, Any]
    machine: Mapping[str, Any]
    audit_every: int = 0
    audit_at: Sequence[str] = ()
    record_uses: bool = False
    log_exits: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a source came to under a design, from the end of the warm-up on.

    operations: counted, in the source's unit. counters: of VM.stats, and of the guest, as prices need them.
    guest: what it did, by name. work: what it did of it that no setting of the guest changes (None: not known).
    gpa_mismatches: None where no gpas are known that they are compared with. history: checksum of what the guest saw.
    details: what only such a source has, in plain types. caption: what the guest did, as a text.
    audits, violations: as of a ReplayResult. future: how shadow pages were used, where that was asked for.
    """

    operations: int
    counters: dict[str, int]
    guest: dict[str, int]
    windows: dict[str, NDArray[np.uint64]]
    pages_mean: float
    pages_max: int
    seconds: float
    gpa_mismatches: int | None
    history: int | None
    details: dict[str, Any]
    caption: str
    result: Result
    work: int | None = None
    audits: int = 0
    violations: tuple[tuple[int, Any], ...] = ()
    future: Future | None = None

    @property
    def exit_log(self) -> NDArray[np.void] | None:
        """Every exit, where a log was asked for."""
        return self.result.exit_log


DETAILS = (
    *("warm_up", "records", "snapshot_words", "physical_stores", "mismatch_records", "boot", "workload"),
    *("kernel", "frames", "refused", "ignored", "processes"),
)
"""Names of details of any source."""


class Source:
    """Something that a study runs.

    name: of it. kind: "workload" or "recording". stream: of a recording. unit: what its operations are called, per:
    what exits are told per million of. words: how the command line calls it. complete: False for a recording that ended
    before its time.
    seeded: something in it is random. guest: it takes settings of the guest kernel. machine: those of MACHINE that it
    takes. parameters: names of its own. tlb: its TLB where none is set: "costs", that of the prices, or None.
    """

    kind = "recording"
    stream: str | None = None
    unit = per = "operations"
    complete = True
    seeded = guest = False
    machine: tuple[str, ...] = ("levels", "tlb")
    parameters: Mapping[str, Any] = {}
    tlb: str | None = None
    recording: Recording | RecordingFile | None = None
    workload: workload.Workload | None = None

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self.name = name
        self.words = tuple(words)

    @property
    def called(self) -> str:
        """In messages about settings."""
        return {GUEST: "a recording", PROGRAM: "a recording of programs"}.get(
            str(self.stream), "a recording of operations"
        )

    @property
    def phases(self) -> Mapping[str, int]:
        """By name, the operation at which a phase begins (`boot`: ends)."""
        return {}

    @property
    def files(self) -> Sequence[str]:
        """That are read."""
        return self.words

    @property
    def argument(self) -> str | None:
        """The words as one; None for the recording in the package."""
        return shlex.join(self.words) if self.words else None

    def begin(self, skip_boot: bool) -> int:
        """The first operation to run. ConfigError."""
        if skip_boot:
            raise ConfigError(f"skip_boot: a recording of a guest is needed; {self.called} has no boot")
        return 0

    def length(self, warm_up: int) -> int:
        """Operations there are, or are run where nothing else is said."""
        raise NotImplementedError

    def checked(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        """Its own parameters, all of them. ConfigError."""
        return {}

    def shown(self, setup: Setup) -> dict[str, Any]:
        """Settings that a study names, of those that are not the design's."""
        return {}

    def window(self, counted: int) -> int:
        """Operations in a window where nobody asks for windows: so that halves, and pages in use, are known."""
        return max(1, counted // WINDOWS)

    def frames(self) -> int:
        """Of the guest."""
        raise NotImplementedError

    def holdings(self, outcome: Outcome) -> Mapping[str, Any] | None:
        """What a recording has and lacks: see recording.holdings."""
        return None

    def run(self, made: Design, setup: Setup, report: Report) -> Outcome:
        """Run it under a design. AuditError where an audit finds violations, but for a guest's recording."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class WorkloadSource(Source):
    """A workload by its name."""

    kind = "workload"
    seeded = guest = True
    machine = ("levels", "tlb", "memory", "vcpus", "host_page_size", "backing", "outer_backing")
    tlb = "costs"

    def __init__(self, found: workload.Workload) -> None:
        super().__init__(found.name, [found.name])
        self.workload = found
        self.parameters = found.parameters

    @property
    def called(self) -> str:
        return self.name

    @property
    def files(self) -> Sequence[str]:
        return ()

    def begin(self, skip_boot: bool) -> int:
        if skip_boot:
            raise ConfigError("skip_boot: a recording is needed; a workload begins after its setup")
        return 0

    def length(self, warm_up: int) -> int:
        return DEFAULT_OPERATIONS + warm_up

    def checked(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self.workload is not None
        return self.workload.checked(dict(parameters))

    def _memory(self, setup: Setup) -> Any:
        assert self.workload is not None
        return setup.machine.get("memory", self.workload.memory)

    def shown(self, setup: Setup) -> dict[str, Any]:
        return {"seed": setup.seed, "memory": self._memory(setup)} | dict(setup.machine) | dict(setup.parameters)

    def frames(self) -> int:
        assert self.workload is not None
        return parse_size(self.workload.memory) >> 12

    def run(self, made: Design, setup: Setup, report: Report) -> Outcome:
        more = {name: value for name, value in setup.machine.items() if name != "memory"}
        if isinstance(made, Shadow) and made.policy == "optimal":
            more["future"] = self.run(
                recorder_of(made), dataclasses.replace(setup, record_uses=True, log_exits=False), None
            ).future
        more["record_uses"] = setup.record_uses
        vm = VM(self._memory(setup), made, tlb=setup.tlb, features=Features(), **more)
        vm.audit_points = setup.audit_at
        result = workload.run(
            self.name,
            vm,
            seed=setup.seed,
            operations=setup.total,
            options=setup.options,
            progress=report,
            window=setup.window,
            warm_up=setup.warm_up,
            audit_every=setup.audit_every,
            log_exits=setup.log_exits,
            **cast("dict[str, Any]", dict(setup.parameters)),
        )
        n = result.counters
        caption = (
            f"{n['accesses']:,} accesses of user code, {n['kernel_accesses']:,} of its kernel, {n['cr3_loads']:,} CR3 "
            f"loads, {n['table_stores']:,} stores to tables, {n['faults']:,} faults; setup left out. "
            f"Seed {result.seed}."
        )
        outcome = _of_kernel(result, result.operations, {}, caption)
        return dataclasses.replace(outcome, future=Future.of(vm.mmu)) if setup.record_uses else outcome


class GuestSource(Source):
    """A recording of a guest."""

    stream = GUEST
    unit = "records"
    per = "guest instructions"

    def __init__(self, recording: Recording | RecordingFile, words: Sequence[str]) -> None:
        super().__init__(recording.name, words)
        self.recording = recording
        self.complete = recording.complete

    @property
    def _recording(self) -> Recording | RecordingFile:
        assert self.recording is not None
        return self.recording

    @property
    def phases(self) -> Mapping[str, int]:
        return self._recording.phases

    def begin(self, skip_boot: bool) -> int:
        user = self._recording.first_user if skip_boot else 0
        if user is None:
            raise ConfigError("skip_boot: a recording with user-mode accesses is needed, this one has none")
        return user

    def length(self, warm_up: int) -> int:
        return self._recording.operations

    def shown(self, setup: Setup) -> dict[str, Any]:
        return {"start": setup.start}

    def window(self, counted: int) -> int:
        return (counted + 1) // 2

    def frames(self) -> int:
        return int(self._recording.nframes)

    def holdings(self, outcome: Outcome) -> Mapping[str, Any]:
        return self._recording.holdings

    def run(self, made: Design, setup: Setup, report: Report) -> Outcome:
        result = trace.replay(
            self._recording,
            made,
            start=setup.start,
            stop=setup.start + setup.total,
            warm_up=setup.warm_up,
            progress=report,
            window=setup.window,
            tlb=setup.tlb,
            audit_every=setup.audit_every,
            log_exits=setup.log_exits,
            audit_at=setup.audit_at,
            record_uses=setup.record_uses,
        )
        whole = result.whole
        counters = whole.counters | {
            "operations": whole.records,
            "instructions": whole.instructions,
            "guest_cr3_loads": result.cr3_loads,
            "guest_invlpg": whole.counters["invlpg"],
            "guest_faults": result.faults,
        }
        guest = {
            "records": whole.records,
            "instructions": whole.instructions,
            "accesses": result.accesses,
            "table_stores": result.table_stores,
            "physical_stores": result.physical_stores,
            "snapshot_words": result.snapshot_words,
            "cr3_loads": result.cr3_loads,
            "faults": result.faults,
        }
        caption = (
            f"{whole.records:,} records replayed, {whole.instructions / 1e6:,.0f} million guest instructions: "
            f"{result.accesses:,} accesses, {result.table_stores:,} stores to tables ({result.physical_stores:,} by "
            f"mappings that are not known), {result.snapshot_words:,} words of new tables."
        )
        if result.boot and result.workload:
            ends = setup.start + result.warm_up + result.boot.records
            caption += f" Boot ends at record {ends:,}, the first user-mode access."
        return Outcome(
            operations=whole.records,
            counters=counters,
            guest=guest,
            windows=result.windows or {},
            pages_mean=result.pages_mean,
            pages_max=result.pages_max,
            seconds=result.seconds,
            gpa_mismatches=result.gpa_mismatches,
            history=None,
            details=result.as_dict(),
            caption=caption,
            result=result,
            audits=result.audits,
            violations=result.violations,
            future=result.future,
        )


class OperationsSource(Source):
    """A recording of operations, with the machine that they start on."""

    stream = OPERATIONS

    def __init__(self, path: str) -> None:
        with Reader(path) as reader:
            start = reader.start()
            super().__init__(reader.name, [path])
            self.complete = reader.complete
            self._length, self._vcpus, self._frames = reader.records, start["vcpus"], start["memory"] >> 12
        if not self._length:
            raise TraceError(path, None, "at least one operation expected")

    def length(self, warm_up: int) -> int:
        return self._length

    def frames(self) -> int:
        return self._frames

    def holdings(self, outcome: Outcome) -> Mapping[str, Any]:
        return {
            "fetches": bool(outcome.guest.get("fetch")),
            "values": True,
            "vcpus": self._vcpus,
            "instructions": False,
        }

    def run(self, made: Design, setup: Setup, report: Report) -> Outcome:
        result = recorded.run(
            self.words[0],
            made,
            operations=setup.total,
            warm_up=setup.warm_up,
            progress=report,
            window=setup.window,
            tlb=setup.tlb,
            audit_every=setup.audit_every,
            log_exits=setup.log_exits,
            audit_at=setup.audit_at,
        )
        n = result.counts
        counters = result.stats | {
            "operations": result.operations,
            "guest_cr3_loads": n["cr3"],
            "guest_invlpg": n["invlpg"],
            "guest_faults": n["guest_faults"],
        }
        done = ", ".join(f"{number:,} {name}" for name, number in n.items() if number and not name.endswith("faults"))
        return Outcome(
            operations=result.operations,
            counters=counters,
            guest={name: number for name, number in n.items() if number},
            windows=result.windows or {},
            pages_mean=result.pages_mean or 0.0,
            pages_max=result.pages_max or 0,
            seconds=result.seconds,
            gpa_mismatches=None,
            history=result.history,
            details={"records": result.operations, "warm_up": result.warm_up},
            caption=f"{done}; {n['guest_faults']:,} ended in a guest fault.",
            result=result,
            audits=result.audits,
        )


class ProgramSource(Source):
    """Recordings of programs, which run side by side on the guest kernel."""

    stream = PROGRAM
    unit = per = "accesses"
    seeded = guest = True
    machine = ("levels", "tlb", "memory")
    parameters: Mapping[str, Any] = {"turn": TURN, "fold": False}
    tlb = "costs"

    def __init__(self, paths: Sequence[str]) -> None:
        readers = spaces.open_all(paths)
        self.complete = all(reader.complete for reader in readers)
        self._length = sum(reader.records for reader in readers)
        self._ordered = len(readers) == 1 and not spaces.split(readers[0])
        super().__init__("+".join(reader.name for reader in readers), paths)
        spaces.close_all(readers)
        self._survey: programs.Survey | None = None

    def length(self, warm_up: int) -> int:
        return self._length

    def checked(self, parameters: Mapping[str, Any]) -> Mapping[str, Any]:
        known = dict(self.parameters) | dict(parameters)
        return {"turn": check_int("turn", known["turn"], 1, 1 << 40), "fold": check_bool("fold", known["fold"])}

    def window(self, counted: int) -> int:
        return max(1, counted // (WINDOWS // 10))  # a look at counters costs as much as some hundred accesses

    def survey(self, turn: int = TURN) -> programs.Survey:
        """What the programs need: a pass over the recordings, made once."""
        if self._survey is None or self._survey.turn != turn:
            self._survey = programs.survey(self.words, turn=turn)
        return self._survey

    def shown(self, setup: Setup) -> dict[str, Any]:
        return {"seed": setup.seed} | dict(setup.machine) | dict(setup.parameters)

    def frames(self) -> int:
        return self.survey().memory >> 12

    def holdings(self, outcome: Outcome) -> Mapping[str, Any]:
        assert self._survey is not None
        return {
            "fetches": self._survey.fetches,
            "sizes": self._survey.sizes,
            "mappings": self._survey.events,
            "processes": len(self._survey.touched),
            "order": self._ordered,
            "values": False,
            "kernel": False,
        }

    def run(self, made: Design, setup: Setup, report: Report) -> Outcome:
        result = programs.run(
            self.survey(setup.parameters["turn"]),
            made,
            memory=setup.machine.get("memory"),
            seed=setup.seed,
            operations=setup.total,
            options=setup.options,
            fold=setup.parameters["fold"],
            windows=setup.window,
            warm_up=setup.warm_up,
            tlb=setup.tlb,
            audit_every=setup.audit_every,
            log_exits=setup.log_exits,
            audit_at=setup.audit_at,
            progress=report,
        )
        n = result.counters
        count = len(result.processes)
        of = f"{count:,} process{'' if count == 1 else 'es'}"
        caption = (
            f"{result.accesses:,} accesses of {of}, {n['kernel_accesses']:,} of the kernel, {n['forks']:,} forks, "
            f"{n['execs']:,} execs, {n['cr3_loads']:,} CR3 loads, {n['faults']:,} faults."
        )
        more = {name: getattr(result, name) for name in ("frames", "refused", "ignored")}
        details = more | {"processes": [dict(each) for each in result.processes]}
        return _of_kernel(result, setup.total - setup.warm_up, details, caption)


def _of_kernel(result: workload.WorkloadResult, operations: int, details: dict[str, Any], caption: str) -> Outcome:
    """What a run of the guest kernel came to."""
    n = result.counters
    counters = result.stats | {
        "operations": result.operations,
        "guest_cr3_loads": n["cr3_loads"],
        "guest_invlpg": n["invlpg"],
        "guest_faults": n["faults"],
    }
    return Outcome(
        operations=operations,
        counters=counters,
        guest=dict(n),
        windows=result.windows or {},
        pages_mean=result.pages_mean or 0.0,
        pages_max=result.pages_max or 0,
        seconds=result.seconds,
        gpa_mismatches=None,
        history=result.history,
        details={"kernel": dict(n), "warm_up": result.warm_up} | details,
        caption=caption,
        result=result,
        work=n["accesses"],
        audits=result.audits,
    )


def opened(sources: Iterable[str | None] | None, progress: Callable[[int, int], None] | None) -> Iterator[Source]:
    """Each of several sources in turn, what `find` makes of it. None: the recording of the package and all workloads.

    progress: called with sources done, and all. ConfigError where there is none.
    """
    wanted = [None, *workload.WORKLOADS] if sources is None else list(sources)
    if not wanted:
        raise ConfigError("sources: at least one is needed")
    for place, source in enumerate(wanted):
        if progress is not None:
            progress(place, len(wanted))
        yield find(source)
    if progress is not None:
        progress(len(wanted), len(wanted))


def find(source: Any = None) -> Source:
    """What `source` is: a workload or its name, a recording, a path, several paths of recordings of programs, or None:
    the recording in the package. ConfigError, TraceError."""
    if isinstance(source, Source):
        return source
    if isinstance(source, (Recording, RecordingFile)):
        path = getattr(source, "path", None)
        bundled = source.name == trace.BUNDLED and path is None
        return GuestSource(source, () if bundled else [str(path or f"{source.name}.npz")])
    if isinstance(source, workload.Workload):
        return WorkloadSource(source)
    if source is None:
        return GuestSource(trace.open_recording(None), ())
    if isinstance(source, (list, tuple)):
        if not source:
            raise ConfigError("source: at least one is needed")
        return find(source[0]) if len(source) == 1 else _several(source)
    if isinstance(source, str) and source in workload.WORKLOADS:
        return WorkloadSource(workload.find(source))
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"workload: a name, a path or a recording is needed, not {source!r:.60}")
    path = Path(source)
    looks_like_a_file = path.suffix in (".npz", SUFFIX) or len(path.parts) > 1 or isinstance(source, os.PathLike)
    if path.is_dir():
        raise ConfigError(f"{path}: it is a directory; a recording (.screc) or the name of a workload is needed")
    if looks_like_a_file and not path.exists():
        raise ConfigError(f"{path}: No such file or directory{_near(path)}")
    if not looks_like_a_file and not path.is_file():
        workload.find(str(source))
        raise AssertionError  # find has refused it
    if is_recording(source):
        with Reader(source) as reader:
            stream = reader.stream
        if stream == OPERATIONS:
            return OperationsSource(str(source))
        if stream == PROGRAM:
            return ProgramSource([str(source)])
    return GuestSource(trace.open_recording(source), [str(source)])


def _near(path: Path) -> str:
    """The file beside it whose name is nearest."""
    try:
        there = [each.name for each in path.parent.iterdir() if each.suffix in (".npz", SUFFIX)]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, there, 1)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def _several(sources: Sequence[Any]) -> Source:
    """Programs that run side by side."""
    for each in sources:
        found = find(each)
        if found.stream != PROGRAM:
            what = "workload" if found.stream is None else f"recording of {found.stream}"
            raise ConfigError(
                f"source: recordings of programs run side by side, nothing else; {found.name} is a {what}"
            )
    return ProgramSource([str(each) for each in sources])
