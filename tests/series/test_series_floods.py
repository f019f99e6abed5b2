"""The series of January 2007, patch 24: the third emulated store in a row to one frame zaps its shadow pages.

Scripted guests with exact counts. docs/series.md has the table of all patches.
"""

import pytest
from guest2007 import DATA, PAGE, USER, A, D, Guest, P, U, W, every_mode

import shadowcore as sc


def forking(mode, mmu="cached"):
    """A guest with 8 pages in use that sees its own leaf table; and the stores of a fork, one exit count each."""
    guest = Guest(mode, mmu)
    for va in range(USER, USER + 8 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    guest.see(guest.entry(USER))

    def protect(number):
        va = USER + number * PAGE
        with guest.counting("mmu_flooded") as moved:
            guest.edit(va, guest.tables.entry(va).value & ~W)
        return moved

    return guest, protect


ONE = {"pf_taken": 1, "pf_emulate": 1}
FLOOD = {**ONE, "mmu_shadow_zapped": 1, "mmu_flooded": 1}


@every_mode
def test_the_third_store_of_a_fork_zaps_the_table_and_the_rest_run_natively(mode):
    """Stores 1 and 2 are emulated and drop an entry each; store 3 is emulated and zaps; store 4 faults once for
    W, those after it take no exit."""
    guest, protect = forking(mode)
    assert [protect(i) for i in range(8)] == [ONE, ONE, FLOOD, {"pf_taken": 1}, {}, {}, {}, {}]
    # The next access through the table shadows and protects it again.
    with guest.counting() as moved:
        guest.cpu.read(USER, 4)
    assert moved == {"pf_taken": 1, "mmu_cache_miss": 1, "rmap_protected": 1}
    assert guest.rights(USER) == "ru"


@every_mode
def test_after_a_flood_the_first_store_floods_again(mode):
    """The counter is not set back by faults or zaps; stores to another frame start it anew."""
    guest, protect = forking(mode)
    for i in range(4):
        protect(i)
    guest.cpu.read(USER, 4)
    assert protect(0) == FLOOD
    guest.cpu.read(USER, 4)
    guest.edit(USER, guest.tables.entry(USER, 2).value, level=2)
    guest.cpu.read(USER, 4)
    assert protect(1) == ONE


@every_mode
@pytest.mark.parametrize(("threshold", "floods"), [(1, [1, 1, 1, 1]), (2, [0, 1, 1, 1]), (None, [0, 0, 0, 0])])
def test_the_flood_threshold_is_a_setting(mode, threshold, floods):
    guest, protect = forking(mode, sc.Shadow.cached(flood_threshold=threshold))
    seen = []
    for i in range(4):
        guest.cpu.read(USER + 7 * PAGE, 4)
        seen.append(protect(i).get("mmu_flooded", 0))
    assert seen == floods


@every_mode
def test_demand_paging_is_taken_for_a_flood(mode):
    """Fault, the guest stores the entry, the access runs: the third new page of a table zaps it. With
    flood_reset, as since 2.6.23, it does not: each fault starts the count anew."""
    for reset, zaps in ((False, [0, 0, 1, 1]), (True, [0, 0, 0, 0])):
        guest = Guest(mode, sc.Shadow.cached(flood_reset=reset))
        guest.cpu.read(USER, 4)
        guest.see(guest.entry(USER))
        seen = []
        for i in range(8, 12):
            va = USER + i * PAGE
            with pytest.raises(sc.PageFault):
                guest.cpu.read(va, 4)
            with guest.counting() as moved:
                guest.edit(va, DATA | P | W | U | A | D)
                guest.cpu.read(va, 4)
            seen.append(moved.get("mmu_shadow_zapped", 0))
            assert moved["pf_taken"] == 2
        assert seen == zaps
