"""I8: flushes that do not happen, and TLB entries that so outlive them."""

import pytest
from broken import TLB_LOG, TLB_SHADOW, TLB_STALE, TLB_TABLE, UNUSED
from guest2007 import DATA, PAGE, RAM, USED, USER, A, D, P, U, W

import shadowcore as sc


def with_tlb(design="cached", vcpus=1):
    """64-bit mode with a TLB, a window over the tables, and four pages from USER on."""
    vm = sc.VM(memory=RAM, mmu=design, tlb=sc.TLB(), vcpus=vcpus)
    tables = sc.PageTables(vm.memory, "64")
    tables.map(USER, DATA, 4 * PAGE, **USED)
    tables.map(0, 0, RAM, "rw", 4096, accessed=True, dirty=True)
    for cpu in vm.vcpus:
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
    return vm, tables


def only(vm, sentence, *besides):
    """The page numbers of which the audit finds `sentence`; it finds nothing else but `besides`."""
    violations = vm.audit().violations
    assert {(v.invariant, v.what, v.page) for v in violations} <= {("I8", s, None) for s in (sentence, *besides)}
    return {v.gfn for v in violations if v.what == sentence}


def move(vm, tables, va, gpa):
    """The guest's own store that leads `va` elsewhere; the flush that a shadow MMU would do of itself is lost."""
    vm.mmu.lose_flushes("store")
    vm.vcpus[0].write(tables.entry(va).gpa, gpa | P | W | U | A | D)


CALM = sc.Shadow.cached(flood_threshold=None)


@pytest.mark.parametrize("design", ["native", CALM, "flush"], ids=["native", "cached", "flush"])
@pytest.mark.parametrize(
    ("name", "flush"),
    [
        ("invlpg", lambda cpu: cpu.invlpg(USER + 123)),
        ("cr3", lambda cpu: setattr(cpu, "cr3", cpu.cr3)),
        ("context", lambda cpu: setattr(cpu, "cr4", cpu.cr4 ^ 1 << 7)),
    ],
    ids=["invlpg", "cr3", "context"],
)
def test_flush_of_the_guest_that_is_lost(design, name, flush):
    """Pages lead elsewhere by now. Until the guest flushes its TLB may know the old frames; after that it may not, and
    after a flush that was lost it does. (Under a shadow MMU, what the shadow has dropped by then leads nowhere there:
    in `cached` at the store, in `flush` at the INVLPG.)"""
    vm, tables = with_tlb(design)
    cpu = vm.vcpus[0]
    lagging = () if design == "native" else (TLB_SHADOW,)
    for number, lost in enumerate(((), (name,))):
        for i in range(2):
            cpu.write(USER + i * PAGE, 1)
        for i in range(2):
            move(vm, tables, USER + i * PAGE, UNUSED + (2 * number + i) * PAGE)
        assert only(vm, TLB_STALE, *lagging) == set()
        assert only(vm, TLB_SHADOW) <= ({USER + i * PAGE >> 12 for i in range(2)} if design is CALM else set())
        vm.mmu.lose_flushes("store", *lost)
        flush(cpu)
        stale = only(vm, TLB_STALE, *lagging)
        expected = {USER + i * PAGE >> 12 for i in range(1 if name == "invlpg" else 2)} if lost else set()
        if design == "flush":  # the pages that it zaps cost the TLB its entries in another way
            assert stale <= expected
        else:  # what led to the tables was in the TLB as well
            assert expected <= stale <= expected | ({tables.entry(USER).gpa >> 12} if lost else set())


@pytest.mark.parametrize("lost", [(), ("protect",)], ids=["done", "lost"])
def test_flush_of_write_protection_that_is_lost(lost):
    """A frame becomes a guest table while a TLB entry still lets stores through to it."""
    vm, tables = with_tlb()
    cpu = vm.vcpus[0]
    table, va = 0x300000, USER + (2 << 20)
    tables.set_entry(va, 2, table | P | W | U)
    cpu.write(table, DATA | P | W | U | A | D)
    vm.mmu.lose_flushes(*lost)
    assert vm.audit().ok
    cpu.read(va, user=True)
    assert only(vm, TLB_TABLE, TLB_SHADOW) == ({table >> 12} if lost else set())
    assert only(vm, TLB_SHADOW, TLB_TABLE) == ({table >> 12} if lost else set())


def test_flush_of_a_dirty_log_that_is_lost():
    vm, _ = with_tlb()
    vm.memory.start_dirty_log()
    cpu = vm.vcpus[0]
    for lost in ((), ("log",)):
        vm.mmu.lose_flushes(*lost)
        cpu.write(USER, 1)
        cpu.read(USER + 3 * PAGE)  # may be writable, and then is logged too
        assert vm.audit().ok
        vm.memory.clear_dirty_log()
        assert (DATA >> 12 in only(vm, TLB_LOG, TLB_SHADOW)) == bool(lost)
        assert (USER >> 12 in only(vm, TLB_SHADOW, TLB_LOG)) == bool(lost)


def test_violations_of_the_tlb_say_where():
    """A line of the report names the page: without it nobody can look further."""
    vm, tables = with_tlb("native")
    vm.vcpus[0].write(USER, 1)
    move(vm, tables, USER, UNUSED)
    vm.mmu.lose_flushes("invlpg")
    vm.vcpus[0].invlpg(USER)
    (violation,) = vm.audit().violations
    assert TLB_STALE in str(violation)
    assert f"{USER >> 12:#x}" in str(violation) or f"{USER:#x}" in str(violation)
