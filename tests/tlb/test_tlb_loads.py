"""The modelled TLB and register loads: what a load drops, what PCIDs and global pages keep, what is refused."""

import pytest
from oracle import CR0_PG, CR0_WP, CR4_PAE, CR4_PCIDE, CR4_PGE, CR4_SMEP, EFER_NXE, EFER_SCE, P, W
from tlb_machine import (
    DATA_A,
    DATA_B,
    DATA_C,
    DESIGNS,
    HIT,
    KEEP,
    MISS,
    MODES,
    X,
    Z,
    hits,
    leaf,
    machine,
    pages,
    poke,
    start,
    two_spaces,
)

import shadowcore as sc


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_cr3_drops_what_is_not_global(mmu, mode):
    vm, tables, other, cpu = two_spaces(mmu, mode)
    tables.map(Z, DATA_C, 4096, "rwx", global_=True)
    assert cpu.read(X) == DATA_A
    assert cpu.read(Z) == DATA_C
    cpu.cr3 = other.cr3
    # `flush` has thrown shadow tables away at this, and with each table everything in the TLB; leaves of `unsync` are
    # not global.
    assert pages(cpu) == ([] if mmu in ("flush", "unsync", "adaptive") else [Z])
    assert cpu.read(X) == DATA_B
    cpu.cr3 = tables.cr3
    assert hits(vm, cpu.read, X) == MISS
    assert cpu.read(X) == DATA_A
    assert vm.audit().ok


@pytest.mark.parametrize("mode", MODES)
def test_global_entries_outlive_cr3(mode):
    """The stale global translation serves in the other address space, until INVLPG; with CR4.PGE off there
    is no such thing."""
    vm, tables, other, cpu = two_spaces("native", mode, global_=True)
    assert cpu.read(X) == DATA_A
    cpu.cr3 = other.cr3
    assert cpu.read(X) == DATA_A
    assert cpu.tlb["global_"].tolist() == [1]
    cpu.invlpg(X)
    assert cpu.read(X) == DATA_B
    cpu.cr4 &= ~CR4_PGE
    assert cpu.read(X) == DATA_B
    assert cpu.tlb["global_"].tolist() == [0]
    cpu.cr3 = tables.cr3
    assert cpu.read(X) == DATA_A
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_pcids_are_tags(mmu):
    """Entries belong to the PCID they were made under: bit 63 of CR3 keeps those of the PCID that comes, without
    it they go; those of others stay either way."""
    vm, tables, other, cpu = two_spaces(mmu)
    cpu.cr4 |= CR4_PCIDE
    cpu.cr3 = tables.cr3 | 1
    assert hits(vm, cpu.read, X) == MISS
    cpu.cr3 = other.cr3 | 2
    assert cpu.cr3 == other.cr3 | 2
    assert cpu.read(X) == DATA_B
    assert sorted(zip(cpu.tlb["pcid"].tolist(), cpu.tlb["gpa"].tolist(), strict=True)) == [(1, DATA_A), (2, DATA_B)]
    cpu.cr3 = tables.cr3 | 1 | KEEP
    assert cpu.cr3 == tables.cr3 | 1
    assert hits(vm, cpu.read, X) == HIT
    assert cpu.read(X) == DATA_A
    cpu.cr3 = other.cr3 | 2
    assert cpu.tlb["pcid"].tolist() == [1]
    assert hits(vm, cpu.read, X) == MISS
    cpu.cr3 = tables.cr3 | 1 | KEEP
    assert hits(vm, cpu.read, X) == HIT
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_bit_63_keeps_even_what_is_wrong(mmu):
    """One PCID, two address spaces: the guest's mistake, and it is told so by stale data."""
    vm, tables, other, cpu = two_spaces(mmu)
    cpu.cr4 |= CR4_PCIDE
    cpu.cr3 = tables.cr3 | 1
    assert cpu.read(X) == DATA_A
    cpu.cr3 = other.cr3 | 1 | KEEP
    assert cpu.read(X) == DATA_A
    cpu.cr3 = other.cr3 | 1
    assert cpu.read(X) == DATA_B
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["native", "cached"])
def test_global_entries_serve_all_pcids(mmu):
    vm, tables, other, cpu = two_spaces(mmu, global_=True)
    cpu.cr4 |= CR4_PCIDE
    cpu.cr3 = tables.cr3 | 1
    assert cpu.read(X) == DATA_A
    cpu.cr3 = other.cr3 | 2
    assert hits(vm, cpu.read, X) == HIT
    assert cpu.read(X) == DATA_A
    cpu.invlpg(X)
    assert cpu.read(X) == DATA_B
    cpu.cr3 = tables.cr3 | 1
    assert cpu.read(X) == DATA_B
    assert vm.audit().ok


# Toggles of a register bit: with it, every entry goes, global or not, under every PCID.
DROPPING = [
    ("cr4", CR4_PGE),
    ("cr4", CR4_PCIDE),
    ("cr4", CR4_SMEP),
    ("cr0", CR0_WP),
    ("efer", EFER_NXE),
]


@pytest.mark.parametrize(("name", "bit"), DROPPING)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_register_loads_that_drop_everything(mmu, name, bit):
    """Both ways; a load of the value that is there drops nothing."""
    vm, tables, _, cpu = two_spaces(mmu)
    tables.map(Z, DATA_C, 4096, "rx" if name != "efer" else "rwx", global_=True)
    if bit == CR4_PCIDE:
        cpu.cr4 |= CR4_PCIDE
    for _ in range(2):
        if cpu.cr4 & CR4_PCIDE:
            cpu.cr3 = tables.cr3 | 4
            cpu.read(X)
            cpu.cr3 = tables.cr3
        cpu.read(X)
        cpu.read(Z)
        assert {X, Z} <= set(pages(cpu))
        setattr(cpu, name, getattr(cpu, name))
        # (`flush` throws its shadow tables away at each load, and with them what the TLB holds.)
        assert mmu == "flush" or {X, Z} <= set(pages(cpu))
        setattr(cpu, name, getattr(cpu, name) ^ bit)
        assert pages(cpu) == []
    assert vm.audit().ok


def test_stale_entries_end_with_register_loads():
    """The same where it shows: a stale translation, even a global one, is not used after such a load."""
    for name, bit in DROPPING:
        vm, tables = machine()
        tables.map(X, DATA_A, 4096, "rwx", global_=True)
        cpu = start(vm, tables, cr4=CR4_PCIDE)
        assert cpu.read(X) == DATA_A
        poke(vm, leaf(tables, X), DATA_B | P | W)
        cpu.cr3 = cpu.cr3
        assert cpu.read(X) == DATA_A
        setattr(cpu, name, getattr(cpu, name) ^ bit)
        assert (name, hex(bit), cpu.read(X)) == (name, hex(bit), DATA_B)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", DESIGNS)
def test_paging_off_and_on(mmu, mode):
    vm, tables = machine(mmu, mode)
    tables.map(X, DATA_A, 4096, "rwx", global_=True)
    cpu = start(vm, tables)
    assert cpu.read(X) == DATA_A
    cpu.cr0 &= ~CR0_PG
    assert cpu.read(X) == X  # linear is physical
    tables.set_entry(X, 1, DATA_B | P)
    cpu.cr0 |= CR0_PG
    assert cpu.read(X) == DATA_B
    assert vm.audit().ok


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_loads_that_drop_nothing(mmu):
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 4096, "rwu")
    cpu = start(vm, tables)
    cpu.read(X)
    cpu.efer |= EFER_SCE
    cpu.pkru = 0x55555554
    cpu.ac = True
    cpu.cpl = 3
    for name, value in [("cr4", cpu.cr4 & ~CR4_PAE), ("cr3", 1 << 60), ("cr0", CR0_PG), ("efer", 1 << 40)]:
        with pytest.raises(sc.GeneralProtection):
            setattr(cpu, name, value)
    assert pages(cpu) == [X]
    assert hits(vm, cpu.read, X) == HIT


# -- PCIDs: what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("mmu", DESIGNS)
def test_pcid_rules(mmu):
    """A load against the rules is #GP(0); registers and TLB stay as they are."""
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 4096, "rw")
    cpu = start(vm, tables)

    def refused(name, value):
        cpu.read(X)
        state = [cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer], cpu.tlb.tolist()
        with pytest.raises(sc.GeneralProtection) as caught:
            setattr(cpu, name, value)
        assert caught.value.error_code == 0
        assert ([cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer], cpu.tlb.tolist()) == state

    refused("cr3", cpu.cr3 | KEEP)  # bit 63 means something with PCIDE only
    for low in (0x001, 0x008, 0x010, 0x018, 0x020, 0x800):
        cpu.cr3 = tables.cr3 | low
        refused("cr4", cpu.cr4 | CR4_PCIDE)  # the current PCID would not be 0
    cpu.cr3 = tables.cr3
    cpu.cr4 |= CR4_PCIDE
    refused("cr0", cpu.cr0 & ~CR0_PG)
    cpu.cr3 = tables.cr3 | 0xFFF
    refused("cr0", cpu.cr0 & ~CR0_PG)
    cpu.cr4 = cpu.cr4  # PCIDE is on already: the PCID may be anything
    # Off again, with a PCID that becomes bits of CR3 that are ignored.
    cpu.cr4 &= ~CR4_PCIDE
    cpu.cr3 = tables.cr3 | 0xABC
    refused("cr4", cpu.cr4 | CR4_PCIDE)
    cpu.cr3 = tables.cr3
    cpu.cr0 &= ~CR0_PG
    refused("cr4", cpu.cr4 | CR4_PCIDE)  # not outside 64-bit modes
    assert vm.audit().ok


def test_pcid_needs_the_feature():
    vm, tables = machine(features=sc.Features(pcid=False))
    cpu = start(vm, tables)
    with pytest.raises(sc.GeneralProtection):
        cpu.cr4 |= CR4_PCIDE


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_pcid_is_for_64_bit_modes(mode):
    vm, tables = machine("native", mode)
    cpu = start(vm, tables)
    with pytest.raises(sc.GeneralProtection):
        cpu.cr4 |= CR4_PCIDE
