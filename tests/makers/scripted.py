"""A script of everything that makes a shadow MMU take pages, and what its guest sees of it."""

from functools import lru_cache

import numpy as np
import streams
from guest2007 import DATA, PAGE, RAM, TABLES, USER, A, D, Guest, P, U, W

import shadowcore as sc

EVER = 1 << 30
CR0_WP, CR0_PG, CR4_PGE = 1 << 16, 1 << 31, 1 << 7

FAR = USER + (64 << 20)
NEW = USER + (128 << 20)  # its table is hung in while the guest runs
LARGE = USER + (192 << 20)
READ_ONLY = USER + 4 * PAGE
CLEAN = USER + 5 * PAGE
DEVICE = USER + 6 * PAGE
TABLE_OF_USER = USER + 7 * PAGE  # a table of the guest that user mode may write
NOWHERE = USER + 100 * PAGE
SECOND = USER + 8 * PAGE


class Scripted:
    """A guest, and a script of everything that makes a shadow MMU take pages."""

    def __init__(self, mode, design):
        self.guest = guest = Guest(mode, design)
        large = 1 << guest.tables.format.shift(2)
        guest.map(READ_ONLY, DATA + 4 * PAGE, rights="rxu")
        guest.map(CLEAN, DATA + 5 * PAGE, dirty=False)
        guest.map(DEVICE, RAM)
        guest.map(FAR, DATA + 16 * PAGE, 4 * PAGE)
        guest.map(NEW, DATA + 20 * PAGE, 4 * PAGE)
        guest.map(LARGE, 0, large, page_size=large)
        guest.map(TABLE_OF_USER, guest.entry(NEW) & -PAGE)
        self.directory_entry = guest.tables.entry(NEW, 2).value
        guest.tables.set_entry(NEW, 2, 0)
        self.other = guest.address_space(4)
        guest.vm.memory.words[DATA // 8 : DATA // 8 + 32 * 512] = np.arange(32 * 512)

    def steps(self):
        """Calls, each one operation of the guest."""
        guest, cpu, vm = self.guest, self.guest.cpu, self.guest.vm

        def load(va, **kwargs):
            return lambda: cpu.read(va, 4, **kwargs)

        def store(va, value, size=4, **kwargs):
            return lambda: cpu.write(va, value, size, **kwargs)

        def register(name, value):
            return lambda: setattr(cpu, name, value)

        def edit(va, value, level=1):
            at = guest.window(guest.entry(va, level))
            return [store(at, value, guest.size), lambda: cpu.invlpg(va)]

        cr0, cr3, cr4 = (guest.tables.registers[name] for name in ("cr0", "cr3", "cr4"))
        leaf = DATA | P | W | U | A | D
        return [
            load(USER),
            store(USER + PAGE, 7),
            lambda: cpu.fetch(USER + 2 * PAGE),
            store(USER + 3 * PAGE, 8, user=True),
            store(READ_ONLY, 9, user=True),
            load(CLEAN),
            store(CLEAN, 10),
            load(NOWHERE),
            load(DEVICE),
            load(FAR),
            store(LARGE + 5 * PAGE, 11),
            load(LARGE + (1 << 20)),
            store(USER + PAGE - 4, 0x1122334455667788, 8),
            *edit(USER + PAGE, leaf + 9 * PAGE),
            load(USER + PAGE),
            store(SECOND, 12),
            *edit(FAR, 0, level=2),
            load(FAR),
            *edit(NEW, self.directory_entry, level=2),
            load(NEW),
            store(NEW + PAGE, 13),
            *(step for i in range(4) for step in edit(USER + i * PAGE, leaf + (i ^ 1) * PAGE)),
            *(load(USER + i * PAGE) for i in range(4)),
            lambda: cpu.cmpxchg(guest.window(guest.entry(CLEAN)), 0, 0, guest.size),
            lambda: cpu.modify(guest.window(guest.entry(USER)), "and", 0xFF & ~U, 1),
            lambda: cpu.invlpg(USER),
            load(USER, user=True),
            store(TABLE_OF_USER + 2 * guest.size, leaf + 30 * PAGE, guest.size, user=True),
            lambda: cpu.invlpg(NEW + 2 * PAGE),
            load(NEW + 2 * PAGE),
            register("cr3", self.other.cr3),
            load(USER),
            store(USER + 2 * PAGE, 14),
            load(FAR),
            register("cr3", cr3),
            load(USER + 2 * PAGE),
            register("cr4", cr4 ^ CR4_PGE),
            load(NEW),
            register("cr0", cr0 & ~CR0_WP),
            store(READ_ONLY, 15),
            load(READ_ONLY, user=True),
            register("cr0", cr0),
            store(READ_ONLY, 16),
            register("cr0", cr0 & ~CR0_PG),
            load(DATA),
            store(DATA + 11 * PAGE, 17),
            load(guest.entry(USER)),
            store(guest.entry(USER + 3 * PAGE), 0),
            register("cr0", cr0),
            load(USER + 3 * PAGE),
            lambda: vm.write_physical(guest.entry(USER + 3 * PAGE), int(leaf).to_bytes(guest.size, "little")),
            lambda: cpu.invlpg(USER + 3 * PAGE),
            load(USER + 3 * PAGE),
        ]

    def seen(self, step):
        """What the guest sees of one step."""
        try:
            return step(), self.guest.cpu.cr2
        except sc.GuestFault as fault:
            return repr(fault), self.guest.cpu.cr2

    def memory(self):
        return self.guest.vm.memory.bytes.tobytes()

    def touched(self):
        """The part of memory that the script touches, but for one store through the large page."""
        memory = self.guest.vm.memory.bytes
        return memory[DATA : DATA + 64 * PAGE].tobytes() + memory[TABLES : TABLES + 32 * PAGE].tobytes()


@lru_cache
def undisturbed(mode, design):
    """What a run without a failure shows, and the pages that it takes."""
    scripted = Scripted(mode, design)
    taken = scripted.guest.vm.stats.mmu_cache_miss
    results = [scripted.seen(step) for step in scripted.steps()]
    assert scripted.guest.vm.audit().ok
    stats = scripted.guest.vm.stats
    return results, scripted.memory(), stats.mmu_cache_miss - taken, stats.mmu_shadow_zapped


DESIGNS = {
    "cached": sc.Shadow.cached(),
    "flush": sc.Shadow.flush(quirks=sc.Quirk.NONE),
    "cached, 12 pages": sc.Shadow.cached(pool_pages=12, min_free=3, refill=5),
}


def roots_of(vm):
    """gfns of the pages that are pinned."""
    pages = vm.mmu.pages
    return sorted(pages["gfn"][pages["root_count"] > 0].tolist())


def check_exhausted(error, vm):
    """The error names what is pinned."""
    assert sorted(error.roots) == roots_of(vm)
    assert error.had == vm.mmu.design.pool_pages
    assert all(f"{gfn:#x}" in str(error) for gfn in error.roots)


def playing(name, **settings):
    data = streams.stream(name)
    return streams.machine(data, sc.Shadow.cached(**settings)), data["ops"]


def columns(*results):
    """What the guest saw, of results one after the other."""
    return [
        np.concatenate([np.asarray(getattr(result, key)) for result in results])
        for key in ("outcome", "error_code", "gpa", "value")
    ]


def same(got, wanted):
    return all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
