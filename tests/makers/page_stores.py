"""A guest with pages of every kind beside each other, and every kind of store to them; `native` is the measure."""

import numpy as np
from operations import WIDE, operations

import shadowcore as sc
from shadowcore.pagetables import A, D

PAGE = 4096
RAM = 512 << 12
TABLES = range(448, 512)
BASE = 0x400000 * 63  # the last pages of a leaf table of every mode, and the first of the next
PLACE = 256  # gfn of the first data frame
CR0_WP, CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 16, 1 << 20, 1 << 21, 1 << 22


# The registers under which supervisor code stores to read-only pages: name: (bits of CR4, EFLAGS.AC).
STATES = {
    "leaves": (0, False),
    "SMEP": (CR4_SMEP, False),
    "SMAP": (CR4_SMAP, True),
    "PKE": (CR4_PKE, False),
    "all": (CR4_SMEP | CR4_SMAP | CR4_PKE, True),
}
# Pages by what they are: (rights, accessed and dirty).
PAGES = {
    "writable": ("rwxu", True),
    "clean": ("rwxu", False),
    "read-only": ("rxu", True),
    "read-only, clean": ("rxu", False),
    "supervisor's": ("rx", False),
    "table": ("rwxu", True),
    "read-only table": ("rxu", True),
    "device": ("rwxu", False),
    "missing": ("rwxu", False),
}


class Guest:
    """A guest with two neighbouring pages `kinds` in two leaf tables, logged from here on."""

    def __init__(self, mode, design, kinds, state="leaves", wp=False, tlb=None):
        self.vm = sc.VM(RAM, design, tlb=tlb)
        self.memory, self.cpu = self.vm.memory, self.vm.vcpus[0]
        self.tables = sc.PageTables(self.memory, mode, allocate=TABLES)
        self.kinds = kinds
        self.va = [BASE - PAGE, BASE]
        self.other = [BASE - 16 * PAGE, BASE + 16 * PAGE]  # always writable; their leaf tables are those of the pages
        self.table_of = [0x10000000 * 3, 0x10000000 * 4]  # pages of which the tables are the "table" pages
        for va in (*self.other, *self.table_of):
            self.tables.map(va, (PLACE + 8) << 12, PAGE, "rwxu", accessed=True, dirty=True)
        for number, (va, kind) in enumerate(zip(self.va, kinds, strict=True)):
            rights, used = PAGES[kind]
            gpa = (PLACE + number) << 12
            if kind in ("table", "read-only table"):
                gpa = self.tables.entry(self.table_of[number]).gpa & -PAGE
            elif kind == "device":
                gpa = RAM + number * PAGE
            if kind != "missing":
                self.tables.map(va, gpa, PAGE, rights, accessed=used, dirty=used)
        self.gfn = [self.tables.entry(va).value >> 12 & 0xFFFFF for va in self.va]
        cr4, ac = STATES[state]
        if mode in ("32", "pae"):
            cr4 &= ~CR4_PKE
        for name, value in self.tables.registers.items():
            value |= cr4 if name == "cr4" else 0
            setattr(self.cpu, name, value if wp or name != "cr0" else value & ~CR0_WP)
        self.cpu.ac = ac
        for va in (*self.other, *self.table_of):
            self.cpu.read(va)
        self.memory.start_dirty_log()

    def log(self):
        return np.flatnonzero(self.memory.dirty_log()).tolist()

    def entries(self):
        """A and D of every entry on the way to the two pages."""
        return [[entry.value & (A | D) for entry in self.tables.walk(va)] for va in self.va]

    def at(self, size, left):
        """Linear address of an access with `left` bytes in the first page (0: all in the second)."""
        return self.va[1] - left


def batch(op, va, value, size, user=False):
    row = {"op": op, "user": user, "size": size, "addr": va, "value": value & (1 << 64) - 1, "value_high": value >> 64}
    return operations(row, dtype=WIDE)


def ran(guest, ops, data=True):
    """A batch of one, with what a call would raise."""
    result = guest.cpu.run(ops, data=data)
    outcome = int(result.outcome[0])
    if outcome == 1:
        raise sc.PageFault(guest.cpu.cr2, int(result.error_code[0]))
    if outcome:
        raise (None, None, sc.GeneralProtection(0), sc.MMIOAccess(int(result.gpa[0])))[outcome]
    return int(result.emulated[0])


STORES = {
    "write": lambda guest, va, size: guest.cpu.write(va, 0x0102030405060708 & (1 << 8 * size) - 1, size),
    "add": lambda guest, va, size: guest.cpu.modify(va, "add", 0x31, size),
    "cmpxchg": lambda guest, va, size: guest.cpu.cmpxchg(va, 0, 0x33, size),
    "mismatch": lambda guest, va, size: guest.cpu.cmpxchg(va, 0x77, 0x33, size),
    "batch": lambda guest, va, size: ran(guest, batch(sc.Op.WRITE, va, 0x55, size)),
    "batch, or": lambda guest, va, size: ran(guest, batch(sc.Op.OR, va, 0x55, size)),
    "no data": lambda guest, va, size: ran(guest, batch(sc.Op.WRITE, va, 0x55, size), data=False),
    "no data, xor": lambda guest, va, size: ran(guest, batch(sc.Op.XOR, va, 0x55, size), data=False),
    "embed": lambda guest, va, size: sc.embed.access_many(guest.cpu, [va], "w", size=size, value=0x55),
}


def outcome(call, *args):
    try:
        call(*args)
    except sc.GuestFault as fault:
        return repr(fault)
    return None


def same_as_native(mode, design, kinds, state, name, size, left, wp=False, user=False):
    """One store under `design` and under `native`: fault, memory, A and D, log. Returns the two guests."""
    guests = [Guest(mode, made, kinds, state, wp) for made in (design, "native")]
    came = [outcome(STORES[name], guest, guest.at(size, left), size) for guest in guests]
    what = (mode, kinds, state, name, size, left)
    if name != "embed":
        assert came[0] == came[1], what
    assert np.array_equal(guests[0].memory.words, guests[1].memory.words), what
    assert guests[0].entries() == guests[1].entries(), what
    assert guests[0].log() == guests[1].log(), what
    assert guests[0].vm.audit().ok, what
    return guests
