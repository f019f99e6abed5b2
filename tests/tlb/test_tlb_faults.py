"""A page fault drops what is cached for its address (SDM vol. 3, 4.10.4.1): in a TLB, and in the shadow of `flush`,
whose leaves lag behind the guest's tables as a TLB does."""

import numpy as np
import pytest
from oracle import CR4_PCIDE, CR4_PGE, CR4_SMEP, PS, A, D, P, U, W
from tlb_machine import (
    DATA_A,
    DATA_B,
    DATA_C,
    KEEP,
    LARGE,
    MIB,
    MODES,
    X,
    Y,
    invariants,
    leaf,
    pages,
    poke,
    start,
    two_spaces,
)

import shadowcore as sc

EXACT_FLUSH = sc.Shadow.flush(quirks=0)
LAGGING = [("native", sc.TLB()), *[(mmu, tlb) for mmu in ("flush", EXACT_FLUSH) for tlb in (sc.TLB(), None)]]
"""Designs with something that can be stale, with the TLB that they need for it."""

RWU = P | W | U | A | D


def machine(mmu, tlb, mode="64"):
    vm = sc.VM(memory=12 * MIB, mmu=mmu, tlb=tlb)
    vm.memory.words[: 9 * MIB // 8 : 512] = np.arange(0, 9 * MIB, 4096)
    return vm, sc.PageTables(vm, mode)


def faults(access, *arguments, **settings):
    with pytest.raises(sc.PageFault) as caught:
        access(*arguments, **settings)
    return caught.value


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["store", "user", "batch"])
def test_a_stale_translation_is_not_used_after_a_fault(mmu, tlb, mode, fault):
    """The entry of X is edited without INVLPG: stale, and rightly so, until an access of X faults."""
    vm, tables = machine(mmu, tlb, mode)
    tables.map(X, DATA_A, 4096, "rwx", accessed=True)
    tables.map(Y, DATA_A, 4096, "rwx", accessed=True)
    cpu = start(vm, tables)
    assert cpu.read(X) == cpu.read(Y) == DATA_A
    tables.set_entry(X, 1, DATA_B | P | A)
    tables.set_entry(Y, 1, DATA_B | P | A)
    assert cpu.read(X) == DATA_A
    if fault == "store":
        assert faults(cpu.write, X, 1).error_code == 3
    elif fault == "user":
        assert faults(cpu.read, X + 0xFF8, user=True).address == X + 0xFF8
    else:
        ops = np.zeros(3, sc.OP_DTYPE)
        ops["op"], ops["size"], ops["addr"] = (sc.Op.READ, sc.Op.WRITE, sc.Op.READ), 8, X
        assert cpu.run(ops).value.tolist() == [DATA_A, 0, DATA_B]
    assert cpu.read(X) == DATA_B
    assert cpu.read(Y) == DATA_A  # another page
    assert vm.audit().ok


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
@pytest.mark.parametrize("entry", [0, DATA_B | P | 1 << 51])
def test_a_fault_for_which_no_right_is_missing(mmu, tlb, entry):
    """An entry that is not present, or has a reserved bit set; when it is mended, the new one serves."""
    vm, tables = machine(mmu, tlb)
    tables.map(X, DATA_A, 4096, "rwx", accessed=True)
    cpu = start(vm, tables)
    cpu.read(X)
    tables.set_entry(X, 1, entry)
    assert cpu.read(X) == DATA_A
    assert faults(cpu.write, X, 1).error_code == (0xB if entry else 2)
    assert faults(cpu.read, X).error_code == (9 if entry else 0)
    tables.set_entry(X, 1, DATA_C | RWU)
    assert cpu.read(X) == DATA_C


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
def test_tables_above_the_leaf(mmu, tlb):
    """The entry above leads to another table: what was read by the old way goes."""
    vm, tables = machine(mmu, tlb)
    tables.map(X, DATA_A, 4096, "rwx", accessed=True)
    tables.map(LARGE, DATA_B, 4096, "rx", accessed=True)
    cpu = start(vm, tables)
    cpu.read(X)
    table = leaf(tables, LARGE) & ~0xFFF
    poke(vm, table + (X >> 9 & 0xFF8), DATA_C | P | A)
    tables.set_entry(X, 2, table | RWU)
    assert cpu.read(X) == DATA_A
    faults(cpu.write, X, 1)
    assert cpu.read(X) == DATA_C


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ["frame", "rights", "gone", "small pages"])
@pytest.mark.parametrize("other", [0x1000, -0x1000])
def test_all_of_a_large_page(mmu, tlb, mode, change, other):
    """A large page is one translation, however many pieces of it are kept (SDM 4.10.2.3): a fault anywhere in it, also
    where nothing was used so far, drops them all."""
    vm, tables = machine(mmu, tlb, mode)
    size = 4 * MIB if mode == "32" else 2 * MIB
    tables.map(LARGE, size, size, "rwx", page_size=size, accessed=True, dirty=True)
    cpu = start(vm, tables)
    used = LARGE if other > 0 else LARGE + 0x3000
    assert cpu.read(used) == size + used - LARGE
    cpu.write(used + 8, 0)
    small = sc.PageTables(vm, mode, allocate=range(0x980, 0x990))
    small.map(LARGE, DATA_A, 0x4000, "rx", accessed=True)
    new = {
        "frame": 2 * size % (8 * MIB) | P | PS | A,
        "rights": size | P | PS | A | D,
        "gone": 0,
        "small pages": small.entry(LARGE, 2).value,
    }
    poke(vm, tables.entry(LARGE, 2).gpa, new[change], tables.format.entry_size)
    assert cpu.read(used) == size + used - LARGE
    faults(cpu.write, LARGE + (other if other > 0 else size + other), 1, user=True)
    if change == "gone":
        faults(cpu.read, used)
    elif change == "small pages":
        assert cpu.read(used) == DATA_A + used - LARGE
    else:
        assert cpu.read(used) == (new["frame"] & ~0xFFF if change == "frame" else size) + used - LARGE
        faults(cpu.write, used + 8, 1)
    assert vm.audit().ok


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
@pytest.mark.parametrize("level", [1, 2])
def test_a_and_d_are_set_again(mmu, tlb, level):
    """A and D that the guest cleared: the walk after the fault sets them."""
    vm, tables = machine(mmu, tlb)
    tables.map(X, DATA_A, 4096, "rwx", accessed=True, dirty=True)
    cpu = start(vm, tables)
    cpu.write(X, 1)
    entry = tables.entry(X, level)
    poke(vm, entry.gpa, entry.value & ~(A | D))
    cpu.write(X, 2)
    assert not tables.entry(X, level).value & A
    faults(cpu.read, X, user=True)
    cpu.write(X, 3)
    assert tables.entry(X, level).value & (A | D) == (A | D if level == 1 else A)


@pytest.mark.parametrize("mmu", ["native", "cached"])
def test_entries_of_other_pcids_stay_but_for_global_ones(mmu):
    """The current PCID's entries for the page go, and global ones of whatever PCID."""
    for is_global, kept in ((False, [1]), (True, [])):
        vm, tables, _, cpu = two_spaces(mmu, global_=is_global)
        cpu.cr4 |= CR4_PCIDE | CR4_PGE
        for pcid in (1, 2):
            cpu.cr3 = tables.cr3 | pcid
            cpu.read(X)
        faults(cpu.read, X, user=True)
        rows = cpu.tlb[cpu.tlb["page"] == X]
        assert rows["pcid"].tolist() == kept
        cpu.read(X)
        cpu.cr3 = tables.cr3 | 1 | KEEP
        faults(cpu.read, X, user=True)
        rows = cpu.tlb[cpu.tlb["page"] == X]
        assert rows["pcid"].tolist() == ([] if is_global else [2])
        assert vm.audit().ok


def test_a_leaf_that_goes_takes_the_entries_of_all_pcids_along():
    """`flush`, where G counts without CR4.PGE: one leaf serves two PCIDs. No entry outlives the leaf."""
    vm, tables = machine("flush", sc.TLB())
    tables.map(X, DATA_A, 4096, "rwx", global_=True, accessed=True)
    cpu = start(vm, tables, cr4=CR4_PCIDE)
    for pcid in (1, 2):
        cpu.cr3 = tables.cr3 | pcid
        cpu.read(X)
    tables.set_entry(X, 1, DATA_B | P | A)
    faults(cpu.write, X, 1)
    assert not len(cpu.tlb)
    assert vm.audit().ok


@pytest.mark.parametrize(("mmu", "tlb"), LAGGING)
def test_the_page_that_faults_of_two(mmu, tlb):
    """An access over a page boundary that faults at its second page drops that one alone."""
    vm, tables = machine(mmu, tlb)
    tables.map(X, DATA_A, 0x2000, "rwx", accessed=True)
    cpu = start(vm, tables)
    cpu.read(X)
    cpu.read(X + 0x1000)
    tables.set_entry(X, 1, DATA_B | P | W | A)
    tables.set_entry(X + 0x1000, 1, DATA_B | P | A)
    assert faults(cpu.write, X + 0xFFC, 1).address == X + 0x1000
    assert cpu.read(X) == DATA_A
    assert cpu.read(X + 0x1000) == DATA_B


@pytest.mark.parametrize("mmu", ["flush", EXACT_FLUSH])
def test_a_leaf_that_is_right_stays(mmu):
    """What the loss of such a leaf would change is the number of exits, which are those of the original."""
    vm, tables = machine(mmu, None)
    tables.map(X, DATA_A, 4096, "rx", accessed=True)
    tables.map(LARGE, 2 * MIB, 2 * MIB, "rx", page_size="2MiB", accessed=True)
    cpu = start(vm, tables)
    for va in (X, LARGE + 0x1000):
        cpu.read(va)
        exits = vm.stats.pf_taken
        faults(cpu.write, va, 1)
        assert vm.stats.pf_taken == exits + 1
        cpu.read(va)
        assert vm.stats.pf_taken == exits + 1


def test_probes_are_no_faults():
    """`translate` has no side effect, and an access that is refused for its address alone is #GP."""
    vm, tables = machine("native", sc.TLB())
    tables.map(X, DATA_A, 4096, "rx", accessed=True)
    cpu = start(vm, tables, cr4=CR4_SMEP)
    cpu.read(X)
    faults(cpu.translate, X, "w")
    with pytest.raises(sc.GeneralProtection):
        cpu.read(X | 1 << 52)
    assert pages(cpu) == [X]


@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync", "adaptive"])
def test_a_lost_flush_at_a_fault_is_audited(mmu):
    """ "fault" of `lose_flushes`: the entry of the TLB stays, and I8 names it. (`flush` and `cached` ask for a flush
    besides, where the leaf goes.)"""
    vm, tables = machine(mmu, sc.TLB())
    tables.map(X, DATA_A, 4096, "rx", accessed=True)
    cpu = start(vm, tables)
    cpu.read(X)
    vm.mmu.lose_flushes("fault")
    faults(cpu.write, X, 1)
    assert invariants(vm) == {"I8"}
    cpu.invlpg(X)
    assert invariants(vm) == set()


@pytest.mark.parametrize("tlb", [None, sc.TLB()])
def test_invlpg_of_a_small_page_beside_half_a_large_one(tlb):
    """`flush`, 32-bit: a leaf of a small page is there still; its directory entry has come to map 4 MiB, of which the
    other half was used. INVLPG drops both."""
    vm, tables = machine("flush", tlb, "32")
    tables.map(LARGE, DATA_A, 4096, "rwx", accessed=True)
    cpu = start(vm, tables)
    assert cpu.read(LARGE) == DATA_A
    vm.write_physical(tables.entry(LARGE, 2).gpa, (4 * MIB | P | PS | A).to_bytes(4, "little"))
    half = LARGE + 2 * MIB
    assert (cpu.read(half), cpu.read(LARGE)) == (6 * MIB, DATA_A)
    cpu.invlpg(LARGE)
    assert cpu.read(LARGE) == 4 * MIB
