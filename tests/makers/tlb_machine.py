"""Machines with a modelled TLB, for the tests of it: memory whose words say where they are, and tables to edit."""

import numpy as np

import shadowcore as sc

MODES = ["32", "pae", "64", "la57"]
DESIGNS = ["native", "cached", "flush", "unsync", "adaptive", "nested", "agile"]
KEEP = 1 << 63  # in a value for CR3: drop nothing
G = 1 << 8
MIB = 1 << 20
ACC_X, ACC_W, ACC_U = 1, 2, 4
HIT, MISS = (1, 0), (0, 1)

# Linear pages, no two of them in one leaf table or in one set of the TLB; all below 4 GiB.
X, Y, Z = 0x40_1000, 0x1000_2000, 0x2000_3000
LARGE = 0x3000_0000
DIRECT = 0x8000_0000  # all of memory, for the guest's own stores to its tables
# Frames of data; the first word of each is its own address.
DATA_A, DATA_B, DATA_C = 0x1_0000, 0x2_0000, 0x3_0000


def machine(mmu="native", mode="64", tlb=None, vcpus=1, **settings):
    """(vm, tables): 8 MiB, whose frames below 6 MiB begin with their address; tables lie above."""
    vm = sc.VM(memory=8 * MIB, mmu=mmu, tlb=tlb or sc.TLB(), vcpus=vcpus, **settings)
    vm.memory.words[: 6 * MIB // 8 : 512] = np.arange(0, 6 * MIB, 4096)
    return vm, sc.PageTables(vm, mode)


def start(vm, tables, vcpu=0, **registers):
    """Turn paging on with the registers of the tables, or those given; bits of `cr4` are added at the end."""
    cpu = vm.vcpus[vcpu]
    extra = registers.pop("cr4", 0)
    for name, value in (tables.registers | registers).items():
        setattr(cpu, name, value)
    cpu.cr4 |= extra
    return cpu


def pages(cpu):
    """Linear pages that the TLB translates."""
    return sorted(cpu.tlb["page"].tolist())


def hits(vm, access, *arguments, **settings):
    """(hits, misses) of one access."""
    before = vm.stats.tlb_hits, vm.stats.tlb_misses
    access(*arguments, **settings)
    return vm.stats.tlb_hits - before[0], vm.stats.tlb_misses - before[1]


def invariants(vm):
    return {violation.invariant for violation in vm.audit().violations}


def words(vm, *gpas):
    return [int(vm.memory.words[gpa // 8]) for gpa in gpas]


def poke(vm, gpa, value, width=8):
    """A store that nobody sees but the memory: as of another processor, in a design without shadow tables."""
    vm.memory.bytes[gpa : gpa + width] = np.frombuffer(value.to_bytes(width, "little"), np.uint8)


def leaf(tables, va, level=1):
    """gpa of the entry that maps `va`."""
    return tables.entry(va, level).gpa


def two_spaces(mmu="native", mode="64", **map_settings):
    """(vm, tables, other, cpu): X leads to DATA_A, in the other address space to DATA_B."""
    vm, tables = machine(mmu, mode)
    other = sc.PageTables(vm, mode, allocate=range(0x100, 0x120))
    tables.map(X, DATA_A, 4096, "rwx", **map_settings)
    other.map(X, DATA_B, 4096, "rwx", **map_settings)
    tables.map(Y, DATA_C, 4096, "rwx")
    other.map(Y, DATA_C, 4096, "rwx")
    return vm, tables, other, start(vm, tables)
