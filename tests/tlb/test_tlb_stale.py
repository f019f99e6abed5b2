"""Entries that are stale until INVLPG, in the modelled TLB and in a shadow that lags behind.

A stale entry is made and used on purpose: what an invalidation is good for shows only where, without it, the
processor goes on with what the guest's tables no longer say."""

import random

import numpy as np
import pytest
from oracle import CR0_PG, CR4_PCIDE, CR4_PKE, CR4_SMAP, FETCH, PS, READ, WRITE, D, P, U, W
from tlb_machine import (
    DATA_A,
    DATA_B,
    DATA_C,
    DESIGNS,
    HIT,
    LARGE,
    MIB,
    MODES,
    X,
    Y,
    hits,
    leaf,
    machine,
    pages,
    poke,
    start,
    two_spaces,
)

import shadowcore as sc

# -- a stale entry, and the instructions that drop it ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_stale_until_invlpg(mode):
    """Another frame, fewer rights: the old translation serves until INVLPG; then the new one."""
    vm, tables = machine("native", mode)
    tables.map(X, DATA_A, 4096, "rwx", dirty=True)
    cpu = start(vm, tables)
    width = tables.format.entry_size
    assert cpu.read(X) == DATA_A
    poke(vm, leaf(tables, X), DATA_B | P, width)
    assert cpu.read(X) == DATA_A
    cpu.write(X + 8, 77)
    assert vm.memory.words[DATA_A // 8 + 1] == 77
    cpu.invlpg(X + 0xABC)
    assert cpu.read(X) == DATA_B
    with pytest.raises(sc.PageFault) as caught:
        cpu.write(X + 8, 78)
    assert caught.value.error_code == 3
    assert cpu.read(X) == DATA_B
    poke(vm, leaf(tables, X), 0, width)
    assert cpu.read(X) == DATA_B
    cpu.invlpg(X)
    with pytest.raises(sc.PageFault) as caught:
        cpu.read(X)
    assert caught.value.error_code == 0
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", DESIGNS)
def test_what_appears_is_seen_at_once(mmu):
    """An entry that is not present is never kept, and rights that grow are looked up before a fault."""
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 4096, "rw", dirty=True)
    tables.map(Y, DATA_B, 4096, "r")
    cpu = start(vm, tables)
    entry = tables.entry(X)
    vm.write_physical(entry.gpa, bytes(8))
    with pytest.raises(sc.PageFault):
        cpu.read(X)
    vm.write_physical(entry.gpa, entry.value.to_bytes(8, "little"))
    assert cpu.read(X) == DATA_A
    assert cpu.read(Y) == DATA_B
    with pytest.raises(sc.PageFault):
        cpu.write(Y, 1)
    vm.write_physical(leaf(tables, Y), (DATA_B | P | W | U).to_bytes(8, "little"))
    cpu.write(Y, 1)
    assert cpu.read(Y, user=True) == 1


def test_dirty_is_kept_too():
    """D cleared behind the processor's back: a store through an entry that remembers D does not set it again."""
    vm, tables = machine()
    tables.map(X, DATA_A, 4096, "rw")
    cpu = start(vm, tables)
    cpu.write(X, 1)
    assert tables.entry(X).value & D
    poke(vm, leaf(tables, X), tables.entry(X).value & ~D)
    cpu.write(X, 2)
    assert not tables.entry(X).value & D
    cpu.invlpg(X)
    cpu.write(X, 3)
    assert tables.entry(X).value & D


def test_rights_are_judged_at_each_use():
    """PKRU, EFLAGS.AC and the mode of the access count as they are now; entries hold what the tables say."""
    vm, tables = machine()
    tables.map(X, DATA_A, 4096, "rwu", dirty=True, pkey=3)
    cpu = start(vm, tables, cr4=CR4_PKE | CR4_SMAP)
    cpu.ac = True
    assert cpu.read(X) == DATA_A
    cpu.ac = False
    with pytest.raises(sc.PageFault):
        cpu.read(X)
    assert cpu.read(X, user=True) == DATA_A
    cpu.pkru = 1 << 6
    with pytest.raises(sc.PageFault) as caught:
        cpu.read(X, user=True)
    assert caught.value.error_code == 0x25
    cpu.pkru = 2 << 6
    assert cpu.read(X, user=True) == DATA_A
    # None of these loads drops an entry.
    cpu.pkru = 0
    assert hits(vm, cpu.write, X, 1, user=True) == HIT
    cpu.pkru = 2 << 6
    with pytest.raises(sc.PageFault):
        cpu.write(X, 1, user=True)


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync", "adaptive"])
def test_invlpg_reaches_every_pcid(mmu):
    """The page's entries under every PCID go, and no other page's."""
    _, tables, other, cpu = two_spaces(mmu)
    cpu.cr4 |= CR4_PCIDE
    for pcid, space in ((1, tables), (2, other), (3, tables)):
        cpu.cr3 = space.cr3 | pcid
        cpu.read(X)
        cpu.read(Y)
    assert len(cpu.tlb) == 6
    cpu.invlpg(X + 0xFFF)
    assert pages(cpu) == [Y, Y, Y]
    assert sorted(cpu.tlb["pcid"].tolist()) == [1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
def test_invlpg_of_a_large_page(mode):
    """Any address of a large page names all of it."""
    vm, tables = machine("native", mode)
    sizes = [4 * MIB if mode == "32" else 2 * MIB] + ([1 << 30] if mode in ("64", "la57") else [])
    for size in sizes:
        tables.map(0x4000_0000, 0, size, "rwx", page_size=size)
        cpu = start(vm, tables)
        assert cpu.read(0x4000_0000 + DATA_A) == DATA_A
        level = 2 if size < 1 << 30 else 3
        old = tables.entry(0x4000_0000, level)
        poke(vm, old.gpa, 0, tables.format.entry_size)
        assert cpu.read(0x4000_0000 + DATA_B) == DATA_B
        cpu.invlpg(0x4000_0000 + size)
        assert cpu.read(0x4000_0000 + DATA_B) == DATA_B
        cpu.invlpg(0x4000_0000 + size - 1)
        with pytest.raises(sc.PageFault):
            cpu.read(0x4000_0000 + DATA_B)
        tables.unmap(0x4000_0000, size)
        cpu.cr0 &= ~CR0_PG
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["native", "flush"])
@pytest.mark.parametrize("mode", ["32", "pae"])
def test_invlpg_outside_64_bit_modes_has_32_address_bits(mode, mmu):
    """As for accesses, the low 32 bits count."""
    vm, tables = machine(mmu, mode)
    tables.map(X, DATA_A, 4096, "rwx")
    cpu = start(vm, tables)
    assert cpu.read(X | 5 << 32) == DATA_A
    tables.set_entry(X, 1, DATA_B | P)
    assert cpu.read(X) == DATA_A
    cpu.invlpg(X | 7 << 32)
    assert cpu.read(X) == DATA_B


def test_invlpg_of_an_address_that_is_not_canonical_does_nothing():
    vm, tables = machine()
    tables.map(X, DATA_A, 4096, "rwx")
    cpu = start(vm, tables)
    cpu.read(X)
    cpu.invlpg(X | 1 << 52)
    assert pages(cpu) == [X]


# -- a shadow that lags behind ---------------------------------------------------------------------------
#
# `flush` sees edits at INVLPG and loads of CR3, as a TLB does: its leaves are subject to the same rules.


def three_frames(mode, va, size, **settings):
    """`flush`, without a TLB and then with one: (cpu, turn), where turn(frame, flags) edits the entry of `va`."""
    for tlb in (None, sc.TLB()):
        vm = sc.VM(memory=16 * MIB, mmu=sc.Shadow.flush(quirks=0), tlb=tlb)
        vm.memory.words[: 12 * MIB // 8 : 512] = np.arange(0, 12 * MIB, 4096)
        tables = sc.PageTables(vm, mode)
        tables.map(va, size, size, "rwx", page_size=size, **settings)

        def turn(gpa, flags, tables=tables, level=1 if size == 4096 else 2):
            tables.set_entry(va, level, gpa | flags)

        yield start(vm, tables), turn


def test_a_leaf_that_ceases_to_be_global():
    """A global leaf is refreshed by an entry that is not global: the next load of CR3 drops it."""
    for cpu, turn in three_frames("64", X, 4096, global_=True):
        assert cpu.read(X) == 4096
        turn(DATA_B, P | W | U)
        cpu.write(X + 8, 1)  # the tables are looked up, for D
        assert cpu.read(X) == DATA_B
        turn(DATA_C, P | W | U)
        cpu.cr3 = cpu.cr3
        assert cpu.read(X) in (DATA_C, 4096)  # (the global one might still be remembered)


@pytest.mark.parametrize("mode", MODES)
def test_a_leaf_that_becomes_part_of_a_large_page(mode):
    """A leaf of a small page is refreshed by the entry of a large one: INVLPG of any of its addresses drops it."""
    size = 4 * MIB if mode == "32" else 2 * MIB
    for tlb in (None, sc.TLB()):
        vm = sc.VM(memory=16 * MIB, mmu=sc.Shadow.flush(quirks=0), tlb=tlb)
        vm.memory.words[: 12 * MIB // 8 : 512] = np.arange(0, 12 * MIB, 4096)
        tables = sc.PageTables(vm, mode)
        tables.map(LARGE, DATA_A, 0x2000, "rwx")
        cpu = start(vm, tables)
        assert cpu.read(LARGE + 0x1000) == DATA_A + 0x1000
        directory = leaf(tables, LARGE, 2)
        width = tables.format.entry_size
        vm.write_physical(directory, (size | P | W | U | PS).to_bytes(width, "little"))
        cpu.write(LARGE + 0x1008, 1)
        assert cpu.read(LARGE + 0x1000) == size + 0x1000
        vm.write_physical(directory, (2 * size | P | W | U | PS).to_bytes(width, "little"))
        cpu.invlpg(LARGE)
        assert cpu.read(LARGE + 0x1000) == 2 * size + 0x1000


@pytest.mark.parametrize("mode", MODES)
def test_invlpg_of_the_other_part_of_a_large_page(mode):
    """Whichever part of the page was used, and whichever is named."""
    size = 4 * MIB if mode == "32" else 2 * MIB
    for used, named in [(0, size // 2), (size // 2, 0), (size - 4096, 0x1000)]:
        for cpu, turn in three_frames(mode, LARGE, size):
            assert cpu.read(LARGE + used) == size + used
            turn(0, P | PS)
            cpu.invlpg(LARGE + named)
            assert cpu.read(LARGE + used) == used


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", ["cached", "flush", "unsync", "adaptive"])
def test_invlpg_drops_every_fragment_of_a_large_page(mmu, mode):
    """One INVLPG is enough for a page of any size, of which the TLB has 4 KiB here and there."""
    vm, tables, other, cpu = two_spaces(mmu, mode)
    size = 4 * MIB if mode == "32" else 2 * MIB
    tables.map(LARGE, 0, size, "rwx", page_size=size, global_=True)
    other.map(LARGE, DATA_A, 0x4000, "rwx")
    for i in range(3):
        assert cpu.read(LARGE + (i << 12)) == i << 12
    cpu.cr3 = other.cr3
    assert cpu.read(LARGE + 0x1000) in (0x1000, DATA_A + 0x1000)
    cpu.invlpg(LARGE)
    assert cpu.read(LARGE + 0x2000) == DATA_A + 0x2000
    assert vm.audit().ok


# -- the shadow MMU besides ------------------------------------------------------------------------------


@pytest.mark.parametrize("mmu", ["cached", "flush", "unsync", "adaptive"])
def test_zapping_everything_flushes(mmu):
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 4096, "rw", global_=True)
    cpu = start(vm, tables)
    cpu.read(X)
    vm.mmu.zap_all()
    assert pages(cpu) == []
    assert cpu.read(X) == DATA_A
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["cached", "flush", "unsync", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
def test_a_tlb_does_not_change_what_a_shadow_does(mmu, mode):
    """Page-fault exits are those of the machine without a TLB: entries are not wider than the leaves they are
    made from."""

    def run(tlb):
        vm = sc.VM(memory=8 * MIB, mmu=mmu, tlb=tlb)
        tables = sc.PageTables(vm, mode)
        tables.map(X, DATA_A, 0x10000, "rwx")
        tables.map(LARGE, 0, 4 * MIB, "rwxu")
        tables.map(Y, leaf(tables, X) & ~0xFFF, 4096, "rwx")
        cpu = start(vm, tables)
        rng = random.Random(5)
        rows = []
        for _ in range(600):
            base = rng.choice([X, X, LARGE])
            rows.append((rng.choice([READ, WRITE, FETCH]), rng.randrange(2), 8, base + rng.randrange(16) * 4096, 9))
            if rng.randrange(8) == 0:
                rows.append((READ, 0, 8, Y + 8 * rng.randrange(512), 0))
        result = cpu.run(np.array(rows, dtype=sc.OP_DTYPE))
        counters = vm.stats.as_dict()
        for name in [name for name in counters if name.startswith(("tlb_", "walk_")) and name != "tlb_flush"]:
            del counters[name]
        return [getattr(result, name).tolist() for name in ("outcome", "error_code", "gpa", "exits")], counters

    with_tlb, without = run(sc.TLB()), run(None)
    assert with_tlb == without
