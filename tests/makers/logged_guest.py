"""A guest of three slots, all of whose frames are mapped, and the dirty logs of them."""

import numpy as np
import pytest

import shadowcore as sc

PAGE = 4096
DESIGNS = ["native", "cached", "flush"]
MODES = ["32", "pae", "64", "la57"]

# Three slots with holes between them, of sizes that fill no whole word of a log; tables lie in the first.
SLOTS = ((0, 512), (1024, 70), (4096, 193))  # first gfn, frames
BASE = 0x40000000  # linear address of gpa 0
READ_ONLY = 0x80000000  # the same, not writable
TABLES = range(384, 512)
DATA = [gfn for first, frames in SLOTS for gfn in range(first, first + frames) if gfn > 15 and gfn not in TABLES]

every_design = pytest.mark.parametrize("design", DESIGNS)


class Guest:
    """A guest that maps its three slots, all of it clean and not accessed. `log`: the slots that are logged from the
    start."""

    def __init__(self, mode="64", design="cached", log=(0, 1, 2), tlb=None, vcpus=1, dirty=False):
        self.slots = [
            sc.MemorySlot(first << 12, frames << 12, dirty_log=number in log)
            for number, (first, frames) in enumerate(SLOTS)
        ]
        self.vm = sc.VM(self.slots, mmu=design, tlb=tlb, vcpus=vcpus)
        self.memory = self.vm.memory
        self.tables = sc.PageTables(self.memory, mode)
        for slot in self.slots:
            for base, rights in ((BASE, "rwxu"), (READ_ONLY, "rxu")):
                self.tables.map(base + slot.gpa, slot.gpa, slot.size, rights, PAGE, accessed=dirty, dirty=dirty)
        self.cpu = self.vm.vcpus[0]
        for cpu in self.vm.vcpus:
            for name, value in self.tables.registers.items():
                setattr(cpu, name, value)

    def log(self):
        """Of all slots, one after the other, as RAM is."""
        return np.concatenate([self.memory.dirty_log(slot) for slot in range(3)])

    def logged(self):
        """The gfns in the logs that are kept."""
        found = set()
        for number, (first, _) in enumerate(SLOTS):
            if number in self.memory.logged_slots:
                found |= {first + int(n) for n in np.flatnonzero(self.memory.dirty_log(number))}
        return found

    def clear(self):
        for slot in range(3):
            self.memory.clear_dirty_log(slot)

    def frames(self):
        return self.memory.words.reshape(-1, 512).copy()

    def table(self, gfn, level=1):
        """gfn of the guest's table of `level` for the page of `gfn`."""
        return self.tables.entry(BASE + (gfn << 12), level).gpa >> 12

    def exits(self, call):
        taken = self.vm.stats.pf_taken
        call()
        return self.vm.stats.pf_taken - taken


def va(gfn, base=BASE):
    return base + (gfn << 12)
