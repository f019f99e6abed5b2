"""The series of January 2007, patches 1 to 9: what is shadowed by what, and kept.

Scripted guests with exact counts. docs/series.md has the table of all patches; the sections here have their numbers.
"""

import numpy as np
import pytest
from guest2007 import BELOW_ROOT, DATA, LEVELS, PAGE, USER, A, Guest, P, U, W, every_mode
from oracle import CR4_PAE

import shadowcore as sc

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
    guest.vm.write_physical(guest.tables.root, (0x103).to_bytes(8, "little"))
    before = guest.cpu.cr4, guest.cpu.pdptes
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
    for level in range(LEVELS[mode], 0, -1):
        guest = Guest(mode)
        if (mode, level) == ("pae", 3):
            continue  # an absent root entry has no page to be made, see the quirk ABSENT_PDPTES
        guest.tables.set_entry(USER, level, 0)
        with guest.counting() as moved, pytest.raises(sc.PageFault) as fault:
            guest.cpu.read(USER, 4)
        assert moved == {"pf_taken": 1, "pf_guest": 1}
        assert (fault.value.address, fault.value.error_code) == (USER, 0)


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
    for entry in guest.tables.walk(USER, 2):
        if (mode, entry.level) != ("pae", 3):
            guest.tables.set_entry(USER, entry.level, entry.value & ~(W | U))
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
