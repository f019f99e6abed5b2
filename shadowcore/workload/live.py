"""A live Linux guest under Linux's own shadow MMU: what KVM counted, and what the same guest comes to here.

The guest was Debian's kernel 6.1 with busybox, 128 MiB and one processor, and ran 60 pipelines of three programs; its
host's shadow MMU was that of Linux 6.1 or 6.12. What its processes touch was counted in a recording of the same kernel
and busybox (`PAGES`); what the guest's kernel does of it, and what the MMU makes of that, follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..config import check_int, design
from ..engine.machine import VM
from ..errors import ConfigError
from ..guest.kernel import Kernel
from ..guest.options import KernelOptions, Program
from .script import Guest

COUNTERS = {
    "pf_taken": "page-fault exits",
    "pf_fixed": "mended",
    "pf_guest": "the guest's own",
    "pf_emulate": "given to the emulator",
    "pf_spurious": "nothing had to change",
    "mmu_flooded": "shadow pages zapped by floods",
    "mmu_shadow_zapped": "shadow pages zapped",
    "mmu_cache_miss": "shadow pages made",
    "invlpg": "INVLPGs",
}
"""What is compared, by KVM's names."""
MEASURED = {
    "6.1": (670.92, 369.14, 206.91, 82.87, 12.01, 0.01, 42.14, 39.77, 45.27),
    "6.12": (677.36, 372.39, 209.32, 82.92, 12.72, 0.01, 41.73, 39.48, 46.74),
}
"""By release of the host: COUNTERS of a pipeline, the mean of three runs (6.1) and of two (6.12), which agree within 2
percent."""
PAGES: dict[str, Any] = {
    "text": 475,
    "constants": 90,
    "data": 10,
    "bss": 7,
    "heap": 4,
    "stack": 4,
    "copied": 14,
    "parent": (1, 2, 1),
    "child": (4, 3, 1),
    "child_reads": 3,
    "child_code": (10, 3, 3),
    "new": (8, 3, 2),
    "new_reads": 2,
    "new_code": (18, 7, 5),
    "vdso": 2,
}
"""Pages, as counted in a recording of the guest (bench/live_guest.py; means of 181 processes, to whole pages).

text, of which constants; data, bss: of busybox. heap, stack, copied: of the shell, its heap, its stack, and of data and
bss those that fork copies. parent, child, new: pages of data and bss, of the heap, and of the stack that are written by
the shell after a fork, by its child before exec, and by the new program. *_reads: other pages of data read. *_code:
stretches of 16 pages of code that are run through, those of them in which both halves are, and stretches of constants
that are read. vdso: pages read beside the stack.
"""
KERNEL = KernelOptions(grouped=True, flush_gather=9622, regions=True, vmap_stacks=True, heap_gap=4096)
"""A kernel of 2022. The heap lies as far from its program as it does in the mean."""
MEMORY, HOST = "128MiB", "2MiB"
WARM = 5
"""Pipelines before those that are counted."""


class Row(NamedTuple):
    """A counter of a pipeline: its name, what it is, in the live guest, in the model."""

    counter: str
    what: str
    linux: float
    model: float

    @property
    def ratio(self) -> float:
        """Model to live guest."""
        return self.model / self.linux


class _Busybox:
    """What processes of one program touch, in the guest's addresses."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.program: Program = guest.kernel.program(text=PAGES["text"], data=PAGES["data"], bss=PAGES["bss"])
        self.data = guest.text + (PAGES["text"] << 12)
        self.heap = guest.heap_of(self.program)

    def stack(self, pages: int) -> int:
        """Where the uppermost `pages` pages of the stack begin."""
        return self.guest.stack - (pages << 12)

    def code(self, stretches: int, both: int, constants: int) -> list[tuple[int, bool]]:
        """Addresses that a process comes by, and whether they are of code, in an order of its own."""
        first = (PAGES["text"] - PAGES["constants"]) // 16
        chosen = self.guest.rng.permutation(first)[:stretches].tolist()
        halves = [16 * at for at in chosen] + [16 * at + 8 for at in chosen[:both]]
        last = self.guest.rng.permutation(PAGES["constants"] // 16)[:constants] + first
        found = [(page, True) for page in halves] + [(16 * at, False) for at in last.tolist()]
        return [
            (self.guest.text + (page << 12), bool(code))
            for page, code in self.guest.rng.permutation(np.array(found)).tolist()
        ]

    def run(self, process: int, code: list[tuple[int, bool]]) -> None:
        """Run through two pages of each half of a stretch, and read a page of constants."""
        for at, is_code in code:
            if is_code:
                self.guest.execute(process, at, 2)
            else:
                self.guest.sweep(process, at, 1)

    def write(self, process: int, pages: tuple[int, int, int], done: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Write so many pages of data, heap and stack, but for the first `done` of each."""
        for at, count, but in zip((self.data, self.heap, self.stack(pages[2])), pages, done, strict=True):
            self.guest.sweep(process, at + (but << 12), count - but, write=True)


class _Member:
    """A program of a pipeline: first a child of the shell, then the program that it execs, in three parts."""

    def __init__(self, guest: Guest, box: _Busybox, process: int) -> None:
        self.guest, self.box, self.process = guest, box, process
        self.code = box.code(*PAGES["new_code"])

    def begin(self) -> None:
        """The child of the shell, and the first part of the program."""
        guest, box, process = self.guest, self.box, self.process
        data, heap, stack = PAGES["new"]
        guest.sweep(process, box.data, PAGES["child"][0] + PAGES["child_reads"])
        box.write(process, PAGES["child"])
        box.run(process, box.code(*PAGES["child_code"]))
        guest.exec(process, box.program)
        guest.heap(process, box.heap + (heap << 12))
        guest.sweep(process, box.data, data // 2 + PAGES["new_reads"])
        guest.sweep(process, box.stack(stack + PAGES["vdso"]), PAGES["vdso"])
        box.write(process, (data // 2, 0, 1))
        self.go_on(0)

    def go_on(self, part: int) -> None:
        """Part 1 or 2 of the program."""
        data, heap, stack = PAGES["new"]
        if part == 1:
            self.box.write(self.process, (data, heap - 1, stack), (data // 2, 0, 0))
        elif part == 2:
            self.box.write(self.process, (0, heap, 0), (0, heap - 1, 0))
        self.box.run(self.process, self.code[part::3])

    def send(self, pipe: int) -> None:
        """Into a pipe."""
        self.guest.send(self.process, pipe, self.box.stack(1), 512)

    def receive(self, pipe: int) -> None:
        """From a pipe."""
        self.guest.receive(self.process, pipe, self.box.stack(1))

    def end(self, shell: int) -> None:
        """It exits, and the shell hears of it."""
        self.guest.exit(self.process)
        self.guest.syscall(shell)


def shell_pipelines(guest: Guest) -> Iterator[None]:
    """A shell runs pipelines of three programs; a round is one.

    It forks all three before they run. Each runs as a child of the shell, execs, and begins; then the first writes and
    ends; the second passes on what it has read, and ends when there is no more; so does the third.
    """
    box = _Busybox(guest)
    shell = guest.spawn(box.program)
    guest.heap(shell, box.heap + (PAGES["heap"] << 12))
    box.write(shell, (PAGES["copied"], PAGES["heap"], PAGES["stack"]))
    pipes = [guest.kernel.pipe() for _ in range(2)]
    guest.go()
    yield
    while True:
        members = []
        for _ in range(3):
            members.append(_Member(guest, box, guest.fork(shell)))
            box.write(shell, PAGES["parent"])
        for member in members:
            member.begin()
        first, second, third = members
        first.go_on(1)
        first.go_on(2)
        first.send(pipes[0])
        first.end(shell)
        second.go_on(1)
        second.receive(pipes[0])
        second.send(pipes[1])
        third.go_on(1)
        third.receive(pipes[1])
        second.go_on(2)
        second.end(shell)
        third.go_on(2)
        third.end(shell)
        guest.go()
        yield


def model(release: str = "6.1", pipelines: int = 60, seed: int = 1, kernel: KernelOptions = KERNEL) -> dict[str, float]:
    """All counters of the MMU here, of a pipeline. release: of the host's Linux, "6.1" or "6.12"; pipelines: those that
    are counted; seed: of everything random; kernel: how the guest is built."""
    check_int("pipelines", pipelines, 1, 1 << 16)
    if release not in MEASURED:
        raise ConfigError(f"release: {release!r} is not one of {', '.join(MEASURED)}")
    vm = VM(MEMORY, design(f"kvm-{release}"), host_page_size=HOST)
    rounds = shell_pipelines(Guest(Kernel(vm, kernel), np.random.default_rng(seed)))
    for _ in range(1 + WARM):  # the first sets it up
        next(rounds)
    before = vm.stats.as_dict()
    for _ in range(pipelines):
        next(rounds)
    return {name: (after - before[name]) / pipelines for name, after in vm.stats.as_dict().items()}


def rows(release: str = "6.1", pipelines: int = 60, seed: int = 1) -> list[Row]:
    """COUNTERS of the live guest beside those of `model`."""
    here = model(release, pipelines, seed)
    return [
        Row(name, what, linux, here[name])
        for (name, what), linux in zip(COUNTERS.items(), MEASURED[release], strict=True)
    ]
