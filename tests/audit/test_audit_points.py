"""Audits at named points: around faults and stores to guest tables, and after loads of CR3."""

from contextlib import suppress

import numpy as np
import pytest
import streams
from guest2007 import DATA, MODES, PAGE, RAM, USER, Guest

import shadowcore as sc
from shadowcore.engine.audit import POINTS

NAMES = ["fuzz_32_s6", "fuzz_64_s6", "fuzz_pae_s6", "forkswitch_pae_s1", "recursive_64_s1", "wp0_64_s1"]
SPTES = "present sptes are not those installed less those removed"


@pytest.mark.parametrize("design", ["native", "flush", "cached", "kvm-2007", "unsync", "adaptive", "kvm-6.1"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_and_nothing_changes(name, design):
    """With audits at every point: the results, counters and memory of the run without."""
    data = streams.stream(name)
    ends = []
    for points in ((), POINTS):
        vm = streams.machine(data, design, features=sc.Features(maxphyaddr=40))
        vm.audit_points = points
        assert vm.audit_points == points
        result = vm.vcpus[0].run(data["ops"][:600])
        ends.append((result, vm.stats.as_dict(), vm.memory.bytes.tobytes()))
    (plain, counters, memory), (audited, audited_counters, audited_memory) = ends
    for column in ("outcome", "error_code", "gpa", "value", "exits", "emulated"):
        assert np.array_equal(getattr(plain, column), getattr(audited, column))
    assert counters == audited_counters
    assert memory == audited_memory


def break_it(vm, by=1):
    """What the audit finds and the engine does not follow."""
    state = vm.mmu.export_state()
    vm.mmu.import_state(state | {"spte_base": state["spte_base"] + by})


def mend_it(vm):
    break_it(vm, -1)


def guest(mode="64"):
    """A guest with eight pages mapped, of which the first has a shadow."""
    made = Guest(mode)
    made.cpu.read(USER)
    return made


# What makes the guest come past each point, and what the point is met by beside it. Those of syncs are of `unsync`
# (test_audit_unsync.py).
MAKERS = {
    "pre-fault": lambda made: made.cpu.read(USER + PAGE),
    "post-fault": lambda made: made.cpu.read(USER + PAGE),
    "pre-write": lambda made: made.vm.write_physical(DATA, b"device"),
    "post-write": lambda made: made.vm.write_physical(DATA, b"device"),
    "post-cr3": lambda made: setattr(made.cpu, "cr3", made.cpu.cr3),
}


@pytest.mark.parametrize("point", MAKERS)
@pytest.mark.parametrize("maker", MAKERS)
def test_each_point_is_where_its_name_says(point, maker):
    """What is broken is found there, and nowhere else; it is reported once, and the operation was done."""
    made = guest()
    vm = made.vm
    vm.audit_points = [point]
    break_it(vm)
    before = vm.stats.as_dict()
    if MAKERS[maker] is MAKERS[point] or maker.rpartition("-")[2] == point.rpartition("-")[2]:
        with pytest.raises(sc.AuditError, match=rf"1 violation\(s\) at {point}, first: I9: {SPTES}") as caught:
            MAKERS[maker](made)
        assert caught.value.point == point
        assert caught.value.violations == (sc.Violation("I9", SPTES, None, 0, 0),)
    else:
        MAKERS[maker](made)
    counted = {name for name, n in vm.stats.as_dict().items() if n != before[name]}
    if maker.endswith("fault"):
        assert {"pf_fixed", "spte_installed"} <= counted
    elif maker.endswith("cr3"):
        assert {"root_loads"} <= counted
    else:
        assert vm.read_physical(DATA, 6) == b"device"
    mend_it(vm)
    assert vm.audit().ok
    MAKERS[maker](made)


@pytest.mark.parametrize("point", ["pre-write", "post-write"])
@pytest.mark.parametrize("mode", MODES)
def test_an_emulated_store_comes_past_the_points_of_writes(mode, point):
    made = guest(mode)
    made.see(made.entry(USER))
    made.vm.audit_points = [point]
    break_it(made.vm)
    with made.counting() as counted, pytest.raises(sc.AuditError) as caught:
        made.edit(USER, 0)
    assert caught.value.point == point
    assert counted == {"pf_taken": 1, "pf_emulate": 1}
    mend_it(made.vm)
    with pytest.raises(sc.PageFault):
        made.cpu.read(USER)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_ends_after_the_operation_that_was_audited(mode):
    made = guest(mode)
    ops = np.zeros(5, sc.OP_DTYPE)
    ops["op"], ops["size"] = sc.Op.WRITE, 1
    ops["addr"] = USER + PAGE * np.array([0, 0, 1, 2, 3])
    ops["value"] = [1, 2, 3, 4, 5]
    made.cpu.run(ops[:1])
    made.vm.audit_points = ("pre-fault",)
    break_it(made.vm)
    with pytest.raises(sc.AuditError) as caught:
        made.cpu.run(ops)
    result = caught.value.result
    assert len(result) == 3
    assert result.exits.tolist() == [0, 0, 1]
    assert result.stats.exits_total == 1
    assert [made.vm.memory.bytes[DATA + PAGE * i] for i in range(4)] == [2, 3, 0, 0]
    mend_it(made.vm)
    rest = made.cpu.run(ops[3:])
    assert rest.exits.tolist() == [1, 1]
    assert made.vm.memory.bytes[DATA + 3 * PAGE] == 5


def test_bad_points():
    vm = sc.VM(memory=RAM)
    for names in (["pre-flight"], "post-cr4", ["pre-fault", ""], [None]):
        with pytest.raises(sc.ConfigError, match="pre-fault, post-fault, pre-write, post-write, post-cr3"):
            vm.audit_points = names
        assert vm.audit_points == ()
    vm.audit_points = "post-cr3"
    assert vm.audit_points == ("post-cr3",)


def test_replay_reports_the_record():
    recording = sc.trace.load()
    done = sc.trace.replay(recording, "cached", stop=3000, audit_at=POINTS)
    assert done.violations == ()
    assert done.whole.records == 3000


# -- views of a structure that was written by hand ---------------------------------------------------------------


@pytest.mark.parametrize("garbage", [0, 1, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
def test_views_of_garbage(garbage):
    """EngineError or some answer, and no crash, whatever is in the links."""
    made = guest()
    mmu = made.vm.mmu
    for array, field in (
        ("pages", "next"),
        ("pages", "parents"),
        ("pages", "prev"),
        ("links", "next"),
        ("frames", "rmap"),
    ):
        kept = mmu.arrays[array].copy()
        mmu.writable_arrays()[array][field] = garbage
        for view in (lambda: mmu.pages, lambda: mmu.rmap(DATA >> 12), lambda: mmu.rmap_length(DATA >> 12)):
            with suppress(sc.EngineError):
                view()
        mmu.writable_arrays()[array][:] = kept
    assert made.vm.audit().ok
    assert len(mmu.pages) == mmu.pages_used


def test_ring_in_the_reverse_map():
    made = guest()
    mmu = made.vm.mmu
    made.map(USER + (4 << 20), DATA, PAGE)
    made.cpu.write(USER, 1)
    made.cpu.write(USER + (4 << 20), 1)
    assert len(mmu.rmap(DATA >> 12)) == 2
    first = int(mmu.arrays["frames"]["rmap"][DATA >> 12]) & 0x7FFFFFFF
    mmu.writable_arrays()["links"]["next"][first - 1] = first
    with pytest.raises(sc.EngineError, match=r"vm\.audit"):
        mmu.rmap(DATA >> 12)
    assert not made.vm.audit().ok
