"""What caches leave of walks in two dimensions, counted by hand; what flushes them; and that nothing stale is there."""

import pytest
from oracle import CR4_PCIDE
from tlb_machine import DATA_A, MIB, invariants, machine, start

import shadowcore as sc

PLACES = (0x40_0000, 0x40_1000, 0x60_0000, 0x4000_0000)  # in three leaf tables, under two directories


def bank(entries, ways=None, *sizes):
    return sc.TLBBank(entries, ways, sizes or ("4k", "2m", "1g"))


def caches(**settings):
    """Places in one frame; a first processor has had the host's tables filled, a second has cached nothing."""
    tlb = sc.ProcessorTLB(load=(bank(1, 1, "1g"),), **settings)  # keeps no page that is here
    vm, tables = machine("nested", "64", tlb, vcpus=2)
    for va in PLACES:
        tables.map(va, DATA_A, 4096, "rw")
    first = start(vm, tables)
    for va in PLACES:
        first.write(va, DATA_A)
    assert all(tables.entry(va, level).gpa >= 6 * MIB for va in PLACES for level in range(1, 5))
    return vm, tables, start(vm, tables, vcpu=1)


def references(vm, access):
    before = vm.stats.walk_references
    access()
    return vm.stats.walk_references - before


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, (24, 24, 24, 24)),
        # Below the directory's entry: the leaf, and where that leads.
        ({"pd": bank(4, 4)}, (24, 1 + 4, 24, 24)),
        # ... its own entry, the way to the leaf table, the leaf, and where that leads.
        ({"pdpt": bank(4, 4)}, (24, 1 + 5 + 4, 10, 24)),
        ({"pml4": bank(4, 4)}, (24, 1 + 5 + 5 + 4, 15, 15)),
        ({"pml4": bank(2, 2), "pdpt": bank(4, 4), "pd": bank(4, 4)}, (24, 5, 10, 15)),
        # The guest's own entries, and the way to tables that were not met before.
        ({"nested": bank(16)}, (24, 4, 4 + 4, 4 + 8)),
        ({"nested": bank(16), "pd": bank(4)}, (24, 1, 4 + 4, 4 + 8)),
        # Tables lie in one block of 2 MiB, the frame in another.
        ({"host_pd": bank(4)}, (4 + 4 + 3 + 4, 4 + 5, 9, 9)),
        ({"host_pdpt": bank(1)}, (4 + 4 + 4 * 2, 4 + 5 * 2, 14, 14)),
        ({"host_pml4": bank(1)}, (4 + 4 + 4 * 3, 4 + 5 * 3, 19, 19)),
        ({"host_pd": bank(4), "pd": bank(4)}, (15, 1 + 1, 9, 9)),
        # A nested TLB for other sizes than the host's.
        ({"nested": bank(16, None, "2m")}, (24, 24, 24, 24)),
    ],
)
def test_what_they_leave_of_a_walk(settings, wanted):
    vm, _, cpu = caches(**settings)
    before = vm.stats.walk_cache_references
    vm.record_walks(1000)
    for va, count in zip(PLACES, wanted, strict=True):
        assert references(vm, lambda va=va: cpu.read(va)) == count
        assert len(vm.walks()) == count
    assert vm.stats.walk_cache_references - before == 4 * 24 - sum(wanted)
    assert vm.audit().ok


def test_five_levels_of_the_host():
    vm = sc.VM(
        memory=8 * MIB,
        mmu=sc.Nested(levels=5),
        tlb=sc.ProcessorTLB(load=(bank(1, 1, "1g"),), host_pml5=bank(1), host_pml4=bank(1)),
    )
    tables = sc.PageTables(vm)
    tables.map(PLACES[0], DATA_A, 4096, "rw")
    tables.activate(vm.vcpus[0])
    vm.vcpus[0].read(PLACES[0])
    assert references(vm, lambda: vm.vcpus[0].read(PLACES[0])) == 4 + 5 * 3


ALL = {"pd": bank(4), "pdpt": bank(4), "nested": bank(16)}


@pytest.mark.parametrize(
    ("flush", "wanted"),
    [
        (lambda vm, cpu, tables: None, 1),
        # The guest's flushes leave what is of the host's tables alone.
        (lambda vm, cpu, tables: cpu.invlpg(0x7000_0000), 4),
        (lambda vm, cpu, tables: setattr(cpu, "cr3", cpu.cr3), 4),
        (lambda vm, cpu, tables: setattr(cpu, "cr3", cpu.cr3 | 1 << 63), 1),
        (lambda vm, cpu, tables: setattr(cpu, "cr4", cpu.cr4 ^ 1 << 7), 4),
        (lambda vm, cpu, tables: cpu.invpcid(2), 4),
        (lambda vm, cpu, tables: cpu.invpcid(1, 5), 1),
        # Those of the hypervisor leave nothing.
        (lambda vm, cpu, tables: (vm.host_touch(0x100), vm.host_unmap(DATA_A + 4096 >> 12)), 1),  # nobody maps it
        (lambda vm, cpu, tables: vm.host_unmap(0x105), 24),
    ],
)
def test_what_flushes_them(flush, wanted):
    vm, tables, cpu = caches(**ALL)
    tables.map(0x70_0000, 0x10_5000, 4096, "rw")
    vm.vcpus[0].read(0x70_0000)
    for one in vm.vcpus:
        one.cr4 |= CR4_PCIDE
    for va in PLACES:
        cpu.read(va)
    flush(vm, cpu, tables)
    assert references(vm, lambda: cpu.read(PLACES[0])) == wanted
    assert vm.audit().ok


def test_what_the_host_withdraws_is_not_used():
    """A frame comes back elsewhere in the tables; a store is seen by a dirty log that begins."""
    vm, _, cpu = caches(**ALL)
    cpu.write(PLACES[0], 5)
    vm.host_unmap(DATA_A >> 12)
    exits = vm.stats.npf_violation
    assert cpu.read(PLACES[0]) == 5
    assert vm.stats.npf_violation == exits + 1
    vm.memory.start_dirty_log()
    cpu.read(PLACES[0])
    vm.memory.clear_dirty_log()
    cpu.write(PLACES[0], 6)
    assert vm.memory.dirty_log()[DATA_A >> 12]
    assert vm.audit().ok


def test_a_store_needs_more_than_a_load_had():
    """The host maps a page of zeros, read-only, which the nested TLB has: a store takes a walk, which is refused."""
    tlb = sc.ProcessorTLB(load=(bank(1, 1, "1g"),), nested=bank(16))
    slots = [sc.MemorySlot(0, 8 * MIB, backing="cold")]
    vm = sc.VM(memory=slots, mmu="nested", tlb=tlb)
    tables = sc.PageTables(vm)
    tables.map(PLACES[0], DATA_A, 4096, "rw", accessed=True, dirty=True)
    tables.activate(vm.vcpus[0])
    cpu = vm.vcpus[0]
    cpu.read(PLACES[0])
    assert references(vm, lambda: cpu.read(PLACES[0])) == 4
    exits = vm.stats.npf_violation
    cpu.write(PLACES[0], 7)
    assert vm.stats.npf_violation == exits + 2  # the page goes, and its own comes
    assert references(vm, lambda: cpu.write(PLACES[0], 8)) == 4
    assert cpu.read(PLACES[0]) == 8
    assert vm.audit().ok


def test_a_lost_flush_is_found():
    """I8: the nested TLB alone has the frame, and the host's tables no more."""
    for lost in ((), ("host",)):
        vm, _, cpu = caches(nested=bank(16))
        cpu.read(PLACES[0])
        vm.mmu.lose_flushes(*lost)
        vm.host_unmap(DATA_A >> 12)
        assert invariants(vm) == ({"I8"} if lost else set())


def test_presets_have_them():
    for name in ("zen4", "goldencove"):
        vm, tables = machine("nested", "64", sc.ProcessorTLB.preset(name))
        tables.map(0x40_0000, 0x10_0000, 3 * MIB, "rw")
        cpu = start(vm, tables)
        for _ in range(2):
            cpu.cr3 = cpu.cr3
            for i in range(768):
                cpu.read(0x40_0000 + (i << 12))
        stats = vm.stats
        assert min(stats.walk_cache_hits, stats.host_cache_hits, stats.walk_cache_references) > 0
        assert bool(stats.nested_tlb_hits) == (name == "zen4")
        assert vm.audit().ok


def test_saved_and_loaded(tmp_path):
    vm, _, cpu = caches(**ALL, host_pd=bank(2))
    for va in PLACES:
        cpu.read(va)
    vm.save(tmp_path / "vm.npz")
    other = sc.VM.load(tmp_path / "vm.npz")
    assert other.tlb == vm.tlb
    cpu.cr3, other.vcpus[1].cr3 = cpu.cr3, cpu.cr3
    assert references(vm, lambda: cpu.read(PLACES[0])) == references(other, lambda: other.vcpus[1].read(PLACES[0])) == 4
    assert vm.stats.as_dict() == other.stats.as_dict()


def test_geometries_that_cannot_be():
    for name in ("nested", "host_pd", "host_pml5"):
        with pytest.raises(sc.ConfigError, match=rf"tlb\.{name}"):
            sc.ProcessorTLB(load=(bank(4),), **{name: 3})
        with pytest.raises(sc.ConfigError, match=rf"tlb\.{name}"):
            sc.ProcessorTLB(load=(bank(4),), replacement="plru", **{name: bank(6, 3)})
