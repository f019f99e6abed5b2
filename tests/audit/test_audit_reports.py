"""What an audit tells its user, what it leaves alone, and that it ends whatever it finds."""

import numpy as np
import pytest
import ruins
from broken import CLEAN, RIGHTS, ROOTS, SUM, behind, machine, place, scalars
from guest2007 import PAGE, USER, D, Guest, W
from samples import sampled

import shadowcore as sc

# -- what a user sees ---------------------------------------------------------------------------------------------


def test_clean_report():
    guest = machine("64")
    report = guest.vm.audit()
    present = int(np.count_nonzero(guest.vm.memory.pool & np.uint64(1)))
    assert (report.ok, report.count, report.violations, report.sptes) == (True, 0, (), present)
    assert str(report) == f"audit clean, {present} sptes"
    assert guest.vm.audit(strict=True) == report


def test_broken_report():
    guest = machine("64")
    page, index = place(guest, USER)
    behind(guest, guest.entry(USER), lambda entry: entry & ~W)
    scalars(guest, n_free=0)
    report = guest.vm.audit()
    line = f"I1: {RIGHTS} (page {page}, entry {index}, gfn {guest.table(USER):#x})"
    assert (report.ok, report.count) == (False, 2)
    head, *lines = str(report).splitlines()
    assert head.startswith("2 violation")
    assert sorted(lines) == sorted([line, f"I6: {SUM}"])
    assert sc.Violation("I1", RIGHTS, page, index, guest.table(USER)) in report.violations


def test_strict_audit():
    guest = machine("64")
    page, _ = place(guest, USER)
    guest.vm.mmu.writable_arrays()["pages"]["root_count"][page] = 1
    report = guest.vm.audit()
    with pytest.raises(sc.AuditError) as caught:
        guest.vm.audit(strict=True)
    assert caught.value.violations == report.violations
    assert "I7" in str(caught.value)
    assert ROOTS in str(caught.value)


def test_more_violations_than_are_kept():
    """All are counted, the first 64 are kept; the report and the error give the number of all."""
    guest = Guest("64", pages=200)
    for i in range(200):
        guest.cpu.write(USER + i * PAGE, 1)
    assert guest.vm.audit().ok
    for i in range(200):
        behind(guest, guest.entry(USER + i * PAGE), lambda entry: entry & ~D)
    report = guest.vm.audit()
    assert (report.count, len(report.violations)) == (200, 64)
    assert {v.what for v in report.violations} == {CLEAN}
    assert str(report).startswith("200 violation")
    with pytest.raises(sc.AuditError, match="200 violation"):
        guest.vm.audit(strict=True)


def test_audit_changes_nothing():
    guest = machine("64")
    for break_it in (lambda: None, lambda: behind(guest, guest.entry(USER), lambda entry: 0)):
        break_it()
        arrays = {name: array.copy() for name, array in guest.vm.mmu.arrays.items()}
        state = guest.vm.mmu.export_state(), guest.cpu.export_state(), guest.vm.memory.bytes.tobytes()
        guest.vm.audit()
        assert state == (guest.vm.mmu.export_state(), guest.cpu.export_state(), guest.vm.memory.bytes.tobytes())
        for name, array in guest.vm.mmu.arrays.items():
            np.testing.assert_array_equal(array, arrays[name])


# -- a structure in ruins -----------------------------------------------------------------------------------------


@sampled("rounds", 150, part=3)
@pytest.mark.parametrize("name", ruins.NAMES)
def test_audit_of_ruins(name, rounds):
    """Whatever the arrays hold, an audit ends, and follows no index out of them."""
    ruins.in_a_process(name, seed=1, rounds=rounds)
