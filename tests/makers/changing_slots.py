"""A machine whose memory slots change, and whose host takes frames away, while its guest runs.

Guest physical memory: slot 0 at 0, with the guest's tables and LOW; slot 1 at HERE, to which the guest maps pages,
as it does to THERE, where a slot can be put. The leaf tables for MIXED are themselves in slot 1.
"""

import random

import numpy as np

import shadowcore as sc

PAGE, MIB = 4096, 1 << 20
RAM = 8 * MIB
LOW_SIZE, SIZE = 4 * MIB, MIB
HERE, THERE = 16 * MIB, 32 * MIB
LOW = 0x100000  # gpa of pages in slot 0
MODES = ("32", "pae", "64", "la57")
DESIGNS = {
    "flush": sc.Shadow.flush(quirks=sc.Quirk.NONE),
    "cached": sc.Shadow.cached(pool_pages=64),
    "cached, few pages": sc.Shadow.cached(pool_pages=12),
    "unsync": sc.Shadow.unsync(),
    "unsync, few pages": sc.Shadow.unsync(pool_pages=24, min_free=5, refill=10),
    "agile": sc.Shadow.agile(nested_writes=1),
    "adaptive, few pages": sc.Shadow.adaptive(pool_pages=24, min_free=5, refill=10),
    "nested": sc.Nested(),
    "nested, direct, few pages": sc.Nested(mmu="direct", pool_pages=12),
    "nested, 5 levels, few pages": sc.Nested(levels=5, pool_pages=10),
    "kvm-2007": sc.Shadow.kvm_2007(pool_pages=64),
    "kvm-6.1": sc.Shadow.kvm_6_1(),
    "kvm-6.12": sc.Shadow.kvm_6_12(),
}
EXACT = [name for name in DESIGNS if name != "kvm-2007"]
PAGES = 24  # mapped of each region
# Linear addresses.
VA_LOW, VA_HERE, VA_THERE, VA_MIXED, VA_LARGE = (0x4000_0000 + (i << 26) for i in range(5))
REGIONS = {VA_LOW: LOW, VA_HERE: HERE, VA_THERE: THERE, VA_MIXED: LOW + 64 * PAGE}


class Machine:
    def __init__(self, mmu="native", mode="64", **more):
        slots = [sc.MemorySlot(0, LOW_SIZE), sc.MemorySlot(HERE, SIZE)]
        self.vm = sc.VM(memory=RAM, slots=slots, mmu=mmu, **more)
        self.cpu, self.memory = self.vm.vcpus[0], self.vm.memory
        self.low, self.high = iter(range(0x200, 0x3FF)), iter(range((HERE + SIZE // 2) >> 12, (HERE + SIZE) >> 12))
        self.source = self.low
        self.tables = sc.PageTables(self.memory, mode, allocate=lambda: next(self.source))
        used = {"rights": "rwxu", "accessed": True, "dirty": True, "page_size": PAGE}
        for va, gpa in REGIONS.items():
            if va == VA_MIXED:
                self.tables.map(va + (4 << 20), LOW, PAGE, **used)  # the tables above
                self.source = self.high
            self.tables.map(va, gpa, PAGES * PAGE, **used)
            self.source = self.low
        self.tables.map(VA_LARGE, 0, LOW_SIZE, "rwxu", 2 * MIB if mode != "32" else 4 * MIB, accessed=True, dirty=True)
        for cpu in self.vm.vcpus:
            for name, value in self.tables.registers.items():
                setattr(cpu, name, value)

    def do(self, step):
        """What came of a step: a value, a fault of the guest, or an error of the call."""
        name, *arguments = step
        try:
            return getattr(self, name)(*arguments)
        except (sc.GuestFault, sc.ConfigError) as error:
            return repr(error)

    def read(self, va):
        return self.cpu.read(va, 8)

    def write(self, va, value):
        self.cpu.write(va, value, 8)

    def add(self, value, va):
        return self.cpu.modify("add", va, value, 8) if hasattr(self.cpu, "modify") else None

    def cr3(self):
        self.cpu.cr3 = self.cpu.cr3

    def invlpg(self, va):
        self.cpu.invlpg(va)

    def device(self, gpa, value):
        self.vm.write_physical(gpa, value.to_bytes(8, "little"))

    def add_slot(self, gpa, size, read_only):
        return self.vm.add_slot(gpa, size, read_only=read_only)

    def remove_slot(self, number):
        self.vm.remove_slot(number)

    def set_slot(self, number, gpa):
        self.vm.set_slot(number, gpa=gpa)

    def log(self, number, on):
        self.vm.set_slot(number, dirty_log=on)

    def clear(self, number):
        self.memory.clear_dirty_log(number)

    def unmap(self, gfn, n, discard):
        self.vm.host_unmap(gfn, n, discard=discard)

    def touch(self, gfn, n, write):
        self.vm.host_touch(gfn, n, write=write)

    def collapse(self, gfn):
        self.vm.host_collapse(gfn)


def step(rng, host):
    """One step of a random program."""
    va = rng.choice(list(REGIONS)) + PAGE * rng.randrange(PAGES) + 8 * rng.randrange(512)
    if rng.random() < 0.15:
        va = VA_LARGE + LOW + PAGE * rng.randrange(PAGES)
    at = rng.choice([HERE, THERE])
    gfn = (rng.choice([LOW, LOW + 64 * PAGE, at]) >> 12) + rng.randrange(PAGES)
    choices = [(30, ("read", va)), (30, ("write", va, rng.getrandbits(64))), (2, ("cr3",)), (3, ("invlpg", va))]
    choices += [(3, ("device", (gfn << 12) + 8, rng.getrandbits(64))), (4, ("remove_slot", rng.choice([1, 1, 2])))]
    choices += [(5, ("add_slot", at, rng.choice([SIZE, SIZE // 2]), rng.random() < 0.3))]
    choices += [(3, ("set_slot", rng.choice([1, 2]), at)), (2, ("log", rng.randrange(3), rng.random() < 0.6))]
    choices += [(1, ("clear", rng.randrange(3)))]
    if host:
        choices += [(6, ("unmap", gfn, rng.choice([1, 3, 16]), rng.random() < 0.5))]
        choices += [(3, ("touch", gfn, 2, rng.random() < 0.5)), (1, ("collapse", 0))]
    weights, steps = zip(*choices, strict=True)
    return rng.choices(steps, weights)[0]


def same(design, mode, seed, steps=250, host=False, **more):
    """A random program on a design and on none: what comes of each step, memory and audits are the same and clean."""
    rng = random.Random(seed)
    made, native = Machine(DESIGNS[design], mode, **more), Machine("native", mode, **more)
    for k in range(steps):
        each = step(rng, host)
        got, wanted = made.do(each), native.do(each)
        assert got == wanted, (k, each)
        if k % 10 == 0:
            report = made.vm.audit()
            assert report.ok, (k, each, str(report))
    assert np.array_equal(made.memory.bytes, native.memory.bytes), np.unique(
        np.flatnonzero(made.memory.bytes != native.memory.bytes) >> 12
    )
    assert made.vm.audit().ok
    assert native.vm.audit().ok
    return made, native
