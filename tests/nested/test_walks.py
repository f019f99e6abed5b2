"""Walks in two dimensions: entries read, which pages are mapped how, what exits and what does not."""

import itertools

import numpy as np
import pytest

import shadowcore as sc

PAGE, MIB, GIB = 4096, 1 << 20, 1 << 30
VA = 0x4000_0000
MODES = {"32": 2, "pae": 3, "64": 4, "la57": 5}


def machine(mode="64", memory=64 * MIB, size=PAGE, pages=16, **settings):
    """A guest that maps `pages` pages of `size` from VA on, to gpas from the same offset in its RAM on."""
    slots = settings.pop("slots", None)
    vm = sc.VM(memory=memory, mmu=sc.Nested(**settings), slots=slots)
    tables = sc.PageTables(vm.memory, mode)
    tables.map(VA, 16 * MIB if size == PAGE else 0, pages * size, "rwxu", size)
    tables.activate(vm.vcpus[0])
    return vm, vm.vcpus[0]


def read_again(vm, cpu, va=VA):
    """Entries that a walk reads once nothing is missing."""
    vm.mmu.general = True
    cpu.read(va)
    before = vm.stats.walk_references
    cpu.read(va)
    counted = vm.stats.walk_references - before
    vm.mmu.general = False
    cpu.read(va)
    before = vm.stats.walk_references
    cpu.read(va)
    assert vm.stats.walk_references - before == counted
    return counted


@pytest.mark.parametrize(("mode", "levels"), list(itertools.product(MODES, (4, 5))))
def test_references_of_a_walk(mode, levels):
    """(n + 1) (m + 1) - 1 entries: 24 for 4 x 4, 35 for 5 x 5."""
    vm, cpu = machine(mode, levels=levels)
    n = MODES[mode]
    assert read_again(vm, cpu) == (n + 1) * (levels + 1) - 1


def test_references_with_large_pages():
    """15 for 2 MiB on 2 MiB, 19 for the mixed cases of 4 levels."""
    large = [sc.MemorySlot(0, 64 * MIB, host_page_size="2MiB")]
    assert read_again(*machine(size=2 * MIB, pages=2, slots=large)) == 15
    assert read_again(*machine(slots=large)) == 19
    assert read_again(*machine(size=2 * MIB, pages=2)) == 19
    assert read_again(*machine(slots=large, host_page_size=PAGE)) == 24


def test_host_pages_of_a_gib():
    slots = [sc.MemorySlot(0, 2 * GIB, host_page_size="1GiB")]
    vm, cpu = machine(memory=2 * GIB, slots=slots)
    assert read_again(vm, cpu) == (4 + 1) * (2 + 1) - 1
    assert vm.stats.pages_1g == 2  # tables lie in the other
    assert (vm.stats.pages_2m, vm.stats.pages_4k) == (0, 0)
    assert vm.audit().ok
    vm, cpu = machine(memory=2 * GIB, slots=slots, host_page_size="2MiB")
    assert read_again(vm, cpu) == 19
    assert vm.stats.pages_1g == 0


@pytest.mark.parametrize("mmu", ["tdp", "direct"])
def test_what_exits(mmu):
    """A first touch exits, of a guest's table as well; loads of CR3, INVLPG and page faults of the guest do not."""
    vm, cpu = machine(mmu=mmu)
    exits = vm.stats.exits_total
    cpu.read(VA)
    tables = 4
    assert 1 <= vm.stats.exits_total - exits <= tables + 1
    assert vm.stats.npf_violation == vm.stats.pf_taken == vm.stats.exits["fill"]
    before = vm.stats.exits_total
    cpu.cr3 = cpu.cr3
    cpu.invlpg(VA)
    for _ in range(2):
        with pytest.raises(sc.PageFault):
            cpu.read(VA + (1 << 30))
    found = vm.stats.exits_total - before
    assert found <= 1  # the table that the fault was found in may be met for the first time
    before = vm.stats.exits_total
    with pytest.raises(sc.PageFault):
        cpu.write(VA + (1 << 30), 1)
    cpu.read(VA)
    assert vm.stats.exits_total == before
    loads = vm.stats.exits["cr4"]
    cpu.cr4 ^= 1 << 7
    assert vm.stats.exits["cr4"] - loads == vm.stats.exits_total - before == 1


def test_devices_exit_each_time():
    vm = sc.VM(memory=64 * MIB, mmu="nested")
    cpu = vm.vcpus[0]
    for count in range(1, 4):
        with pytest.raises(sc.MMIOAccess):
            cpu.read(128 * MIB)
        assert vm.stats.exits["mmio"] == count
    assert (vm.stats.npf_misconfig, vm.stats.pf_mmio_spte_created) == (2, 1)


def test_beyond_what_four_levels_translate():
    """There is no entry for a gpa of more than 48 bits: each access is handed out."""
    vm = sc.VM(memory=64 * MIB, mmu="nested", features=sc.Features(maxphyaddr=52))
    tables = sc.PageTables(vm.memory, "64")
    tables.map(VA, 1 << 50, PAGE, "rwu", 4096)
    cpu = vm.vcpus[0]
    tables.activate(cpu)
    for _ in range(2):
        with pytest.raises(sc.MMIOAccess) as found:
            cpu.read(VA)
        assert found.value.gpa == 1 << 50
    assert vm.stats.npf_misconfig == 0
    assert vm.audit().ok


def test_settings():
    with pytest.raises(sc.ConfigError, match="levels"):
        sc.Nested(levels=3)
    with pytest.raises(sc.ConfigError, match=r"mmu.*tdp, direct"):
        sc.Nested(mmu="shadow")
    with pytest.raises(sc.ConfigError, match="host_page_size"):
        sc.Nested(host_page_size=8192)
    with pytest.raises(sc.ConfigError, match=r"prefetch.*direct"):
        sc.Nested(prefetch=8)
    with pytest.raises(sc.ConfigError, match="prefetch"):
        sc.Nested(mmu="direct", prefetch=3)
    with pytest.raises(sc.ConfigError, match="quirks"):
        sc.Nested(quirks=sc.Quirk.RMAP_LEAK)
    with pytest.raises(sc.ConfigError, match="pool_pages"):
        sc.Nested(pool_pages=4)
    assert sc.Nested.kvm_6_1("direct").prefetch == 8
    assert sc.Nested.kvm_6_1().name == "kvm-6.1-tdp"


def test_the_tables_are_real_ones():
    """From the root in the pool, an x86 walk over the host's arrays leads to the frame."""
    vm, cpu = machine()
    cpu.write(VA + 8, 0x1122334455667788, 8)
    pool, base = vm.memory.pool, vm.memory.pool_hpa
    gpa = cpu.translate(VA + 8).gpa
    (root, *_) = vm.mmu.roots(0)
    at = base + root * PAGE
    for level in (4, 3, 2, 1):
        entry = int(pool.reshape(-1)[(at - base) // 8 + (gpa >> (12 + 9 * (level - 1)) & 511)])
        assert entry & 0x27 == 0x27
        at = entry & 0x000F_FFFF_FFFF_F000
    assert int.from_bytes(vm.read_physical(gpa, 8), "little") == 0x1122334455667788
    assert at == vm.memory.ram_hpa + (gpa & ~4095)
    assert np.array_equal(vm.mmu.rmap(gpa >> 12)[:, 1], [gpa >> 12 & 511])
