"""Markers of entries that the guest has not made: when they are set, what they save, and that the guest cannot tell."""

import broken
import numpy as np
import pytest
from guest2007 import PAGE, USER, Guest, every_mode

import shadowcore as sc
from shadowcore.config import MARKERS
from shadowcore.pagetables import FORMATS

MARKER = 1 << 10
BEYOND = USER + 8 * PAGE
"""The first page of the user that is not mapped; its table is."""
STATS = ("markers_made", "marker_hits", "markers_stale", "exits_guest")


def refused(guest, va, *more, write=False):
    """Error code of a user's access that faults, and the counters that moved."""
    access = (lambda: guest.cpu.write(va, 1, 4, user=True)) if write else (lambda: guest.cpu.read(va, 4, user=True))
    with guest.counting(*STATS, *more) as moved, pytest.raises(sc.PageFault) as fault:
        access()
    assert guest.cpu.cr2 == va
    return fault.value.error_code, moved


def made(mode, **settings):
    """A guest that has used its first user page, and the window on its tables."""
    guest = Guest(mode, sc.Shadow.cached(flood_threshold=None, **settings))
    guest.cpu.read(USER, 4, user=True)
    guest.see(guest.entry(USER), guest.entry(USER) + PAGE)
    return guest


def present(guest, va):
    """What the guest's entry for `va` would be if it were mapped as its neighbour is."""
    return guest.tables.entry(USER).value + (va - USER)


@every_mode
def test_a_new_page_marks_what_its_table_does_not_have(mode):
    guest = made(mode, notpresent_marker=True)
    number = guest.page_at(USER, 1)["page"]
    entries = guest.vm.memory.pool[number]
    assert (entries == MARKER).sum() == 512 - 8
    assert entries[8] == MARKER
    assert guest.page_at(USER, 1)["present"] == 1
    for write in (False, True):
        code, moved = refused(guest, BEYOND, write=write)
        assert (code, moved) == (4 | 2 * write, {"pf_guest": 1, "marker_hits": 1})
    assert guest.clean()


@every_mode
def test_the_store_that_makes_the_entry_drops_the_marker_and_the_one_that_clears_it_sets_one(mode):
    guest = made(mode, notpresent_marker=True)
    place, size = guest.tables.entry(USER).gpa + 8 * FORMATS[mode].entry_size, guest.size
    guest.see(place)
    with guest.counting(*STATS) as moved:
        guest.cpu.write(guest.window(place), present(guest, BEYOND), size)
    assert moved == {"pf_taken": 1, "pf_emulate": 1}
    assert guest.exits(BEYOND) == 1
    assert guest.exits(BEYOND) == 0
    with guest.counting(*STATS) as moved:
        guest.cpu.write(guest.window(place), 0, size)
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "markers_made": 1}
    assert refused(guest, BEYOND) == (4, {"pf_guest": 1, "marker_hits": 1})
    assert guest.clean()


@every_mode
def test_at_walks_alone_the_second_fault_is_delivered(mode):
    guest = made(mode, notpresent_marker="synced")
    first = {"pf_taken": 1, "pf_guest": 1, "exits_guest": 1, "markers_made": 1}
    assert refused(guest, BEYOND) == (4, first)
    assert refused(guest, BEYOND) == (4, {"pf_guest": 1, "marker_hits": 1})
    assert guest.clean()


def test_rights_are_no_matter_of_markers():
    """An entry that is present and forbids the access is none to mark."""
    guest = Guest("64", sc.Shadow.cached(notpresent_marker=True))
    guest.map(BEYOND, 0x180000, rights="r")
    code, moved = refused(guest, BEYOND)
    assert (code, moved["exits_guest"], "marker_hits" in moved) == (5, 1, False)


def test_a_fetch_says_so_only_where_the_guest_has_no_execute():
    """The processor's own code would have bit 4 in any case: KVM runs it with EFER.NX set."""
    for mode, code in (("32", 4), ("64", 20)):
        guest = made(mode, notpresent_marker=True)
        with pytest.raises(sc.PageFault) as fault:
            guest.cpu.fetch(BEYOND, user=True)
        assert fault.value.error_code == code
        assert guest.vm.stats.marker_hits == 1


@every_mode
def test_a_marker_that_lags_is_no_reason_for_a_fault(mode):
    """The table is out of sync, the guest makes an entry, and need not flush: the access succeeds."""
    guest = Guest(mode, sc.Shadow.unsync(notpresent_marker="walk", prefetch=0))
    guest.cpu.read(USER, 4, user=True)
    place = guest.tables.entry(USER).gpa + 8 * FORMATS[mode].entry_size
    guest.cpu.write(guest.window(place), 0, guest.size)
    assert guest.vm.stats.mmu_unsync > 0
    code, moved = refused(guest, BEYOND)
    assert (code, moved["markers_made"]) == (4, 1)
    assert refused(guest, BEYOND) == (4, {"pf_guest": 1, "marker_hits": 1})
    with guest.counting(*STATS) as moved:
        guest.cpu.write(guest.window(place), present(guest, BEYOND), guest.size)
        guest.cpu.read(BEYOND, 4, user=True)
    assert (moved["markers_stale"], moved["pf_taken"]) == (1, 1)
    assert guest.clean()


@every_mode
def test_a_table_that_leaves_sync_drops_its_markers_and_a_sync_sets_them(mode):
    guest = Guest(mode, sc.Shadow.unsync(notpresent_marker=True, prefetch=0))
    guest.cpu.read(USER, 4, user=True)
    number = guest.page_at(USER, 1)["page"]
    assert (guest.vm.memory.pool[number] == MARKER).sum() == 512 - 8
    guest.edit(USER + 7 * PAGE, 0)
    assert guest.page_at(USER, 1)["unsync"]
    assert (guest.vm.memory.pool[number] == MARKER).sum() == 0
    guest.cpu.cr3 = guest.cpu.cr3
    guest.cpu.read(USER, 4, user=True)
    assert (guest.vm.memory.pool[number] == MARKER).sum() == 512 - 7
    assert guest.clean()


@pytest.mark.parametrize("mmu", [sc.Shadow.cached(notpresent_marker=True), sc.Shadow.unsync(notpresent_marker=True)])
def test_an_audit_finds_a_marker_that_is_wrong(mmu):
    guest = Guest("64", mmu)
    guest.cpu.read(USER, 4, user=True)
    guest.vm.memory.bytes[guest.entry(BEYOND - PAGE) + 8] = 1  # the entry after the last: present, by no store
    found = {(v.invariant, v.what) for v in guest.vm.audit().violations}
    assert found == {("I1", broken.MARKER)}


def test_a_saved_machine_keeps_them(tmp_path):
    guest = made("64", notpresent_marker=True)
    guest.vm.save(tmp_path / "vm.npz")
    vm = sc.VM.load(tmp_path / "vm.npz")
    assert vm.mmu.design == guest.vm.mmu.design
    assert np.array_equal(vm.memory.pool, guest.vm.memory.pool)
    with pytest.raises(sc.PageFault):
        vm.vcpus[0].read(BEYOND, 4, user=True)
    assert vm.stats.marker_hits == 1


def test_settings():
    assert sc.Shadow.cached().notpresent_marker == sc.Shadow(notpresent_marker=False).notpresent_marker == "never"
    assert sc.Shadow.cached(notpresent_marker=True).notpresent_marker == "page"
    for name in MARKERS:
        assert sc.Shadow.unsync(notpresent_marker=name).notpresent_marker == name
    for make, value in (
        (sc.Shadow.cached, "walk"),
        (sc.Shadow.cached, "always"),
        (sc.Shadow.unsync, 2),
        (sc.Shadow.flush, True),
        (sc.Shadow.flush, "synced"),
    ):
        with pytest.raises(sc.ConfigError, match=r"^notpresent_marker: "):
            make(notpresent_marker=value)
    found = sc.study("demand", operations=2000, windows=0, settings={"notpresent_marker": True})
    assert [name for name, each in found.designs.items() if each.counters["marker_hits"]] == ["cached", "unsync"]
    with pytest.raises(sc.ConfigError, match="notpresent_marker: it is no setting of native, flush"):
        sc.study("demand", ["native", "flush"], operations=2000, settings={"notpresent_marker": True})
