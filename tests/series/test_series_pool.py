"""The series of January 2007, patches 17, 22, 23, 25, 28 to 30, 32 and 33: the pool, its limits, its audits.

Scripted guests with exact counts. docs/series.md has the table of all patches; the sections here have their numbers.
"""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
from guest2007 import BELOW_ROOT, DATA, LEVELS, PAGE, USER, Guest, W, every_mode
from places import TESTS

import shadowcore as sc

# -- 17: recycling ------------------------------------------------------------------------------------------------


def many_tables(mmu="cached", tables=260):
    """A 4-level guest with one page in each of `tables` leaf tables."""
    guest = Guest("64", mmu, pages=0)
    for i in range(tables):
        guest.map(USER + (i << 21), DATA)
    return guest


def test_the_pool_is_used_up_to_its_last_pages_and_then_refilled():
    """256 pages. A fault that begins with 5 free recycles nothing; one that begins with 4 zaps the oldest until
    25 are free: 231 in use, and 3 more for its own path, of which the upper tables were among the oldest."""
    guest = many_tables()
    vm = guest.vm
    # 4 roots of paging off, the root, and above the leaf tables one each of levels 3 and 2.
    assert vm.mmu.pages_used == 5
    reached = 0
    while vm.mmu.pages_used < 251:
        guest.cpu.read(USER + (reached << 21), 4)
        reached += 1
    assert (reached, vm.mmu.pages_free) == (244, 5)
    with guest.counting() as moved:
        guest.cpu.read(USER + (reached << 21), 4)
    assert moved == {"pf_taken": 1, "mmu_cache_miss": 1}
    assert vm.mmu.pages_free == 4
    with guest.counting() as moved:
        guest.cpu.read(USER + (reached + 1 << 21), 4)
    assert moved == {"pf_taken": 1, "mmu_recycled": 21, "mmu_shadow_zapped": 21, "mmu_cache_miss": 3}
    assert vm.mmu.pages_used == 231 + 3
    assert guest.clean()


def test_recycling_is_by_age_of_creation():
    """However often a page was used. Of the 21 victims 4 are the roots of paging off and 2 the upper tables (the
    root in use is passed over): 15 leaf tables, those made first. The next one is there still, unlinked."""
    guest = many_tables()
    for i in range(245):
        guest.cpu.read(USER + (i << 21), 4)
        guest.cpu.read(USER, 4)
    guest.cpu.read(USER + (245 << 21), 4)
    made = []
    for i in range(17):
        with guest.counting() as moved:
            guest.cpu.read(USER + (i << 21), 4)
        assert moved["pf_taken"] == 1
        made.append(moved.get("mmu_cache_miss", 0))
    assert made == [1] * 15 + [0, 0]


def test_the_least_pool_serves_every_access():
    """Four pages, the path of one access: each fault recycles what the one before needed."""
    guest = Guest("64", sc.Shadow.cached(pool_pages=4, min_free=3, refill=3))
    guest.map(USER + (16 << 20), DATA)
    for _ in range(3):
        assert guest.exits(USER) == 1
        assert guest.exits(USER + (16 << 20)) == 1
    assert guest.clean()


# -- 22, 23: free pages are clean ---------------------------------------------------------------------------------


@every_mode
def test_freed_pages_are_all_zero(mode):
    """Nothing checks this when a page is taken or freed: zapping clears the entries in use, and only those."""
    guest = Guest(mode)
    for va in range(USER, USER + 8 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    used = set(guest.vm.mmu.pages["page"].tolist())
    guest.vm.mmu.zap_all()
    freed = sorted(used - set(guest.vm.mmu.pages["page"].tolist()))
    assert freed
    assert not guest.vm.memory.pool[freed].any()
    assert guest.clean()


def test_an_entry_left_in_a_free_page_is_named():
    guest = Guest("64")
    guest.vm.mmu.writable_arrays()["table"][200, 77] = 1 << 12
    (violation,) = guest.vm.audit().violations
    assert (violation.invariant, violation.page, violation.index) == ("I6", 200, 77)


# -- 25: roots in use ---------------------------------------------------------------------------------------------


@every_mode
def test_a_root_in_use_is_emptied_and_kept(mode):
    """A flood of stores to a root: it loses its entries, stays, and becomes the youngest page. It stays
    protected, so that each store after that costs an exit again."""
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    level = 2 if mode == "pae" else LEVELS[mode]
    root = guest.page_at(USER, level)
    unused = guest.entry(USER, level) + 64 * guest.size
    guest.see(unused)
    roots = 4 if mode == "32" else 1  # all four are of this frame
    for number in range(1, 6):
        with guest.counting() as moved:
            guest.cpu.write(guest.window(unused), 0, guest.size)
        rows = guest.pages(root["gfn"])
        if number < 3:
            assert moved == {"pf_taken": 1, "pf_emulate": 1}
            assert rows["present"].sum() > 0
            continue
        assert (moved["pf_taken"], moved["pf_emulate"], moved["mmu_shadow_zapped"]) == (1, 1, roots)
        assert (rows["root_count"].tolist(), rows["present"].sum()) == ([1] * roots, 0)
        assert sorted(rows["age"]) == list(range(guest.vm.mmu.pages_used - roots, guest.vm.mmu.pages_used))
    assert root["page"] in guest.vm.mmu.roots()
    assert guest.exits(USER) == 1
    assert guest.clean()


@every_mode
def test_recycling_passes_over_a_root_in_use(mode):
    """With fewer pages than would do, the pool is recycled over and over; roots keep what they hold as long as
    their tables are there, and are never freed."""
    guest = Guest(mode, sc.Shadow.cached(pool_pages=12, min_free=5, refill=5))
    for i in range(1, 40):
        guest.map(USER + (i << 22), DATA)
    roots = guest.vm.mmu.roots()
    for i in range(40):
        guest.cpu.read(USER + (i << 22), 4)
        assert guest.vm.mmu.roots() == roots
        assert guest.clean()
    assert guest.vm.stats.mmu_recycled > 20
    assert set(roots) - {None} <= set(guest.vm.mmu.pages["page"].tolist())


# -- 28, 32: the end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmu", ["cached", "flush", "native", "kvm-2007", "unsync"])
def test_a_machine_that_goes_leaves_nothing(mmu):
    """Guest memory that the caller gave, and the pool, are held by nothing when the machine is gone."""
    ram = np.zeros(1 << 20, dtype=np.uint8)
    vm = sc.VM(memory=ram, mmu=mmu)
    vm.vcpus[0].write(0x1000, 7)
    held = [weakref.ref(array) for array in (ram, vm.memory.pool) if array is not None]
    del ram, vm
    gc.collect()
    assert [array() for array in held] == [None] * len(held)


def test_zapping_everything_leaves_no_record_and_no_link():
    guest = Guest("64")
    for i in range(8):
        guest.cpu.read(USER + i * PAGE, 4)
    guest.vm.mmu.zap_all()
    pages = guest.vm.mmu.pages
    assert (len(pages), pages["root_count"].tolist(), pages["present"].tolist()) == (1, [1], [0])
    assert not any(guest.vm.mmu.rmap_length((DATA >> 12) + i) for i in range(8))
    assert guest.clean()


def test_a_processor_keeps_its_mmu():
    """The parts of a machine may go in any order: the structure stays as long as one processor is left."""
    guest = Guest("64")
    guest.cpu.write(USER, 7, 4)
    cpu = guest.cpu
    del guest
    gc.collect()
    assert cpu.read(USER, 4) == 7
    assert cpu.mmu.pages_used > 5


# -- 29, 30: memory is reserved before anything changes -----------------------------------------------------------

NO_ALLOCATION = """
import resource, sys
import shadowcore as sc
from guest2007 import DATA, PAGE, USER, Guest

TABLES = 256
guest = Guest("64", sc.Shadow.cached(pool_pages=512))
first = USER + (32 << 20)
for i in range(TABLES):
    guest.map(first + (i << 21), DATA, 512 * PAGE)
write = guest.cpu.write
write(USER, 1, 4)
guest.see(guest.entry(USER))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used, used))
try:
    bytearray(1 << 20)
    sys.exit("the limit does not bind")
except MemoryError:
    pass
for i in range(TABLES):
    for j in range(512):
        write(first + (i << 21) + j * PAGE, 1, 4)
guest.edit(USER, 0)
assert guest.vm.mmu.rmap_length((DATA >> 12) + 300) == TABLES
assert guest.vm.stats.pf_taken == TABLES * 512 + 3
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space by what Linux reports")
def test_faults_and_stores_allocate_nothing():
    """A process that may not grow any more: 131072 faults, each with a record in the reverse map, and an emulated
    store. The records alone would be 1 MiB, and chained ones more."""
    path = [str(TESTS / "models"), str(TESTS / "makers"), *sys.path]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{NO_ALLOCATION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pool_too_small_is_an_error_and_changes_nothing():
    """Five levels of tables, four pages. The guest goes on in what fits: with paging off."""
    guest = Guest("la57", sc.Shadow.cached(pool_pages=4, min_free=0, refill=0))
    with pytest.raises(sc.PoolExhausted) as error:
        guest.cpu.read(USER, 4)
    assert (error.value.needed, error.value.had) == (5, 4)
    assert guest.clean()
    assert guest.cpu.cr2 == 0
    guest.cpu.cr0 &= (1 << 31) - 1
    guest.cpu.write(DATA, 5, 4)
    assert guest.vm.read_physical(DATA, 1) == b"\5"


def test_the_error_names_the_roots_that_pin_the_pool():
    """Three processors, each in its own address space. Two have a root in use; the third needs a root and three
    tables below it, and the pool has five pages."""
    vm = sc.VM(memory="8MiB", mmu=sc.Shadow.cached(pool_pages=5, min_free=0, refill=0), vcpus=3)
    spaces = [sc.PageTables(vm.memory, "64", allocate=range(512 + 16 * i, 528 + 16 * i)) for i in range(3)]
    for cpu, tables in zip(vm.vcpus, spaces, strict=True):
        tables.map(USER, DATA, PAGE, "rw")
        for name, value in tables.registers.items():
            setattr(cpu, name, value)
    assert [vm.vcpus[i].read(USER, 4) for i in (0, 1, 0, 1)] == [0] * 4
    with pytest.raises(sc.PoolExhausted) as error:
        vm.vcpus[2].read(USER, 4)
    assert {tables.root >> 12 for tables in spaces[:2]} <= set(error.value.roots)
    assert (error.value.needed, error.value.had) == (6, 5)
    assert vm.audit().ok
    vm.vcpus[1].cr3 = spaces[2].cr3  # one root for both
    assert vm.vcpus[2].read(USER, 4) == 0


@every_mode
def test_a_fault_that_finds_no_page_changes_nothing_and_can_be_repeated(mode):
    """Each page that the path needs fails in turn."""
    for after in range(BELOW_ROOT[mode]):
        guest = Guest(mode)
        before = guest.vm.mmu.pages.tolist(), guest.vm.stats.pf_taken
        guest.vm.mmu.fail_pages(after, 1000)
        with pytest.raises(sc.PoolExhausted):
            guest.cpu.read(USER, 4)
        assert guest.clean()
        assert guest.vm.stats.pf_taken == before[1]
        guest.vm.mmu.fail_pages(0, 0)
        assert guest.exits(USER) == 1
        assert guest.clean()


# -- 33: audits ---------------------------------------------------------------------------------------------------


def audited():
    """A guest with two pages in use and their table seen through the window."""
    guest = Guest("64")
    guest.cpu.write(USER, 1, 4)
    guest.cpu.write(USER + PAGE, 1, 4)
    guest.see(guest.entry(USER))
    assert guest.clean()
    return guest, {va: guest.path(va)[-1] for va in (USER, guest.window(guest.entry(USER)))}


def test_audit_counts_the_records_of_the_reverse_map():
    """Two writable leaves, one of which loses W behind the back of the reverse map."""
    guest, leaves = audited()
    _, page, index, spte = leaves[USER]
    guest.vm.mmu.writable_arrays()["table"][page, index] = spte & ~W
    assert {violation.invariant for violation in guest.vm.audit().violations} == {"I3"}


def test_audit_sees_a_writable_guest_table():
    guest, leaves = audited()
    _, page, index, spte = leaves[guest.window(guest.entry(USER))]
    guest.vm.mmu.writable_arrays()["table"][page, index] = spte | W
    found = {(violation.invariant, violation.page, violation.index) for violation in guest.vm.audit().violations}
    assert ("I2", page, index) in found


def test_audit_compares_every_leaf_with_the_guests_tables():
    """The guest's entry changes behind the back of the shadow; and the shadow behind that of the guest."""
    guest, leaves = audited()
    _, page, index, _ = leaves[USER]
    gpa = guest.entry(USER)
    guest.vm.memory.bytes[gpa + 1] ^= 0x10  # another frame
    (violation,) = guest.vm.audit().violations
    assert (violation.invariant, violation.page, violation.index) == ("I1", page, index)
    guest.vm.memory.bytes[gpa + 1] ^= 0x10
    assert guest.clean()
    guest.vm.memory.bytes[gpa] &= ~W & 0xFF  # less rights
    (violation,) = guest.vm.audit().violations
    assert (violation.invariant, violation.page, violation.index) == ("I1", page, index)
