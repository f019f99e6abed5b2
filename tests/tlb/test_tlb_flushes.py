"""Each TLB flush that the MMU asks for, and what happens where it is lost: a stale entry is used, and audited.

Most scenarios end in the same disaster: a page table that a TLB entry lets the guest write to behind the MMU's
back.  In them X maps the leaf table of Y."""

import itertools

import pytest
from oracle import CR0_PE, CR0_PG, CR4_PCIDE, CR4_PGE, PS, D, P, U, W
from tlb_machine import (
    ACC_W,
    DATA_A,
    DATA_B,
    DATA_C,
    DIRECT,
    KEEP,
    LARGE,
    MIB,
    X,
    Y,
    Z,
    invariants,
    leaf,
    machine,
    pages,
    start,
    two_spaces,
    words,
)

import shadowcore as sc
from shadowcore.engine.mmu import FLUSHES


class Scenario:
    """A machine in which X leads to the leaf table of Y; `lost` flushes do not happen from `go` on."""

    def __init__(self, mmu="cached", vcpus=1, rights="rw", **registers):
        self.vm, self.tables = machine(mmu, vcpus=vcpus)
        self.tables.map(Y, DATA_A, 4096, "rwx")
        self.table = leaf(self.tables, Y) & ~0xFFF
        self.tables.map(X, self.table, 4096, rights, dirty=True)
        self.tables.map(DIRECT, 0, 8 * MIB, "rw", page_size=4096, dirty=True)
        self.cpus = [start(self.vm, self.tables, i, **registers) for i in range(vcpus)]
        self.cpu = self.cpus[0]

    def reach(self, gpa):
        """Fill the leaf of the direct map that leads to `gpa`, so that a store there takes no flush for that."""
        self.cpu.read(DIRECT + gpa)

    def store(self, gpa, value, cpu=None):
        """The guest's own store, by the direct map."""
        (cpu or self.cpu).write(DIRECT + gpa, value)

    def write_x(self, value, cpu=None):
        """Store to the entry of Y through X; whether the MMU saw it as a store to a table."""
        before = self.vm.stats.pf_emulate
        (cpu or self.cpu).write(X + (Y >> 9 & 0xFF8), value)
        return self.vm.stats.pf_emulate > before

    def overwrite(self, cpu=None):
        """Make the entry of Y lead to DATA_B, through X, and invalidate Y, as a guest does.  What then is:
        (the MMU saw the store, where Y leads, invariants that are broken)."""
        seen = self.write_x(DATA_B | P | W | U, cpu)
        for each in self.cpus:
            each.invlpg(Y)
        return seen, (cpu or self.cpu).read(Y), invariants(self.vm)


# Seen, and right; or unseen, and the old frame is read although guest and TLB agree that it is gone.
RIGHT = (True, DATA_B, set())
WRONG = (False, DATA_A, {"I1", "I8"})


def unused_entry(s):
    """X gets into the TLB, writable, while nothing shadows the table it maps."""
    s.cpu.write(X + 8 * 500, 0)
    assert s.cpu.tlb["dirty"][s.cpu.tlb["page"] == X].tolist() == [1]


def test_flush_when_a_frame_becomes_a_table():
    """ "protect": sptes of a frame lose W as it becomes a guest table; the TLB still has it."""

    def run(*lost):
        s = Scenario()
        unused_entry(s)
        s.vm.mmu.lose_flushes(*lost)
        assert s.cpu.read(Y) == DATA_A
        return invariants(s.vm), s.overwrite()

    assert run() == (set(), RIGHT)
    assert run("protect") == ({"I8"}, WRONG)


@pytest.mark.parametrize("why", ["unprotected", "flooded", "not within an entry"])
def test_flush_when_a_leaf_table_is_zapped(why):
    """ "zap": the leaf of X is gone, and with it the record by which its frame would be write-protected; then the
    frame becomes a table."""

    def run(*lost):
        s = Scenario()
        table_of_x = leaf(s.tables, X) & ~0xFFF
        s.reach(table_of_x)
        unused_entry(s)
        s.vm.mmu.lose_flushes(*lost)
        if why == "unprotected":
            s.vm.mmu.unprotect(table_of_x >> 12)
        elif why == "flooded":
            for _ in range(3):
                s.store(table_of_x + 8 * 511, 0)
        else:
            s.vm.write_physical(table_of_x + 8 * 510 + 4, bytes(8))
        assert s.vm.stats.mmu_shadow_zapped == 1
        assert s.cpu.read(Y) == DATA_A
        return invariants(s.vm), s.overwrite()

    assert run() == (set(), RIGHT)
    assert run("zap") == ({"I8"}, WRONG)


def zap_and_store(s, gpa, value):
    """The store to the directory is made natively, after the directory's shadow was zapped."""
    s.vm.mmu.unprotect(gpa >> 12)
    s.store(gpa, value)
    assert s.vm.stats.pf_emulate == 0


@pytest.mark.parametrize(("change", "flush"), [(zap_and_store, "zap_upper"), (Scenario.store, "store")])
def test_flush_when_the_way_to_a_page_goes(change, flush):
    """ "zap_upper", "store": a table above the leaves is zapped and then edited, or loses an entry by a store.

    Without the flush, stale entries are used, until the guest's INVLPG: no longer than on a processor without a
    shadow, so for the guest nothing is wrong.  Nor is it for the MMU: leaves and their records in the reverse map stay,
    by which the TLB is flushed should a frame become a table.  The audit sees it all the same, until the INVLPG, of
    which one has to be enough for all fragments of a large page."""

    def run(*lost):
        s = Scenario()
        s.tables.map(LARGE, 2 * MIB, 2 * MIB, "rwx", page_size="2MiB", accessed=True, dirty=True)
        entry = s.tables.entry(LARGE, 2)
        s.cpu.read(LARGE + 0x5000)
        s.reach(entry.gpa)
        for i in range(2):
            assert s.cpu.read(LARGE + (i << 12)) == 2 * MIB + (i << 12)
        s.vm.mmu.lose_flushes(*lost)
        before = s.vm.stats.tlb_flush
        change(s, entry.gpa, entry.value ^ 2 * MIB ^ 4 * MIB)
        assert s.vm.stats.tlb_flush == before + 1
        found = invariants(s.vm)
        first = s.cpu.read(LARGE + 0x1000) - 0x1000
        s.cpu.invlpg(LARGE)
        return found, first, s.cpu.read(LARGE + 0x1000) - 0x1000, invariants(s.vm)

    assert run() == (set(), 4 * MIB, 4 * MIB, set())
    assert run(flush) == ({"I8"}, 2 * MIB, 4 * MIB, set())
    assert run(flush, "invlpg") == ({"I8"}, 2 * MIB, 2 * MIB, {"I8"})


def test_flush_when_a_store_drops_an_entry():
    """ "store": the guest turns X elsewhere by an emulated store, then makes a table of the frame that X led to."""

    def run(*lost):
        s = Scenario()
        s.reach(leaf(s.tables, X))
        unused_entry(s)
        s.vm.mmu.lose_flushes(*lost)
        s.store(leaf(s.tables, X), DATA_C | P | W | U | D)
        assert s.vm.stats.pf_emulate == 1
        assert s.cpu.read(Y) == DATA_A
        before = invariants(s.vm)
        s.write_x(DATA_B | P | W | U)
        s.cpu.invlpg(Y)
        named = s.tables.entry(Y).value & 0xFFFFF000
        return before, named, s.cpu.read(Y), invariants(s.vm)

    # Without INVLPG of X the store may go either way; what counts is that Y leads where its entry says.
    assert run() == (set(), DATA_A, DATA_A, set())
    assert run("store") == ({"I8"}, DATA_B, DATA_A, {"I1", "I8"})


def test_flush_when_w_is_withheld():
    """ "withheld": a new leaf of a shadowed table would have been writable.

    No stale entry can be seen for the lack of this flush alone.  A writable TLB entry comes from a writable leaf; that
    leaf is in the reverse map of its frame until it is dropped, zapped or replaced, each of which flushes; and when
    the frame becomes a table, all that are in the reverse map are flushed.  So where a new leaf meets a frame that
    is a table already, no TLB has a writable entry of it.  The flush is requested, and it mends what another lost
    one left: that is shown."""

    def run(*lost):
        s = Scenario()
        s.tables.map(Z, s.table, 4096, "rw", dirty=True)
        unused_entry(s)
        s.vm.mmu.lose_flushes(*lost)
        assert s.cpu.read(Y) == DATA_A
        before = invariants(s.vm), s.vm.stats.tlb_flush
        s.cpu.read(Z)
        return before[0], s.vm.stats.tlb_flush - before[1], s.overwrite()

    assert run() == (set(), 1, RIGHT)
    assert run("withheld") == (set(), 1, RIGHT)
    assert run("protect") == ({"I8"}, 1, RIGHT)
    assert run("protect", "withheld") == ({"I8"}, 1, WRONG)


@pytest.mark.parametrize("other", ["another processor", "another PCID"])
def test_flush_when_a_leaf_loses_w(other):
    """ "leaf": with CR0.WP = 0, a supervisor's store to a read-only page has made its leaf writable, and a user's
    load takes W away again, on another processor or under another PCID."""

    def run(*lost):
        s = Scenario(vcpus=2, rights="ru", cr0=CR0_PG | CR0_PE, cr4=CR4_PCIDE)
        cpu, second = s.cpus
        cpu.cr3 = s.tables.cr3 | 1
        unused_entry(s)
        s.vm.mmu.lose_flushes(*lost)
        if other == "another PCID":
            cpu.cr3 = s.tables.cr3 | 2
            second = cpu
        second.read(X, user=True)
        assert second.read(Y) == DATA_A
        cpu.cr3 = s.tables.cr3 | 1 | KEEP
        return invariants(s.vm), s.overwrite()

    assert run() == (set(), RIGHT)
    assert run("leaf") == ({"I8"}, WRONG)


def test_flush_when_an_upper_entry_is_turned():
    """ "link": the first store to a large page that was only read so far turns the entry above to the shadow page of
    the dirty one.

    No harmful stale entry can be left by this.  An entry of a shadowed directory changes by stores, which drop the
    entry above and flush, or by the walk that sets D; so when the entry is turned with none dropped, D was just set,
    and all that the TLB has of the page are entries without W, of the same frames: they refuse stores, which are
    then looked up.  The flush is requested, and without it nothing goes wrong; but the audit sees that entries are left
    of which the shadow knows no more."""

    def run(*lost):
        s = Scenario()
        s.tables.map(LARGE, 2 * MIB, 2 * MIB, "rwxu", page_size="2MiB")
        for i in range(3):
            s.cpu.read(LARGE + (i << 12))
        assert not (s.cpu.tlb["access"] & ACC_W).any()
        s.vm.mmu.lose_flushes(*lost)
        before = s.vm.stats.tlb_flush
        s.cpu.write(LARGE + 0x1008, 5)
        entries = len(s.cpu.tlb)
        assert s.vm.stats.tlb_flush - before == 1
        s.cpu.write(LARGE + 0x2008, 6)
        found = invariants(s.vm)
        assert words(s.vm, 2 * MIB + 0x1008, 2 * MIB + 0x2008) == [5, 6]
        return entries, found

    assert run() == (1, set())
    assert run("link") == (3, {"I8"})


@pytest.mark.parametrize("mmu", ["cached", "flush", "unsync", "adaptive"])
def test_flush_when_a_log_is_cleared(mmu):
    """ "log": stores through an entry that was writable before are missing from the dirty log."""

    def run(first, *lost):
        s = Scenario(mmu)
        s.tables.map(Z, DATA_C, 4096, "rw", dirty=True)
        if not first:
            s.vm.memory.start_dirty_log()
        s.cpu.write(Z, 1)
        s.vm.mmu.lose_flushes(*lost)
        if first:
            s.vm.memory.start_dirty_log()
        else:
            assert s.vm.memory.dirty_log()[DATA_C >> 12]
            s.vm.memory.clear_dirty_log()
        s.cpu.write(Z, 2)
        assert words(s.vm, DATA_C) == [2]
        return bool(s.vm.memory.dirty_log()[DATA_C >> 12]), invariants(s.vm)

    for first in (True, False):
        assert run(first) == (True, set())
        assert run(first, "log") == (False, {"I8"})


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync", "adaptive"])
def test_flush_when_cr3_is_loaded(mmu):
    """ "cr3": the translations of one address space serve another."""

    def run(*lost):
        vm, _, other, cpu = two_spaces(mmu)
        cpu.read(X)
        vm.mmu.lose_flushes(*lost)
        cpu.cr3 = other.cr3
        return cpu.read(X), invariants(vm)

    assert run() == (DATA_B, set())
    assert run("cr3") == (DATA_A, {"I8"})


# Leaves of `unsync` are not global.
CONTEXTS = [(mmu, load) for mmu in ("native", "cached", "unsync") for load in ("paging off", "PGE", "PCIDE")]
CONTEXTS.remove(("unsync", "PGE"))


@pytest.mark.parametrize(("mmu", "load"), CONTEXTS)
def test_flush_when_the_context_changes(mmu, load):
    """ "context": with paging off the linear address is translated all the same; a global translation outlives the
    loads that are to end it, one of a PCID the end of PCIDs."""

    def run(*lost):
        vm, _, other, cpu = two_spaces(mmu, global_=load == "PGE")
        if load == "PCIDE":
            cpu.cr4 |= CR4_PCIDE
        assert cpu.read(X) == DATA_A
        vm.mmu.lose_flushes(*lost)
        if load == "paging off":
            cpu.cr0 &= ~CR0_PG
        else:
            cpu.cr3 = other.cr3 | (KEEP if load == "PCIDE" else 0)
            cpu.cr4 ^= CR4_PGE if load == "PGE" else CR4_PCIDE
            cpu.cr4 |= CR4_PGE
        return cpu.read(X), invariants(vm)

    assert run() == (X if load == "paging off" else DATA_B, set())
    assert run("context") == (DATA_A, {"I8"})


@pytest.mark.parametrize("mmu", ["native", "flush"])
def test_flush_at_invlpg(mmu):
    """ "invlpg": the guest has changed an entry and said so.  (`cached` flushes when the entry is stored to.)"""

    def run(*lost):
        vm, tables = machine(mmu)
        tables.map(X, DATA_A, 4096, "rw")
        cpu = start(vm, tables)
        cpu.read(X)
        tables.set_entry(X, 1, DATA_B | P)
        vm.mmu.lose_flushes(*lost)
        cpu.invlpg(X)
        return cpu.read(X), invariants(vm)

    assert run() == (DATA_B, set())
    assert run("invlpg") == (DATA_A, {"I8"})


def test_flush_at_invlpg_of_a_large_page():
    """`flush` drops all of a large page, whose leaf table is zapped; that asks for a flush as well, so that the one
    for the INVLPG itself is seen only where both are lost."""

    def run(*lost):
        vm, tables = machine("flush")
        tables.map(LARGE, 2 * MIB, 2 * MIB, "rw", page_size="2MiB")
        cpu = start(vm, tables)
        for i in range(2):
            cpu.read(LARGE + (i << 12))
        tables.set_entry(LARGE, 2, 4 * MIB | P | PS)
        vm.mmu.lose_flushes(*lost)
        cpu.invlpg(LARGE)
        return [cpu.read(LARGE + (i << 12)) - (i << 12) for i in range(2)], invariants(vm)

    assert run() == run("invlpg") == run("zap") == ([4 * MIB, 4 * MIB], set())
    assert run("invlpg", "zap") == ([2 * MIB, 2 * MIB], {"I8"})


@pytest.mark.parametrize("design", ["native", "flush", "cached"])
def test_flush_when_memory_slots_change(design):
    """All pages are zapped, each with a flush, so that nothing is left where the last one is lost; natively a TLB knows
    guest physical addresses, and where there is no memory it is not asked."""

    def run(*lost):
        vm, tables = machine(design)
        tables.map(X, DATA_A, 4096, "rw")
        cpu = start(vm, tables)
        cpu.read(X)
        vm.mmu.lose_flushes(*lost)
        before = vm.stats.tlb_flush
        vm.remove_slot(0)
        assert vm.stats.tlb_flush > before
        with pytest.raises((sc.MMIOAccess, sc.PageFault)):
            cpu.read(X)
        return invariants(vm)

    assert run() == run("slots") == set()


def test_every_flush_has_its_test():
    """The names that can be lost are those that the tests above lose."""
    shadow = {"protect", "zap", "zap_upper", "store", "withheld", "leaf", "link", "log"}
    assert set(FLUSHES) == shadow | {"cr3", "context", "invlpg", "fault", "slots", "host"}  # "host": test_tlb_lost.py
    vm, _ = machine()
    with pytest.raises(sc.ConfigError, match="lose_flushes"):
        vm.mmu.lose_flushes("zap", "everything")


@pytest.mark.parametrize("lost", [*itertools.combinations(FLUSHES, 1), FLUSHES])
def test_lost_flushes_are_counted_all_the_same(lost):
    """A lost flush is requested: the counters of two runs, one with and one without, are the same as long as no
    stale entry is met."""

    def run(*lost):
        s = Scenario()
        s.vm.mmu.lose_flushes(*lost)
        s.cpu.write(X + 8 * 500, 0)
        s.cpu.read(Y)
        s.vm.mmu.unprotect(s.tables.root >> 12)
        s.cpu.cr3 = s.cpu.cr3
        s.cpu.invlpg(X)
        return s.vm.stats.tlb_flush, s.vm.stats.invlpg

    assert run(*lost) == run()


@pytest.mark.parametrize("tlb", [None, sc.TLB()])
def test_log_of_a_slot_that_a_leaf_was_turned_to(tlb):
    """`flush`: a leaf is refreshed after its entry has changed, without INVLPG, to a frame of another slot; the log
    of that slot still sees the stores."""
    slots = [sc.MemorySlot(0, "4MiB"), sc.MemorySlot(16 * MIB, "4MiB")]
    vm = sc.VM(memory=slots, mmu=sc.Shadow.flush(quirks=0), tlb=tlb)
    tables = sc.PageTables(vm, "64")
    tables.map(X, DATA_A, 4096, "rw")
    cpu = start(vm, tables)
    cpu.read(X)
    tables.set_entry(X, 1, 16 * MIB | P | W)
    cpu.write(X, 1)
    assert vm.read_physical(16 * MIB, 1) == b"\1"
    vm.memory.start_dirty_log(1)
    cpu.write(X, 2)
    assert vm.read_physical(16 * MIB, 1) == b"\2"
    assert vm.memory.dirty_log(1)[0]
    assert vm.audit().ok


def test_every_exit_flushes_in_the_series():
    """Quirk EXIT_FLUSHES: a dropped entry asks for no flush, as every exit is one.  So is the exit for a load of CR3:
    a global entry, whose leaf a device's store has dropped, must not let stores reach the new root unseen."""
    vm, tables = machine("kvm-2007")
    root = 0x50000
    tables.map(X, root, 4096, "rw", global_=True, dirty=True)
    cpu = start(vm, tables)
    cpu.write(X + 8 * 300, 0)
    vm.write_physical(root, vm.read_physical(tables.root, 4096))
    vm.write_physical(leaf(tables, X), bytes(8))
    cpu.cr3 = root
    assert invariants(vm) == set()
    assert pages(cpu) == []
