"""Settings of every design that shadows guest tables: leaves made at an emulated store and for neighbours of a fault,
floods counted page by page. Scripted guests with exact counts; whatever is set, the guest sees what `native` has."""

import numpy as np
import pytest
import streams
from guest2007 import DATA, PAGE, USER, A, Guest, P, W, every_mode

import shadowcore as sc

COLUMNS = ("outcome", "error_code", "gpa", "value")
ONE = {"pf_taken": 1, "pf_emulate": 1}
FLOOD = {**ONE, "mmu_shadow_zapped": 1, "mmu_flooded": 1}


def guest(mode="64", pages=16, **settings):
    return Guest(mode, sc.Shadow.cached(**settings), pages=pages)


@every_mode
@pytest.mark.parametrize("prefetch", [2, 8, 32])
def test_a_fault_fills_the_neighbours_of_its_group(mode, prefetch):
    made = guest(mode, pages=40, prefetch=prefetch)
    first = 8 % prefetch
    # All pages from the start of the group on, up to the first that cannot be made.
    assert [made.exits(USER + i * PAGE) for i in range(8, 8 + prefetch - first)] == [1] + [0] * (prefetch - first - 1)
    assert made.exits(USER + 39 * PAGE) == (prefetch < 32 or 0) + (prefetch == 32)
    assert made.vm.stats.prefetched >= prefetch - 1
    assert made.vm.audit().ok


@every_mode
def test_neighbours_end_at_the_first_that_was_not_accessed(mode):
    made = guest(mode, prefetch=8)
    at = USER + 3 * PAGE
    gpte = made.tables.entry(at).value
    made.map(at, DATA + 3 * PAGE, accessed=False)
    assert made.exits(USER + PAGE) == 1
    assert [made.exits(USER + i * PAGE) for i in range(8)] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert made.tables.entry(at).value & A == gpte & A


def test_neighbours_have_the_rights_of_a_load():
    """W only where the guest's entry is dirty; a table of the guest stays write-protected."""
    made = guest(prefetch=8)
    made.map(USER + PAGE, DATA + PAGE, dirty=False)
    made.map(USER + 2 * PAGE, made.table(USER) << 12)
    made.cpu.read(USER)
    assert made.leaf(USER) & W
    assert not made.leaf(USER + PAGE) & W
    assert not made.leaf(USER + 2 * PAGE) & W
    assert made.vm.audit().ok


@every_mode
def test_neighbours_below_a_large_page(mode):
    made = guest(mode, prefetch=8)
    size = 4 << 20 if mode == "32" else 2 << 20
    base = USER + (8 << 20)
    made.map(base, 0, size, page_size=size)
    offsets = (0, size - PAGE)  # with 4-byte entries: in different shadow pages
    for offset in offsets:
        first = offset & ~(8 * PAGE - 1)
        assert [made.exits(base + first + i * PAGE) for i in range(8)] == [1] + [0] * 7
        for i in range(8):
            va = base + first + i * PAGE
            assert made.cpu.translate(va) is not None
            assert made.leaf(va) & P
    assert made.vm.audit().ok


@every_mode
def test_a_store_makes_the_leaf_at_once(mode):
    made = guest(mode, update_in_place=True)
    made.cpu.read(USER)
    made.see(made.entry(USER))
    value = made.tables.entry(USER).value
    moved_to = value + 5 * PAGE
    with made.counting("prefetched") as moved:
        made.edit(USER, moved_to)
    assert moved == {**ONE, "prefetched": 1}
    assert made.exits(USER) == 0
    assert made.cpu.translate(USER).gpa == DATA + 5 * PAGE
    made.edit(USER, value & ~A)  # a walk has to set A
    assert made.exits(USER) == 1
    assert made.vm.audit().ok


def test_a_store_of_half_an_entry_and_by_a_device():
    made = guest(update_in_place=True)
    made.cpu.read(USER)
    at = made.entry(USER)
    made.see(at)
    value = made.tables.entry(USER).value
    made.cpu.write(made.window(at), (value + PAGE) & 0xFFFFFFFF, 4)
    assert made.exits(USER) == 0
    assert made.cpu.translate(USER).gpa == DATA + PAGE
    made.vm.write_physical(at, (value + 2 * PAGE).to_bytes(8, "little"))
    assert made.exits(USER) == 1  # no vcpu says by which rules the entry is to be read
    assert made.cpu.translate(USER).gpa == DATA + 2 * PAGE


def edits(made, *vas):
    """What a store to the entry of each costs."""
    found = []
    for va in vas:
        with made.counting("mmu_flooded") as moved:
            made.edit(va, made.tables.entry(va).value & ~W)
        found.append(moved)
    return found


def two_tables(**settings):
    made = guest("64", **settings)
    other = USER + (2 << 20)
    made.map(other, DATA, 16 * PAGE)
    for va in (USER, other):
        made.cpu.read(va)
        made.see(made.entry(va))
    return made, USER, other


def test_each_page_counts_its_own_stores():
    """In turn to two tables: no flood to a vcpu's count, one in each to the pages' own."""
    made, one, two = two_tables()
    assert edits(made, one, two, one, two, one, two) == [ONE] * 6
    made, one, two = two_tables(flood_pages=True)
    assert edits(made, one, two, one, two, one, two) == [ONE] * 4 + [FLOOD] * 2


def test_a_fault_through_a_page_ends_its_flood():
    made, one, _ = two_tables(flood_pages=True)
    assert edits(made, one, one) == [ONE] * 2
    made.cpu.read(one + 4 * PAGE)
    assert edits(made, one, one, one) == [ONE, ONE, FLOOD]
    made, one, _ = two_tables()
    assert edits(made, one, one) == [ONE] * 2
    made.cpu.read(one + 4 * PAGE)
    assert edits(made, one) == [FLOOD]


@pytest.mark.parametrize(("forget", "floods"), [(None, True), (2, True), (1, False)])
def test_stores_elsewhere_make_a_page_forget(forget, floods):
    made, one, two = two_tables(flood_pages=True, flood_forget=forget)
    assert edits(made, one, two, one, two, one)[-1] == (FLOOD if floods else ONE)


COMBINED = (
    {"prefetch": 32, "update_in_place": True},
    {"update_in_place": True, "flood_pages": True, "flood_threshold": 2, "notpresent_marker": "page"},
    {"prefetch": 4, "flood_pages": True, "flood_forget": 2, "policy": "lru", "pool_pages": 16, "refill": 8},
    {"prefetch": 8, "update_in_place": True, "policy": "cost", "pool_pages": 16, "refill": 8, "recycle_children": True},
)


@pytest.fixture(scope="module")
def native():
    return {name: ran(name, "native") for name in ("fuzz_32_s6", "fuzz_pae_s6")}


def ran(name, mmu, general=False, points=()):
    data = streams.stream(name)
    vm = streams.machine(data, mmu)
    vm.mmu.general = general
    vm.audit_points = points
    result = vm.vcpus[0].run(data["ops"])
    assert vm.audit().ok
    return vm, result


@pytest.mark.parametrize("settings", COMBINED, ids=range(len(COMBINED)))
@pytest.mark.parametrize("name", ["fuzz_32_s6", "fuzz_pae_s6"])
def test_the_guest_sees_the_same(name, settings, native):
    vm, result = ran(name, sc.Shadow.cached(**settings))
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(result, column), getattr(native[name][1], column))
    assert streams.different_frames(streams.frames_of(vm), streams.frames_of(native[name][0])) == []
    slow, other = ran(name, sc.Shadow.cached(**settings), general=True)
    assert vm.stats.as_dict() == slow.stats.as_dict()
    assert np.array_equal(result.exits, other.exits)
    assert np.array_equal(vm.mmu.arrays["table"], slow.mmu.arrays["table"])


@pytest.mark.parametrize("settings", COMBINED, ids=range(len(COMBINED)))
def test_tables_that_lag(settings):
    """Fast paths do not show, nor do audits after each exit and store."""
    settings = {name: value for name, value in settings.items() if name != "flood_pages"}
    vm, result = ran("fuzz_pae_s6", sc.Shadow.unsync(**settings))
    slow, other = ran("fuzz_pae_s6", sc.Shadow.unsync(**settings), general=True)
    assert vm.stats.as_dict() == slow.stats.as_dict()
    assert np.array_equal(result.value, other.value)


@pytest.mark.slow
@pytest.mark.parametrize("settings", COMBINED, ids=range(len(COMBINED)))
@pytest.mark.parametrize("make", [sc.Shadow.cached, sc.Shadow.unsync])
@pytest.mark.parametrize("name", ["fuzz_32_s6", "fuzz_pae_s6", "pressure_64_s1"])
def test_audits_at_each_fault_and_store(name, make, settings):
    if make == sc.Shadow.unsync:
        settings = {name: value for name, value in settings.items() if name != "flood_pages"}
    ran(name, make(**settings), points=("post-fault", "post-write"))


def test_a_saved_machine_goes_on(tmp_path):
    for mmu in (
        sc.Shadow.cached(prefetch=8, update_in_place=True, flood_pages=True, flood_forget=3),
        sc.Shadow.unsync(update_in_place=True, flood_forget=3),
    ):
        vm, loaded = streams.saved_half_way("fuzz_pae_s6", mmu, tmp_path / "vm")
        assert np.array_equal(vm.mmu.arrays["pages"], loaded.mmu.arrays["pages"])


def test_a_dirty_log_shows_no_neighbour():
    made = guest(prefetch=8)
    made.vm.memory.start_dirty_log(0)
    made.cpu.read(USER)
    made.vm.memory.clear_dirty_log(0)
    assert not made.leaf(USER + PAGE) & W
    assert made.vm.memory.dirty_log(0).sum() == 0
    made.cpu.write(USER + PAGE, 1)
    assert made.vm.memory.dirty_log(0).sum() == 1


def test_settings_are_checked():
    for wrong, said in (
        ({"prefetch": 3}, "prefetch: 3 is not 0, 1, 2, 4"),
        ({"flood_forget": 4}, "flood_forget: pages have to have counts"),
        ({"flood_pages": True, "flood_reset": True}, "flood_pages, flood_reset"),
        ({"flood_pages": True, "flood_threshold": 300}, "flood_threshold: 300"),
        ({"flood_pages": True, "flood_forget": 0}, "flood_forget: 0 is not within 1"),
        ({"quirks": sc.Quirk.KVM_2007, "prefetch": 8}, "update_in_place, prefetch: leaves are made without a walk"),
    ):
        with pytest.raises(sc.ConfigError, match=said):
            sc.Shadow.cached(**wrong)
    with pytest.raises(sc.ConfigError, match="guest tables have to be shadowed"):
        sc.Shadow.flush(prefetch=8)
    with pytest.raises(sc.ConfigError, match="lagging tables count floods page by page"):
        sc.Shadow.unsync(flood_pages=True)
    assert (sc.Shadow.cached().prefetch, sc.Shadow.unsync().prefetch) == (0, 8)
    assert sc.Shadow.kvm_2007(flood_pages=True).flood_pages
