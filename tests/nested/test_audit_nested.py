"""The invariants of the host's tables: each holds, and each is found when it is broken by hand."""

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.engine.mmu import FLUSHES

PAGE, MIB = 4096, 1 << 20
VA = 0x4000_0000
P, W, PS = 1, 2, 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000


def machine(mmu="tdp", host=PAGE, **more):
    vm = sc.VM(memory=[sc.MemorySlot(0, 16 * MIB, host_page_size=host)], mmu=sc.Nested(mmu=mmu), **more)
    tables = sc.PageTables(vm.memory, "64")
    tables.map(VA, 4 * MIB, 64 * PAGE, "rwu", 4096)
    tables.map(VA + 64 * PAGE, 64 * MIB, PAGE, "rwu", 4096)
    tables.activate(vm.vcpus[0])
    for page in range(64):
        vm.vcpus[0].write(VA + page * PAGE, page)
    with pytest.raises(sc.MMIOAccess):
        vm.vcpus[0].read(VA + 64 * PAGE)
    assert vm.audit().ok
    return vm


def leaf(vm, gfn=1024):
    ((page, index), *_) = vm.mmu.rmap(gfn).tolist()
    return page, index


def pages_of(vm, level):
    return [int(row["page"]) for row in vm.mmu.pages if row["level"] == level]


# Each finds its place first, for nothing may be looked at while the arrays are lent.


def another_frame(vm):
    at = leaf(vm)
    a = yield
    a["table"][at] += np.uint64(PAGE)


def wider(vm):
    at = leaf(vm)
    a = yield
    a["table"][at] ^= np.uint64(P)


def a_link_elsewhere(vm):
    (upper,) = pages_of(vm, 2)
    a = yield
    index = np.flatnonzero(a["table"][upper] & np.uint64(P))[0]
    a["table"][upper, index] = (int(a["table"][upper, index]) & ~ADDRESS) | (vm.memory.pool_hpa + upper * PAGE)


def no_parent(vm):
    page = pages_of(vm, 1)[0]
    a = yield
    a["pages"]["parents"][page] = 0


def not_in_the_hash(vm):
    page = pages_of(vm, 1)[0]
    a = yield
    a["hash"][a["hash"] == page] = 0xFFFFFFFF


def a_free_page_in_use(vm):
    a = yield
    free = np.flatnonzero(a["pages"]["active"] == 0)[5]
    a["table"][free, 3] = 1 << 12


def counted_wrong(vm):
    page = pages_of(vm, 1)[0]
    a = yield
    a["pages"]["present"][page] += 1


def a_root_more(vm):
    page = pages_of(vm, 4)[0]
    a = yield
    a["pages"]["root_count"][page] += 1


def not_listed(vm):
    a = yield
    a["frames"]["rmap"][1024] = 0


def mapped_wrong(vm):
    a = yield
    a["mapped"][1024] += 1


def another_device(vm):
    pages = pages_of(vm, 1)
    (page,) = [page for page in pages if vm.mmu.table(page)[0] and not vm.mmu.table(page)[0] & np.uint64(P)]
    a = yield
    a["table"][page, 0] += np.uint64(PAGE)


BROKEN = {
    another_frame: {"I1", "I11", "I3"},
    a_link_elsewhere: {"I1", "I4"},
    no_parent: {"I4"},
    not_in_the_hash: {"I5"},
    a_free_page_in_use: {"I6"},
    counted_wrong: {"I6"},
    a_root_more: {"I7"},
    not_listed: {"I3", "I11"},
    mapped_wrong: {"I11"},
    another_device: {"I1"},
    wider: {"I11", "I9"},
}


@pytest.mark.parametrize("mmu", ["tdp", "direct"])
@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_each_is_found(broken, mmu):
    vm = machine(mmu)
    steps = broken(vm)
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(vm.mmu.writable_arrays())
    del steps
    found = {violation.invariant for violation in vm.audit().violations}
    assert found
    assert found & BROKEN[broken], found


def test_host_pages():
    """I13: a leaf maps what the host has, and lets no store reach the zero page."""
    vm = machine(backing="cold")
    assert vm.audit().ok
    vm.host_unmap(1024, 4)
    assert len(vm.mmu.rmap(1024)) == 0
    vm.vcpus[0].read(VA)
    assert vm.audit().ok
    page, index = leaf(vm)
    vm.host_unmap(1024, 1, discard=True)
    vm.vcpus[0].read(VA)
    page, index = leaf(vm)
    assert not vm.mmu.table(page)[index] & np.uint64(W)  # the zero page
    arrays = vm.mmu.writable_arrays()
    arrays["table"][page, index] |= np.uint64(W)
    del arrays
    assert {violation.invariant for violation in vm.audit().violations} == {"I13"}


def test_counters():
    """I9."""
    vm = machine()
    state = vm.mmu.export_state()
    state["counters"][0] += 1
    vm.mmu.import_state(state)
    assert {violation.invariant for violation in vm.audit().violations} == {"I9"}


@pytest.mark.parametrize("mmu", ["tdp", "direct"])
def test_a_flush_that_is_lost(mmu):
    """I8: a TLB entry outlives what the host took away, or lets stores pass that a log has to see."""
    for flush, act in (
        ("host", lambda vm: vm.host_unmap(1024)),
        ("log", lambda vm: vm.memory.start_dirty_log(0)),
    ):
        assert flush in FLUSHES
        for lost in (False, True):
            vm = machine(mmu, tlb=sc.TLB())
            vm.vcpus[0].write(VA, 1)
            if lost:
                vm.mmu.lose_flushes(flush)
            act(vm)
            found = {violation.invariant for violation in vm.audit().violations}
            assert found == ({"I8"} if lost else set()), (flush, lost)


def test_too_few_tables_for_one_walk():
    """The tables of a guest lie so far apart that no walk can be completed: the error says what is needed."""
    vm = sc.VM(memory="512MiB", mmu=sc.Nested(pool_pages=8, levels=5))
    tables = sc.PageTables(vm.memory, "64", allocate=range(8 * 512, 120 * 512, 4 * 512))
    tables.map(VA, 4 * MIB, PAGE, "rwu", 4096)
    tables.activate(vm.vcpus[0])
    with pytest.raises(sc.PoolExhausted, match="21"):
        vm.vcpus[0].read(VA)
    assert vm.audit().ok


def test_tables_that_run_out():
    """The TDP MMU begins anew where the pool has no page left; the direct MMU recycles the oldest."""
    for mmu in ("tdp", "direct"):
        vm = sc.VM(memory="64MiB", mmu=sc.Nested(mmu=mmu, pool_pages=8, min_free=0, refill=1))
        cpu = vm.vcpus[0]
        for gpa in range(0, 64 * MIB, 2 * MIB):
            cpu.write(gpa, gpa)
            assert cpu.read(gpa) == gpa
        assert vm.stats.mmu_recycled > 0
        assert vm.audit().ok
        vm.mmu.zap_all()
        assert (cpu.read(4 * MIB), vm.audit().ok) == (4 * MIB, True)
