"""A small guest for scripted operations with exact counts: its tables, and a window through which it edits them."""

from contextlib import contextmanager

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.pagetables import FORMATS, A, D, P, U, W

MODES = ("32", "pae", "64", "la57")
every_mode = pytest.mark.parametrize("mode", MODES)
eight_byte_modes = pytest.mark.parametrize("mode", MODES[1:])

# Levels of tables; and shadow pages on the way to a page of the user, below the root.
LEVELS = {"32": 2, "pae": 3, "64": 4, "la57": 5}
BELOW_ROOT = {"32": 1, "pae": 1, "64": 3, "la57": 4}

ADDRESS = 0x000F_FFFF_FFFF_F000

# Guest physical memory: data at DATA, frames for tables from TABLES to TABLES_END, nothing from RAM on.
PAGE = 4096
RAM = 8 << 20
TABLES = 0x440000
TABLES_END = 0x640000
DATA = 0x100000

# Linear addresses: pages of the user, and all frames for tables at WINDOW[mode] + gpa.
USER = 0x40000000
WINDOW = {
    "32": 0xC000_0000,
    "pae": 0xC000_0000,
    "64": 0xFFFF_8880_0000_0000,
    "la57": 0xFF11_0000_0000_0000,
}
# What is mapped here at first: read-write for everyone, accessed and dirty.
USED = {"rights": "rwxu", "accessed": True, "dirty": True, "page_size": 4096}

COUNTED = (
    "pf_taken",
    "pf_guest",
    "pf_emulate",
    "mmu_cache_miss",
    "mmu_shadow_zapped",
    "mmu_recycled",
    "mmu_unprotect",
    "rmap_protected",
)


class Guest:
    """A machine in paging mode `mode`, in kernel mode unless an access says user=True.

    `pages` pages from USER on are mapped to DATA, the first of them to DATA itself. paging=False: the registers
    are still to be loaded (`start`).
    """

    def __init__(self, mode="64", mmu="cached", pages=8, paging=True, tlb=None, **more):
        self.mode = mode
        self.vm = sc.VM(memory=RAM, mmu=mmu, tlb=tlb, **more)
        self.cpu = self.vm.vcpus[0]
        self.frames = iter(range(TABLES >> 12, TABLES_END >> 12))
        self.tables = self.address_space(pages)
        self.size = FORMATS[mode].entry_size
        if paging:
            self.start()

    def address_space(self, pages=8):
        """Tables of another process: its own user pages' tables and window, the same frames."""
        tables = sc.PageTables(self.vm.memory, self.mode, allocate=lambda: next(self.frames))
        window = WINDOW[self.mode] + TABLES
        tables.map(window, TABLES, TABLES_END - TABLES, "rwx", 4096, accessed=True, dirty=True)
        if pages:
            tables.map(USER, DATA, pages << 12, **USED)
        return tables

    def start(self, wp=True):
        for name, value in self.tables.registers.items():
            setattr(self.cpu, name, value if wp or name != "cr0" else value & ~(1 << 16))

    def map(self, va, gpa, size=4096, **flags):
        """Map by plain stores, before the guest has used the range: the shadow does not learn of it."""
        self.tables.map(va, gpa, size, **{**USED, **flags})

    def entry(self, va, level=1):
        """gpa of the guest's entry of `level` for `va`."""
        return self.tables.entry(va, level).gpa

    def table(self, va, level=1):
        """gfn of the guest's table of `level` for `va`."""
        return self.entry(va, level) >> 12

    def window(self, gpa):
        return WINDOW[self.mode] + gpa

    def see(self, *gpas):
        """Load through the window, so that a later store there costs no exit for filling it."""
        for gpa in gpas:
            self.cpu.read(self.window(gpa), 4)

    def edit(self, va, value, level=1):
        """The guest's own store to its entry of `level` for `va`."""
        self.cpu.write(self.window(self.entry(va, level)), value, self.size)

    @contextmanager
    def counting(self, *more):
        """A dict that after the block holds the counters that moved, of COUNTED and `more`, and by how much."""
        moved = {}
        before = self.vm.stats.as_dict()
        yield moved
        after = self.vm.stats.as_dict()
        moved.update({name: after[name] - before[name] for name in (*COUNTED, *more) if after[name] != before[name]})

    def exits(self, va):
        """Exits of one load, which succeeds."""
        taken = self.vm.stats.pf_taken
        self.cpu.read(va, 4)
        return self.vm.stats.pf_taken - taken

    # -- the shadow ----------------------------------------------------------------------------------------------

    def path(self, va):
        """(level, pool page, index, spte) from the root down to the leaf, or to the first that is not present."""
        roots = self.vm.mmu.roots()
        page = roots[0] if len(roots) == 1 else roots[va >> 30 & 3]
        levels = {"64": 4, "la57": 5}.get(self.cpu.mode, 2)
        found = []
        for level in range(levels, 0, -1):
            index = va >> 12 + 9 * (level - 1) & 511
            spte = int(self.vm.memory.pool[page, index])
            found.append((level, page, index, spte))
            if not spte & P or (level > 1 and spte & 0x80):
                break
            page = (spte & ADDRESS) - self.vm.memory.pool_hpa >> 12
        return found

    def leaf(self, va):
        """The leaf spte of `va`; 0 if some entry on the way is not present."""
        last = self.path(va)[-1]
        return last[3] if last[0] == 1 else 0

    def rights(self, va):
        """Letters of what the leaf of `va` grants."""
        spte = self.leaf(va)
        return "".join(letter for letter, bit in (("r", P), ("w", W), ("u", U)) if spte & bit)

    def pages(self, gfn=None, **fields):
        """Active shadow pages, newest first, that shadow the guest table `gfn` and have these role fields."""
        pages = self.vm.mmu.pages
        if gfn is not None:
            fields = {"gfn": gfn, "direct": 0, **fields}
        for name, value in fields.items():
            pages = pages[pages[name] == value]
        return pages

    def page_at(self, va, level):
        """Row of the shadow page of `level` on the way to `va`."""
        number = next(page for at, page, _, _ in self.path(va) if at == level)
        return self.pages(page=number)[0]

    def clean(self):
        """Every invariant holds, and free pages of the pool are all zero."""
        report = self.vm.audit()
        free = np.ones(len(self.vm.memory.pool), dtype=bool)
        free[self.vm.mmu.pages["page"]] = False
        return report.ok and not self.vm.memory.pool[free].any()


__all__ = [
    "BELOW_ROOT",
    "DATA",
    "LEVELS",
    "MODES",
    "PAGE",
    "RAM",
    "TABLES",
    "USED",
    "USER",
    "WINDOW",
    "A",
    "D",
    "Guest",
    "P",
    "U",
    "W",
    "eight_byte_modes",
    "every_mode",
]
