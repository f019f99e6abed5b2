"""The 33 patches of January 2007, one section each where a patch changed behaviour: scripted guests, exact counts.

docs/series.md has the table. Numbers follow from the rules; where a count is not obvious its parts are given.
"""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest
from guest2007 import DATA, MODES, PAGE, RAM, USER, A, D, Guest, P, U, W, run
from oracle import CR0_PE, CR0_PG, CR4_PAE

import shadowcore as sc
from shadowcore.pagetables import PS

every_mode = pytest.mark.parametrize("mode", MODES)
eight_byte_modes = pytest.mark.parametrize("mode", ["pae", "64", "la57"])

# Shadow pages of the path to one page of the user, below the root.
BELOW_ROOT = {"32": 1, "pae": 1, "64": 3, "la57": 4}


# -- 1: a reverse map ---------------------------------------------------------------------------------------------


@every_mode
def test_reverse_map_lists_the_writable_sptes_of_a_frame(mode):
    """One record for each leaf that is present and writable: read-only mappings, and clean ones that were only
    read, have none. A mapping that goes takes its record along."""
    guest = Guest(mode)
    frame = DATA + (1 << 20)
    first, second, read_only, clean = (USER + (16 << 20) + i * PAGE for i in range(4))
    guest.map(first, frame)
    guest.map(second, frame)
    guest.map(read_only, frame, rights="rxu")
    guest.map(clean, frame, dirty=False)

    def records():
        return sorted(map(tuple, guest.vm.mmu.rmap(frame >> 12).tolist()))

    def place(va):
        _, page, index, _ = guest.path(va)[-1]
        return page, index

    assert records() == []
    for va in (first, second, read_only, clean):
        guest.cpu.read(va, 4)
    assert records() == [place(first), place(second)]
    guest.cpu.write(clean, 1, 4)
    assert records() == [place(first), place(second), place(clean)]
    gone = place(first)
    guest.edit(first, 0)
    assert gone not in records()
    assert records() == [place(second), place(clean)]


# -- 2: the walker knows the gfn of each table --------------------------------------------------------------------


@every_mode
def test_each_shadow_page_is_known_by_the_gfn_of_its_guest_table(mode):
    """Guest tables of 1024 entries of 4 bytes as well, which need two shadow pages."""
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    shadow = [(level, guest.page_at(USER, level)["gfn"]) for level, *_ in guest.path(USER)]
    walked = [(entry.level, entry.gpa >> 12) for entry in guest.tables.walk(USER)]
    assert shadow == (walked if mode != "pae" else walked[1:])


# -- 3: PAE root entries are loaded with CR3, as the processor does -----------------------------------------------


def bad_root(guest, bits=1 << 1):
    """A PAE root table like the guest's, in another frame, with reserved bits in its last present entry."""
    root = guest.vm.read_physical(guest.tables.root, 32)
    entries = np.frombuffer(root, dtype="<u8").copy()
    entries[3] |= bits
    gpa = next(guest.frames) << 12
    guest.vm.write_physical(gpa, entries.tobytes())
    return gpa


@pytest.mark.parametrize("bits", [1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 60])
def test_a_bad_pae_root_entry_refuses_cr3_and_changes_nothing(bits):
    guest = Guest("pae")
    before = guest.cpu.cr3, guest.cpu.pdptes, guest.vm.mmu.roots()
    gpa = bad_root(guest, bits)
    with pytest.raises(sc.GeneralProtection):
        guest.cpu.cr3 = gpa
    assert (guest.cpu.cr3, guest.cpu.pdptes, guest.vm.mmu.roots()) == before
    guest.vm.write_physical(gpa + 24, bits.to_bytes(8, "little"))  # not present: nothing is reserved
    guest.cpu.cr3 = gpa
    assert guest.cpu.pdptes[3] == bits


def test_a_bad_pae_root_entry_refuses_to_turn_paging_on():
    guest = Guest("pae", paging=False)
    gpa = bad_root(guest)
    registers = guest.tables.registers
    guest.cpu.efer, guest.cpu.cr4, guest.cpu.cr3 = registers["efer"], registers["cr4"], gpa
    with pytest.raises(sc.GeneralProtection):
        guest.cpu.cr0 = registers["cr0"]
    assert guest.cpu.mode == "off"
    guest.cpu.cr3 = registers["cr3"]
    guest.cpu.cr0 = registers["cr0"]
    assert guest.cpu.mode == "pae"


def test_a_bad_pae_root_entry_refuses_to_turn_pae_on():
    """The directory of a 32-bit guest, read as PAE root entries."""
    guest = Guest("32")
    guest.vm.write_physical(guest.tables.root, (0x102).to_bytes(4, "little") * 2)
    before = guest.cpu.cr4, guest.cpu.pdptes
    guest.vm.write_physical(guest.tables.root, (0x103).to_bytes(8, "little"))
    with pytest.raises(sc.GeneralProtection):
        guest.cpu.cr4 |= CR4_PAE
    assert (guest.cpu.cr4, guest.cpu.pdptes) == before
    assert guest.cpu.mode == "32"


def test_pae_root_entries_lie_at_any_multiple_of_32():
    guest = Guest("pae")
    root = guest.vm.read_physical(guest.tables.root, 32)
    guest.vm.write_physical(DATA + 0x7E0, root)
    guest.cpu.cr3 = DATA + 0x7E0
    assert b"".join(entry.to_bytes(8, "little") for entry in guest.cpu.pdptes) == root
    assert guest.exits(USER) == 1


# -- 4: one call walks to the end ---------------------------------------------------------------------------------


@every_mode
def test_a_hole_at_any_level_makes_no_shadow_page(mode):
    """The guest's walk comes first, as far as it goes; only what it found complete is shadowed."""
    for level in range(guest_levels(mode), 0, -1):
        guest = Guest(mode)
        if (mode, level) == ("pae", 3):
            continue  # an absent root entry has no page to be made, see the quirk ABSENT_PDPTES
        guest.tables.set_entry(USER, level, 0)
        with guest.counting() as moved, pytest.raises(sc.PageFault) as fault:
            guest.cpu.read(USER, 4)
        assert moved == {"pf_taken": 1, "pf_guest": 1}
        assert (fault.value.address, fault.value.error_code) == (USER, 0)


def guest_levels(mode):
    return {"32": 2, "pae": 3, "64": 4, "la57": 5}[mode]


@every_mode
def test_a_fault_below_marks_no_entry_accessed(mode):
    """A is set in all entries of a walk that succeeds, and in none of one that does not."""
    guest = Guest(mode)
    guest.tables.set_entry(USER, 1, 0)
    with pytest.raises(sc.PageFault):
        guest.cpu.read(USER, 4)
    assert not any(entry.value & A for entry in guest.tables.walk(USER))
    guest.cpu.read(USER + PAGE, 4)
    walked = guest.tables.walk(USER + PAGE)
    assert all(entry.value & A for entry in (walked[1:] if mode == "pae" else walked))


# -- 5 to 7: four roots in PAE format -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "32", "pae"])
def test_below_four_levels_the_roots_are_four_directories(mode):
    """No shadow page of level 3: each root serves 1 GiB."""
    guest = Guest("32" if mode == "off" else mode, paging=mode != "off")
    rows = [guest.pages(page=page)[0] for page in guest.vm.mmu.roots() if page is not None]
    assert [row["level"] for row in rows] == [2] * len(rows)
    assert not len(guest.pages(level=3))
    if mode == "pae":
        # The user's and the window's; the guest has no others.
        assert [page is None for page in guest.vm.mmu.roots()] == [True, False, True, False]
        assert [row["gfn"] for row in rows] == [guest.table(USER, 2), guest.table(guest.window(0x440000), 2)]
        return
    gfn = 0 if mode == "off" else guest.tables.root >> 12
    assert [(row["gfn"], row["quadrant"], row["direct"]) for row in rows] == [
        (gfn, quadrant, mode == "off") for quadrant in range(4)
    ]


@pytest.mark.parametrize(("mode", "level"), [("64", 4), ("la57", 5)])
def test_with_four_levels_and_more_there_is_one_root(mode, level):
    guest = Guest(mode)
    (root,) = guest.vm.mmu.roots()
    assert guest.pages(page=root)[["gfn", "level", "direct"]].tolist() == [(guest.tables.root >> 12, level, 0)]


def test_pae_root_entries_are_those_of_the_last_cr3_load():
    """Their table is no shadowed table: stores to it are not emulated, and mean nothing until CR3 is loaded."""
    guest = Guest("pae")
    guest.cpu.write(USER, 7, 4)
    guest.see(guest.entry(USER, 3))
    assert not len(guest.pages(guest.table(USER, 3)))
    with guest.counting() as moved:
        guest.edit(USER, 0, level=3)
        assert guest.cpu.read(USER, 4) == 7
    assert moved == {}
    guest.cpu.cr3 = guest.tables.cr3
    with pytest.raises(sc.PageFault):
        guest.cpu.read(USER, 4)


@every_mode
def test_upper_sptes_grant_everything(mode):
    """P, W, U and A, whatever the guest's entries say; the rights are in the leaf alone."""
    guest = Guest(mode)
    for level in range(2, min(guest_levels(mode), 3 if mode == "pae" else 5)):
        entry = guest.tables.entry(USER, level)
        guest.tables.set_entry(USER, level, entry.value & ~(W | U))
    top = 2 if mode in ("32", "pae") else guest_levels(mode)
    guest.tables.set_entry(USER, top, guest.tables.entry(USER, top).value & ~(W | U))
    guest.cpu.read(USER, 4)
    *upper, leaf = guest.path(USER)
    assert {spte & 0xFFF for *_, spte in upper} == {P | W | U | A}
    assert not any(spte >> 63 for *_, spte in upper)
    assert leaf[3] & (P | W | U) == P


# -- 9: shadow pages are kept -------------------------------------------------------------------------------------


@every_mode
def test_a_second_visit_to_a_process_takes_no_page_fault(mode):
    guest = Guest(mode)
    first, second = guest.tables, guest.address_space()
    pages = [USER + i * PAGE for i in range(8)]
    for tables, exits in ((first, 8), (second, 8), (first, 0), (second, 0), (first, 0)):
        guest.cpu.cr3 = tables.cr3
        with guest.counting() as moved:
            for va in pages:
                guest.cpu.write(va, 1, 4)
        assert moved.get("pf_taken", 0) == exits
        assert moved.get("mmu_cache_miss", 0) == (exits and BELOW_ROOT[mode])
    # The baseline refills at each visit.
    baseline = Guest(mode, "flush")
    second = baseline.address_space()
    for tables in (baseline.tables, second, baseline.tables):
        baseline.cpu.cr3 = tables.cr3
        assert sum(baseline.exits(va) for va in pages) == 8


def test_a_32_bit_table_has_two_shadow_pages_and_a_directory_four():
    """One for each 2 MiB, or 1 GiB, of what it maps: the quadrant, part of the key."""
    guest = Guest("32")
    guest.map(USER + (2 << 20), DATA)
    guest.cpu.read(USER, 4)
    guest.cpu.read(USER + (2 << 20), 4)
    table = guest.table(USER)
    assert table == guest.table(USER + (2 << 20))
    assert sorted(guest.pages(table)["quadrant"].tolist()) == [0, 1]
    assert guest.page_at(USER + (2 << 20), 1)["quadrant"] == 1
    assert sorted(guest.pages(guest.tables.root >> 12)["quadrant"].tolist()) == [0, 1, 2, 3]


@every_mode
def test_a_table_under_two_parents_has_one_shadow_page(mode):
    """Two directory entries name one table: one page, two parents. The second path costs one exit that only
    links; removing one entry removes one parent."""
    guest = Guest(mode)
    other = USER + (16 << 20)
    guest.map(other, DATA)  # a table there, and now another one in its place
    guest.tables.set_entry(other, 2, guest.tables.entry(USER, 2).value)
    for va in range(USER, USER + 8 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    with guest.counting() as moved:
        guest.cpu.read(other, 4)
        guest.cpu.read(other + PAGE, 4)
    assert moved == {"pf_taken": 1}
    assert guest.page_at(other, 1) == guest.page_at(USER, 1)
    assert guest.page_at(USER, 1)["parents"] == 2
    guest.edit(other, 0, level=2)
    assert guest.page_at(USER, 1)["parents"] == 1
    assert [guest.exits(USER + i * PAGE) for i in range(8)] == [0] * 8
    with pytest.raises(sc.PageFault):
        guest.cpu.read(other, 4)


def test_with_paging_off_there_are_direct_pages_and_they_are_kept():
    """Four roots of frame 0, leaf tables by the linear address; found again when paging is turned off again."""
    guest = Guest("64", paging=False)
    with guest.counting() as moved:
        guest.cpu.write(DATA, 1, 4)
        guest.cpu.write(DATA + PAGE, 1, 4)
        guest.cpu.write(DATA + (2 << 20), 1, 4)
    assert moved == {"pf_taken": 3, "mmu_cache_miss": 2}
    leaves = guest.pages(level=1)
    assert sorted(leaves["gfn"].tolist()) == [0, 512]
    assert set(leaves["direct"].tolist()) == {1}
    off = guest.cpu.cr0
    guest.start()
    guest.cpu.read(USER, 4)
    guest.cpu.cr0 = off
    with guest.counting() as moved:
        guest.cpu.write(DATA, 2, 4)
        guest.cpu.write(DATA + (2 << 20), 2, 4)
    assert moved == {}


# -- 10, 11: guest tables are write-protected ---------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("mappings", [1, 2, 7])
def test_a_frame_that_becomes_a_table_is_write_protected_everywhere(mode, mappings):
    """The frame is mapped writable at several addresses; then it becomes a table, and all of them lose W."""
    guest = Guest(mode)
    other = USER + (16 << 20)
    guest.map(other, DATA)
    frame = guest.table(other)
    aliases = [USER + (32 << 20) + i * PAGE for i in range(mappings)]
    for va in aliases:
        guest.map(va, frame << 12)
        guest.cpu.read(va, 4)
    assert {guest.rights(va) for va in aliases} == {"rwu"}
    assert guest.vm.mmu.rmap_length(frame) == mappings
    with guest.counting() as moved:
        guest.cpu.read(other, 4)
    assert moved == {"pf_taken": 1, "mmu_cache_miss": 1, "rmap_protected": mappings}
    assert {guest.rights(va) for va in aliases} == {"ru"}
    assert guest.vm.mmu.rmap_length(frame) == 0


@every_mode
def test_a_new_leaf_to_a_table_is_not_writable(mode):
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    alias = USER + (16 << 20)
    guest.map(alias, guest.table(USER) << 12)
    guest.map(alias + PAGE, DATA)
    guest.cpu.read(alias, 4)
    guest.cpu.read(alias + PAGE, 4)
    assert (guest.rights(alias), guest.rights(alias + PAGE)) == ("ru", "rwu")
    assert guest.vm.mmu.rmap_length(guest.table(USER)) == 0


@every_mode
def test_within_a_large_page_only_the_tables_are_protected(mode):
    """A large page over all tables, in the shadow one leaf for each 4 KiB: stores to the table in use are
    emulated, those to the first frame of the page and to others are not."""
    size = 4 << 20 if mode == "32" else 2 << 20
    guest = Guest(mode)
    large = USER + (64 << 20)
    first = 0x400000  # the tables begin at 0x440000
    guest.map(large, first, size, page_size=size)
    guest.cpu.read(USER, 4)
    table = guest.table(USER) << 12
    unused = guest.table(USER) + 100 << 12
    for gpa, stores in ((first, 0), (table + 0xF00, 1), (unused, 0), (first + PAGE, 0)):
        with guest.counting() as moved:
            guest.cpu.write(large + gpa - first, 1, 4)
        assert moved.get("pf_emulate", 0) == stores, hex(gpa)
        assert guest.rights(large + gpa - first) == ("ru" if stores else "rwu")
    page = guest.page_at(large, 1)
    assert (page["gfn"], page["direct"], page["present"]) == (first >> 12, 1, 4)
    assert guest.path(large)[-2][3] >> 9 & 1  # the mark of a large page


# -- 12, 13: stores to tables are emulated, and drop what they change ---------------------------------------------


@every_mode
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_store_to_a_table_is_emulated(mode, size):
    """One exit; the bytes are there, and only they."""
    guest = Guest(mode)
    gpa = guest.entry(USER + 100 * PAGE)
    guest.vm.write_physical(gpa - 8, bytes(range(0x10, 0x28)))
    guest.cpu.read(USER, 4)
    guest.see(gpa)
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa), 0xF0E0D0C0B0A09080, size)
    straddles = {"mmu_shadow_zapped": 1} if size > guest.size else {}
    assert moved == {"pf_taken": 1, "pf_emulate": 1} | straddles
    wanted = bytearray(range(0x10, 0x28))
    wanted[8 : 8 + size] = 0xF0E0D0C0B0A09080.to_bytes(8, "little")[:size]
    assert guest.vm.read_physical(gpa - 8, 24) == wanted


@every_mode
def test_a_store_over_a_page_boundary_reaches_both_frames(mode):
    """From the end of a table in use into a frame that is none: one half is emulated."""
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    table = guest.table(USER) << 12
    after = next(guest.frames) << 12
    alias = USER + (16 << 20)
    guest.map(alias, table)
    guest.map(alias + PAGE, after)
    guest.cpu.read(alias, 4)
    guest.cpu.read(alias + PAGE, 4)
    with guest.counting() as moved:
        guest.cpu.write(alias + PAGE - 4, 0x1122334455667788, 8)
    assert moved == {"pf_taken": 1, "pf_emulate": 1}
    assert guest.vm.read_physical(table + PAGE - 4, 4) == 0x55667788.to_bytes(4, "little")
    assert guest.vm.read_physical(after, 4) == 0x11223344.to_bytes(4, "little")


@every_mode
def test_a_store_outside_ram_is_handed_out(mode):
    guest = Guest(mode)
    device = USER + (16 << 20)
    guest.map(device, RAM + 0x3000)
    with guest.counting("pf_mmio") as moved, pytest.raises(sc.MMIOAccess) as access:
        guest.cpu.write(device + 0x10, 1, 4)
    assert access.value.gpa == RAM + 0x3010
    assert moved == {"pf_taken": 1, "pf_mmio": 1} | {"mmu_cache_miss": BELOW_ROOT[mode]}


@every_mode
def test_a_store_to_an_entry_drops_one_spte(mode):
    """The entry that was stored to is faulted in anew, by what it says now; its neighbours stay."""
    guest = Guest(mode)
    for va in range(USER, USER + 4 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    guest.see(guest.entry(USER))
    present = guest.page_at(USER, 1)["present"]
    moved_to = DATA + 0x40000
    guest.vm.write_physical(moved_to, b"\x99\0\0\0")
    with guest.counting() as moved:
        guest.edit(USER, moved_to | P | W | U | A | D)
    assert moved == {"pf_taken": 1, "pf_emulate": 1}
    assert guest.page_at(USER + PAGE, 1)["present"] == present - 1
    assert guest.leaf(USER) == 0
    assert [guest.exits(USER + i * PAGE) for i in range(4)] == [1, 0, 0, 0]
    assert guest.cpu.read(USER, 4) == 0x99
    assert guest.vm.mmu.rmap_length(DATA >> 12) == 0


# -- 14: a page that cannot be emulated is unprotected ------------------------------------------------------------


@every_mode
def test_an_unprotected_table_is_written_natively(mode):
    """All its shadow pages go, so that the store itself can run: one exit for W, no emulation. False where
    there is nothing to zap: then the failure is another one."""
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    gpa = guest.entry(USER)
    guest.see(gpa)
    with guest.counting() as moved:
        assert guest.vm.mmu.unprotect(gpa >> 12)
        assert not guest.vm.mmu.unprotect(gpa >> 12)
    assert moved == {"mmu_shadow_zapped": 1, "mmu_unprotect": 1}
    with guest.counting() as moved:
        guest.edit(USER, 0)
        guest.edit(USER + PAGE, 0)
    assert moved == {"pf_taken": 1}


# -- 15, 16: zapping cuts links, not children ---------------------------------------------------------------------


@eight_byte_modes
def test_children_of_a_zapped_table_stay_and_are_found_again(mode):
    """A directory is zapped (a store over two entries): its table keeps its leaves and loses its parent; one
    exit puts both in place again, with no leaf filled."""
    guest = Guest(mode)
    for va in range(USER, USER + 4 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    directory = guest.entry(USER, 2)
    guest.see(directory)
    child = guest.page_at(USER, 1)
    with guest.counting() as moved:
        guest.cpu.write(guest.window(directory + 12), 0, 8)
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_shadow_zapped": 1}
    row = guest.pages(page=child["page"])[0]
    assert (row["parents"], row["present"]) == (0, child["present"])
    with guest.counting() as moved:
        for va in range(USER, USER + 4 * PAGE, PAGE):
            guest.cpu.read(va, 4)
    # In PAE mode the directory is a root: emptied, not freed.
    assert moved == {"pf_taken": 1} | ({} if mode == "pae" else {"mmu_cache_miss": 1})
    assert guest.page_at(USER, 1)["page"] == child["page"]


@every_mode
def test_a_zapped_leaf_table_takes_its_records_along(mode):
    guest = Guest(mode)
    gfns = [(DATA >> 12) + i for i in range(4)]
    for i in range(4):
        guest.cpu.read(USER + i * PAGE, 4)
    assert [guest.vm.mmu.rmap_length(gfn) for gfn in gfns] == [1] * 4
    guest.vm.mmu.unprotect(guest.table(USER))
    assert [guest.vm.mmu.rmap_length(gfn) for gfn in gfns] == [0] * 4


@every_mode
def test_a_table_without_parents_is_kept_until_it_is_linked_again(mode):
    """Removing the last entry that names a table frees nothing; naming it again costs one exit that links."""
    guest = Guest(mode)
    for va in range(USER, USER + 4 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    entry = guest.tables.entry(USER, 2)
    guest.see(entry.gpa)
    child = guest.page_at(USER, 1)["page"]
    with guest.counting("mmu_pde_zapped") as moved:
        guest.edit(USER, 0, level=2)
    # A 32-bit entry covers two shadow tables, of which one is linked.
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_pde_zapped": 1}
    assert guest.pages(page=child)[0]["parents"] == 0
    guest.edit(USER, entry.value, level=2)
    with guest.counting() as moved:
        for va in range(USER, USER + 4 * PAGE, PAGE):
            guest.cpu.read(va, 4)
    assert moved == {"pf_taken": 1}
    assert guest.page_at(USER, 1)["page"] == child


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


# -- 18: INVLPG is not intercepted --------------------------------------------------------------------------------


@every_mode
def test_invlpg_takes_no_exit_and_is_not_needed(mode):
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    guest.edit(USER, 0)
    with pytest.raises(sc.PageFault):
        guest.cpu.read(USER, 4)
    with guest.counting("exits_invlpg", "invlpg") as moved:
        guest.cpu.invlpg(USER)
        guest.cpu.invlpg(USER + PAGE)
    assert moved == {"invlpg": 2}


@every_mode
def test_before_the_series_invlpg_is_what_makes_an_edit_seen(mode):
    guest = Guest(mode, "flush")
    guest.cpu.read(USER, 4)
    guest.edit(USER, 0)
    assert guest.exits(USER) == 0
    with guest.counting("exits_invlpg", "invlpg") as moved:
        guest.cpu.invlpg(USER)
    assert moved == {"exits_invlpg": 1, "invlpg": 1}
    with pytest.raises(sc.PageFault):
        guest.cpu.read(USER, 4)


# -- 20: stores over two entries ----------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_store_over_two_entries_zaps_the_table(mode, size):
    guest = Guest(mode)
    for va in range(USER, USER + 4 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    gpa = guest.entry(USER + PAGE)
    guest.see(gpa)
    with guest.counting("mmu_flooded") as moved:
        guest.cpu.write(guest.window(gpa - size // 2), 0, size)
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_shadow_zapped": 1, "mmu_flooded": 1}
    assert not len(guest.pages(guest.table(USER)))
    assert guest.clean()


@every_mode
def test_a_short_store_within_an_entry_drops_one_spte(mode):
    guest = Guest(mode)
    for va in range(USER, USER + 4 * PAGE, PAGE):
        guest.cpu.read(va, 4)
    gpa = guest.entry(USER + PAGE)
    guest.see(gpa)
    guest.cpu.write(guest.window(gpa), guest.tables.entry(USER + PAGE).value & 0xFF, 1)
    assert [guest.exits(USER + i * PAGE) for i in range(4)] == [0, 1, 0, 0]


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
    guest.vm.memory.pool[200, 77] = 1 << 12
    (violation,) = guest.vm.audit().violations
    assert (violation.invariant, violation.page, violation.index) == ("I6", 200, 77)


# -- 24: write floods ---------------------------------------------------------------------------------------------


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


# -- 25: roots in use ---------------------------------------------------------------------------------------------


@every_mode
def test_a_root_in_use_is_emptied_and_kept(mode):
    """A flood of stores to the root: it loses its entries, stays, and becomes the youngest page. It stays
    protected, so that each store after that costs an exit again."""
    guest = Guest(mode)
    guest.cpu.read(USER, 4)
    level = {"32": 2, "pae": 2, "64": 4, "la57": 5}[mode]
    root = guest.page_at(USER, level)
    assert root["root_count"] == 1
    unused = guest.entry(USER, level) + 64 * guest.size
    guest.see(unused)
    for _ in range(5):
        with guest.counting() as moved:
            guest.cpu.write(guest.window(unused), 0, guest.size)
        assert (moved["pf_taken"], moved["pf_emulate"]) == (1, 1)
        guest.see(unused)
    row = guest.pages(page=root["page"])[0]
    youngest = guest.pages(root["gfn"])["age"]
    assert row["root_count"] == 1
    # In mode 32 all four roots are of this frame; in the others the window's path was made again since.
    window = len(guest.path(guest.window(unused))) - 1 if mode in ("64", "la57") else 0
    assert max(youngest) == guest.vm.mmu.pages_used - 1
    assert row["present"] == (1 if window else 0)
    assert guest.exits(USER) == 1
    assert guest.clean()
