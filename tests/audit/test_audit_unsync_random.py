"""Random guests of design `unsync`, several processors each, and an audit after every operation."""

import itertools
import random
from contextlib import suppress

import pytest
from guest2007 import PAGE
from samples import sampled

import shadowcore as sc

MIB = 1 << 20
DIRECT = {"32": 0xC000_0000, "pae": 0xC000_0000, "64": 0xFFFF_8880_0000_0000, "la57": 0xFF11_0000_0000_0000}
SMALL, READ_ONLY, BEYOND, LARGE, DEVICE, HUGE = (n << 28 for n in (4, 5, 6, 7, 8, 32))
EXPECTED = (sc.PageFault, sc.MMIOAccess, sc.GeneralProtection, sc.PoolExhausted, sc.EngineError)


def design(rng):
    settings = {
        "pool_pages": rng.choice([16, 30, 60, 200]),
        "min_free": rng.choice([0, 5]),
        "prefetch": rng.choice([0, 1, 8]),
        "prev_roots": rng.choice([0, 1, 3, 16]),
        "flood_threshold": rng.choice([None, 1, 3]),
    }
    return rng.choice([sc.Shadow.unsync, sc.Shadow.adaptive, sc.Shadow.kvm_6_1, sc.Shadow.kvm_6_12])(**settings)


class Machine:
    """Two slots of RAM, one of them with a page of the host that may be large; three address spaces."""

    def __init__(self, rng):
        self.rng = rng
        self.mode = rng.choice(["32", "pae", "64", "64", "la57"])
        self.size = 4 if self.mode == "32" else 8
        slots = [
            sc.MemorySlot(0, 8 * MIB, host_page_size=rng.choice([PAGE, 2 * MIB])),
            sc.MemorySlot(16 * MIB, 4 * MIB),
        ]
        tlb = rng.choice([None, sc.TLB(16, 4, 4, 2, 2, 2)])
        self.vm = sc.VM(slots, design(rng), rng.choice([1, 1, 2, 3]), tlb)
        frames = itertools.count(1024)
        self.spaces = [self.space(lambda: next(frames)) for _ in range(3)]
        self.entries = [
            tables.entry(va + i * PAGE, level).gpa
            for tables in self.spaces
            for va in (SMALL, READ_ONLY, LARGE, DEVICE, DIRECT[self.mode])
            for i, level in ((0, 1), (1, 1), (2, 1), (0, 2), (0, 3))
            if level < 3 or (self.size == 8 and self.mode != "pae")
            if va != LARGE or level > 1
        ]
        self.values = [self.entry(gpa) for gpa in self.entries]
        for cpu, tables in zip(self.vm.vcpus, self.spaces, strict=False):
            for name, value in tables.registers.items():
                setattr(cpu, name, value)

    def space(self, allocate):
        rng, used = self.rng, {"accessed": True, "dirty": True}
        tables = sc.PageTables(self.vm.memory, self.mode, allocate=allocate)
        large = 1 << tables.format.shift(2)
        keys = {"pkey": rng.randrange(16)} if self.mode in ("64", "la57") else {}
        tables.map(DIRECT[self.mode], 4 * MIB, 4 * MIB, "rwx", PAGE, **used)
        tables.map(SMALL, MIB, 64 * PAGE, "rwxu", PAGE, accessed=True, dirty=rng.random() < 0.7)
        tables.map(READ_ONLY, MIB, 32 * PAGE, rng.choice(["rwxu", "rxu", "rx"]), PAGE, **keys)
        tables.map(BEYOND, 16 * MIB, MIB, "rwxu", PAGE, **used)
        tables.map(LARGE, 0, large, rng.choice(["rwxu", "rx"]), large, dirty=rng.random() < 0.5, accessed=True, **keys)
        tables.map(DEVICE, 32 * MIB, 16 * PAGE, "rwxu", PAGE, accessed=True)
        if keys and rng.random() < 0.6:
            tables.map(HUGE, 0, 1 << 30, "rwxu", 1 << 30, **used)
        return tables

    def entry(self, gpa):
        return int.from_bytes(self.vm.read_physical(gpa, self.size), "little")

    def value(self, gpa):
        """A value for an entry: another one's, or its own with a bit changed."""
        if self.rng.random() < 0.7:
            return self.rng.choice(self.values)
        return self.entry(gpa) ^ 1 << self.rng.choice([0, 1, 2, 5, 6, 7, 12, 8 * self.size - 1, 8 * self.size - 4])

    def step(self, path):
        """One operation of the guest or the host; says which."""
        rng, cpu, vm = self.rng, self.rng.choice(self.vm.vcpus), self.vm
        base, pages = rng.choice([(SMALL, 20), (READ_ONLY, 12), (BEYOND, 8), (LARGE, 512), (DEVICE, 4), (HUGE, 9000)])
        va, gpa, user = (
            base + rng.randrange(pages) * PAGE + 8 * rng.randrange(500),
            rng.choice(self.entries),
            rng.random() < 0.5,
        )
        cr3 = rng.choice(self.spaces).registers["cr3"]
        if cpu.cr4 >> 17 & 1:
            cr3 |= rng.randrange(3) | rng.randrange(2) << 63
        slot = rng.randrange(2)
        log = vm.memory.clear_dirty_log if slot in vm.memory.logged_slots else vm.memory.start_dirty_log
        ways = {
            "read": (25, lambda: cpu.read(va, self.size, user=user)),
            "write": (20, lambda: cpu.write(va, rng.choice(self.values), rng.choice([1, 4, 8]), user=user)),
            "fetch": (5, lambda: cpu.fetch(va, user=user)),
            "table": (22, lambda: cpu.write(DIRECT[self.mode] + gpa - 4 * MIB, self.value(gpa), self.size)),
            "cr3": (10, lambda: setattr(cpu, "cr3", cr3)),
            "invlpg": (5, lambda: cpu.invlpg(va)),
            "wp": (3, lambda: setattr(cpu, "cr0", cpu.cr0 ^ 1 << 16)),
            "cr4": (3, lambda: setattr(cpu, "cr4", cpu.cr4 ^ 1 << rng.choice([4, 7, 17, 20, 21, 22]))),
            "nxe": (1, lambda: setattr(cpu, "efer", cpu.efer ^ 1 << 11)),
            "keys": (1, lambda: setattr(cpu, "pkru", rng.getrandbits(32))),
            "paging": (1, lambda: self.without_paging(cpu)),
            "device": (1, lambda: vm.write_physical(gpa, self.value(gpa).to_bytes(8, "little")[: self.size])),
            "zap": (1, vm.mmu.zap_all),
            "unprotect": (1, lambda: vm.mmu.unprotect(gpa >> 12)),
            "log": (1, lambda: log(slot)),
            "saved": (1, lambda: self.reload(path)),
        }
        (name,) = rng.choices(list(ways), [weight for weight, _ in ways.values()])
        with suppress(*EXPECTED):
            ways[name][1]()
        return name, hex(va), hex(gpa), hex(cr3)

    def without_paging(self, cpu):
        cr0 = cpu.cr0
        cpu.cr0 = cr0 & ~(1 << 31)
        for gpa in (0x10_0000, 0x5000, 16 * MIB, 32 * MIB, 4 * MIB):
            with suppress(sc.MMIOAccess):
                cpu.write(gpa, 7, 4)
            self.vm.audit(strict=True)
        cpu.cr0 = cr0

    def reload(self, path):
        self.vm.save(path)
        self.vm = sc.VM.load(path)


@sampled("seeds", 200, 10)
def test_no_invariant_is_ever_broken(seeds, tmp_path):
    for seed in range(seeds):
        machine = Machine(random.Random(seed))
        for step in range(250):
            done = machine.step(tmp_path / "vm")
            report = machine.vm.audit()
            if not report.ok:
                pytest.fail(f"seed {seed}, step {step}, {done}: {report}")
