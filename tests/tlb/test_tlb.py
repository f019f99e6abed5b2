"""The modelled TLB: its geometry, its counters, and the view of its entries."""

import random
from collections import OrderedDict

import numpy as np
import pytest
from oracle import CR4_PCIDE, CR4_PKE, FETCH, READ, WRITE
from tlb_machine import (
    ACC_U,
    ACC_W,
    ACC_X,
    DATA_A,
    DATA_B,
    DATA_C,
    DESIGNS,
    HIT,
    LARGE,
    MIB,
    MISS,
    MODES,
    X,
    Y,
    hits,
    machine,
    pages,
    start,
)

import shadowcore as sc

# -- geometry --------------------------------------------------------------------------------------------


class Model:
    """Sets of at most `ways` entries, the least recently used of which is replaced."""

    def __init__(self, geometry):
        self.geometry = geometry  # size class: (entries, ways)
        self.sets = {
            size: [OrderedDict() for _ in range(entries // ways)]
            for size, (entries, ways) in geometry.items()
            if entries
        }
        self.hits = self.misses = 0

    def access(self, size, number, write, dirty):
        """Page `number` of a size; `dirty`: what its entry says after the access."""
        ways = self.geometry[size][1]
        if size not in self.sets:
            self.misses += 1
            return
        found = self.sets[size][number % len(self.sets[size])]
        if number in found and (found[number] or not write):
            self.hits += 1
        else:
            self.misses += 1
            if number not in found and len(found) == ways:
                found.popitem(last=False)
            found[number] = dirty
        found.move_to_end(number)

    def pages(self, shifts):
        return sorted(number << shifts[size] for size in self.sets for found in self.sets[size] for number in found)


GEOMETRIES = [
    {},
    {"small_entries": 1, "small_ways": 1, "large_entries": 1, "large_ways": 1},
    {"small_entries": 8, "small_ways": 8, "large_entries": 3, "large_ways": 3},
    {"small_entries": 7, "small_ways": 1, "large_entries": 5, "large_ways": 1},
    {"small_entries": 12, "small_ways": 2, "large_entries": 6, "large_ways": 2},
    {"small_entries": 15, "small_ways": 5, "large_entries": 0, "huge_entries": 0},
    {"small_entries": 0, "large_entries": 2, "large_ways": 1, "huge_entries": 1, "huge_ways": 1},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("mode", MODES)
def test_sets_ways_and_replacement(mode, geometry):
    """Random loads and stores of pages of all sizes: hits, misses and what is kept, exactly as of sets with
    replacement of the least recently used entry, each page size for itself."""
    tlb = sc.TLB(**geometry)
    vm, tables = machine("native", mode, tlb)
    shifts = {"small": 12, "large": 22 if mode == "32" else 21, "huge": 30}
    bases = {"small": X, "large": LARGE, "huge": 0x4000_0000}
    counts = {"small": 40, "large": 9, "huge": 3}
    if mode in ("32", "pae"):
        del shifts["huge"]
    dirty = set()
    for size, shift in shifts.items():
        for i in range(counts[size]):
            gpa = i % 30 << 12 if size == "small" else 0
            va = bases[size] + (i << shift)
            tables.map(va, gpa, 1 << shift, "rwx", page_size=1 << shift, dirty=i % 3 == 0)
            dirty |= {va} if i % 3 == 0 else set()
    cpu = start(vm, tables)
    geometry = {size: (getattr(tlb, f"{size}_entries"), getattr(tlb, f"{size}_ways")) for size in shifts}
    model = Model(geometry)
    rng = random.Random(3)
    vm.stats.reset()
    for _ in range(20):
        rows = []
        for _ in range(40):
            size = rng.choice(list(shifts))
            # A hot part, so that hits are frequent whatever the geometry.
            i = rng.randrange(rng.choice([2, counts[size]]))
            va = bases[size] + (i << shifts[size])
            op = rng.choice([READ, READ, FETCH, WRITE])
            rows.append((op, 0, 8, va + 8 * rng.randrange(1, 500), 0))
            dirty |= {va} if op == WRITE else set()
            model.access(size, va >> shifts[size], op == WRITE, va in dirty)
        assert not cpu.run(np.array(rows, dtype=sc.OP_DTYPE)).outcome.any()
        assert (vm.stats.tlb_hits, vm.stats.tlb_misses) == (model.hits, model.misses)
        assert pages(cpu) == model.pages(shifts)
    assert vm.stats.accesses == model.hits + model.misses == 800
    assert model.hits > 0
    assert vm.audit().ok


def test_replacement_step_by_step():
    """Four ways: a fifth page replaces the one not used for longest, and a hit makes a page young."""
    vm, tables = machine(tlb=sc.TLB(small_entries=4, small_ways=4))
    tables.map(X, DATA_A, 0x10000, "rw")
    cpu = start(vm, tables)
    a, b, c, d, e, f = (X + (i << 12) for i in range(6))
    for va in (a, b, c, d):
        assert hits(vm, cpu.read, va) == MISS
    assert hits(vm, cpu.read, a) == HIT
    assert hits(vm, cpu.read, e) == MISS
    assert pages(cpu) == [a, c, d, e]
    assert hits(vm, cpu.read, b) == MISS
    assert pages(cpu) == [a, b, d, e]
    cpu.invlpg(e)
    assert hits(vm, cpu.read, f) == MISS  # takes the place that is free, not that of d, the oldest
    assert pages(cpu) == [a, b, d, f]


def test_number_of_sets_need_not_be_a_power_of_two():
    """Three sets of two ways: the page number modulo three chooses the set."""
    vm, tables = machine(tlb=sc.TLB(small_entries=6, small_ways=2))
    tables.map(X, DATA_A, 0x10000, "rw")
    cpu = start(vm, tables)
    first = X >> 12
    rows = {first + i: (first + i) % 3 for i in range(10)}
    same = [number for number, row in rows.items() if row == rows[first]]
    other = next(number for number, row in rows.items() if row != rows[first])
    assert len(same) == 4
    cpu.read(other << 12)
    for number in same[:3]:
        cpu.read(number << 12)
    assert pages(cpu) == sorted(number << 12 for number in (other, *same[1:3]))


@pytest.mark.parametrize("mode", MODES)
def test_native_keeps_pages_whole(mode):
    """The sizes of the guest's pages; one entry serves all of a page."""
    vm, tables = machine("native", mode)
    large = 4 * MIB if mode == "32" else 2 * MIB
    tables.map(X, DATA_A, 4096, "rwx")
    tables.map(LARGE, 0, large, "rwx", page_size=large)
    sizes = {X: 4096, LARGE: large}
    if mode in ("64", "la57"):
        tables.map(0x4000_0000, 0, 1 << 30, "rw", page_size=1 << 30)
        sizes[0x4000_0000] = 1 << 30
    cpu = start(vm, tables)
    for va, size in sizes.items():
        assert hits(vm, cpu.read, va + DATA_B % size) == MISS
        assert hits(vm, cpu.read, va + min(size - 8, MIB)) == HIT
    assert dict(zip(cpu.tlb["page"].tolist(), cpu.tlb["page_size"].tolist(), strict=True)) == sizes
    assert cpu.read(LARGE + DATA_C) == DATA_C


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mmu", ["cached", "flush", "unsync"])
def test_shadow_tables_hold_only_small_pages(mmu, mode):
    """The processor walks the shadow, whose leaves are of 4 KiB, whatever the guest's are."""
    large = 4 * MIB if mode == "32" else 2 * MIB
    for kept in (True, False):
        tlb = sc.TLB() if kept else sc.TLB(small_entries=0)
        vm, tables = machine(mmu, mode, tlb)
        tables.map(LARGE, 0, large, "rw" if mode != "32" else "rwx", page_size=large)
        cpu = start(vm, tables)
        for i in range(3):
            assert hits(vm, cpu.read, LARGE + (i << 12)) == MISS
            assert hits(vm, cpu.read, LARGE + (i << 12) + 8) == (HIT if kept else MISS)
        assert pages(cpu) == ([LARGE + (i << 12) for i in range(3)] if kept else [])
        assert set(cpu.tlb["page_size"].tolist()) <= {4096}


def test_settings_that_make_no_sense():
    for settings, named in [
        ({"small_entries": 10, "small_ways": 4}, "tlb.small_entries"),
        ({"large_ways": 0}, "tlb.large_ways"),
        ({"huge_entries": -1}, "tlb.huge_entries"),
        ({"small_entries": 2.5}, "tlb.small_entries"),
    ]:
        with pytest.raises(sc.ConfigError, match=named):
            sc.TLB(**settings)
    with pytest.raises(sc.ConfigError, match="tlb"):
        sc.VM(memory=MIB, tlb=64)


# -- counters, and the view of the entries ---------------------------------------------------------------


@pytest.mark.parametrize("mmu", DESIGNS)
def test_counters(mmu):
    """Hits and misses by what the access needs; together they are the accesses."""
    vm, tables = machine(mmu)
    tables.map(X, DATA_A, 0x2000, "rwx")
    tables.map(X + 0x2000, DATA_C, 0x1000, "rx")
    tables.map(X + 0x3000, 0x100_0000, 0x1000, "rw")  # no memory there
    cpu = start(vm, tables)
    vm.stats.reset()
    assert hits(vm, cpu.read, X) == MISS
    assert hits(vm, cpu.read, X + 8, 4) == HIT
    assert hits(vm, cpu.fetch, X) == HIT
    # D is not set yet: the processor has to walk; then it is.
    assert hits(vm, cpu.write, X, 1) == MISS
    assert hits(vm, cpu.write, X, 1) == HIT
    assert hits(vm, cpu.cmpxchg, X, 1, 2) == HIT
    # An access to two pages asks twice.
    assert hits(vm, cpu.read, X + 0xFFC) == (1, 1)
    assert hits(vm, cpu.read, X + 0xFFC) == (2, 0)

    def faults(access, *arguments, **settings):
        with pytest.raises(sc.PageFault):
            access(*arguments, **settings)

    # What an entry refuses is looked up in the tables before it is a fault.
    assert hits(vm, cpu.read, X + 0x2000) == MISS
    assert hits(vm, faults, cpu.write, X + 0x2000, 1) == MISS
    assert hits(vm, faults, cpu.read, X + 0x2000, user=True) == MISS
    assert hits(vm, faults, cpu.read, X + 0x8000) == MISS

    def device():
        with pytest.raises(sc.MMIOAccess):
            cpu.read(X + 0x3000)

    # Devices and pages that are not present are never kept, and a fault drops what was kept for its page.
    assert hits(vm, device) == MISS
    assert hits(vm, device) == MISS
    assert pages(cpu) == [X, X + 0x1000]
    assert vm.stats.tlb_hits + vm.stats.tlb_misses == vm.stats.accesses == 16
    assert vm.audit().ok


def test_a_hit_reads_no_table():
    vm, tables = machine()
    tables.map(X, DATA_A, 4096, "rw")
    cpu = start(vm, tables)
    cpu.read(X)
    assert vm.stats.walk_references == 4
    cpu.read(X)
    assert vm.stats.walk_references == 4


def test_without_a_tlb_nothing_is_counted():
    vm = sc.VM(memory=MIB, mmu="native")
    cpu = vm.vcpus[0]
    cpu.read(0)
    assert len(cpu.tlb) == 0
    assert (vm.stats.tlb_hits, vm.stats.tlb_misses, vm.stats.accesses) == (0, 0, 1)


def test_paging_off_needs_no_translation():
    """Without paging there is nothing to keep in `native`; under a shadow MMU the processor still walks one."""
    for mmu, kept in (("native", []), ("cached", [DATA_A]), ("flush", [DATA_A])):
        vm, _ = machine(mmu)
        cpu = vm.vcpus[0]
        assert cpu.read(DATA_A) == cpu.read(DATA_A) == DATA_A
        assert pages(cpu) == kept
        assert vm.stats.tlb_hits == len(kept)


def test_view_of_the_entries():
    """`cpu.tlb` has one row an entry, of each field what the guest's tables said; it is a copy."""
    vm, tables = machine()
    tables.map(X, DATA_A, 4096, "rwu", dirty=True, pkey=5)
    tables.map(Y, DATA_B, 4096, "rx", global_=True)
    tables.map(LARGE, 2 * MIB, 2 * MIB, "rwxu", page_size="2MiB")
    cpu = start(vm, tables, cr4=CR4_PCIDE | CR4_PKE)
    cpu.cr3 = tables.root | 7
    for va in (X + 24, Y, LARGE + 0x12345):
        cpu.read(va)
    rows = {row["page"].item(): row for row in cpu.tlb}
    names = ("gpa", "page_size", "pcid", "access", "pkey", "dirty", "global_")
    assert {va: tuple(row[name].item() for name in names) for va, row in rows.items()} == {
        X: (DATA_A, 4096, 7, ACC_W | ACC_U, 5, 1, 0),
        Y: (DATA_B, 4096, 7, ACC_X, 0, 0, 1),
        LARGE: (2 * MIB, 2 * MIB, 7, ACC_X | ACC_W | ACC_U, 0, 0, 0),
    }
    copy = cpu.tlb
    copy["gpa"] = 0
    assert cpu.read(X) == DATA_A
    assert sorted(cpu.tlb["gpa"].tolist()) == [DATA_A, DATA_B, 2 * MIB]
