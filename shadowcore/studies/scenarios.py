"""Ten small guests, each made to show one thing that a shadow MMU does: what `shadowcore show` steps through.

A scenario is a function that sets up tables and says what the guest does, and a line in SCENARIOS. All have 4-level
paging; the kernel has the first frames of memory at DIRECT, and its tables among them, as Linux has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import Op
from ..engine.batch import OP_DTYPE
from ..engine.machine import VM
from ..pagetables import A, P, PageTables, U, W

DIRECT = 0xFFFF_8880_0000_0000
CODE, DATA, STACK = 0x40_0000, 0x60_0000, 0x7F_F000
_DIRECT_FRAMES = 32
_TABLES = 8
"""gfn of the first table; frames from 64 on are for pages of programs."""


class Guest:
    """What the guest does, an operation a row, with the reason of each. Tables that exist from the start are made in
    memory, and what the guest changes it changes by stores through the direct map."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.notes: list[str] = []
        self._next = iter(range(_TABLES, _DIRECT_FRAMES))
        self.tables = PageTables(vm.memory, "64", self.frame)
        self.tables.map(DIRECT, 0, _DIRECT_FRAMES << 12, "rw")

    def frame(self) -> int:
        """gfn of a frame for a table, zero."""
        return next(self._next)

    def space(self, kernel: bool = True) -> PageTables:
        """Another address space, which shares the kernel's half with the first; kernel=False: has none of it."""
        made = PageTables(self.vm.memory, "64", self.frame)
        if kernel:
            words = self.vm.memory.words.reshape(-1, 512)
            words[made.root >> 12, 256:] = words[self.tables.root >> 12, 256:]
        return made

    def _add(self, op: Op, user: bool, addr: int, value: int, note: str) -> None:
        self.rows.append((op, user, 8, addr, value))
        self.notes.append(note)

    def read(self, gva: int, note: str, user: bool = True) -> None:
        """A load of 8 bytes."""
        self._add(Op.READ, user, gva, 0, note)

    def write(self, gva: int, value: int, note: str, user: bool = True) -> None:
        """A store of 8 bytes."""
        self._add(Op.WRITE, user, gva, value, note)

    def fetch(self, gva: int, note: str, user: bool = True) -> None:
        """An instruction fetch."""
        self._add(Op.FETCH, user, gva, 0, note)

    def store(self, gpa: int, value: int, note: str) -> None:
        """The kernel's store of 8 bytes at a gpa, through its direct map."""
        self._add(Op.WRITE, False, DIRECT + gpa, value, note)

    def set_entry(self, tables: PageTables, va: int, level: int, value: int, note: str) -> None:
        """The kernel's store to the entry of a table that translates `va`."""
        self.store(tables.entry(va, level).gpa, value, note)

    def cr3(self, tables: PageTables, note: str) -> None:
        """A load of CR3."""
        self._add(Op.CR3, False, 0, tables.cr3, note)

    def invlpg(self, gva: int, note: str) -> None:
        """INVLPG."""
        self._add(Op.INVLPG, False, gva, 0, note)

    @property
    def operations(self) -> Any:
        """What the guest does, OP_DTYPE."""
        return np.array(self.rows, dtype=OP_DTYPE)


def _demand(guest: Guest) -> None:
    tables = guest.tables
    tables.map(CODE, 64 << 12, 0x1000, "rxu")
    tables.map(DATA, 65 << 12, 0x1000, "rwu")
    entry = tables.entry(DATA + 0x1000).gpa
    guest.fetch(CODE, "The program's first instruction, in a page that the guest maps.")
    guest.read(DATA, "It reads a variable. This page is mapped, too.")
    guest.write(DATA, 1, "The same page, now a store: D of the guest's entry has to be set.")
    guest.write(DATA, 2, "Once more.")
    guest.write(DATA + 0x1000, 3, "A page that the guest has not mapped yet.")
    guest.store(
        entry, 66 << 12 | P | W | U, "The guest's page fault handler gives the program a frame: a store to a table."
    )
    guest.write(DATA + 0x1000, 3, "The instruction again.")
    guest.read(DATA + 0x1000, "And from here on the page is like any other.")


def _fork(guest: Guest) -> None:
    parent = guest.tables
    parent.map(CODE, 64 << 12, 0x1000, "rxu")
    parent.map(DATA, 65 << 12, 0x2000, "rwu")
    child = guest.space()
    child.map(CODE, 64 << 12, 0x1000, "rxu")
    child.map(DATA, 65 << 12, 0x2000, "ru")
    guest.write(DATA, 1, "The parent writes to its page.")
    guest.read(DATA, "It reads it.")
    for page in range(2):
        entry = parent.entry(DATA + 0x1000 * page)
        value = (65 + page) << 12 | P | U | A
        guest.store(entry.gpa, value, "fork(): the kernel takes W from the parent's page, for the child shares it.")
    guest.invlpg(DATA, "And has the processor forget what it allowed before.")
    guest.cr3(child, "The scheduler picks the child.")
    guest.read(DATA, "The child reads: the frame is the parent's.")
    guest.write(DATA, 2, "The child writes: the guest's own fault, for its entry is read only.")
    guest.set_entry(child, DATA, 1, 70 << 12 | P | W | U, "The kernel gives the child a copy of the frame.")
    guest.invlpg(DATA, "The old translation has to go.")
    guest.write(DATA, 2, "The instruction again: the child has a page of its own.")
    guest.cr3(parent, "Back to the parent.")
    guest.read(DATA, "Which still has the old frame.")


def _flood(guest: Guest) -> None:
    tables = guest.tables
    tables.map(CODE, 64 << 12, 0x1000, "rxu")
    tables.map(DATA, 65 << 12, 0x8000, "rwu")
    other = guest.space()
    other.map(CODE, 64 << 12, 0x1000, "rxu")
    other.map(DATA, 80 << 12, 0x1000, "rwu")
    guest.write(DATA, 1, "Process 1 runs.")
    guest.cr3(other, "Process 2 runs.")
    guest.fetch(CODE, "It has work to do, too.")
    first = tables.entry(DATA).gpa
    for i in range(6):
        why = (
            "Process 1 has ended and its table is taken apart, entry by entry."
            if i == 0
            else "The kernel clears the next entry of the dead table."
        )
        guest.store(first + 8 * i, 0, why)
    guest.store(first + 48, 0, "From now on the frame is plain memory: it can be used for anything.")
    guest.fetch(CODE, "Process 2 has noticed nothing.")


def _switch(guest: Guest) -> None:
    one = guest.tables
    one.map(CODE, 64 << 12, 0x1000, "rxu")
    one.map(DATA, 65 << 12, 0x1000, "rwu")
    two = guest.space()
    two.map(CODE, 64 << 12, 0x1000, "rxu")
    two.map(DATA, 66 << 12, 0x1000, "rwu")
    for turn in range(2):
        again = " again" * turn
        guest.fetch(CODE, f"Process 1 runs{again}.")
        guest.write(DATA, 1 + turn, f"It writes its page{again}.")
        guest.cr3(two, f"Process 2 takes over{again}.")
        guest.fetch(CODE, f"Process 2 runs{again}.")
        guest.write(DATA, 11 + turn, f"It writes its page{again}.")
        guest.cr3(one, f"Process 1 takes over{again}.")
    guest.write(DATA, 5, "Who had to build anything a second time?")


def _invlpg(guest: Guest) -> None:
    tables = guest.tables
    tables.map(DATA, 65 << 12, 0x1000, "rwu")
    entry = tables.entry(DATA).gpa
    guest.read(DATA, "The page is read: frame 0x41.")
    guest.store(entry, 66 << 12 | P | W | U, "The kernel moves the page to frame 0x42.")
    guest.read(DATA, "Without INVLPG: the old frame or the new one? The architecture allows both.")
    guest.invlpg(DATA, "The kernel says that the old translation must go.")
    guest.read(DATA, "Now it has to be the new frame.")
    guest.store(entry, 0, "The page is unmapped.")
    guest.invlpg(DATA, "And forgotten.")
    guest.read(DATA, "An access to it is the guest's own fault.")


def _self_map(guest: Guest) -> None:
    tables = guest.tables
    tables.map(DATA, 65 << 12, 0x1000, "rwu")
    slot = 510
    root = tables.root
    guest.vm.memory.words[(root >> 3) + slot] = root | P | W
    window = (0xFFFF << 48) | slot << 39
    entry = window | DATA >> 9 & 0x7F_FFFF_FFF8
    guest.write(DATA, 1, "A page of data, to begin with.")
    guest.read(
        entry,
        "The kernel reads the page's entry through the self-map: the root is walked as if it were a lower table.",
        False,
    )
    guest.write(entry, 66 << 12 | P | W | U, "It stores to the entry, at the same address.", False)
    guest.invlpg(DATA, "The old translation goes.")
    guest.read(DATA, "The page is at its new frame.")
    top = window | slot << 30 | slot << 21 | slot << 12 | slot << 3
    guest.read(top, "The entry that maps itself: four times through the same one.", False)


def _large(guest: Guest) -> None:
    tables = guest.tables
    tables.map(0x4000_0000, 0x20_0000, "2MiB", "rwu")
    spare = guest.frame()
    guest.read(0x4000_0000, "The program has a page of 2 MiB.")
    guest.read(0x4000_1000, "The next 4 KiB of the same large page.")
    guest.write(0x4000_2000, 7, "A store further on: D is of the large page as a whole.")
    guest.write(0x4000_3000, 8, "And one more.")
    for i in range(2):
        value = (0x200 + i) << 12 | P | W | U
        guest.store((spare << 12) + 8 * i, value, "The kernel splits the page: it fills a table of small ones.")
    directory = tables.entry(0x4000_0000, 2).gpa
    guest.store(directory, spare << 12 | P | W | U, "And puts that table in place of the large page.")
    guest.invlpg(0x4000_0000, "The old translation goes.")
    guest.read(0x4000_1000, "Now through the small page's entry.")


def _isolation(guest: Guest) -> None:
    kernel = guest.tables
    kernel.map(CODE, 64 << 12, 0x1000, "rxu")
    kernel.map(STACK, 66 << 12, 0x1000, "rwu")
    user = guest.space(kernel=False)
    user.map(CODE, 64 << 12, 0x1000, "rxu")
    user.map(STACK, 66 << 12, 0x1000, "rwu")
    entry_page = 0xFFFF_FE00_0000_0000
    for tables in (user, kernel):
        tables.map(entry_page, 90 << 12, 0x1000, "rx")
    guest.cr3(user, "The program runs on tables without the kernel (page-table isolation, KPTI).")
    for turn in range(2):
        again = " once more" * turn
        guest.fetch(CODE, f"It executes a SYSCALL instruction{again}.")
        guest.fetch(entry_page, "The entry code: one of the few pages of the kernel that both tables map.", False)
        guest.cr3(kernel, "Its first work is to load the kernel's tables.")
        guest.read(STACK, "The kernel copies an argument from the program's stack.", False)
        guest.cr3(user, "On its way out it loads the program's tables.")
    guest.fetch(CODE, "Two CR3 loads a system call: what does each cost under this design?")


def _recycle(guest: Guest) -> None:
    spaces = [guest.tables]
    spaces[0].map(CODE, 64 << 12, 0x1000, "rxu")
    for i in range(2):
        space = guest.space()
        space.map(CODE, (65 + i) << 12, 0x1000, "rxu")
        spaces.append(space)
    for turn in range(2):
        for number, space in enumerate(spaces):
            if turn or number:
                guest.cr3(space, f"Process {number + 1} runs.")
            guest.fetch(CODE, "Its code." if not turn else "Its code: is it still shadowed?")


def _unsync(guest: Guest) -> None:
    tables = guest.tables
    tables.map(CODE, 64 << 12, 0x1000, "rxu")
    tables.map(DATA, 65 << 12, 0x1000, "rwu")
    entry = tables.entry(DATA + 0x1000).gpa
    guest.fetch(CODE, "The program starts.")
    guest.write(DATA, 1, "It writes its page; its leaf table is shadowed now.")
    for i in range(3):
        value = (66 + i) << 12 | P | W | U
        why = (
            "The kernel maps a page: the first store to a leaf table that is shadowed."
            if i == 0
            else "And the next one, in the same table."
        )
        guest.store(entry + 8 * i, value, why)
    guest.write(DATA + 0x1000, 3, "The new page is used.")
    guest.store(entry, 80 << 12 | P | W | U, "The kernel moves the page to another frame.")
    guest.read(DATA + 0x1000, "Without a flush the old frame may still be reached, as with a TLB.")
    guest.cr3(tables, "The kernel loads CR3, which flushes.")
    guest.read(DATA + 0x1000, "The new frame, as the architecture demands.")


@dataclass(frozen=True)
class Scenario:
    """A small guest to step through.

    title: what it shows. about: a paragraph for who has not met it. designs: under which it is shown. setup: tables,
    and what the guest does. memory: bytes of guest RAM, or "512KiB". settings: of shadow designs.
    """

    name: str
    title: str
    about: str
    designs: tuple[str, ...]
    setup: Callable[[Guest], None] = field(repr=False)
    memory: str = "512KiB"
    settings: dict[str, int] = field(default_factory=dict)


SCENARIOS: dict[str, Scenario] = {
    s.name: s
    for s in (
        Scenario(
            "demand-paging",
            "Demand paging",
            "A program touches pages. Some the guest maps and the shadow has not met yet: a hidden page fault, "
            "which the guest never sees. One the guest has not mapped itself: that fault is injected, and its "
            "handler stores to a table.",
            ("cached", "unsync", "native"),
            _demand,
        ),
        Scenario(
            "fork",
            "fork and copy-on-write",
            "Two processes share frames, read only, until one of them writes. Each change of rights is a store to "
            "a table that the shadow MMU has to notice, or may notice late.",
            ("cached", "unsync", "flush"),
            _fork,
        ),
        Scenario(
            "flood",
            "A flood of stores",
            "When a process ends, the kernel clears its tables. Emulating each store would be a waste: after a "
            "few in a row the MMU concludes that the frame is no table any more, zaps its shadow and lifts the "
            "write protection.",
            ("cached", "unsync"),
            _flood,
        ),
        Scenario(
            "switch",
            "A context switch",
            "Two processes take turns. Before the series every CR3 load threw the shadow tables away, and each "
            "process paid for its pages again; with cached tables a root is found and kept.",
            ("flush", "cached", "unsync"),
            _switch,
        ),
        Scenario(
            "invlpg",
            "INVLPG",
            "The kernel changes an entry and invalidates the page. Between the two either frame is allowed.",
            ("cached", "unsync", "flush"),
            _invlpg,
        ),
        Scenario(
            "self-map",
            "A self-map",
            "One entry of the root points to the root: all tables then appear in the address space, as in Windows "
            "and many small kernels. The same frame is shadowed at every level at once.",
            ("cached", "unsync"),
            _self_map,
        ),
        Scenario(
            "large-page",
            "A large page",
            "The guest maps 2 MiB by one entry. Over host pages of 4 KiB the shadow needs a table that no guest "
            "table stands behind, a direct one. Then the guest splits the page.",
            ("cached", "unsync"),
            _large,
            "8MiB",
        ),
        Scenario(
            "kpti",
            "A system call with page-table isolation",
            "With KPTI kernel and user code run on tables of their own: two CR3 loads for each system call.",
            ("flush", "cached", "unsync"),
            _isolation,
        ),
        Scenario(
            "recycling",
            "Recycling",
            "A pool of few shadow pages, and more processes than it has room for: the oldest pages go, and are "
            "made again when they are needed. Roots in use are passed over.",
            ("cached",),
            _recycle,
            settings={"pool_pages": 14, "min_free": 4, "refill": 6},
        ),
        Scenario(
            "unsync",
            "Tables that leave sync",
            "Today's KVM lets leaf tables lag behind the guest's until a flush. Compare with cached, which "
            "emulates every one of these stores.",
            ("unsync", "cached"),
            _unsync,
        ),
    )
}
"""The scenarios by name, in the order in which a course would take them."""
