"""Roots of several processors: shared, pinned by each, and too many for a pool."""

import pytest
from oracle import CR0_PG, CR3, READ
from several_vcpus import delta, ops, pair
from tlb_machine import (
    DATA_A,
    DATA_B,
    DATA_C,
    DIRECT,
    MIB,
    MODES,
    X,
    Y,
    Z,
    words,
)

import shadowcore as sc


def root_counts(vm):
    """{gfn: root count} of the pages that serve as roots, added up."""
    counts = {}
    for page in vm.mmu.pages:
        if page["root_count"]:
            counts[int(page["gfn"])] = counts.get(int(page["gfn"]), 0) + int(page["root_count"])
    return counts


@pytest.mark.parametrize("mode", MODES)
def test_roots_are_shared_and_pinned_by_both(mode):
    """Both walk from the same shadow pages; they are roots until the last has left."""
    vm, _, (first, second) = pair("cached", mode)
    assert vm.mmu.roots(0) == vm.mmu.roots(1)
    held = [root for root in vm.mmu.roots(0) if root is not None]
    number = {int(page["page"]): int(page["root_count"]) for page in vm.mmu.pages}
    assert [number[root] for root in held] == [2] * len(held)
    assert delta(vm, ("mmu_cache_miss", "pf_taken"), first.read, X) > (0, 1)
    # What the one has filled serves the other.
    assert delta(vm, ("mmu_cache_miss", "pf_taken"), second.read, X) == (0, 0)
    first.cr0 &= ~CR0_PG
    number = {int(page["page"]): int(page["root_count"]) for page in vm.mmu.pages}
    assert [number[root] for root in held] == [1] * len(held)
    assert set(vm.mmu.roots(0)).isdisjoint(held)
    vm.mmu.zap_all()
    assert [root for root in vm.mmu.roots(1) if root is not None] == held
    assert second.read(X) == DATA_A
    assert first.read(DATA_C) == DATA_C
    assert vm.audit().ok


def test_root_that_another_edits_stays_a_root():
    """A flood of stores by one to the root that the other walks from: emptied, kept, and right."""
    vm, tables, (first, second) = pair()
    other = sc.PageTables(vm, "64", allocate=range(0x180, 0x1A0))
    other.map(X, DATA_C, 4096, "rw")
    other.map(DIRECT, 0, 8 * MIB, "rw", page_size=4096)
    second.cr3 = other.cr3
    assert (first.read(X), second.read(X)) == (DATA_A, DATA_C)
    assert root_counts(vm) == {tables.root >> 12: 1, other.root >> 12: 1}
    (root,) = vm.mmu.roots(0)
    for _ in range(3):
        second.write(DIRECT + tables.root + 0xFF8, 0)
    assert vm.stats.mmu_flooded == 1
    assert vm.mmu.roots(0) == [root]
    assert first.read(X) == DATA_A
    # The entry of the other's root: both address spaces become the same below it.
    second.write(DIRECT + tables.root, words(vm, other.root)[0])
    assert first.read(X) == DATA_C
    assert vm.audit().ok


@pytest.mark.parametrize("mode", MODES)
def test_recycling_passes_over_the_roots_of_all(mode):
    """A small pool, two address spaces, one vcpu in each: whoever needs room takes it from what is no root."""
    vm, _, (first, second) = pair(sc.Shadow.cached(pool_pages=12, min_free=2, refill=3), mode, tlb=False)
    other = sc.PageTables(vm, mode, allocate=range(0x180, 0x1A0))
    for va, gpa in ((X, DATA_B), (Y, DATA_C), (Z, DATA_A)):
        other.map(va, gpa, 4096, "rwx")
    second.cr3 = other.cr3
    roots = vm.mmu.roots(0), vm.mmu.roots(1)
    for _ in range(20):
        assert [first.read(va) for va in (X, Y, Z)] == [DATA_A, DATA_B, DATA_C]
        assert [second.read(va) for va in (X, Y, Z)] == [DATA_B, DATA_C, DATA_A]
        assert vm.audit().ok
    assert vm.stats.mmu_recycled > 0 or mode == "64"
    if mode in ("64", "la57"):
        assert (vm.mmu.roots(0), vm.mmu.roots(1)) == roots


def test_pool_that_the_roots_of_all_fill():
    """PoolExhausted names the roots that pin the pool, the other's too; who had his pages goes on."""
    vm, tables, (first, second) = pair(sc.Shadow.cached(pool_pages=4, min_free=0, refill=0), "64", tlb=False)
    spaces = [sc.PageTables(vm, "64", allocate=range(0x180 + 32 * i, 0x1A0 + 32 * i)) for i in range(2)]
    for i, space in enumerate(spaces):
        space.map(X, (DATA_B, DATA_C)[i], 4096, "rw")
    assert first.read(X) == DATA_A
    second.cr3 = spaces[0].cr3
    # Each needs four pages, and the roots of both are two of the four.
    rows = ops((0, CR3, 0, tables.cr3), (1, READ, X, 0))
    with pytest.raises(sc.PoolExhausted) as caught:
        first.run(rows)
    assert set(caught.value.roots) <= {tables.root >> 12, spaces[0].root >> 12}
    assert tables.root >> 12 in caught.value.roots
    assert caught.value.had == 4
    assert len(caught.value.result) == 1
    assert vm.audit().ok
    # With one root for both there is room.
    second.cr3 = tables.cr3
    assert first.read(X) == second.read(X) == DATA_A
    assert vm.audit().ok
