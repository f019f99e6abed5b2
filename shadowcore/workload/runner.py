"""Workloads by name, run on the guest kernel; catalog and first_touch have what they do."""

from __future__ import annotations

import dataclasses
import difflib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import notebook
from ..config import TLB, Design, Features, check_int
from ..engine.audits import Audits
from ..engine.exitlog import ExitLog
from ..engine.machine import VM
from ..engine.tlbs import ProcessorTLB
from ..engine.windows import WindowLog, grown
from ..errors import ConfigError
from ..guest.kernel import Kernel
from ..guest.options import Call, KernelOptions
from .script import WORKLOADS, Guest, Workload


@dataclasses.dataclass(frozen=True)
class WorkloadResult:
    """What a run came to.

    operations: of the processor, setup and warm-up left out: accesses of user code and of the kernel, CR3 loads,
        INVLPGs.
    counters: of the kernel; stats: of the VM; both of these operations alone. setup: operations that the setup took.
    warm_up: those between it and the first that is counted. audits: how many were made.
    history: checksum of all accesses from boot on; the same under every design. frames: at the end.
    seconds: of the work that is counted. recording: all operations from boot on (OP_DTYPE), or None.
    windows: counters in each window of operations, by name (see `windows.WindowLog`), or None; and if there are,
    pages_mean, pages_max: shadow pages in use, sampled.
    exit_log: every exit, as `ExitLog.rows` has them; None where no log was asked for.
    """

    workload: str
    design: str
    seed: int
    parameters: dict[str, int]
    operations: int
    setup: int
    counters: dict[str, int]
    stats: dict[str, int]
    frames: dict[str, int]
    history: int
    seconds: float
    recording: NDArray[Any] | None = dataclasses.field(repr=False)
    windows: dict[str, NDArray[np.uint64]] | None = dataclasses.field(default=None, compare=False, repr=False)
    pages_mean: float | None = None
    pages_max: int | None = None
    warm_up: int = 0
    audits: int = 0
    exit_log: NDArray[np.void] | None = dataclasses.field(default=None, compare=False, repr=False)

    def _repr_html_(self) -> str:
        title = f"{self.workload} under {self.design}: {self.operations:,} operations"
        return notebook.counters(title, self.stats | {f"guest: {name}": n for name, n in self.counters.items()})

    @property
    def operations_per_second(self) -> float:
        """Operations by seconds of this host; 0 if no time passed."""
        return self.operations / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All but the recording, the windows and the log of exits, in plain types."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["recording"], plain["windows"], plain["exit_log"]
        return plain | {"operations_per_second": self.operations_per_second}


WINDOWS = 200
"""Parts in which a run is looked at for the end of its warm-up, where there are no windows."""


class _Meter:
    """Carries operations out in parts, so that counters can be read in between: a round may be longer than a window.

    Windows end at the first look after their last operation. Pages in use are those at each look, eight a window. The
    warm-up ends at the first look after its last operation; what is counted begins there.
    """

    def __init__(self, kernel: Kernel, vm: VM, window: int, warm_up: int = 0, exits: ExitLog | None = None) -> None:
        self._kernel, self._stats, self._window, self._exits = kernel, vm.stats, window, exits
        self._warm_up = warm_up
        self._calls = 1
        self._begin()

    def _begin(self) -> None:
        self.counters, self.stats = self._kernel.counters, self._stats.as_dict()
        self.clock = time.perf_counter()
        self._kernel_before = self.counters
        self.start = self._seen = _operations(self.counters)
        self._end = self._window
        self._log = WindowLog(self._stats)
        if self._exits is not None:
            self._exits.clear()

    def run(self, calls: NDArray[Any]) -> NDArray[np.uint64]:
        results, first = [], 0
        while first < len(calls):
            part = calls[first : _whole(calls, first, first + self._calls)]
            first += len(part)
            results.append(self._kernel.run(part))
            self._look(len(part))
        return np.concatenate(results) if results else np.zeros(0, dtype=np.uint64)

    def _look(self, calls: int) -> None:
        counters = self._kernel.counters
        seen = _operations(counters)
        if self._warm_up and seen - self.start >= self._warm_up:
            self._warm_up = 0
            self._begin()
            return
        pages = self._stats.mmu_cache_miss - self._stats.page_frees
        self._log.pages(1, pages, pages)
        each = (seen - self._seen) / calls
        self._calls = max(1, min(int(self._window / 8 / each), 2 * self._calls) if each else 2 * self._calls)
        self._seen = seen
        if seen - self.start >= self._end:
            self._close(counters)

    def _close(self, counters: dict[str, int]) -> None:
        done = self._seen - self.start
        before = self._kernel_before
        grown = {name: counters[name] - before[name] for name in ("faults", "table_stores", "switches", "cr3_loads")}
        self._log.count(guest_cr3_loads=grown.pop("cr3_loads"), **grown)
        self._kernel_before = counters
        self._end = (done // self._window + 1) * self._window
        self._log.close(done)

    def results(self) -> dict[str, Any]:
        """What a WorkloadResult has of it."""
        if self._log.open:
            self._close(self._kernel.counters)
        windows = self._log.arrays(self._seen - self.start)
        most = int(windows["pages_max"].max(initial=0))
        return {"windows": windows, "pages_mean": self._log.pages_mean, "pages_max": most}


def _whole(calls: NDArray[Any], first: int, stop: int) -> int:
    """Where calls[first:stop] may end: not between an operation and those that come amid it."""
    part = calls[first:stop]
    with_others = np.flatnonzero((part["op"] == Call.MUNMAP) & (part["value"] != 0))
    if len(with_others):
        last = int(with_others[-1])
        stop = max(stop, first + last + 1 + int(part["value"][last]))
    return stop


def find(name: str) -> Workload:
    """The workload of that name; ConfigError with the nearest one if there is none."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    near = difflib.get_close_matches(str(name), WORKLOADS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(WORKLOADS)}"
    raise ConfigError(f"workload: there is no {name!r}{hint}")


def run(
    name: str,
    vm: VM | str | Design = "cached",
    *,
    seed: int = 0,
    operations: int = 1_000_000,
    options: KernelOptions | None = None,
    record: bool = False,
    audit_every: int = 0,
    progress: Callable[[int, int], None] | None = None,
    window: int = 0,
    tlb: TLB | ProcessorTLB | None = None,
    vcpus: int | None = None,
    host_page_size: int | str | None = None,
    warm_up: int = 0,
    log_exits: bool = False,
    **parameters: Any,
) -> WorkloadResult:
    """Run a workload until the processor has done `operations`, setup left out; the round in hand is finished.

    vm: a fresh VM, or a design, for which one with the memory that the workload needs is made.
    seed: of everything random. options: of the kernel; what the workload needs (swap, large pages) is added.
    record: keep every operation (19 bytes each). audit_every: check all invariants (AuditError) after this many
        operations, and at the end (0: never). progress: called with operations done, and all.
    window: count by windows of this many operations (0: do not). tlb: a TLB to model, vcpus: processors (1), and
        host_page_size: of the host's pages under the guest's memory (4096 bytes), where the VM is made here.
    warm_up: of the operations, those that come first and are not counted; they warm tables, shadow and TLB.
    log_exits: keep a log of all exits that are counted. Its operations count from the end of the setup on.
    parameters: see WORKLOADS[name].parameters. ConfigError for what cannot be.
    """
    workload = find(name)
    checked = workload.checked(parameters)
    wanted = check_int("operations", operations, 0, 1 << 62)
    every = check_int("audit_every", audit_every, 0, 1 << 62)
    check_int("seed", seed, 0, (1 << 64) - 1)
    if options is None:
        options = KernelOptions()
    if not isinstance(options, KernelOptions):
        raise ConfigError(f"options: KernelOptions are needed, not {options!r:.60}")
    needed = {key: max(value, getattr(options, key)) for key, value in workload.options.items()}
    options = dataclasses.replace(options, seed=seed, **needed)
    step = check_int("window", window, 0, 1 << 62)
    warm = check_int("warm_up", warm_up, 0, max(wanted - 1, 0))
    if not isinstance(vm, VM):
        count = 1 if vcpus is None else vcpus
        vm = VM(workload.memory, vm, count, tlb, features=Features(), host_page_size=host_page_size)
    else:
        for key, value in (("tlb", tlb), ("vcpus", vcpus), ("host_page_size", host_page_size)):
            if value is not None:
                raise ConfigError(f"{key}: the VM that was given has its own, or none")
    kernel = Kernel(vm, options)
    if record:
        kernel.record()
    guest = Guest(kernel, np.random.default_rng(seed))
    steps = workload.function(guest, **checked)
    next(steps)
    setup = _operations(kernel.counters)
    # Without windows or a warm-up nothing is looked at in between.
    exits = vm.record_exits() if log_exits else None
    meter = _Meter(kernel, vm, step or (max(1, (wanted - warm) // WINDOWS) if warm else 0), warm, exits)
    if step or warm:
        guest.carry_out = meter.run
    done, seconds, began = 0, 0.0, meter.clock
    audits = Audits(vm, every)
    with audits.told(lambda: done):
        while done < wanted or (warm and done == meter.start - setup):
            clock = time.perf_counter()
            next(steps)
            if meter.clock > began:
                seconds, clock, began = 0.0, meter.clock, meter.clock
            seconds += time.perf_counter() - clock
            done = _operations(kernel.counters) - setup
            if audits.due(done):
                audits.look(done)
            if progress is not None:
                progress(min(done, wanted), wanted)
        audits.look(done)
    return WorkloadResult(
        workload=name,
        design=vm.mmu.design.name,
        seed=seed,
        parameters=checked,
        operations=done - (meter.start - setup),
        setup=setup,
        counters=_since(kernel.counters, meter.counters),
        stats=grown(vm.stats.as_dict(), meter.stats),
        frames=kernel.frames,
        history=kernel.history,
        seconds=seconds,
        recording=kernel.recording if record else None,
        warm_up=meter.start - setup,
        audits=audits.made,
        exit_log=None if exits is None else exits.close(),
        **(meter.results() if step else {}),
    )


def _operations(counters: dict[str, int]) -> int:
    return counters["accesses"] + counters["kernel_accesses"] + counters["cr3_loads"] + counters["invlpg"]


def _since(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}
