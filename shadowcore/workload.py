"""Workloads: what processes of the guest kernel do, each a short function with parameters and a seed.

A workload is a generator: it sets its processes up, yields, and from then on yields after each round of work. Rounds
are arrays of kernel operations (CALL_DTYPE), carried out without the GIL. The same seed gives the same operations
whatever the design of the VM.
"""

from __future__ import annotations

import dataclasses
import difflib
import heapq
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import TLB, Features, Native, Shadow, check_int
from .errors import ConfigError
from .guest_options import Call, File, KernelOptions, Program, Prot, Touch
from .kernel import CALL_DTYPE, NO_PROGRAM, Kernel
from .machine import VM
from .windows import WindowLog

if TYPE_CHECKING:
    from . import calibration as calibrated

AREA = 0x50000000
"""Where workloads map what they share or scan: free in every mode."""
RW = int(Prot.READ | Prot.WRITE)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a workload: its default, the lowest and highest value, and what it is (with its unit)."""

    default: int
    low: int
    high: int
    help: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """A workload: `function` makes its generator; memory: guest RAM in bytes that its defaults need; options: settings
    of the kernel that it needs."""

    name: str
    summary: str
    function: Callable[..., Iterator[None]]
    memory: str
    parameters: dict[str, Parameter]
    options: dict[str, Any]

    def checked(self, given: dict[str, Any]) -> dict[str, int]:
        """Every parameter with its value; ConfigError for one that there is not, or that is out of range."""
        for name in given:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise ConfigError(f"{self.name}: there is no parameter {name!r}; its parameters: {known}")
        return {
            name: check_int(f"{self.name}: {name}", given.get(name, what.default), what.low, what.high)
            for name, what in self.parameters.items()
        }


@dataclasses.dataclass(frozen=True)
class WorkloadResult:
    """What a run came to.

    operations: of the processor, setup left out: accesses of user code and of the kernel, CR3 loads, INVLPGs.
    counters: of the kernel; stats: of the VM; both without the setup. setup: operations that the setup took.
    history: checksum of all accesses from boot on; the same under every design. frames: at the end.
    seconds: of the work, the setup left out. recording: all operations from boot on (OP_DTYPE), or None.
    windows: counters in each window of operations, by name (see `windows.WindowLog`), or None; and if there are,
    pages_mean, pages_max: shadow pages in use, sampled.
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
    recording: NDArray[Any] | None
    windows: dict[str, NDArray[np.uint64]] | None = dataclasses.field(default=None, compare=False)
    pages_mean: float | None = None
    pages_max: int | None = None

    @property
    def operations_per_second(self) -> float:
        return self.operations / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All but the recording and the windows, in plain types."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del plain["recording"], plain["windows"]
        return plain | {"operations_per_second": self.operations_per_second}


WORKLOADS: dict[str, Workload] = {}
"""By name."""


def _workload(
    name: str, memory: str, options: dict[str, Any] | None = None, **parameters: tuple[int, int, int, str]
) -> Callable[[Callable[..., Iterator[None]]], Callable[..., Iterator[None]]]:
    def register(function: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        summary = (function.__doc__ or "").partition("\n")[0].rstrip(".")
        made = {key: Parameter(*what) for key, what in parameters.items()}
        WORKLOADS[name] = Workload(name, summary, function, memory, made, options or {})
        return function

    return register


class Guest:
    """A kernel with a list of operations that is being written, and numbers for its processes."""

    def __init__(self, kernel: Kernel, rng: np.random.Generator) -> None:
        self.kernel = kernel
        self.rng = rng
        self.carry_out: Callable[[NDArray[Any]], NDArray[np.uint64]] = kernel.run
        self._rows: list[tuple[int, ...]] = []
        self._free: list[int] = []
        self._next = 0
        self.huge = 2 << 20 if kernel.options.mode != "32" else 4 << 20
        self.text = 0x400000 if kernel.options.mode in ("64", "la57") else 0x8048000
        self.stack = 0x7FFFFFFFF000 if kernel.options.mode in ("64", "la57") else 0xBFFFF000

    def _add(
        self,
        op: int,
        process: int = 0,
        addr: int = 0,
        count: int = 0,
        value: int = 0,
        flags: int = 0,
        size: int = 8,
        prot: int = 0,
    ) -> None:
        self._rows.append((op, flags, size, prot, process, addr, count, value))

    def _number(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def take(self) -> NDArray[Any]:
        """The operations written so far, which are forgotten here."""
        calls = np.array(self._rows, dtype=CALL_DTYPE)
        self._rows.clear()
        return calls

    def go(self) -> NDArray[np.uint64]:
        """Carry out the operations written so far."""
        return self.carry_out(self.take())

    def spawn(self, program: Program | None = None) -> int:
        number = self._number()
        self._add(Call.SPAWN, number, value=NO_PROGRAM if program is None else program.number)
        return number

    def fork(self, parent: int) -> int:
        number = self._number()
        self._add(Call.FORK, parent, value=number)
        return number

    def exec(self, process: int, program: Program) -> None:
        self._add(Call.EXEC, process, value=program.number)

    def exit(self, process: int) -> None:
        self._add(Call.EXIT, process)
        heapq.heappush(self._free, process)

    def sweep(self, process: int, addr: int, count: int, stride: int = 4096, write: bool = False) -> None:
        self._add(Call.TOUCH, process, addr, count, stride, Touch.WRITE if write else 0)

    def scatter(self, process: int, addr: int, length: int, count: int, write: bool = False) -> None:
        self._add(Call.TOUCH, process, addr, count, length, Touch.RANDOM | (Touch.WRITE if write else 0))

    def execute(self, process: int, addr: int, count: int, stride: int = 4096) -> None:
        self._add(Call.TOUCH, process, addr, count, stride, Touch.FETCH, 1)

    def syscall(self, process: int, accesses: int = 8) -> None:
        self._add(Call.SYSCALL, process, count=accesses)

    def map(self, process: int, addr: int, pages: int, file: File | None = None, shared: bool = False) -> None:
        backing = 0 if file is None else file.number + 1
        self._add(Call.MMAP, process, addr, pages << 12, backing, 1 if shared else 0, prot=RW)

    def unmap(self, process: int, addr: int, pages: int) -> None:
        self._add(Call.MUNMAP, process, addr, pages << 12)

    def protect(self, process: int, addr: int, pages: int, prot: int) -> None:
        self._add(Call.MPROTECT, process, addr, pages << 12, prot=prot)

    def send(self, process: int, pipe: int, addr: int, length: int) -> None:
        self._add(Call.PIPE_WRITE, process, addr, length, pipe)

    def receive(self, process: int, pipe: int, addr: int) -> None:
        self._add(Call.PIPE_READ, process, addr, value=pipe)

    def age(self, process: int, pages: int) -> None:
        self._add(Call.AGE, process, count=pages)

    def swap_out(self, process: int, pages: int) -> None:
        self._add(Call.SWAP_OUT, process, count=pages)

    def idle(self, accesses_only: int = 1) -> None:
        for _ in range(accesses_only):
            self._add(Call.IDLE)

    def heap(self, process: int, end: int) -> None:
        self._add(Call.BRK, process, end)

    def heap_of(self, program: Program) -> int:
        """Where the heap of a program begins."""
        return self.text + (program.text + program.data + program.bss << 12) + 4096


def _repeat(guest: Guest) -> Iterator[None]:
    """The round that was written, again and again."""
    calls = guest.take()
    while True:
        guest.carry_out(calls)
        yield


@_workload(
    "pingpong",
    "64MiB",
    processes=(2, 2, 512, "processes in the ring"),
    pages=(16, 1, 4096, "pages that each works on"),
    touches=(512, 1, 1 << 20, "accesses by which each does so, at random"),
)
def pingpong(guest: Guest, processes: int, pages: int, touches: int) -> Iterator[None]:
    """A token goes round a ring of processes through pipes; each works on its pages (lmbench's lat_ctx)."""
    program = guest.kernel.program(text=32, data=4, bss=4)
    ring = [guest.spawn(program) for _ in range(processes)]
    pipes = [guest.kernel.pipe() for _ in ring]
    token = guest.stack - 64
    for process in ring:
        guest.map(process, AREA, pages)
        guest.sweep(process, AREA, pages, write=True)
    guest.send(ring[0], pipes[0], token, 8)
    guest.go()
    yield
    for i in range(processes):
        process = ring[(i + 1) % processes]
        guest.receive(process, pipes[i], token)
        guest.scatter(process, AREA, pages << 12, touches)
        guest.send(process, pipes[(i + 1) % processes], token, 8)
    yield from _repeat(guest)


@_workload(
    "hackbench",
    "128MiB",
    groups=(1, 1, 20, "groups of 40 tasks: 20 senders, 20 receivers"),
    bytes=(104, 8, 4096, "bytes of a message, rounded up to a multiple of 8"),
    burst=(8, 1, 16, "messages that wait in a pipe before its reader runs"),
    touches=(64, 1, 4096, "accesses of a task to its own data, each time it runs"),
)
def hackbench(guest: Guest, groups: int, bytes: int, burst: int, touches: int) -> Iterator[None]:
    """Groups of 20 senders and 20 receivers, all to all, processes forked from one (hackbench)."""
    kernel = guest.kernel
    program = kernel.program(text=64, data=16, bss=16)
    parent = guest.spawn(program)
    guest.heap(parent, guest.heap_of(program) + (64 << 12))
    guest.sweep(parent, guest.heap_of(program), 64, write=True)
    teams = [([guest.fork(parent) for _ in range(20)], [guest.fork(parent) for _ in range(20)]) for _ in range(groups)]
    pipes = [[kernel.pipe() for _ in range(20)] for _ in range(groups)]
    guest.go()
    yield
    length = min((bytes + 7) & ~7, 4096)
    message = guest.heap_of(program)
    for first in range(0, 20, burst):
        for (senders, receivers), own in zip(teams, pipes, strict=True):
            some = senders[first : first + burst]
            for sender in some:
                guest.scatter(sender, message, 16 << 12, touches, write=True)
                for pipe in own:
                    guest.send(sender, pipe, message, length)
            for receiver, pipe in zip(receivers, own, strict=True):
                for _ in some:
                    guest.receive(receiver, pipe, message)
                guest.scatter(receiver, message, 16 << 12, touches)
    yield from _repeat(guest)


@_workload(
    "fork-storm",
    "128MiB",
    pages=(256, 1, 65536, "pages of the parent"),
    children=(16, 1, 256, "children alive at a time"),
    written=(32, 0, 65536, "pages that each child writes"),
)
def fork_storm(guest: Guest, pages: int, children: int, written: int) -> Iterator[None]:
    """A process forks without end; its children write some of their pages and exit."""
    parent = guest.spawn(guest.kernel.program())
    guest.map(parent, AREA, pages)
    guest.sweep(parent, AREA, pages, write=True)
    guest.go()
    yield
    while True:
        alive = [guest.fork(parent) for _ in range(children)]
        guest.scatter(parent, AREA, pages << 12, written, write=True)
        for child in alive:
            guest.scatter(child, AREA, pages << 12, written, write=True)
            guest.exit(child)
        guest.go()
        yield


SHELL = {
    "children": (4, 1, 16, "processes of a pipeline"),
    "exec_percent": (31, 0, 100, "percent of them that exec; the others are built in"),
    "text": (500, 16, 16384, "pages of the program's code"),
    "windows": (19, 1, 1024, "stretches of 16 of them that a process runs through"),
    "heap": (20, 1, 4096, "pages of the shell's heap"),
    "dirty": (6, 0, 4096, "of these, pages that the shell writes between two forks, and each child"),
    "fresh": (8, 0, 4096, "pages that a process allocates"),
    "work": (250_000, 0, 1 << 32, "accesses of each process to these"),
    "slice": (8_000_000, 1000, 1 << 32, "accesses after which a process is preempted"),
}


def _run_code(guest: Guest, process: int, text: int, windows: int) -> None:
    """Fetches from `windows` different stretches of 16 pages of code."""
    total = text // 16
    for window in guest.rng.permutation(total)[:windows].tolist():
        guest.execute(process, guest.text + window * 65536, 4, 4096)


def _start(guest: Guest, p: dict[str, int], program: Program, child: int) -> None:
    """A member of a pipeline comes to life: it writes what the shell has written since, and perhaps execs."""
    guest.sweep(child, guest.heap_of(program), p["dirty"], write=True)
    _run_code(guest, child, p["text"], p["windows"])
    if guest.rng.integers(100) < p["exec_percent"]:
        guest.exec(child, program)
        _run_code(guest, child, p["text"], p["windows"])
        guest.sweep(child, guest.text + (program.text << 12), program.data // 2, write=True)


def _finish(guest: Guest, p: dict[str, int], shell: int, child: int, pipes: list[int], place: int) -> None:
    """It reads from the one before it, works, writes to the one after it, and exits."""
    buffer = guest.stack - 4096
    if place:
        guest.receive(child, pipes[place - 1], buffer)
    if p["fresh"]:
        guest.map(child, AREA, p["fresh"])
        guest.sweep(child, AREA, p["fresh"], write=True)
        for done in range(0, p["work"], p["slice"]):
            piece = min(p["slice"], p["work"] - done)
            if done:
                guest.syscall(shell)
            guest.scatter(child, AREA, p["fresh"] << 12, piece // 2)
            guest.scatter(child, AREA, p["fresh"] << 12, piece - piece // 2, write=True)
        guest.unmap(child, AREA, min(p["fresh"], 4))
    if place + 1 < p["children"]:
        guest.send(child, pipes[place], buffer, 512)
    guest.exit(child)


def _pipeline(guest: Guest, p: dict[str, int], program: Program, shell: int, pipes: list[int]) -> None:
    """The shell forks the members, each of which runs until it waits for the one before it; then they finish, one
    after the other, and the shell hears of each."""
    children = []
    for _ in range(p["children"]):
        children.append(guest.fork(shell))
        guest.sweep(shell, guest.heap_of(program), p["dirty"], write=True)
    for child in children:
        _start(guest, p, program, child)
    for place, child in enumerate(children):
        _finish(guest, p, shell, child, pipes, place)
        guest.syscall(shell)


@_workload("shell", "64MiB", None, **SHELL)
def shell(guest: Guest, **p: int) -> Iterator[None]:
    """A shell script of pipelines: fork, sometimes exec, exit; calibrated by a recording of one."""
    if p["dirty"] > p["heap"]:
        raise ConfigError(f"shell: dirty: {p['dirty']} is more than the {p['heap']} pages of the heap")
    program = guest.kernel.program(text=p["text"], data=8, bss=8)
    me = guest.spawn(program)
    heap = guest.heap_of(program)
    guest.heap(me, heap + (p["heap"] << 12))
    guest.sweep(me, heap, p["heap"], write=True)
    _run_code(guest, me, p["text"], p["windows"])
    pipes = [guest.kernel.pipe() for _ in range(p["children"])]
    guest.go()
    yield
    while True:
        _pipeline(guest, p, program, me, pipes)
        guest.go()
        yield


def _compiler(guest: Guest, make: int, cc: Program, headers: File, p: dict[str, int]) -> None:
    """make forks, the child becomes the compiler, reads its source and headers, builds its trees, exits."""
    job = guest.fork(make)
    guest.exec(job, cc)
    _run_code(guest, job, cc.text, cc.text // 24)
    guest.map(job, AREA, headers.pages, headers)
    for first in guest.rng.integers(0, headers.pages, 24).tolist():
        guest.sweep(job, AREA + (first << 12), min(8, headers.pages - first))
    heap = guest.heap_of(cc)
    for step in range(4):
        guest.heap(job, heap + ((step + 1) * p["heap"] // 4 << 12))
        grown = max(1, (step + 1) * p["heap"] // 4)
        guest.sweep(job, heap + (step * p["heap"] // 4 << 12), p["heap"] // 4, write=True)
        guest.scatter(job, heap, grown << 12, p["work"] // 6)
        guest.scatter(job, heap, grown << 12, p["work"] // 12, write=True)
    for _ in range(4):
        guest.send(job, p["pipe"], heap, 2048)
        guest.receive(make, p["pipe"], guest.stack - 4096)
    guest.exit(job)


COMPILE = {
    "text": (1200, 64, 16384, "pages of the compiler's code"),
    "headers": (1024, 32, 1 << 18, "pages of source files, in the page cache"),
    "heap": (384, 4, 1 << 18, "pages that a job allocates"),
    "work": (60_000, 0, 1 << 32, "accesses of a job to them"),
}


@_workload("compile", "128MiB", None, **COMPILE)
def compile_(guest: Guest, **p: int) -> Iterator[None]:
    """Many short processes of one program, that read files from the page cache and grow heaps (a build)."""
    cc = guest.kernel.program(text=p["text"], data=48, bss=32)
    headers = guest.kernel.file(p["headers"])
    make = guest.spawn(guest.kernel.program(text=128, data=8, bss=8))
    guest.go()
    yield
    settings = p | {"pipe": guest.kernel.pipe()}
    while True:
        _compiler(guest, make, cc, headers, settings)
        guest.go()
        yield


@_workload(
    "webserver",
    "192MiB",
    workers=(16, 1, 512, "processes, forked in advance"),
    shared=(8192, 16, 1 << 20, "pages of the cache that all share"),
    touches=(256, 1, 1 << 16, "accesses to it for a request, 7 of 8 to its sixteenth that is asked for most"),
    requests=(8, 1, 1024, "requests that a worker serves before the next one runs"),
)
def webserver(guest: Guest, workers: int, shared: int, touches: int, requests: int) -> Iterator[None]:
    """Workers forked in advance, which serve requests from a large shared memory (a prefork server)."""
    program = guest.kernel.program(text=256, data=32, bss=32)
    master = guest.spawn(program)
    guest.map(master, AREA, shared, guest.kernel.file(shared, zero=True), shared=True)
    guest.sweep(master, AREA, shared, write=True)
    team = [guest.fork(master) for _ in range(workers)]
    for worker in team:
        guest.map(worker, AREA + (shared << 12) + 0x10000, 32)
        guest.sweep(worker, AREA + (shared << 12) + 0x10000, 32, write=True)
    guest.go()
    yield
    for worker in team:
        for _ in range(requests):
            guest.syscall(worker)
            guest.scatter(worker, AREA, max(1, shared // 16) << 12, touches - touches // 8)
            guest.scatter(worker, AREA, shared << 12, touches // 8)
            guest.scatter(worker, AREA + (shared << 12) + 0x10000, 32 << 12, touches // 4 + 1, write=True)
            guest.scatter(worker, AREA, shared << 12, 2, write=True)
            guest.syscall(worker, 16)
    yield from _repeat(guest)


@_workload(
    "database",
    "256MiB",
    pages=(24576, 64, 1 << 24, "pages of the buffer pool, of which an eighth is asked for most of the time"),
    index=(1024, 1, 1 << 24, "of these, pages of the upper levels of its trees"),
    lookups=(64, 1, 4096, "transactions between two system calls"),
)
def database(guest: Guest, pages: int, index: int, lookups: int) -> Iterator[None]:
    """One big process with random access: down a tree, to a row, and sometimes a change (a database)."""
    if index > pages:
        raise ConfigError(f"database: index: {index} is more than the {pages} pages of the pool")
    server = guest.spawn(guest.kernel.program(text=1024, data=64, bss=64))
    guest.map(server, AREA, pages)
    guest.sweep(server, AREA, pages, write=True)
    guest.go()
    yield
    for _ in range(16):
        guest.scatter(server, AREA, max(4096, index << 8), 2 * lookups)
        guest.scatter(server, AREA, index << 12, 2 * lookups)
        guest.scatter(server, AREA, max(1, pages // 8) << 12, 3 * lookups)
        guest.scatter(server, AREA, pages << 12, lookups)
        guest.scatter(server, AREA, max(1, pages // 8) << 12, lookups, write=True)
        guest.syscall(server, 16)
    yield from _repeat(guest)


@_workload(
    "analytics",
    "256MiB",
    {"large_pages": 32},
    large=(32, 1, 32, "large pages (2 MiB; 4 MiB in mode 32) of the columns"),
    scan=(1, 0, 1, "1: in large pages, 0: in pages of 4096 bytes"),
    stride=(64, 8, 4096, "bytes between two accesses"),
    groups=(64, 1, 4096, "pages of the table of groups"),
)
def analytics(guest: Guest, large: int, scan: int, stride: int, groups: int) -> Iterator[None]:
    """A scan of columns in large pages, aggregated into a small table (a column store)."""
    analyst = guest.spawn(guest.kernel.program(text=256, data=32, bss=32))
    pages = large * (guest.huge >> 12)
    base = 0x60000000
    guest.map(analyst, base, pages, guest.kernel.file(pages, zero=True, large=bool(scan)), shared=True)
    guest.sweep(analyst, base, pages, write=True)
    guest.map(analyst, AREA, groups)
    guest.sweep(analyst, AREA, groups, write=True)
    guest.go()
    yield
    chunk = 65536
    for at in range(0, pages << 12, chunk):
        guest.sweep(analyst, base + at, chunk // stride, stride)
        guest.scatter(analyst, AREA, groups << 12, chunk // stride // 8 + 1, write=True)
    yield from _repeat(guest)


@_workload(
    "demand",
    "128MiB",
    pages=(4096, 1, 1 << 22, "pages touched and given back, again and again"),
    touches=(64, 1, 512, "accesses to each, spread over the page"),
)
def demand(guest: Guest, pages: int, touches: int) -> Iterator[None]:
    """Memory is mapped, touched and unmapped, again and again: page faults and dying tables."""
    eater = guest.spawn(guest.kernel.program())
    guest.go()
    yield
    guest.map(eater, AREA, pages)
    guest.sweep(eater, AREA, pages * touches, 4096 // touches // 8 * 8 or 8, write=True)
    guest.unmap(eater, AREA, pages)
    yield from _repeat(guest)


@_workload(
    "ageing",
    "96MiB",
    {"swap_pages": 32768},
    processes=(4, 1, 256, "processes"),
    pages=(4096, 8, 1 << 20, "pages of each"),
    hot=(256, 1, 1 << 20, "of these, pages in use"),
    scan=(256, 1, 1 << 20, "pages of a process looked at in each round"),
    touches=(16384, 1, 1 << 20, "accesses of a process in each round"),
    swap=(1, 0, 1, "1: pages that were not accessed are swapped out, 0: accessed bits are cleared alone"),
)
def ageing(guest: Guest, processes: int, pages: int, hot: int, scan: int, touches: int, swap: int) -> Iterator[None]:
    """The kernel looks at accessed bits and takes away what is not used (kswapd)."""
    hot = min(hot, pages)
    program = guest.kernel.program()
    team = [guest.spawn(program) for _ in range(processes)]
    for process in team:
        guest.map(process, AREA, pages)
        guest.sweep(process, AREA, pages, write=True)
    guest.go()
    yield
    while True:
        for process in team:
            guest.scatter(process, AREA, hot << 12, touches)
            guest.scatter(process, AREA, hot << 12, touches // 4 + 1, write=True)
            guest.scatter(process, AREA, pages << 12, 16)
            (guest.swap_out if swap else guest.age)(process, scan)
        guest.go()
        yield


@_workload(
    "kbuild-like",
    "192MiB",
    None,
    **COMPILE,
    scripts=(4, 0, 64, "pipelines of the shell for each four jobs of the compiler"),
)
def kbuild_like(guest: Guest, scripts: int, **p: int) -> Iterator[None]:
    """A mixture: jobs of a compiler, pipelines of a shell between them, idle time, ageing (a kernel build)."""
    kernel = guest.kernel
    cc = kernel.program(text=p["text"], data=48, bss=32)
    headers = kernel.file(p["headers"])
    make = guest.spawn(kernel.program(text=128, data=8, bss=8))
    busybox = kernel.program(text=500, data=16, bss=8)
    sh = guest.spawn(busybox)
    settings = {name: what[0] for name, what in SHELL.items()} | {"work": 2000, "children": 2}
    guest.heap(sh, guest.heap_of(busybox) + (settings["heap"] << 12))
    guest.sweep(sh, guest.heap_of(busybox), settings["heap"], write=True)
    pipes = [kernel.pipe() for _ in range(settings["children"])]
    p["pipe"] = kernel.pipe()
    guest.go()
    yield
    while True:
        for _ in range(4):
            _compiler(guest, make, cc, headers, p)
        for _ in range(scripts):
            _pipeline(guest, settings, busybox, sh, pipes)
        guest.idle(2)
        guest.age(sh, 64)
        guest.go()
        yield


@_workload(
    "idle",
    "16MiB",
    processes=(8, 1, 512, "processes asleep"),
    ticks=(1000, 1, 1 << 20, "timer ticks between two wakeups"),
)
def idle(guest: Guest, processes: int, ticks: int) -> Iterator[None]:
    """Nothing runs but timer ticks; now and then a process wakes up for a moment."""
    program = guest.kernel.program(text=32, data=4, bss=4)
    team = [guest.spawn(program) for _ in range(processes)]
    for process in team:
        guest.sweep(process, guest.stack - 8, 1, write=True)
    guest.go()
    yield
    for process in team:
        guest.syscall(process)
        guest.sweep(process, guest.stack - 64, 8, 8, write=True)
        guest.idle(ticks)
    yield from _repeat(guest)


class _Meter:
    """Carries operations out in parts, so that counters can be read in between: a round may be longer than a window.

    Windows end at the first look after their last operation. Pages in use are those at each look, eight a window.
    """

    def __init__(self, kernel: Kernel, vm: VM, window: int) -> None:
        self._kernel, self._stats, self._window = kernel, vm.stats, window
        self._start = self._seen = _operations(kernel.counters)
        self._kernel_before = kernel.counters
        self._end = window
        self._calls = 1
        self._log = WindowLog(vm.stats)

    def run(self, calls: NDArray[Any]) -> NDArray[np.uint64]:
        results, first = [], 0
        while first < len(calls):
            part = calls[first : first + self._calls]
            first += len(part)
            results.append(self._kernel.run(part))
            self._look(len(part))
        return np.concatenate(results) if results else np.zeros(0, dtype=np.uint64)

    def _look(self, calls: int) -> None:
        counters = self._kernel.counters
        seen = _operations(counters)
        pages = self._stats.mmu_cache_miss - self._stats.page_frees
        self._log.pages(1, pages, pages)
        each = (seen - self._seen) / calls
        self._calls = max(1, min(int(self._window / 8 / each), 2 * self._calls) if each else 2 * self._calls)
        self._seen = seen
        if seen - self._start >= self._end:
            self._close(counters)

    def _close(self, counters: dict[str, int]) -> None:
        done = self._seen - self._start
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
        windows = self._log.arrays(self._seen - self._start)
        most = int(windows["pages_max"].max(initial=0))
        return {"windows": windows, "pages_mean": self._log.pages_mean, "pages_max": most}


def find(name: str) -> Workload:
    """The workload of that name; ConfigError with the nearest one if there is none."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    near = difflib.get_close_matches(str(name), WORKLOADS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(WORKLOADS)}"
    raise ConfigError(f"workload: there is no {name!r}{hint}")


def run(
    name: str,
    vm: VM | str | Native | Shadow = "cached",
    *,
    seed: int = 0,
    operations: int = 1_000_000,
    options: KernelOptions | None = None,
    record: bool = False,
    audit_every: int = 0,
    progress: Callable[[int, int], None] | None = None,
    window: int = 0,
    tlb: TLB | None = None,
    **parameters: Any,
) -> WorkloadResult:
    """Run a workload until the processor has done `operations`, setup left out; the round in hand is finished.

    vm: a fresh VM, or a design, for which one with the memory that the workload needs is made.
    seed: of everything random. options: of the kernel; what the workload needs (swap, large pages) is added.
    record: keep every operation (19 bytes each). audit_every: check all invariants (AuditError) every so many
        operations, and at the end (0: never). progress: called with operations done, and all.
    window: count by windows of so many operations (0: do not). tlb: a TLB to model, where the VM is made here.
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
    if not isinstance(vm, VM):
        vm = VM(workload.memory, vm, tlb=tlb, features=Features())
    elif tlb is not None:
        raise ConfigError("tlb: the VM that was given has its own, or none")
    kernel = Kernel(vm, options)
    if record:
        kernel.record()
    guest = Guest(kernel, np.random.default_rng(seed))
    steps = workload.function(guest, **checked)
    next(steps)
    counters, stats = kernel.counters, vm.stats.as_dict()
    setup = _operations(counters)
    meter = _Meter(kernel, vm, step) if step else None
    if meter is not None:
        guest.carry_out = meter.run
    done, seconds, audited = 0, 0.0, 0
    while done < wanted:
        clock = time.perf_counter()
        next(steps)
        seconds += time.perf_counter() - clock
        done = _operations(kernel.counters) - setup
        if every and done - audited >= every:
            audited = done
            vm.audit(strict=True)
        if progress is not None:
            progress(min(done, wanted), wanted)
    if every:
        vm.audit(strict=True)
    return WorkloadResult(
        workload=name,
        design=vm.mmu.design.name,
        seed=seed,
        parameters=checked,
        operations=done,
        setup=setup,
        counters=_since(kernel.counters, counters),
        stats=_since(vm.stats.as_dict(), stats),
        frames=kernel.frames,
        history=kernel.history,
        seconds=seconds,
        recording=kernel.recording if record else None,
        **({} if meter is None else meter.results()),
    )


def _operations(counters: dict[str, int]) -> int:
    return counters["accesses"] + counters["kernel_accesses"] + counters["cr3_loads"] + counters["invlpg"]


def _since(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in after}


def calibration(recordings: tuple[str | None, ...] = (None,), spaces: int = 120, seed: int = 1) -> list[calibrated.Row]:
    """Rates of recorded Linux guests beside those of the guest kernel: see calibration.rows."""
    from .calibration import rows

    return rows(recordings, spaces, seed)
