"""Random programs for TLBs, and an engine with the model beside it that runs them.

Two address spaces share tables; large and small pages, global and not; a program accesses, edits tables by its own
stores and by those of a device, with INVLPG and without, loads CR3 with and without bit 63, toggles what drops
translations.  A few linear pages and a few frames serve for all, so that what is remembered is used again."""

import random
from dataclasses import dataclass

import lazy_oracle
import numpy as np
from hypothesis import strategies as st
from oracle import (
    CR0,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR3,
    CR4,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    EFER,
    EFER_LME,
    EFER_NXE,
    FETCH,
    INVLPG,
    INVPCID,
    NX,
    OK,
    PS,
    READ,
    WRITE,
    A,
    D,
    P,
    U,
    W,
)

import shadowcore as sc

G = 1 << 8
KEEP = 1 << 63
ALL = P | W | U

# Memory: frames for tables and data; two more places that large pages can lead to.
SLOTS = [(0, 16), (0x400, 8), (0x600, 8)]
TABLES = range(10)


# Flags of the entries that programs store.
FLAGS = [ALL | A | D, ALL | A | D, ALL, ALL | A, ALL | G, ALL | A | D | G, P | U, P | U | A, P | W | A | D, P | G, 0]


@dataclass(frozen=True)
class Mode:
    width: int  # bytes of an entry
    shift: int  # of a directory entry
    roots: tuple  # gpa of the root of each address space
    cr4: int
    efer: int
    upper: dict  # (frame, index): entry above the directories

    @property
    def flags(self):
        return FLAGS if self.width == 4 else [*FLAGS, ALL | NX | A]


# Frames: 1, 2 lead to directory 3 with tables 4 and 5; 6, 7 to directory 8 with tables 9 and 5.  The root entries
# of PAE lie in frame 0, so that all modes can use the tables at once.
MODES = {
    "64": Mode(
        8,
        21,
        (0x1000, 0x6000),
        CR4_PAE,
        EFER_LME | EFER_NXE,
        {(1, 0): 2 << 12 | ALL, (2, 0): 3 << 12 | ALL, (6, 0): 7 << 12 | ALL, (7, 0): 8 << 12 | ALL},
    ),
    "pae": Mode(8, 21, (0x20, 0x40), CR4_PAE, EFER_NXE, {(0, 4): 3 << 12 | P, (0, 8): 8 << 12 | P}),
    "32": Mode(4, 22, (0x3000, 0x8000), CR4_PSE, 0, {}),
}
DIRECT = 3  # directory entry by which the program reaches its tables: a large page at gpa 0


def base_tables(mode):
    """{(frame, index): entry} before the program starts."""
    other = 0 if mode.width == 4 else 0x600  # 4 MiB pages lead to multiples of 4 MiB
    tables = dict(mode.upper)
    for directory, table, large in ((3, 4, 0x400), (8, 9, other)):
        tables |= {
            (directory, 0): table << 12 | ALL,
            (directory, 1): 5 << 12 | ALL,
            (directory, 2): large << 12 | ALL | PS,
            (directory, DIRECT): ALL | PS | A | D,
        }
    tables |= {(4, i): 10 + i << 12 | ALL for i in range(4)}
    tables |= {(9, 0): 11 << 12 | ALL, (9, 1): 12 << 12 | ALL | A | D, (9, 2): 10 << 12 | P | U, (9, 3): 14 << 12 | ALL}
    return tables | {(5, 0): 14 << 12 | ALL | G, (5, 1): 15 << 12 | ALL | A | D}


def linear_pages(mode):
    """The linear pages that programs use."""
    regions = [(0, range(4)), (1, range(2)), (2, range(2)), (DIRECT, (3, 4, 5, 9, 10))]
    found = [(region << mode.shift) + (i << 12) for region, within in regions for i in within]
    if mode.width == 4:
        found += [(2 << 22) + 0x20_0000, (2 << 22) + 0x20_1000]  # the other half of a 4 MiB page
    return found


def lines_of(mode, place):
    """Linear addresses that the entry at `place` maps, one for each page if they are small."""
    frame, index = place
    return {
        3: [index << mode.shift],
        8: [index << mode.shift],
        4: [index << 12],
        9: [index << 12],
        5: [(1 << mode.shift) + (index << 12)],
    }.get(frame, [])


class Choices:
    """Choices made one after the other from one number: one drawn number is one step."""

    def __init__(self, number):
        self.number = number

    def __call__(self, options):
        self.number, i = divmod(self.number, len(options))
        return options[i]


NUMBERS = st.tuples(*[st.integers(0, (1 << 24) - 1)] * 2).map(lambda pair: pair[0] | pair[1] << 24)
# Long programs find more; the short ones are there for a failure to shrink to.
PROGRAMS = st.one_of(*[st.lists(NUMBERS, min_size=n, max_size=50) for n in (1, 35, 36, 37)])


def edit(mode, choose):
    """(place, entry)"""
    tables = [(4, 0), (4, 1), (4, 2), (4, 3), (5, 0), (5, 1), (9, 0), (9, 1), (9, 2), (9, 3)]
    directories = [(frame, index) for frame in (3, 8) for index in (0, 1, 2, 2)]
    kind = choose(["leaf"] * 6 + ["directory"] * 3 + ["upper"])
    if kind == "upper" and mode.upper:
        place = choose(sorted(mode.upper))
        return place, choose([mode.upper[place], *mode.upper.values()])
    if kind == "leaf":
        target = choose([10, 11, 12, 13, 14, 15, 0x400, 0x401, 0x600, 0x407, 3, 4, 9, 0x80])
        return choose(tables), target << 12 | choose(mode.flags)
    large = [0, 0x400, 0x400] + ([] if mode.width == 4 else [0x600, 0x600])
    return choose(directories), choose(
        [choose([4, 5, 9]) << 12 | ALL, choose(large) << 12 | choose(mode.flags) | PS, choose(large) << 12 | ALL | PS]
    )


def step(mode, number):
    """One step, as (what, ...)."""
    choose = Choices(number)
    kind = choose(
        ["access"] * 10 + ["edit"] * 4 + ["edit and invalidate"] * 3 + ["device", "invlpg"] + ["load"] * 5 + ["invpcid"]
    )
    if kind == "access":
        op = choose([READ, READ, WRITE, WRITE, FETCH])
        address = choose(linear_pages(mode)) + choose([0, 8, 0x18])
        return kind, op, address, choose([0x11, 0x5A5A_0000, 14 << 12 | ALL, 10 << 12 | P]), choose([0, 1])
    if kind == "invlpg":
        return kind, choose(linear_pages(mode)) + choose([0, 0xFFF, 0x3000])
    if kind == "invpcid":
        return kind, choose(range(4)), choose([0, 1, 2]), choose(linear_pages(mode)) + choose([0, 0x3000])
    if kind != "load":
        place, entry = edit(mode, choose)
        # What the entry translates is often of interest soon afterwards.
        return kind, place, entry, choose([None, None, (READ, 0), (WRITE, 0), (WRITE, 1)]), choose([0, 0x1000])
    kind = choose(["cr3", "cr3", "toggle"])
    if kind == "cr3":
        return kind, choose([0, 1]), choose([0, 1, 2]), choose([0, 1])
    pcide = [("cr4", CR4_PCIDE)] * 2 if mode.efer & EFER_LME else []
    return kind, *choose([("cr4", CR4_PGE), ("cr4", CR4_SMEP), ("cr0", CR0_WP), ("efer", EFER_NXE), *pcide])


def registers(mode):
    """Loads that turn paging on; with global pages, and with PCIDs where there are any."""
    cr4 = mode.cr4 | CR4_PGE
    loads = [(CR4, cr4), (CR3, mode.roots[0]), (CR0, CR0_PG | CR0_WP | CR0_PE | 0x10)]
    if mode.efer:
        loads.insert(0, (EFER, mode.efer))
    if mode.efer & EFER_LME:
        loads.append((CR4, cr4 | CR4_PCIDE))
    return loads


def store_entries(modes, write):
    """Put the tables of each mode and the data that programs start with, by write(gpa, value, size)."""
    for mode in modes:
        for (frame, index), entry in base_tables(mode).items():
            write((frame << 12) + index * mode.width, entry, mode.width)
    for first, frames in SLOTS:
        for gfn in range(first, first + frames):
            if gfn not in TABLES:
                write(gfn << 12, 0x1_0001 * gfn, 8)


def machine(modes, design, tlb):
    """A VM with a vcpu for each mode; registers are as at reset."""
    slots = [sc.MemorySlot(first << 12, frames << 12) for first, frames in SLOTS]
    vm = sc.VM(memory=slots, mmu=design, tlb=tlb, vcpus=len(modes))
    store_entries(modes, lambda gpa, value, size: vm.write_physical(gpa, value.to_bytes(size, "little")))
    return vm


class Steps:
    """Turns steps into operations, by the registers as they are: `op` performs one, `device` a device's store."""

    def __init__(self, mode, cpu):
        self.mode, self.cpu = mode, cpu

    def toggle(self, name, bit):
        self.op({"cr0": CR0, "cr4": CR4, "efer": EFER}[name], value=getattr(self.cpu, name) ^ bit)

    def step(self, step):
        mode, cpu = self.mode, self.cpu
        match step:
            case ("access", op, address, value, user):
                self.op(op, address, value, user=user)
            case ("edit" | "edit and invalidate" | "device" as kind, (frame, index) as place, entry, follow, beside):
                gpa = (frame << 12) + index * mode.width
                if kind == "device":
                    self.device(gpa, entry, mode.width)
                else:
                    self.op(WRITE, (DIRECT << mode.shift) + gpa, entry, mode.width)
                for address in lines_of(mode, place):
                    if kind == "edit and invalidate":
                        # Of a large page any address will do.
                        self.op(INVLPG, address + beside if frame in (3, 8) else address)
                    if follow:
                        self.op(follow[0], address, 0x77, user=follow[1])
            case ("invlpg", address):
                self.op(INVLPG, address)
            case ("cr3", space, pcid, keep):
                self.op(CR3, value=mode.roots[space] | ((pcid | keep << 63) if cpu.cr4 & CR4_PCIDE else 0))
            case ("invpcid", kind, pcid, address):
                self.op(INVPCID, address, pcid if cpu.cr4 & CR4_PCIDE else 0, kind)
            case ("toggle", name, bit):
                self.toggle(name, bit)


class Together:
    """An engine and the forgetful model, operation by operation, with a vcpu for each mode.

    habits: of the model, see LazyCpu; ahead: whether it reads ahead.
    """

    def __init__(self, modes, design, tlb, **habits):
        self.vm = machine(modes, design, tlb)
        self.memory = lazy_oracle.FlatMemory(*SLOTS)
        store_entries(modes, self.memory.write)
        self.cpus = []
        self.parts = [Part(self, i, mode, habits) for i, mode in enumerate(modes)]
        self.by_memory = 0  # accesses that only a held translation explains

    def step(self, number, vcpu=0):
        part = self.parts[vcpu]
        part.step(step(part.mode, number))

    def read_ahead(self):
        for cpu in self.cpus:
            cpu.read_ahead()

    def finish(self):
        for cpu, part in zip(self.vm.vcpus, self.parts, strict=True):
            names = ("cr0", "cr2", "cr3", "cr4", "efer")
            assert [getattr(cpu, name) for name in names] == [getattr(part.cpu, name) for name in names]
        assert np.array_equal(self.memory.bytes, self.vm.memory.bytes)
        report = self.vm.audit()
        assert report.ok, report


class Part(Steps):
    """One vcpu, on both sides."""

    def __init__(self, together, number, mode, habits):
        ahead = habits.get("ahead", False)
        habits = {key: value for key, value in habits.items() if key != "ahead"}
        super().__init__(mode, lazy_oracle.LazyCpu(together.memory, ahead=linear_pages(mode) * ahead, **habits))
        self.together = together
        together.cpus.append(self.cpu)
        self.cpu.beside = together.cpus
        self.engine = together.vm.vcpus[number]
        self.ops = np.zeros(1, dtype=sc.OP_DTYPE)
        for op, value in registers(mode):
            self.op(op, value=value)

    def op(self, op, address=0, value=0, size=8, user=0):
        self.together.read_ahead()
        self.ops[0] = (op, user, size, address, value)
        result = self.engine.run(self.ops)
        got = int(result.outcome[0]), int(result.error_code[0]), int(result.gpa[0])
        if op in (READ, WRITE, FETCH):
            self.choose(op, address, value, size, user, got, int(result.value[0]))
            return
        assert got[:2] == self.cpu.step(op, address, value, size)[:2]
        if op == INVLPG:
            self.cpu.invlpg(address)

    def choose(self, op, address, value, size, user, got, loaded):
        """Find the right outcome that is the engine's, and go on from it."""
        ours, engines = self.together.memory, self.together.vm.memory.bytes
        outcomes = self.cpu.outcomes(op, address, value, size, bool(user))
        before = ours.bytes.copy()
        for outcome in outcomes:
            if outcome.result != got:
                continue
            self.cpu.happened(outcome, address)
            right = np.array_equal(ours.bytes, engines)
            if right and (op != READ or got[0] != OK or loaded == ours.read(got[2], size)):
                self.together.by_memory += outcome.held is None and got[0] == OK
                return
            ours.bytes[:] = before
        results = [outcome.result for outcome in outcomes]
        raise AssertionError(f"op {op} at {address:#x}: {got} is none of {results}, or has another effect")

    def device(self, gpa, value, size):
        self.together.read_ahead()
        self.together.vm.write_physical(gpa, value.to_bytes(size, "little"))
        self.together.memory.write(gpa, value, size)


TINY = sc.TLB(small_entries=1, small_ways=1, large_entries=1, large_ways=1, huge_entries=0)
SMALL = sc.TLB(small_entries=6, small_ways=2, large_entries=2, large_ways=2, huge_entries=0)
TLBS = [sc.TLB(), SMALL, TINY]


def seeded(first, count, steps=60):
    """Random programs that are the same in every run; evenly random ones find more than those that are searched."""
    for seed in range(first, first + count):
        rng = random.Random(seed)
        yield seed, rng.choice(TLBS), [rng.getrandbits(48) for _ in range(steps)]


# Variants of each design, with what the model has to know of their habits.
DESIGNS = {
    "native": [("native", {})],
    "cached": [
        (sc.Shadow.cached(pool_pages=32), {}),
        (sc.Shadow.cached(pool_pages=8), {}),
        (sc.Shadow.cached(pool_pages=32, notpresent_marker=True), {}),
    ],
    "flush": [
        (sc.Shadow.flush(quirks=0, pool_pages=32), {"rereads": True}),
        (
            sc.Shadow.flush(quirks=sc.Quirk.TWO_EXITS | sc.Quirk.ACCESSED_EARLY, pool_pages=32),
            {"early": True, "keeps_refused": True, "rereads": True},
        ),
    ],
    "agile": [
        (sc.Shadow.agile(), {}),
        (sc.Shadow.agile(nested_writes=1, nested_back="never"), {}),
        (sc.Shadow.agile(nested_writes=1, nested_interval=5), {}),
        (sc.Shadow.agile(nested_writes=1, nested_interval=4, nested_back="reset", pool_pages=74, refill=5), {}),
    ],
    "nested": [("nested", {}), (sc.Nested(mmu="direct", pool_pages=32, refill=5, levels=5), {})],
    "unsync": [
        (sc.Shadow.unsync(pool_pages=64), {"ahead": True}),
        (sc.Shadow.unsync(pool_pages=8, prev_roots=0, prefetch=0, release="6.12"), {"ahead": True}),
        (sc.Shadow.unsync(pool_pages=16, prev_roots=16, prefetch=32, flood_threshold=1), {"ahead": True}),
        (sc.Shadow.unsync(pool_pages=64, notpresent_marker="walk"), {"ahead": True}),
        (sc.Shadow.unsync(pool_pages=32, prefetch=0, release="2.6.28", notpresent_marker=True), {"ahead": True}),
        (sc.Shadow.adaptive(pool_pages=32, rules=("emulate", "zap", "invlpg", "freed")), {"ahead": True}),
    ],
}


def program_on(mode, variant, tlb, program):
    """Run it on the engine and on the model; AssertionError where they part."""
    mmu, habits = variant
    together = Together([mode], mmu, tlb, **habits)
    for number in program:
        together.step(number)
    together.finish()
    return together
