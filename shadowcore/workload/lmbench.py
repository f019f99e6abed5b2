"""Workloads of lmbench and its like: system calls, switches, processes, faults (sources: docs/workloads.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..errors import ConfigError
from ..guest.options import Program, Prot
from .first_touch import TODAY
from .script import AREA, Guest, workload


@workload(
    "syscall",
    "16MiB",
    accesses=(2, 0, 4096, "accesses of the kernel to its own data in a call"),
    calls=(1000, 1, 1 << 20, "calls in a round"),
)
def syscall(guest: Guest, accesses: int, calls: int) -> Iterator[None]:
    """A process asks the kernel for next to nothing, again and again (lmbench's lat_syscall null: getpid)."""
    process = guest.spawn(guest.kernel.program(text=16, data=2, bss=2))
    guest.execute(process, guest.text, 1)
    guest.go()
    yield
    for _ in range(calls):
        guest.syscall(process, accesses)
        guest.execute(process, guest.text, 1)
    yield from guest.repeat()


@workload("context-switch", "16MiB", trips=(100, 1, 1 << 20, "round trips in a round, two switches each"))
def context_switch(guest: Guest, trips: int) -> Iterator[None]:
    """A token goes to another process through a pipe, and back through another one (lmbench's lat_pipe)."""
    program = guest.kernel.program(text=16, data=2, bss=2)
    ends = [guest.spawn(program) for _ in range(2)]
    pipes = [guest.kernel.pipe() for _ in ends]
    token = guest.stack - 64
    for process in ends:
        guest.sweep(process, token, 1, write=True)
        guest.execute(process, guest.text, 1)
    guest.go()
    yield
    for _ in range(trips):
        for i in range(2):
            guest.send(ends[i], pipes[i], token, 8)
            guest.receive(ends[1 - i], pipes[i], token)
            guest.execute(ends[1 - i], guest.text, 1)
    yield from guest.repeat()


@dataclasses.dataclass(frozen=True)
class _Image:
    """A program as it comes to life: its pages, those of its C library among them, and what of them it uses.

    text: pages of code. windows: stretches of 16 of these that it runs through. data, bss: pages, all of which it
    writes. heap: pages that it allocates and writes. stack: pages that it writes besides.
    """

    program: Program
    windows: int
    heap: int
    stack: int

    @classmethod
    def of(cls, guest: Guest, text: int, windows: int, data: int, bss: int, heap: int, stack: int = 3) -> _Image:
        return cls(guest.kernel.program(text=text, data=data, bss=bss), windows, heap, stack)

    def code(self, guest: Guest, process: int, windows: int | None = None) -> None:
        """Fetches from the first page of stretches of 16, spread evenly over the code."""
        count = self.windows if windows is None else windows
        stretches = max(1, self.program.text // 16)
        for i in range(count):
            guest.execute(process, guest.text + (i * stretches // max(count, 1) << 16), 1)

    def begin(self, guest: Guest, process: int) -> None:
        """From exec to main, and what main uses."""
        self.code(guest, process, self.windows // 2)
        guest.sweep(process, guest.text + (self.program.text << 12), self.program.data + self.program.bss, write=True)
        start = guest.heap_of(self.program)
        if self.heap:
            guest.heap(process, start + (self.heap << 12))
            guest.sweep(process, start, self.heap, write=True)
        guest.sweep(process, guest.stack - (self.stack << 12), self.stack, write=True)
        self.code(guest, process)

    def forked(self, guest: Guest, process: int, pages: int) -> None:
        """What either side of a fork writes next: the stack, and the C library's data."""
        guest.sweep(process, guest.stack - 4096, 1, write=True)
        guest.sweep(process, guest.text + (self.program.text << 12), min(pages, self.program.data), write=True)


SMALL = (464, 20, 10, 6, 20)
"""A small program with its C library: text, windows, data, bss, heap. 60 faults or so from exec to exit; `perf stat`
says 50 to 100 of such programs."""
SHELL = (720, 45, 24, 16, 120)
"""A shell: some 200 faults."""
WRITTEN = 5
"""Pages of data that each side of a fork writes; with the stack, what a fork and an exit of glibc's touch."""
PROCESSES = {
    "heap": (20, 0, 4096, "pages of heap that the parent has written"),
    "written": (WRITTEN, 0, 10, "pages of data that each side writes after the fork, besides one of the stack"),
}


def _parent(guest: Guest, heap: int) -> tuple[_Image, int]:
    text, windows, data, bss, _ = SMALL
    image = _Image.of(guest, text, windows, data, bss, heap)
    process = guest.spawn(image.program)
    image.begin(guest, process)
    return image, process


def _fork(guest: Guest, image: _Image, parent: int, written: int) -> int:
    """A fork, and what both sides do at once; the child's code lies in the page cache, its entries not yet made."""
    child = guest.fork(parent)
    image.forked(guest, parent, written)
    guest.syscall(parent)  # wait
    image.code(guest, child, 5)
    image.forked(guest, child, written)
    return child


@workload("lmbench-fork", "64MiB", TODAY, **PROCESSES)
def lmbench_fork(guest: Guest, heap: int, written: int) -> Iterator[None]:
    """A small process forks a child that exits, and waits for it, again and again (lat_proc fork)."""
    image, parent = _parent(guest, heap)
    guest.go()
    yield
    while True:
        guest.exit(_fork(guest, image, parent, written))
        image.code(guest, parent, 2)
        guest.go()
        yield


@workload("lmbench-exec", "64MiB", TODAY, **PROCESSES)
def lmbench_exec(guest: Guest, heap: int, written: int) -> Iterator[None]:
    """The same with a child that execs a program which says hello and exits (lat_proc exec)."""
    image, parent = _parent(guest, heap)
    hello = _Image.of(guest, *SMALL)
    guest.go()
    yield
    while True:
        _exec(guest, image, parent, written, (hello,))
        guest.go()
        yield


@workload("lmbench-sh", "64MiB", TODAY, **PROCESSES)
def lmbench_sh(guest: Guest, heap: int, written: int) -> Iterator[None]:
    """The same with a shell between, which execs the program in its place (lat_proc shell)."""
    image, parent = _parent(guest, heap)
    sh, hello = _Image.of(guest, *SHELL), _Image.of(guest, *SMALL)
    guest.go()
    yield
    while True:
        _exec(guest, image, parent, written, (sh, hello))
        guest.go()
        yield


def _exec(guest: Guest, image: _Image, parent: int, written: int, programs: tuple[_Image, ...]) -> None:
    child = _fork(guest, image, parent, written)
    for program in programs:
        guest.exec(child, program.program)
        for _ in range(12):  # a loader's: open, read, map each library
            guest.syscall(child)
            guest.execute(child, guest.text, 1)
        program.begin(guest, child)
    guest.syscall(child)  # write
    guest.exit(child)
    image.code(guest, parent, 2)


@workload(
    "fork-exec",
    "128MiB",
    TODAY,
    parent=(600, 0, 1 << 16, "pages of heap that the parent has written"),
    text=(600, 16, 16384, "pages of the program's code"),
    windows=(40, 1, 1024, "stretches of 16 of them that it runs through"),
    heap=(150, 0, 1 << 16, "pages that it allocates and writes"),
)
def fork_exec(guest: Guest, parent: int, text: int, windows: int, heap: int) -> Iterator[None]:
    """A program of the size of a language's runtime forks, and the child execs a small one, again and again."""
    image, process = _parent(guest, parent)
    child = _Image.of(guest, text, windows, 12, 12, heap)
    guest.go()
    yield
    while True:
        _exec(guest, image, process, WRITTEN, (child,))
        guest.go()
        yield


@workload("lmbench-prot-fault", "16MiB", faults=(100, 1, 1 << 20, "faults in a round"))
def lmbench_prot_fault(guest: Guest, faults: int) -> Iterator[None]:
    """A store to a page that may only be read, whose signal is caught, again and again (lat_sig prot)."""
    _, process = _parent(guest, 20)
    guest.map(process, AREA, 1)
    guest.sweep(process, AREA, 1)
    guest.protect(process, AREA, 1, Prot.READ)
    guest.sweep(process, AREA, 1)
    guest.go()
    yield
    for _ in range(faults):
        guest.sweep(process, AREA, 1, write=True)  # refused
        guest.sweep(process, guest.stack - 1024, 8, 64, write=True)  # the frame of the signal
        guest.execute(process, guest.text, 1)
        guest.syscall(process, 4)  # sigreturn
    yield from guest.repeat()


@workload("lmbench-page-fault", "64MiB", TODAY, pages=(1024, 1, 1 << 20, "pages of the file, all in the page cache"))
def lmbench_page_fault(guest: Guest, pages: int) -> Iterator[None]:
    """A cached file is mapped, a byte of each page read, in a shuffled order, and unmapped (lat_pagefault)."""
    file = guest.kernel.file(pages)
    _, process = _parent(guest, 20)
    guest.map(process, AREA, pages, file, shared=True)
    guest.sweep(process, AREA, pages)
    guest.go()
    yield
    order = guest.rng.permutation(pages).tolist()
    while True:
        guest.unmap(process, AREA, pages)
        guest.map(process, AREA, pages, file, shared=True)
        for page in order:
            guest.sweep(process, AREA + (page << 12), 1)
        guest.go()
        yield


@workload("lmbench-mmap", "128MiB", TODAY, pages=(16384, 40, 1 << 22, "pages of the file"))
def lmbench_mmap(guest: Guest, pages: int) -> Iterator[None]:
    """A file is mapped, every fourth page of its first tenth stored to, and unmapped (lat_mmap)."""
    file = guest.kernel.file(pages, zero=True)
    _, process = _parent(guest, 20)
    guest.go()
    yield
    guest.map(process, AREA, pages, file, shared=True)
    guest.sweep(process, AREA, pages // 40, 4 << 12, write=True)
    guest.unmap(process, AREA, pages)
    yield from guest.repeat()


KBUILD = {
    "tools": (8, 1, 64, "small processes that go with each object: shells, the driver, and what they start"),
    "heap": (8800, 8, 1 << 20, "pages that the compiler allocates and writes"),
    "headers": (1600, 16, 1 << 18, "pages of source files, in the page cache, of which the compiler reads a quarter"),
    "assembler": (750, 0, 1 << 18, "pages that the assembler allocates and writes"),
    "syscalls": (4000, 0, 1 << 20, "system calls of the compiler: files looked for, opened, read, closed"),
    "work": (400_000, 0, 1 << 32, "accesses of the compiler to its heap, besides the first stores"),
}


@workload("kbuild", "256MiB", TODAY, **KBUILD)
def kbuild(guest: Guest, **p: int) -> Iterator[None]:
    """A kernel is built: for each object a compiler, an assembler and some small processes, with the faults that were
    counted of such a build."""
    if p["heap"] > 32768:
        raise ConfigError(f"kbuild: heap: {p['heap']} is more than 32768 pages")
    headers = guest.kernel.file(p["headers"])
    sh = _Image.of(guest, *SHELL)
    tool = _Image.of(guest, *SMALL)
    cc = _Image.of(guest, 5600, 140, 60, 200, p["heap"], 12)
    assembler = _Image.of(guest, 640, 30, 12, 24, p["assembler"])
    make = guest.spawn(sh.program)
    sh.begin(guest, make)
    guest.go()
    yield
    while True:
        for i in range(p["tools"]):
            _exec(guest, sh, make, WRITTEN, (sh,) if i % 2 else (tool,))
        _exec(guest, sh, make, WRITTEN, (assembler,))
        job = _fork(guest, sh, make, WRITTEN)
        guest.exec(job, cc.program)
        for _ in range(p["syscalls"]):
            guest.syscall(job, 4)
            guest.sweep(job, guest.stack - 64, 1)
        guest.map(job, AREA, p["headers"], headers)
        for first in guest.rng.permutation(p["headers"] // 16)[: p["headers"] // 64].tolist():
            guest.sweep(job, AREA + (first << 16), 16)
        cc.begin(guest, job)
        guest.scatter(job, guest.heap_of(cc.program), p["heap"] << 12, p["work"] - p["work"] // 3)
        guest.scatter(job, guest.heap_of(cc.program), p["heap"] << 12, p["work"] // 3, write=True)
        guest.exit(job)
        guest.go()
        yield
