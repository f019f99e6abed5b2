"""I15 and its neighbours under agile paging: each is found when it is broken by hand, or comes from a file."""

import numpy as np
import pytest
from agile_machine import PAGE, VA, AgileMachine
from forged import parts, written

import shadowcore as sc


def machine(**more):
    made = AgileMachine(sc.Shadow.agile(nested_writes=1, nested_back="never"), **more)
    made.cpu.write(VA, 1)
    made.touch()
    made.cpu.read(VA)
    assert made.vm.audit().ok
    return made


def page_of(vm, field, level=None):
    pages = vm.mmu.pages
    rows = pages[(pages[field] == 1) & ((pages["level"] == level) if level else True)]
    return int(rows["page"][0])


def an_entry_below_a_mark(arrays, vm, at):
    arrays["table"][at["nested"], 3] = arrays["table"][at["leaf"], at["used"]]


def a_host_table_of_another_address(arrays, vm, at):
    table = arrays["table"][at["upper"]]
    used = int(np.flatnonzero(table)[0])
    table[used + 1], table[used] = table[used], 0


def a_stand_in_that_is_a_host_table(arrays, vm, at):
    arrays["pages"]["role"][at["leaf"]] |= np.uint32(1 << 26)


def a_stand_in_that_is_none(arrays, vm, at):
    arrays["pages"]["role"][at["nested"]] &= ~np.uint32(1 << 26)


def a_table_that_is_shadowed_too(arrays, vm, at):
    arrays["frames"]["shadowed"][at["frame"]] += 1


def places(made):
    vm = made.vm
    leaf = page_of(vm, "host", 1)
    return {
        "nested": page_of(vm, "nested"), "leaf": leaf, "upper": page_of(vm, "host", 2),
        "used": int(np.flatnonzero(vm.mmu.table(leaf))[0]), "frame": made.table(),
    }  # fmt: skip


def a_count_below_a_mark(arrays, vm, at):
    arrays["pages"]["present"][at["nested"]] = 1


BROKEN = {
    an_entry_below_a_mark: "I6",
    a_count_below_a_mark: "I15",
    a_host_table_of_another_address: "I15",
    a_stand_in_that_is_a_host_table: "I15",
    a_stand_in_that_is_none: "I15",
    a_table_that_is_shadowed_too: "I15",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_each_is_found(broken):
    made = machine()
    at = places(made)
    arrays = made.vm.mmu.writable_arrays()
    broken(arrays, made.vm, at)
    del arrays
    found = {violation.invariant for violation in made.vm.audit().violations}
    assert BROKEN[broken] in found, found
    with pytest.raises(sc.AuditError):
        made.cpu.read(VA)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_a_file_with_it_is_refused(broken, tmp_path):
    made = machine()
    at = places(made)
    made.vm.save(tmp_path / "vm")
    state, arrays = parts(tmp_path / "vm")
    views = {"table": arrays["mmu_table"].view(np.uint64), "frames": None, "pages": None}
    from shadowcore.engine.mmu import FRAME_DTYPE, PAGE_DTYPE

    views["frames"] = arrays["mmu_frames"].view(FRAME_DTYPE).reshape(-1)
    views["pages"] = arrays["mmu_pages"].view(PAGE_DTYPE).reshape(-1)
    broken(views, made.vm, at)
    written(tmp_path / "forged", state, arrays)
    with pytest.raises(sc.SnapshotError):
        sc.VM.load(tmp_path / "forged")


@pytest.mark.parametrize("change", [
    {"nested_number": 1 << 24}, {"nested_clock": -1}, {"nested_since": 1 << 40}, {"nested_clock": "2"},
])  # fmt: skip
def test_the_rule_in_a_file(change, tmp_path):
    made = machine()
    made.vm.save(tmp_path / "vm")
    state, arrays = parts(tmp_path / "vm")
    state["mmu"] |= change
    written(tmp_path / "forged", state, arrays)
    with pytest.raises(sc.SnapshotError):
        sc.VM.load(tmp_path / "forged")


def test_the_number_of_tables_is_checked():
    made = machine()
    state = made.vm.mmu.export_state()
    from shadowcore.engine.counters import COUNTERS, EXIT_REASONS

    state["counters"][len(EXIT_REASONS) + COUNTERS.index("nested_tables")] += 1
    made.vm.mmu.import_state(state)
    assert {violation.invariant for violation in made.vm.audit().violations} == {"I15"}


@pytest.mark.parametrize("lost", [False, True])
def test_a_flush_that_is_lost(lost):
    """I8: an entry of the TLB, of a walk below a mark, outlives what the host took away, or the log has to see."""
    for flush, act in (
        ("host", lambda vm, gfn: vm.host_unmap(gfn)),
        ("log", lambda vm, gfn: vm.memory.start_dirty_log(0)),
    ):
        made = machine(tlb=sc.TLB())
        made.cpu.write(VA, 2)
        if lost:
            made.vm.mmu.lose_flushes(flush)
        act(made.vm, int(made.entry(VA).value) >> 12 & 0xFFFFF)
        found = {violation.invariant for violation in made.vm.audit().violations}
        assert found == ({"I8"} if lost else set()), flush


def test_counters_that_are_reset_keep_the_number():
    made = machine()
    made.vm.stats.reset()
    assert made.vm.stats.nested_tables == 1
    assert made.vm.audit().ok
    made.cpu.write(VA + PAGE, 2)
