"""Each quirk by itself: what exactly it changes, beside the same guest without it. Those of Linux 6.1 come last."""

import inspect
import pathlib
import re
import sys

import pytest
from guest2007 import BELOW_ROOT, DATA, LEVELS, PAGE, RAM, TABLES, USER, A, D, Guest, P, U, W, every_mode
from oracle import CR0_PG, CR0_WP, CR4_PCIDE, CR4_PGE, CR4_PKE, CR4_SMAP, EFER_NXE

import shadowcore as sc
from shadowcore import Quirk
from shadowcore.pagetables import NX

OTHER = USER + (16 << 20)
RESERVED = 1 << 3  # of a page fault's error code


def pair(mode, quirk, design=sc.Shadow.cached, **settings):
    """(guest without the quirk, guest with it and no other), each for the same script."""
    return [Guest(mode, design(quirks=quirks), **settings) for quirks in (Quirk.NONE, quirk)]


def attempt(access, *args, **kwargs):
    """Error code of the page fault that the access ends with, or None."""
    try:
        access(*args, **kwargs)
    except sc.PageFault as fault:
        return fault.error_code
    return None


def refused(guest, va, **kwargs):
    """A user's store that its rights forbid: the error code, and the counters that moved."""
    with guest.counting() as moved:
        code = attempt(guest.cpu.write, va, 1, 4, user=True, **kwargs)
    return code, moved


def test_every_quirk_has_a_test():
    """Here, or, of what the guest sees of tables that lag, beside the other tests of that."""
    names = [name for name, _ in inspect.getmembers(sys.modules[__name__], inspect.isfunction)]
    beside = pathlib.Path(__file__).parents[1] / "unsync" / "test_guest_sees.py"
    names += re.findall(r"^def (test_\w+)", beside.read_text(), re.M)
    for quirk in Quirk:
        assert any(name.startswith(f"test_{quirk.name.lower()}_") for name in names), quirk


def test_every_quirk_is_on_in_one_design_of_the_real_code():
    """In that of January 2007 or in that of Linux 6.1; none is in the corrected ones."""
    together = Quirk.NONE
    for quirk in Quirk:
        together |= quirk
    assert sc.Shadow.kvm_2007().quirks == Quirk.KVM_2007 == Quirk(0xFFFF)
    assert sc.Shadow.kvm_6_1().quirks == sc.Shadow.kvm_6_12().quirks == Quirk.KVM_6_1
    assert together == Quirk.KVM_2007 ^ Quirk.KVM_6_1
    assert sc.Shadow.cached().quirks == sc.Shadow.unsync().quirks == Quirk.NONE


@pytest.mark.parametrize(
    ("design", "quirk"),
    [(sc.Shadow.cached, Quirk.WP0_HIDES_USER), (sc.Shadow.unsync, Quirk.TWO_EXITS), (sc.Shadow.flush, Quirk.KVM_6_1)],
)
def test_a_quirk_of_another_design_is_refused(design, quirk):
    with pytest.raises(sc.ConfigError, match="the design has only"):
        design(quirks=quirk)


@every_mode
def test_two_exits_for_a_violation_through_a_missing_leaf(mode):
    """The first fills the leaf, the second finds it and is injected; at a leaf that is there, one is enough."""
    plain, quirky = pair(mode, Quirk.TWO_EXITS)
    for guest, exits in ((plain, 1), (quirky, 2)):
        guest.map(OTHER, DATA, rights="rxu")
        code, moved = refused(guest, OTHER)
        assert (code, moved["pf_taken"], moved["pf_guest"]) == (7, exits, 1)
        assert moved.get("mmu_cache_miss", 0) == (BELOW_ROOT[mode] if exits == 2 else 0)
        assert guest.rights(OTHER) == ("ru" if exits == 2 else "")
    assert refused(quirky, OTHER) == (7, {"pf_taken": 1, "pf_guest": 1})


def almost_full(guest):
    """Fill the pool by tables of the user, until the next fault recycles the 21 oldest pages."""
    made = 1
    while guest.vm.mmu.pages_free > 4:
        guest.map(USER + (made << 21), DATA)
        guest.cpu.read(USER + (made << 21), 4)
        made += 1


def test_two_exits_are_one_where_the_processor_found_a_leaf():
    """Recycling at the start of the fault took the leaf away: it is filled again, and the fault injected at once."""
    guest = Guest("64", "kvm-2007")
    kernel = guest.window(guest.tables.root)
    guest.cpu.read(kernel, 4)
    almost_full(guest)
    code, moved = refused(guest, kernel)
    assert (code, moved["pf_taken"], moved["mmu_recycled"]) == (7, 1, 21)


@every_mode
def test_accessed_early_marks_entries_of_a_refused_access(mode):
    def marked(guest, va):
        walked = guest.tables.walk(va)
        return [bool(entry.value & A) for entry in (walked[1:] if mode == "pae" else walked)]

    for guest, early in zip(pair(mode, Quirk.ACCESSED_EARLY), (False, True), strict=True):
        guest.map(OTHER, DATA, rights="rxu", accessed=False)
        assert refused(guest, OTHER)[0] == 7
        assert marked(guest, OTHER) == [early] * len(marked(guest, OTHER))
        guest.tables.set_entry(OTHER + PAGE, 1, 0)
        assert attempt(guest.cpu.read, OTHER + PAGE, 4) == 0
        assert marked(guest, OTHER + PAGE) == [early] * (len(marked(guest, OTHER)) - 1) + [False]


@every_mode
def test_dirty_lost_when_a_store_to_a_table_is_emulated(mode):
    """The entry that maps the table, clean until then."""
    for guest, dirty in zip(pair(mode, Quirk.DIRTY_LOST), (True, False), strict=True):
        guest.map(OTHER, guest.table(USER) << 12, dirty=False)
        guest.cpu.read(USER, 4)
        with guest.counting() as moved:
            guest.cpu.write(OTHER, guest.tables.entry(USER).value, guest.size)
        assert moved["pf_emulate"] == 1
        assert bool(guest.tables.entry(OTHER).value & D) == dirty
        # Data is another matter: its D bit is set.
        guest.map(OTHER + PAGE, DATA, dirty=False)
        guest.cpu.write(OTHER + PAGE, 1, 4)
        assert guest.tables.entry(OTHER + PAGE).value & D


@every_mode
def test_role_without_access_lends_the_rights_of_another_path(mode):
    """One table below two entries, of which the second is read-only. With rights in the role there are two
    shadow pages; without, the second path finds the leaves of the first, and stores that the guest forbids."""
    second = USER + (16 << 20)
    for guest, wrong in zip(pair(mode, Quirk.ROLE_WITHOUT_ACCESS), (False, True), strict=True):
        guest.map(second, DATA)
        guest.tables.set_entry(second, 2, guest.tables.entry(USER, 2).value & ~W)
        guest.cpu.write(USER, 1, 4, user=True)
        guest.cpu.read(second, 4, user=True)
        assert len(guest.pages(guest.table(USER))) == (1 if wrong else 2)
        assert attempt(guest.cpu.write, second, 2, 4, user=True) == (None if wrong else 7)
        assert guest.cpu.read(USER, 4) == (2 if wrong else 1)


@every_mode
def test_role_without_access_denies_what_another_path_denied(mode):
    """The same, and the read-only path comes first: the guest gets a fault that its tables do not give."""
    second = USER + (16 << 20)
    for guest, wrong in zip(pair(mode, Quirk.ROLE_WITHOUT_ACCESS), (False, True), strict=True):
        guest.map(second, DATA)
        guest.tables.set_entry(second, 2, guest.tables.entry(USER, 2).value & ~W)
        guest.cpu.read(second, 4, user=True)
        guest.cpu.read(USER, 4, user=True)
        assert attempt(guest.cpu.write, USER, 2, 4, user=True) == (7 if wrong else None)


@every_mode
def test_role_without_access_keeps_the_leaves_of_a_large_page_that_becomes_dirty(mode):
    """Two places in a clean large page are read, one is stored to: its entry is dirty, and its leaves may be W from
    now on. That is another shadow page, so that two entries for one frame each keep their own dirty bit; the
    other place takes an exit more."""
    size = 4 << 20 if mode == "32" else 2 << 20
    large, alias = USER + (64 << 20), USER + (128 << 20)
    for guest, wrong in zip(pair(mode, Quirk.ROLE_WITHOUT_ACCESS), (False, True), strict=True):
        for va in (large, alias):
            guest.map(va, 0, size, page_size=size, dirty=False)
        assert guest.exits(large) == 1
        assert guest.exits(large + PAGE) == 1
        guest.cpu.write(large, 1, 4)
        assert guest.tables.entry(large, 2).value & D
        assert guest.exits(large + PAGE) == (0 if wrong else 1)
        assert guest.exits(alias) == 1
        guest.cpu.write(alias, 2, 4)
        assert bool(guest.tables.entry(alias, 2).value & D) != wrong


@every_mode
def test_role_without_mode_lets_stores_through_that_wp_forbids(mode):
    """A supervisor's store to a read-only page of the user, granted under CR0.WP=0, is granted still when WP is
    set; with WP in the role the pages are others."""
    for guest, wrong in zip(pair(mode, Quirk.ROLE_WITHOUT_MODE, paging=False), (False, True), strict=True):
        guest.map(OTHER, DATA, rights="rxu")
        guest.start(wp=False)
        guest.cpu.write(OTHER, 1, 4)
        assert guest.rights(OTHER) == "rw"
        guest.cpu.cr0 |= CR0_WP
        assert attempt(guest.cpu.write, OTHER, 2, 4) == (None if wrong else 3)
        assert guest.cpu.read(OTHER, 4) == (2 if wrong else 1)


def test_pde_write_drops_the_wrong_entry_of_a_32_bit_directory():
    """A directory entry now names another table: the old mapping stays in use."""
    for guest, wrong in zip(pair("32", Quirk.PDE_WRITE), (False, True), strict=True):
        guest.map(OTHER, DATA + PAGE)
        guest.vm.write_physical(DATA, b"\1\0\0\0\2")
        guest.vm.write_physical(DATA + PAGE, b"\3\0\0\0\4")
        guest.cpu.read(USER, 4)
        guest.see(guest.entry(USER, 2))
        guest.edit(USER, guest.tables.entry(OTHER, 2).value, level=2)
        assert guest.cpu.read(USER, 4) == (1 if wrong else 3)


def test_pde_write_drops_entries_of_both_halves_of_a_32_bit_table():
    """Level 1: the entry with the same number in the other quadrant is dropped too; that costs an exit more."""
    half = 2 << 20
    for guest, exits in zip(pair("32", Quirk.PDE_WRITE), (0, 1), strict=True):
        guest.map(USER + half, DATA)
        guest.cpu.read(USER, 4)
        guest.cpu.read(USER + half, 4)
        guest.see(guest.entry(USER))
        guest.edit(USER, guest.tables.entry(USER).value)
        assert guest.exits(USER + half) == exits
        assert guest.exits(USER) == 1


def test_no_refill_at_cr3_uses_the_pool_up():
    """Loads of CR3 with no fault between them, each with a root of its own: with the quirk the pool is used up
    to its last page and then roots are missing, until a fault recycles; the original died there."""
    for guest, wrong in zip(pair("64", Quirk.NO_REFILL_AT_CR3), (False, True), strict=True):
        recycled = []
        for gfn in range(TABLES >> 12, (TABLES >> 12) + 300):
            with guest.counting() as moved:
                guest.cpu.cr3 = gfn << 12
            recycled.append(moved.get("mmu_recycled", 0))
        if wrong:
            assert set(recycled) == {0}
            assert guest.vm.mmu.pages_free == 0
            assert guest.vm.mmu.roots() == [None]
        else:
            # 4 roots of paging off, then one a load but for the first: 252 in use before the load that recycles 21.
            assert [i for i, n in enumerate(recycled) if n] == [248, 269, 290]
            assert set(recycled) == {0, 21}
        guest.cpu.cr3 = guest.tables.cr3
        with guest.counting() as moved:
            guest.cpu.read(USER, 4)
        assert moved["pf_taken"] == 1
        assert guest.clean()


@every_mode
def test_rmap_leak_leaves_a_record_for_a_leaf_that_gave_up_w(mode):
    """CR0.WP=0: the supervisor stores to a read-only page of the user, the user reads it, over and over. What
    the original dies of, write-protecting the frame, drops the records here."""
    for guest, leaks in zip(pair(mode, Quirk.RMAP_LEAK, paging=False), (False, True), strict=True):
        frame = DATA + (1 << 20)
        guest.map(OTHER, frame, rights="rxu")
        guest.start(wp=False)
        lengths = []
        for _ in range(3):
            guest.cpu.write(OTHER, 1, 4)
            assert guest.rights(OTHER) == "rw"
            lengths.append(guest.vm.mmu.rmap_length(frame >> 12))
            guest.cpu.read(OTHER, 4, user=True)
            assert guest.rights(OTHER) == "ru"
            lengths.append(guest.vm.mmu.rmap_length(frame >> 12))
        assert lengths == ([1, 1, 2, 2, 3, 3] if leaks else [1, 0, 1, 0, 1, 0])
        assert len(guest.vm.mmu.rmap(frame >> 12)) == 0


def test_paging_off_unprotected_writes_tables_behind_the_shadow():
    """A table in use, edited with paging off: the edit is emulated, or it is not and the old mapping stays."""
    for guest, wrong in zip(pair("64", Quirk.PAGING_OFF_UNPROTECTED), (False, True), strict=True):
        guest.cpu.read(USER, 4)
        gpa, value = guest.entry(USER), guest.tables.entry(USER + PAGE).value
        on = guest.cpu.cr0
        guest.cpu.cr0 = on & ~CR0_PG
        with guest.counting() as moved:
            guest.cpu.write(gpa, value, 8)
        assert moved.get("pf_emulate", 0) == (0 if wrong else 1)
        guest.cpu.cr0 = on
        assert guest.exits(USER) == (0 if wrong else 1)
        assert guest.rights(USER) == "rwu"
        assert (guest.vm.mmu.rmap_length(DATA >> 12) == 1) == wrong


def test_a_device_access_with_paging_off_leaves_no_trace_in_2007():
    guest = Guest("64", "kvm-2007", paging=False)
    with guest.counting() as moved, pytest.raises(sc.MMIOAccess):
        guest.cpu.read(RAM + PAGE, 4)
    assert moved == {"pf_taken": 1}


def test_absent_pdptes_pin_pages_and_protect_frame_0():
    """Two of the four PAE root entries are not present. A page for each makes frame 0 a table: stores to it are
    emulated."""
    for guest, wrong in zip(pair("pae", Quirk.ABSENT_PDPTES), (False, True), strict=True):
        roots = guest.vm.mmu.roots()
        assert roots.count(None) == (0 if wrong else 2)
        assert (roots[0] == roots[2]) or not wrong
        zero = guest.pages(0)
        assert len(zero) == (1 if wrong else 0)
        assert zero["root_count"].tolist() == ([2] if wrong else [])
        guest.map(OTHER, 0)
        with guest.counting() as moved:
            guest.cpu.write(OTHER, 1, 4)
        assert moved.get("pf_emulate", 0) == wrong


def test_root_emptied_by_recycling_costs_the_running_process_its_top_level():
    """The root in use is among the 21 oldest pages when the pool is refilled: emptied, so that a path none of
    whose tables was recycled has to be linked anew; or passed over."""
    for guest, wrong in zip(pair("64", Quirk.ROOT_EMPTIED, pages=0), (0, 1), strict=True):
        window = guest.window(guest.tables.root)
        made = 0
        while guest.vm.mmu.pages_free > 4:
            va = USER + (made << 21)
            guest.map(va, DATA)
            guest.cpu.read(va, 4)
            made += 1
            if made == 40:
                guest.cpu.read(window, 4)
        root = guest.page_at(window, 4)
        guest.map(USER + (made << 21), DATA)
        with guest.counting() as moved:
            guest.cpu.read(USER + (made << 21), 4)
        assert (moved["mmu_recycled"], moved["mmu_shadow_zapped"]) == (21, 21 + wrong)
        assert guest.exits(window) == wrong
        assert guest.page_at(window, 4)["page"] == root["page"]
        assert guest.clean()


@pytest.mark.parametrize("mode", ["pae", "64", "la57"])
def test_nx_leaf_only_runs_what_an_upper_entry_forbids(mode):
    for guest, wrong in zip(pair(mode, Quirk.NX_LEAF_ONLY), (False, True), strict=True):
        guest.tables.set_entry(USER, 2, guest.tables.entry(USER, 2).value | NX)
        guest.map(OTHER, DATA, rights="rwu")
        guest.cpu.read(USER, 4)
        guest.cpu.read(OTHER, 4)
        assert attempt(guest.cpu.fetch, USER) == (None if wrong else 0x11)
        assert attempt(guest.cpu.fetch, OTHER) == 0x11  # the leaf's own


@every_mode
def test_processor_code_tells_of_the_shadow_entry_instead_of_the_guests(mode):
    """A violation where no leaf is yet: the page is there for the guest, but the code says it is not."""
    for guest, codes in zip(pair(mode, Quirk.PROCESSOR_CODE), ((7, 9), (6, 0)), strict=True):
        guest.map(OTHER, DATA, rights="rxu")
        assert refused(guest, OTHER) == (codes[0], {"pf_taken": 1, "pf_guest": 1})
        assert attempt(guest.cpu.write, OTHER + PAGE, 1, 4) == 2  # not present: the same
        if mode != "32":
            guest.tables.set_entry(OTHER + PAGE, 1, DATA | P | W | U | A | D | 1 << 51)
            assert attempt(guest.cpu.read, OTHER + PAGE, 4) == codes[1]


def test_processor_code_blames_the_guest_for_what_recycling_mended():
    """A store to a shadowed table, found read-only by the processor. Recycling at the start of the fault takes the
    leaf and the table's shadow page; the leaf is filled again, W this time, and the fault injected for all that."""
    guest = Guest("64", "kvm-2007")
    guest.cpu.read(USER, 4)
    guest.see(guest.entry(USER))
    almost_full(guest)
    with guest.counting() as moved:
        assert attempt(guest.cpu.write, guest.window(guest.entry(USER)), 0, 8) == 3
    assert (moved["pf_taken"], moved["mmu_recycled"]) == (1, 21)


def test_a_device_leaf_has_no_dirty_bit_of_its_own_in_2007():
    """The first store through a clean entry sets D there; the leaf was made before that, and no processor walks it."""
    guest = Guest("64", "kvm-2007")
    guest.map(OTHER, RAM, dirty=False)
    with pytest.raises(sc.MMIOAccess):
        guest.cpu.write(OTHER, 1, 4)
    assert guest.tables.entry(OTHER).value & D
    assert not guest.leaf(OTHER) & D
    assert guest.leaf(OTHER) & W


@every_mode
def test_exit_flushes_instead_of_a_request(mode):
    """With a TLB: an edit's exit has emptied it, or the edit asks for a flush of its own; after a fault that
    takes no right away only the exits of the quirk have."""
    for flushing in (False, True):
        quirks = Quirk.EXIT_FLUSHES if flushing else Quirk.NONE
        guest = Guest(mode, sc.Shadow.cached(quirks=quirks), tlb=sc.TLB())
        for i in range(4):
            guest.cpu.read(USER + i * PAGE, 4)
        assert len(guest.cpu.tlb) == (1 if flushing else 4)
        guest.see(guest.entry(USER))
        with guest.counting("tlb_flush") as moved:
            guest.edit(USER, 0)
        assert moved == {"pf_taken": 1, "pf_emulate": 1} | ({} if flushing else {"tlb_flush": 1})
        assert attempt(guest.cpu.read, USER, 4) == 0
        assert guest.clean()


@every_mode
def test_global_without_pge_keeps_tables_over_cr3_loads(mode):
    """Design `flush`: a leaf table of global leaves alone outlives CR3 loads; G should count with CR4.PGE only."""
    for pge in (False, True):
        for quirks, kept in ((Quirk.NONE, pge), (Quirk.GLOBAL_WITHOUT_PGE, True)):
            guest = Guest(mode, sc.Shadow.flush(quirks=quirks))
            guest.cpu.cr4 = guest.cpu.cr4 | CR4_PGE if pge else guest.cpu.cr4 & ~CR4_PGE
            guest.map(OTHER, DATA, global_=True)
            guest.cpu.read(OTHER, 4)
            guest.cpu.read(USER, 4)
            guest.cpu.cr3 = guest.tables.cr3
            assert guest.exits(OTHER) == (0 if kept else 1)
            assert guest.exits(USER) == 1


@every_mode
def test_ignored_bits_refused_by_loads_of_cr0_and_cr3(mode):
    """A register is loaded with one ignored bit more than it has: #GP and nothing changed, or nothing comes of it.
    Under `native`, too, which stands for the processor that the streams of 2007 were made on."""
    quirk = Quirk.IGNORED_BITS_REFUSED
    designs = sc.Native(), sc.Native(quirk), sc.Shadow.cached(), sc.Shadow.cached(quirks=quirk), sc.Shadow.kvm_2007()
    ignored = (0, 1, 2) if mode in ("32", "pae") else range(5, 12)
    for design in designs:
        guest = Guest(mode, design)
        for name, bits in (("cr0", (*range(6, 16), 17, *range(19, 29))), ("cr3", ignored)):
            before = getattr(guest.cpu, name)
            for bit in bits:
                if design.quirks & quirk:
                    with pytest.raises(sc.GeneralProtection):
                        setattr(guest.cpu, name, before | 1 << bit)
                    assert getattr(guest.cpu, name) == before
                else:
                    setattr(guest.cpu, name, before | 1 << bit)
                    assert getattr(guest.cpu, name) == before | (1 << bit if name == "cr3" else 0)
                guest.cpu.write(USER, bit, 4)
                assert guest.cpu.read(USER, 4) == bit
        assert guest.vm.audit().ok


def test_ignored_bits_refused_is_the_one_quirk_of_native():
    with pytest.raises(sc.ConfigError, match="the design has only"):
        sc.Native(Quirk.KVM_2007)
    with pytest.raises(sc.ConfigError, match="not a combination"):
        sc.Native(1 << 40)


@pytest.mark.parametrize("mode", ["pae", "64", "la57"])
def test_role_without_nxe_serves_an_entry_whose_bit_63_is_reserved(mode):
    """A page made while EFER.NXE was on is found again when it is off, and what it maps is read without an exit."""
    plain, quirky = pair(mode, Quirk.ROLE_WITHOUT_NXE, sc.Shadow.unsync)
    for guest, code in ((plain, P | RESERVED), (quirky, None)):
        guest.map(OTHER, DATA, rights="rw")
        assert guest.tables.entry(OTHER).value & NX
        guest.cpu.efer |= EFER_NXE
        guest.exits(OTHER)
        guest.cpu.efer &= ~EFER_NXE
        guest.cpu.read(USER, 4)
        with guest.counting() as moved:
            assert attempt(guest.cpu.read, OTHER, 4) == code
        assert moved == ({} if code is None else {"pf_taken": 1, "pf_guest": 1})


@every_mode
def test_wp0_hides_user_lets_a_supervisor_past_smap(mode):
    """With CR0.WP off, EFLAGS.AC allows a store to a read-only page of the user; the leaf that grants it says that the
    page is the supervisor's, and the next load needs no AC."""
    plain, quirky = pair(mode, Quirk.WP0_HIDES_USER, sc.Shadow.unsync)
    for guest, code in ((plain, P), (quirky, None)):
        guest.map(OTHER, DATA, rights="rxu")
        guest.cpu.cr0 &= ~CR0_WP
        guest.cpu.cr4 |= CR4_SMAP
        guest.cpu.ac = True
        with guest.counting() as moved:
            guest.cpu.write(OTHER, 5, 4)
        assert moved.get("pf_emulate", 0) == (code is not None)
        assert guest.rights(OTHER) == ("" if code is not None else "rw")
        guest.cpu.ac = False
        assert attempt(guest.cpu.read, OTHER, 4) == code


@every_mode
def test_fault_keeps_leaf_that_lags_behind_an_entry_that_went(mode):
    """The entry of a page that is in use becomes 0; a store to it faults, and after that a load should."""
    plain, quirky = pair(mode, Quirk.FAULT_KEEPS_LEAF, sc.Shadow.unsync)
    for guest, code in ((plain, 0), (quirky, None)):
        guest.map(OTHER, DATA, dirty=False)
        guest.exits(OTHER)
        guest.edit(OTHER, 0)
        assert attempt(guest.cpu.read, OTHER, 4) is None
        assert attempt(guest.cpu.write, OTHER, 1, 4) == W
        assert attempt(guest.cpu.read, OTHER, 4) == code


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_tagged_cr3_lags_behind_what_another_pcid_left(mode):
    """Two roots have their leaf tables in common. While one is in use an entry is made, used and changed: the other,
    loaded with bit 63 set, never used that page while it led elsewhere."""
    plain, quirky = pair(mode, Quirk.TAGGED_CR3_LAGS, sc.Shadow.unsync)
    for guest, seen in ((plain, b"new!"), (quirky, b"old!")):
        vm, cpu = guest.vm, guest.cpu
        guest.map(OTHER, DATA, 2 * PAGE)
        vm.write_physical(DATA, b"old!")
        vm.write_physical(DATA + PAGE, b"new!")
        cpu.cr4 |= CR4_PCIDE
        root, twin = cpu.cr3, next(guest.frames) << 12
        vm.write_physical(twin, vm.read_physical(root, PAGE))
        cpu.cr3 = root | 1
        cpu.cr3 = twin | 2
        cpu.read(OTHER + PAGE, 4)  # so that it leads to the leaf table
        guest.edit(OTHER, 0)
        cpu.cr3 = root | 1
        assert attempt(cpu.read, OTHER, 4) == 0
        guest.edit(OTHER, DATA | P | W | A | D)
        assert cpu.read(OTHER, 4).to_bytes(4, "little") == b"old!"
        guest.edit(OTHER, DATA + PAGE | P | W | A | D)
        cpu.cr3 = 1 << 63 | twin | 2
        assert cpu.read(OTHER, 4).to_bytes(4, "little") == seen


@pytest.mark.parametrize("mode", ["64", "la57"])
def test_device_unasked_for_its_protection_key(mode):
    """The page of a device, beyond RAM, is met once; then its key forbids it."""
    plain, quirky = pair(mode, Quirk.DEVICE_UNASKED, sc.Shadow.unsync)
    for guest, refusal in ((plain, sc.PageFault), (quirky, sc.MMIOAccess)):
        guest.map(OTHER, RAM, pkey=3)
        guest.cpu.cr4 |= CR4_PKE
        with pytest.raises(sc.MMIOAccess):
            guest.cpu.read(OTHER, 4)
        guest.cpu.pkru = 1 << 6
        with pytest.raises(refusal):
            guest.cpu.read(OTHER, 4)


@pytest.mark.parametrize("mode", ["pae", "64", "la57"])
def test_store_rounded_down_to_one_entry(mode):
    """Four bytes, two of them in the directory entry that leads to a page in use."""
    plain, quirky = pair(mode, Quirk.STORE_ROUNDED, sc.Shadow.unsync)
    for guest, code in ((plain, 0), (quirky, None)):
        guest.map(OTHER, DATA)
        guest.exits(OTHER)
        guest.cpu.write(guest.window(guest.entry(OTHER, 2) - 2), 0, 4)
        guest.cpu.cr3 = guest.cpu.cr3
        assert attempt(guest.cpu.read, OTHER, 4) == code


def test_levels_are_those_of_the_tables():
    """The shape on which the counts above rest."""
    for mode, levels in LEVELS.items():
        guest = Guest(mode)
        assert len(guest.tables.walk(USER)) == levels
        guest.cpu.read(USER, 4)
        assert len(guest.path(USER)) == BELOW_ROOT[mode] + 1
