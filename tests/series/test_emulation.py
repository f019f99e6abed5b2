"""Stores to guest tables that are in use, made by the emulator: of every size, over page boundaries, as parts of
read-modify-writes, one by one and in batches, and where the embedder says that it cannot emulate them.

The same operations run on `native`, which has nothing to emulate: results, CR2 and every byte of memory have to
be equal.
"""

import operator

import numpy as np
import pytest
from guest2007 import DATA, LEVELS, MODES, PAGE, RAM, USED, USER, A, D, Guest, P, U, W

import shadowcore as sc
from shadowcore.pagetables import NX

every_mode = pytest.mark.parametrize("mode", MODES)
CALM = sc.Shadow.cached(flood_threshold=None)  # no store of a series is taken for a flood

MISSING, READ_ONLY, PLAIN, TABLE, DEVICE = "missing", "read-only", "plain", "table", "device"
WORD = (1 << 64) - 1
FAR = USER + (64 << 20)
PAGES = 8  # mapped from USER on
PLACE = DATA + (1 << 20)  # frames of pages that an access crosses


def seen(call, guest):
    """What came of a call on a guest: its value or fault, and CR2."""
    try:
        return call(guest), guest.cpu.cr2
    except sc.GuestFault as fault:
        return repr(fault), guest.cpu.cr2


def different_frames(first, second):
    first, second = (guest.vm.memory.words for guest in (first, second))
    return [] if np.array_equal(first, second) else np.unique(np.flatnonzero(first != second) // 512).tolist()


class Twins:
    """A guest under a shadow MMU, and the same guest under none."""

    def __init__(self, mode, design=CALM, pages=PAGES, setup=lambda guest: None):
        self.guests = [Guest(mode, mmu, pages) for mmu in (design, "native")]
        self.guest = self.guests[0]
        for guest in self.guests:
            setup(guest)
        self.do(lambda guest: [guest.cpu.read(USER + i * PAGE, 4) for i in range(pages)])

    def do(self, call):
        """Do the same on both; what it came to, which is the same."""
        got, wanted = (seen(call, guest) for guest in self.guests)
        assert got == wanted
        return got[0]

    def ram(self, gpa, size):
        return int.from_bytes(self.guest.vm.read_physical(gpa, size), "little")

    def check(self):
        """The memories are equal, with all accessed and dirty bits, and the shadow is sound."""
        assert different_frames(*self.guests) == []
        report = self.guest.vm.audit()
        assert report.ok, str(report)

    def look(self, base=USER, pages=PAGES):
        """Where each page leads now, for loads and for stores."""

        def translations(guest):
            found = []
            for va in range(base, base + pages * PAGE, PAGE):
                for access in "rw":
                    try:
                        guest.cpu.read(va, 4)
                        found.append(guest.cpu.translate(va, access).gpa)
                    except sc.GuestFault as fault:
                        found.append(repr(fault))
            return found

        return self.do(translations)


# -- stores of every size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@every_mode
def test_store_within_a_leaf_table(mode, size):
    """Of every size, at every offset from an entry on. A store within one entry drops the spte made from it; one that
    touches two entries, and so every one that is longer than an entry, zaps the table."""
    twins = Twins(mode)
    guest = twins.guest
    entry = guest.entry(USER + PAGE)
    for offset in range(2 * guest.size + 1):
        gpa = entry + offset
        guest.see(gpa)
        guest.exits(USER + (PAGES - 1) * PAGE)
        value = twins.ram(gpa, size)  # what is there, so that all pages stay where they are
        two = offset // guest.size != (offset + size - 1) // guest.size
        present = sum(guest.leaf(USER + i * PAGE) & 1 for i in range(PAGES))
        assert present == PAGES
        with guest.counting("mmu_pte_write", "mmu_flooded", "spte_removed") as moved:
            guest.cpu.write(guest.window(gpa), value, size)
        zap = {"mmu_flooded": 1, "mmu_shadow_zapped": 1, "spte_removed": PAGES + 1}
        expected = {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1, **(zap if two else {"spte_removed": 1})}
        assert moved == expected, (offset, two)
        assert guest.vm.audit().ok
        exits = [guest.exits(USER + i * PAGE) for i in range(PAGES)]
        if two:
            assert exits == [1] * PAGES
        else:
            index = 1 + offset // guest.size
            assert exits == [int(i == index) for i in range(PAGES)]
    twins.do(lambda twin: [twin.see(entry + offset) for offset in range(2 * twin.size + 1)])
    twins.do(lambda twin: twin.cpu.write(twin.window(entry), twins.ram(entry, size), size))
    twins.check()


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@every_mode
def test_store_changes_what_the_tables_say(mode, size):
    """Bytes of an entry that is in use change; pages go where the new entry leads."""
    twins = Twins(mode)
    entry = twins.guest.entry(USER + PAGE)
    for offset in range(2 * twins.guest.size):
        gpa = entry + offset
        value = twins.ram(gpa, size) ^ (0x10 | W if offset % twins.guest.size == 0 else 0x21)
        before = twins.look()
        twins.do(lambda guest, at=gpa, value=value: guest.cpu.write(guest.window(at), value, size))
        assert twins.ram(gpa, size) == value
        assert twins.do(lambda guest, at=gpa: guest.cpu.read(guest.window(at), size)) == value
        after = twins.look()
        assert after != before or offset % twins.guest.size not in (0, 2)
        twins.check()
        # Through another way into memory, back to where it was.
        for guest in twins.guests:
            original = DATA | P | W | U | A | D
            for i in range(PAGES):
                data = (original + i * PAGE).to_bytes(guest.size, "little")
                guest.vm.write_physical(guest.entry(USER + i * PAGE), data)


@pytest.mark.parametrize("quadrant", [0, 1])
def test_store_to_a_table_of_4_byte_entries_concerns_one_quadrant(quadrant):
    """Its 1024 entries have two shadow pages, and entry n and n + 512 the same index in them: one spte goes."""
    guest = Guest("32", CALM, 1)
    pages = [USER, USER + (2 << 20)]
    guest.map(pages[1], DATA + PAGE)
    gpa = guest.entry(pages[quadrant])
    guest.see(gpa)
    for va in pages:
        guest.cpu.read(va, 4)
    assert len(guest.pages(gpa >> 12)) == 2
    with guest.counting("spte_removed") as moved:
        guest.cpu.write(guest.window(gpa), guest.tables.entry(pages[quadrant]).value, 4)
    assert moved["spte_removed"] == 1
    assert [guest.exits(va) for va in pages] == [int(va == pages[quadrant]) for va in pages]
    assert guest.vm.audit().ok


def test_store_to_a_directory_of_4_byte_entries_drops_two_links():
    """Each of its entries spans 4 MiB, two sptes of 2 MiB; the neighbours stay."""
    guest = Guest("32", CALM, 1)
    pages = [USER + (i << 21) for i in range(4)]
    for i, va in enumerate(pages):
        guest.map(va, DATA + i * PAGE)
    gpa = guest.entry(USER, 2)
    guest.see(gpa)
    for va in pages:
        guest.cpu.read(va, 4)
    with guest.counting("spte_removed", "mmu_pde_zapped") as moved:
        guest.cpu.write(guest.window(gpa), guest.tables.entry(USER, 2).value, 4)
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "spte_removed": 2, "mmu_pde_zapped": 2}
    assert [guest.exits(va) for va in pages] == [1, 1, 0, 0]
    assert guest.vm.audit().ok


@every_mode
def test_store_longer_than_its_value(mode):
    """Only the low bytes count of a value that has more; higher ones of a 16-byte value are its upper half."""
    twins = Twins(mode)
    gpa = twins.guest.entry(USER + (PAGES + 8) * PAGE) & -16
    for size in (1, 2, 4, 8):
        twins.do(lambda guest, size=size: guest.cpu.write(guest.window(gpa), 0x8877665544332210, size))
        assert twins.ram(gpa, 16) == 0x8877665544332210 & (1 << 8 * size) - 1
    value = 0xFFEEDDCCBBAA99887766554433221100
    twins.do(lambda guest: guest.cpu.write(guest.window(gpa), value, 16))
    assert twins.ram(gpa, 16) == value
    assert twins.do(lambda guest: guest.cpu.read(guest.window(gpa), 16)) == value
    twins.check()
    for call in (lambda: twins.guest.cpu.write(USER, 1 << 64, 8), lambda: twins.guest.cpu.write(USER, 1 << 128, 16)):
        with pytest.raises(sc.ConfigError, match="value"):
            call()


# -- over a page boundary -----------------------------------------------------------------------------------------

CROSS = USER + (32 << 20) - PAGE  # the second page has a leaf table of its own in every mode
KINDS = (PLAIN, TABLE, READ_ONLY, MISSING, DEVICE)


def crossing(mode, first, second, design=CALM):
    """Two neighbouring pages of these kinds. Tables are the leaf tables of USER and FAR, in use."""

    def setup(guest):
        guest.map(FAR, DATA + 16 * PAGE, PAGES * PAGE)
        guest.map(CROSS, PLACE, 2 * PAGE)
        for va, kind, table in ((CROSS, first, USER), (CROSS + PAGE, second, FAR)):
            if kind == TABLE:
                guest.map(va, guest.entry(table) & -PAGE)
            elif kind == READ_ONLY:
                guest.map(va, PLACE + (va - CROSS), rights="rxu")
            elif kind == DEVICE:
                guest.map(va, RAM + (va - CROSS))
            elif kind == MISSING:
                guest.tables.unmap(va, PAGE)
        for i in range(PAGES):
            guest.cpu.read(FAR + i * PAGE, 4)

    return Twins(mode, design, setup=setup)


def frame(twins, va, kind):
    """gpa behind a page of `crossing`."""
    if kind == TABLE:
        return twins.guest.entry(USER if va == CROSS else FAR) & -PAGE
    return (RAM if kind == DEVICE else PLACE) + va - CROSS


ACCESSES = {
    "read": lambda guest, va, value, size: guest.cpu.read(va, size),
    "write": lambda guest, va, value, size: guest.cpu.write(va, value, size),
    "cmpxchg": lambda guest, va, value, size: guest.cpu.cmpxchg(va, 0, value, size),
    "add": lambda guest, va, value, size: guest.cpu.modify(va, "add", value, size),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
@every_mode
def test_access_over_a_page_boundary(mode, first, second):
    """Nothing is transferred unless both pages allow it; a fault is that of the first page that has one, and CR2 the
    address in it."""
    value = 0x1122334455667788_99AABBCCDDEEFF01
    twins = crossing(mode, first, second)
    low, high = frame(twins, CROSS, first), frame(twins, CROSS + PAGE, second)
    for name, access in ACCESSES.items():
        stores = name != "read"
        for size in (2, 4, 8, 16):
            if size == 16 and name in ("cmpxchg", "add"):
                continue  # such operands lie within a page, or do not exist
            for left in {1, size // 2, size - 1}:
                va = CROSS + PAGE - left
                part = value & (1 << 8 * size) - 1
                twins.do(lambda guest: [guest.cpu.read(used + 3 * PAGE, 4) for used in (USER, FAR)])
                before = [twins.ram(gpa, PAGE) for gpa in (low, high) if gpa < RAM]
                emulated = twins.guest.vm.stats.pf_emulate
                came = twins.do(lambda guest, v=va, p=part, s=size, a=access: a(guest, v, p, s))
                emulated = twins.guest.vm.stats.pf_emulate - emulated
                fault = next(
                    (
                        at
                        for at, kind in ((va, first), (CROSS + PAGE, second))
                        if kind == MISSING or (stores and kind == READ_ONLY)
                    ),
                    None,
                )
                device = next(
                    (gpa for gpa, kind in ((low + PAGE - left, first), (high, second)) if kind == DEVICE), None
                )
                what = (name, size, left)
                if fault is not None:
                    code = W * stores | P * ((first if fault == va else second) == READ_ONLY)
                    assert came == repr(sc.PageFault(fault, code)), what
                    assert twins.guest.cpu.cr2 == fault
                elif device is not None:
                    assert came == repr(sc.MMIOAccess(device)), what
                else:
                    old = before[0] >> 8 * (PAGE - left) | (before[1] & (1 << 8 * (size - left)) - 1) << 8 * left
                    new = {"read": old, "write": part, "cmpxchg": part if old == 0 else old, "add": old + part}[name]
                    new &= (1 << 8 * size) - 1
                    got = twins.ram(low + PAGE - left, left) | twins.ram(high, size - left) << 8 * left
                    assert got == new, what
                    assert came == {"read": old, "write": None, "cmpxchg": old == 0, "add": old}[name]
                    assert emulated == stores * [first, second].count(TABLE), what
                    # Around it nothing moved.
                    for was, gpa, keep in (
                        (before[0], low, PAGE - left),
                        (before[1], high + size - left, PAGE - size + left),
                    ):
                        now = twins.ram(gpa, keep)
                        assert now == (was & (1 << 8 * keep) - 1 if gpa == low else was >> 8 * (size - left))
                    continue
                assert emulated == 0
                for was, gpa in zip(before, [gpa for gpa in (low, high) if gpa < RAM], strict=True):
                    assert not (was ^ twins.ram(gpa, PAGE)) & ~every_entry(twins.guest.size, A | D), what
            twins.check()
    twins.look()
    twins.look(FAR)
    twins.check()


def every_entry(size, bits):
    """`bits` in each entry of a table, as one number."""
    return int.from_bytes(bits.to_bytes(size, "little") * (PAGE // size), "little")


@every_mode
def test_store_that_cuts_off_its_own_second_page(mode):
    """Both pages are translated before bytes move: the part that changes the entry of the second page does not change
    where this store's other part goes."""

    def setup(guest):
        span = 1 << guest.tables.format.shift(2)
        guest.last = FAR + span - PAGE
        guest.map(guest.last, PLACE)
        guest.map(guest.last - PAGE, guest.entry(guest.last) & -PAGE)
        guest.cpu.read(guest.last)
        guest.cpu.read(guest.last - PAGE)

    twins = Twins(mode, setup=setup)
    last = twins.guest.last
    gone = twins.ram(twins.guest.entry(last), twins.guest.size) & ~P
    # The lower part is the entry of the page that the upper part lies in, without its P bit.
    size = 2 * twins.guest.size
    twins.do(lambda guest: guest.cpu.write(last - guest.size, gone | 0x5A << 8 * guest.size, size))
    assert twins.ram(PLACE, 1) == 0x5A
    assert twins.do(lambda guest: guest.cpu.read(last)) == repr(sc.PageFault(last, 0))
    twins.check()


@pytest.mark.parametrize("entries", [1, 2])
@every_mode
def test_both_parts_in_one_table(mode, entries):
    """The end of a table and its start, as neighbouring pages. A first part of two entries zaps the table: by then the
    second part is a store like any other."""

    def setup(guest):
        for i in range(2):
            guest.map(CROSS + i * PAGE, guest.entry(USER) & -PAGE)
        guest.cpu.read(CROSS, 4)
        guest.cpu.read(CROSS + PAGE, 4)

    twins = Twins(mode, setup=setup)
    table, left = twins.guest.entry(USER) & -PAGE, 1 if entries == 1 else twins.guest.size + 1
    with twins.guest.counting("mmu_flooded") as moved:
        twins.do(lambda guest: guest.cpu.write(CROSS + PAGE - left, twins.ram(table, 2) << 8 * left, 16))
    two = left + twins.guest.size < 16  # the second part, too, is longer than an entry
    assert moved["pf_emulate"] == 2 // entries
    assert moved["mmu_shadow_zapped"] == moved["mmu_flooded"] == (1 if entries == 2 or two else 0)
    assert twins.ram(table + 2, 14 - left) == 0
    twins.check()


@every_mode
def test_second_page_makes_a_table_of_the_first_frame(mode):
    """The leaf table of the second page, mapped as the first one, and not shadowed until the second page is walked:
    the store has to go round the write protection that its own second half has brought."""
    twins = Twins(mode)
    va = FAR + (1 << twins.guest.tables.format.shift(2))
    for guest in twins.guests:
        guest.map(va, PLACE)
        guest.map(va - PAGE, guest.entry(va) & -PAGE)
    assert not len(twins.guest.pages(twins.guest.table(va)))
    size = 2 * twins.guest.size
    with twins.guest.counting() as moved:
        twins.do(lambda guest: guest.cpu.write(va - guest.size, 0x7766554433221100, size))
    assert moved["pf_emulate"] == 1
    assert twins.ram((twins.guest.entry(va) & -PAGE) + PAGE - twins.guest.size, twins.guest.size) == (
        0x7766554433221100 & (1 << 8 * twins.guest.size) - 1
    )
    twins.check()
    assert twins.guest.rights(va - PAGE) in ("", "ru")


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_access_that_wraps_at_4_gib(mode):
    """Below 4-level paging addresses have 32 bits: the byte after the last one is the first."""
    twins = Twins(mode)
    for guest in twins.guests:
        guest.map(0xFFFF_F000, PLACE)
        guest.map(0, PLACE + PAGE)
        guest.cpu.cr3 = guest.tables.cr3  # the PAE root entries of new tables
    twins.do(lambda guest: guest.cpu.write(0xFFFF_FFFD, 0x1122334455667788, 8))
    assert twins.ram(PLACE + PAGE - 3, 3) == 0x667788
    assert twins.ram(PLACE + PAGE, 5) == 0x1122334455
    assert twins.do(lambda guest: guest.cpu.read(0xFFFF_FFFD, 8)) == 0x1122334455667788
    twins.check()


@pytest.mark.parametrize(("mode", "edge"), [("64", 1 << 47), ("la57", 1 << 56)])
def test_access_that_leaves_the_canonical_addresses(mode, edge):
    """#GP, whatever the first page would have said; the last bytes below the edge can be used."""
    twins = Twins(mode)
    for guest in twins.guests:
        guest.map(edge - PAGE, PLACE)
    for start, size in ((edge - 7, 8), (edge - 1, 2), (edge - 8, 16), (edge, 1), (WORD, 2), (WORD - 6, 8)):
        for access in ACCESSES.values():
            if size < 16 or access in (ACCESSES["read"], ACCESSES["write"]):
                came = twins.do(lambda guest, a=access, v=start, s=size: a(guest, v, 1, s))
                assert came == repr(sc.GeneralProtection(0))
    twins.do(lambda guest: guest.cpu.write(edge - 8, 0x55, 8))
    assert twins.ram(PLACE + PAGE - 8, 8) == 0x55
    assert twins.guest.vm.stats.gp_guest > 10
    twins.check()


# -- compare and exchange -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@every_mode
def test_cmpxchg_on_a_live_table(mode, size):
    """It stores if what is expected is there, and says whether it was. On a mismatch the old value is stored, which
    is an emulated store as well."""
    twins = Twins(mode)
    gpa = twins.guest.entry(USER + 2 * PAGE) & -16
    two = size > twins.guest.size
    for flip in (U, W, P, 0):
        old = twins.ram(gpa, size)
        new = old ^ flip if flip else old ^ 0x66 << 8 * (size - 1)
        for expected, fits in ((old ^ 1, False), (old ^ 1 << 8 * size - 1, False), (old, True)):
            twins.look()
            twins.guest.see(gpa)
            before = twins.guest.vm.memory.bytes.tobytes()
            with twins.guest.counting("mmu_pte_write") as moved:
                assert twins.do(lambda g, e=expected, n=new: g.cpu.cmpxchg(g.window(gpa), e, n, size)) is fits
            zap = {"mmu_shadow_zapped": 1} if two else {}
            assert moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1} | zap
            assert twins.ram(gpa, size) == (new if fits else old)
            assert fits or twins.guest.vm.memory.bytes.tobytes() == before
            twins.check()
    twins.look()
    twins.check()


@pytest.mark.parametrize("size", [8, 16])
@every_mode
def test_cmpxchg_on_the_last_entry_of_the_root(mode, size):
    """The last bytes of the table that the processor walks from, {1, 2} becoming {3, 4}: found, stored, and the next
    address is translated as before. A root that is emptied on the way stays a root."""

    def setup(guest):
        level = 2 if mode == "pae" else LEVELS[mode]
        guest.end = (guest.entry(USER, level) & -PAGE) + PAGE - size
        guest.vm.memory.bytes[guest.end : guest.end + size] = 0

    twins = Twins(mode, setup=setup)
    end, guest = twins.guest.end, twins.guest
    half = 4 * size
    values = {name: high << half | low for name, low, high in (("old", 1, 2), ("new", 3, 4), ("other", 2, 1))}
    twins.do(lambda g: g.cpu.write(g.window(end), values["old"], size))
    assert guest.pages(end >> 12, root_count=1).size or guest.pages(end >> 12)["root_count"].any()
    roots = guest.vm.mmu.roots()
    assert twins.do(lambda g: g.cpu.cmpxchg(g.window(end), values["other"], values["new"], size)) is False
    assert twins.ram(end, size) == values["old"]
    twins.check()
    with guest.counting() as moved:
        assert twins.do(lambda g: g.cpu.cmpxchg(g.window(end), values["old"], values["new"], size)) is True
    assert moved["pf_emulate"] == 1
    assert twins.ram(end, size) == values["new"]
    assert guest.vm.mmu.roots() == roots
    twins.look()
    twins.check()


@every_mode
def test_cmpxchg_needs_a_page_that_may_be_written(mode):
    """Also where it would not store: #PF with W, nothing changes; and D is set on a mismatch."""

    def setup(guest):
        guest.map(FAR, PLACE, rights="rxu")
        guest.map(FAR + PAGE, PLACE, dirty=False)

    twins = Twins(mode, setup=setup)
    for user in (False, True):
        for expected in (0, 5):
            came = twins.do(lambda g, e=expected, u=user: g.cpu.cmpxchg(FAR, e, 7, 4, user=u))
            assert came == repr(sc.PageFault(FAR, P | W | U * user))
        came = twins.do(lambda g, u=user: g.cpu.modify(FAR, "or", 0, 1, user=u))
        assert came == repr(sc.PageFault(FAR, P | W | U * user))
    assert not twins.guest.tables.entry(FAR + PAGE).value & D
    assert twins.do(lambda g: g.cpu.cmpxchg(FAR + PAGE, 5, 7, 4)) is False
    assert twins.guest.tables.entry(FAR + PAGE).value & D
    assert twins.ram(PLACE, 4) == 0
    twins.check()


@every_mode
def test_cmpxchg_of_16_bytes_wants_an_aligned_operand(mode):
    """#GP before anything else, be the page there or not; the smaller ones take any address."""
    twins = Twins(mode)
    before = twins.guest.vm.memory.bytes.tobytes()
    accesses = twins.guest.vm.stats.pf_taken
    for va in (USER + 8, USER + 1, USER + PAGE - 8, FAR + 4, twins.guest.window(twins.guest.entry(USER)) + 8):
        assert twins.do(lambda g, v=va: g.cpu.cmpxchg(v, 0, 1, 16)) == repr(sc.GeneralProtection(0))
    assert twins.guest.vm.memory.bytes.tobytes() == before
    assert twins.guest.vm.stats.pf_taken == accesses
    assert twins.guest.vm.stats.gp_guest == 5
    assert twins.do(lambda g: g.cpu.cmpxchg(USER + 16, 0, 1 << 100, 16)) is True
    assert twins.do(lambda g: g.cpu.cmpxchg(USER + 3, 0, 1 << 63, 8)) is True
    twins.check()


# -- other read-modify-writes -------------------------------------------------------------------------------------

OPERATIONS = {
    "xchg": lambda old, value: value,
    "add": operator.add,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("operation", OPERATIONS)
@every_mode
def test_modify(mode, operation, size):
    """On a page of data, and on a table in use: the old value comes back, the new one wraps at its size."""
    twins = Twins(mode)
    entry = twins.guest.entry(USER + 2 * PAGE)
    at = {"data": (USER + 0x30, DATA + 0x30), "table": (twins.guest.window(entry), entry)}
    for value in (0xFF, 0x8000000000000001, WORD, 0, 0xFFFF_FFFF_FFFF_FF00 | 0xFF & ~W):
        for where, (va, gpa) in at.items():
            old = twins.ram(gpa, size)
            with twins.guest.counting() as moved:
                assert twins.do(lambda g, v=va, x=value: g.cpu.modify(v, operation, x, size)) == old
            assert twins.ram(gpa, size) == OPERATIONS[operation](old, value) & (1 << 8 * size) - 1
            assert moved.get("pf_emulate", 0) == (where == "table")
            twins.look()
            twins.check()


@every_mode
def test_one_byte_and_takes_a_right_away(mode):
    """What a kernel does to write-protect a page: an `and` of one byte of the entry. Only that spte goes."""
    twins = Twins(mode)
    guest = twins.guest
    entry = guest.entry(USER + PAGE)
    guest.see(entry)
    before = guest.tables.entry(USER + PAGE).value
    with guest.counting("mmu_pte_write", "spte_removed") as moved:
        old = twins.do(lambda g: g.cpu.modify(g.window(entry), "and", 0xFF & ~W, 1))
    assert old == before & 0xFF
    assert moved == {"pf_taken": 1, "pf_emulate": 1, "mmu_pte_write": 1, "spte_removed": 1}
    assert guest.tables.entry(USER + PAGE).value == before & ~W
    twins.check()
    assert [guest.exits(USER + i * PAGE) for i in range(3)] == [0, 1, 0]
    assert twins.do(lambda g: g.cpu.write(USER + PAGE, 1, user=True)) == repr(sc.PageFault(USER + PAGE, P | W | U))
    assert twins.do(lambda g: g.cpu.modify(g.window(entry), "or", W, 1)) == old & ~W
    assert twins.do(lambda g: g.cpu.write(USER + PAGE, 1, user=True)) is None
    twins.check()


def test_modify_arguments():
    guest = Guest("64")
    for arguments in (
        (USER, "nand", 1),
        (USER, None, 1),
        (USER, "add", 1, 16),
        (USER, "add", -1),
        (USER, "add", 1 << 64),
    ):
        with pytest.raises(sc.ConfigError):
            guest.cpu.modify(*arguments)
    for arguments in ((USER, -1, 1), (USER, 1, 1 << 64), (USER, 1 << 64, 1), (USER, 1 << 128, 1, 16), (USER, 0, 1, 3)):
        with pytest.raises(sc.ConfigError):
            guest.cpu.cmpxchg(*arguments)
    assert not guest.vm.memory.words[DATA // 8]


# -- the same in batches ------------------------------------------------------------------------------------------

WIDE = np.dtype(
    [
        *[(name, sc.OP_DTYPE[name]) for name in sc.OP_DTYPE.names],
        ("value_high", "<u8"),
        ("expected", "<u8"),
        ("expected_high", "<u8"),
    ]
)
CODES = {"xchg": sc.Op.XCHG, "add": sc.Op.ADD, "and": sc.Op.AND, "or": sc.Op.OR, "xor": sc.Op.XOR}


def batch(rows, dtype=WIDE):
    ops = np.zeros(len(rows), dtype)
    for i, row in enumerate(rows):
        for name, value in row.items():
            ops[name][i] = value
    return ops


def random_rows(mode, rng, n):
    """Operations on the tables of USER and on its pages: mostly what a kernel does, some of it nonsense."""
    guest = Guest(mode)
    leaf, top = guest.entry(USER) & -PAGE, guest.entry(USER, 2)
    leaves = [
        DATA | P | W | U | A | D,
        DATA + PAGE | P | U | A,
        PLACE | P | W,
        RAM | P | W | U,
        0,
        leaf | P | W | U | A | D,
    ]
    if guest.size == 8:
        leaves.append(NX | DATA | P | W | U | A | D)
    rows = []
    for _ in range(n):
        size = int(rng.choice([1, 2, 4, 8, 16, guest.size]))
        kind = rng.choice(["table", "entry", "page", "top"], p=[0.25, 0.3, 0.4, 0.05])
        if kind == "table":
            va = guest.window(leaf + int(rng.integers(0, PAGES * guest.size)))
        elif kind == "entry":
            va, size = guest.window(leaf + guest.size * int(rng.integers(0, PAGES))), guest.size
        elif kind == "top":
            va, size = guest.window(top + guest.size), guest.size
        else:
            va = USER + int(rng.integers(0, PAGES)) * PAGE + int(rng.choice([0, 0x10, 0xFF8, 0xFFC, 0xFFF]))
        if size == 16 and rng.random() < 0.7:
            va &= -16
        codes = [sc.Op.READ, sc.Op.WRITE, sc.Op.WRITE, sc.Op.CMPXCHG]
        op = int(rng.choice([*codes, *CODES.values()] if size < 16 else codes))
        if op in (sc.Op.AND, sc.Op.OR, sc.Op.XOR, sc.Op.ADD):
            value = (0x1, 0x2, 0x4, 0x1000, WORD - W, WORD - U, 0xFFFF_FF00)[rng.integers(7)]
        else:
            value = int(leaves[rng.integers(len(leaves))])
        expected = int(leaves[rng.integers(len(leaves))])
        rows.append(
            {
                "op": op,
                "user": rng.random() < 0.2,
                "size": size,
                "addr": va,
                "value": value,
                "expected": expected,
                "value_high": value * (size == 16),
                "expected_high": expected * (size == 16),
            }
        )
    return rows


def scalar(cpu, row):
    """One operation of a batch as a call; what `run` would have given for it."""
    arguments = {"size": row["size"], "user": bool(row["user"])}
    value, expected = (row.get(name, 0) | row.get(f"{name}_high", 0) << 64 for name in ("value", "expected"))
    keep = (1 << 8 * row["size"]) - 1
    old = 0
    try:
        if row["op"] == sc.Op.READ:
            old = cpu.read(row["addr"], **arguments)
        elif row["op"] == sc.Op.WRITE:
            cpu.write(row["addr"], value & (keep if row["size"] == 16 else WORD), **arguments)
        elif row["op"] == sc.Op.CMPXCHG:
            was = cpu.cmpxchg(row["addr"], expected, value & (keep if row["size"] == 16 else WORD), **arguments)
            return 0, 0, was
        else:
            name = next(name for name, code in CODES.items() if code == row["op"])
            old = cpu.modify(row["addr"], name, value, **arguments)
        return 0, 0, old
    except sc.PageFault as fault:
        return 1, fault.error_code, 0
    except sc.GeneralProtection:
        return 2, 0, 0
    except sc.MMIOAccess:
        return 3, 0, 0


@pytest.mark.parametrize("seed", range(4))
@every_mode
def test_random_stores_to_live_tables(mode, seed):
    """The shadow's results, and each byte of memory, are those of `native`, in a batch as well as one by one; with
    floods, and without."""
    rng = np.random.default_rng([seed, MODES.index(mode)])
    floods = sc.Shadow.cached(pool_pages=16, min_free=2, refill=4)
    guests = [Guest(mode, mmu, PAGES) for mmu in ("native", CALM, floods, "cached")]
    native, called = guests[0], guests[-1]
    start = native.vm.memory.bytes.copy()
    tables = slice(native.entry(USER) & -PAGE, (native.entry(USER) & -PAGE) + PAGE)
    kinds = set()
    for _ in range(6):
        rows = random_rows(mode, rng, 120)
        ops = batch(rows)
        results = [guest.cpu.run(ops) for guest in guests[:-1]]
        for result in results[1:]:
            for name in ("outcome", "error_code", "gpa", "value", "value_high"):
                np.testing.assert_array_equal(getattr(result, name), getattr(results[0], name), err_msg=name)
        first = results[0]
        for i, row in enumerate(rows):
            outcome, code, old = scalar(called.cpu, row)
            assert (outcome, code) == (first.outcome[i], first.error_code[i]), (i, row)
            if row["op"] == sc.Op.CMPXCHG:
                if outcome == 0:
                    keep = (1 << 8 * row["size"]) - 1
                    read = int(first.value[i]) | int(first.value_high[i]) << 64
                    assert old is (read == (row["expected"] | row["expected_high"] << 64) & keep)
            else:
                assert old == int(first.value[i]) | int(first.value_high[i]) << 64
        for guest in guests[1:]:
            assert different_frames(guest, native) == []
            assert guest.cpu.cr2 == native.cpu.cr2
            assert guest.vm.audit().ok
        kinds |= {(int(o), int(c)) for o, c in zip(first.outcome, ops["op"], strict=True)}
        assert not results[0].emulated.any()
        assert int(results[1].emulated.sum()) == results[1].stats.pf_emulate > 0
        # Repair the table, for the next round.
        for guest in guests:
            guest.vm.write_physical(tables.start, start[tables].tobytes())
    assert {outcome for outcome, _ in kinds} == {0, 1, 2, 3}
    assert {op for outcome, op in kinds if outcome == 0} == {sc.Op.READ, sc.Op.WRITE, sc.Op.CMPXCHG, *CODES.values()}


@every_mode
def test_batch_of_compare_and_exchange(mode):
    """value, the upper halves, exits and emulated stores of each row; without the optional fields they are 0."""
    guest = Guest(mode, CALM)
    gpa = guest.entry(USER + 16 * PAGE) & -16
    guest.see(gpa)
    guest.cpu.read(USER, 4)
    va = guest.window(gpa)
    low, high = 0x1111_2222_3333_4444, 0x5555_6666_7777_8888
    two = guest.size < 8
    result = guest.cpu.run(
        batch(
            [
                {"op": sc.Op.CMPXCHG, "size": 16, "addr": va, "value": low, "value_high": high},
                {"op": sc.Op.CMPXCHG, "size": 16, "addr": va, "expected": low, "value": 1},
                {
                    "op": sc.Op.CMPXCHG,
                    "size": 16,
                    "addr": va,
                    "expected": low,
                    "expected_high": high,
                    "value": 5,
                    "value_high": 6,
                },
                {"op": sc.Op.READ, "size": 16, "addr": va},
                {"op": sc.Op.WRITE, "size": 16, "addr": va, "value": 0, "value_high": 0},
                {"op": sc.Op.CMPXCHG, "size": 16, "addr": va + 8, "value": 1},
                {"op": sc.Op.CMPXCHG, "size": 8, "addr": va + 8, "value": high, "value_high": WORD},
                {"op": sc.Op.ADD, "size": 1, "addr": va + 8, "value": 0x178},
            ]
        )
    )
    assert result.outcome.tolist() == [0, 0, 0, 0, 0, 2, 0, 0]
    assert result.value.tolist() == [0, low, low, 5, 0, 0, 0, 0x88]
    assert result.value_high.tolist() == [0, high, high, 6, 0, 0, 0, 0]
    assert guest.vm.read_physical(gpa, 16) == bytes(8) + (high - 0x88).to_bytes(8, "little")
    assert guest.vm.audit().ok
    # The first store is longer than an entry and zaps the table, so that those after it meet a frame like any other.
    assert result.emulated.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert result.exits.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert result.stats.pf_emulate == 1

    guest.cpu.read(USER + PAGE, 4)
    narrow = guest.cpu.run(batch([{"op": sc.Op.CMPXCHG, "size": 8, "addr": va, "value": 3}], sc.OP_DTYPE))
    assert (narrow.value.tolist(), narrow.value_high, narrow.emulated.tolist()) == ([0], None, [1])
    assert guest.vm.read_physical(gpa, 8) == bytes([3]) + bytes(7)
    assert narrow.stats.mmu_flooded == two


@pytest.mark.parametrize("op", [sc.Op.XCHG, sc.Op.ADD, sc.Op.AND, sc.Op.OR, sc.Op.XOR])
def test_batch_with_a_size_that_is_none(op):
    """16 bytes exist for loads, stores and CMPXCHG alone; found before anything runs."""
    guest = Guest("64")
    rows = [{"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 1}, {"op": op, "size": 16, "addr": USER}]
    with pytest.raises(sc.ConfigError, match=r"ops\[1\]: size 16"):
        guest.cpu.run(batch(rows))
    assert not guest.vm.memory.words[DATA // 8]


@every_mode
def test_batch_without_data(mode):
    """data=False: no value is read or stored, but the exits and emulated stores are those of the same operations with
    data that changes nothing."""
    twins = [Guest(mode, CALM), Guest(mode, CALM)]
    for guest in twins:
        guest.see(guest.entry(USER))
        guest.cpu.read(USER, 4)
    at = twins[0].window(twins[0].entry(USER))
    was = twins[0].tables.entry(USER).value
    memory = twins[0].vm.memory.bytes.tobytes()
    rows = [
        {"op": sc.Op.WRITE, "size": twins[0].size, "addr": at, "value": was},
        {"op": sc.Op.READ, "size": 4, "addr": USER},
        {"op": sc.Op.CMPXCHG, "size": twins[0].size, "addr": at, "expected": was + 1, "value": 0},
        {"op": sc.Op.READ, "size": 4, "addr": USER},
        {"op": sc.Op.OR, "size": 1, "addr": at, "value": 0},
        {"op": sc.Op.WRITE, "size": 1, "addr": USER, "value": 0},
    ]
    moving = twins[0].cpu.run(batch(rows))
    still = twins[1].cpu.run(batch([{**row, "value": 0x55, "expected": was} for row in rows]), data=False)
    for name in ("outcome", "error_code", "gpa", "exits", "emulated"):
        np.testing.assert_array_equal(getattr(still, name), getattr(moving, name))
    assert still.emulated.tolist() == [1, 0, 1, 0, 1, 0]
    assert not still.value.any()
    assert twins[1].vm.memory.bytes.tobytes() == memory
    assert twins[1].vm.audit().ok


# -- the embedder cannot emulate ----------------------------------------------------------------------------------


class Hook:
    """A can_emulate that answers, raises, or does something, and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def __call__(self, gva, gpa, nbytes):
        self.asked.append((gva, gpa, nbytes))
        answer = self.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer


def hooked(mode, answer, pages=PAGES, mmu="cached"):
    """A guest whose table of USER is in use and can be seen through the window."""
    guest = Guest(mode, mmu, pages)
    guest.see(guest.entry(USER))
    for i in range(pages):
        guest.cpu.read(USER + i * PAGE, 4)
    guest.vm.mmu.can_emulate = hook = Hook(answer)
    return guest, hook


@every_mode
def test_hook_is_asked_for_stores_to_tables_alone(mode):
    guest, hook = hooked(mode, True)
    gpa = guest.entry(USER + PAGE)
    guest.cpu.read(guest.window(gpa), 4)
    guest.cpu.write(USER, 5)
    guest.cpu.fetch(USER)
    assert hook.asked == []
    value = guest.tables.entry(USER).value
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa), value, guest.size)
        guest.cpu.cmpxchg(guest.window(gpa), 0, 0, 4)
    assert moved["pf_emulate"] == 2
    assert hook.asked == [(guest.window(gpa), gpa, guest.size), (guest.window(gpa), gpa, 4)]
    guest.vm.mmu.can_emulate = None
    guest.cpu.write(guest.window(gpa), value, guest.size)
    assert len(hook.asked) == 2
    assert guest.vm.mmu.can_emulate is None
    assert guest.vm.audit().ok


OPERATION = {
    "write": lambda guest, va, value: guest.cpu.write(va, value, guest.size),
    "xchg": lambda guest, va, value: guest.cpu.modify(va, "xchg", value, guest.size),
    "cmpxchg": lambda guest, va, value: guest.cpu.cmpxchg(va, DATA | P | W | U | A | D, value, guest.size),
    "run": lambda guest, va, value: guest.cpu.run(
        batch([{"op": sc.Op.WRITE, "size": guest.size, "addr": va, "value": value}])
    ),
}


@pytest.mark.parametrize("operation", OPERATION)
@every_mode
def test_refused_store_is_made_natively(mode, operation):
    """The exit that asks, the table unprotected, and the exit that grants W; nothing is emulated. The next stores are
    the processor's own, until the table is used again."""
    guest, hook = hooked(mode, False)
    gpa, value = guest.entry(USER), DATA + PAGE | P | W | U | A | D
    with guest.counting("pf_fixed", "mmu_pte_write") as moved:
        result = OPERATION[operation](guest, guest.window(gpa), value)
    assert moved == {"pf_taken": 2, "pf_fixed": 2, "mmu_shadow_zapped": 1, "mmu_unprotect": 1}
    if operation == "run":
        assert (result.exits.tolist(), result.emulated.tolist(), result.outcome.tolist()) == ([2], [0], [0])
    assert hook.asked == [(guest.window(gpa), gpa, guest.size)]
    assert guest.tables.entry(USER).value == value
    assert not len(guest.pages(gpa >> 12))
    assert guest.vm.audit().ok
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa) + guest.size, value, guest.size)
    assert moved == {}
    assert guest.exits(USER) == 1
    assert guest.cpu.translate(USER).gpa == DATA + PAGE
    assert guest.cpu.translate(USER + PAGE).gpa == DATA + PAGE
    with guest.counting() as moved:
        guest.cpu.write(guest.window(gpa), value, guest.size)
    assert moved["mmu_unprotect"] == 1
    assert len(hook.asked) == 2
    assert guest.vm.audit().ok


@pytest.mark.parametrize("refused", ["first", "second", "both"])
@every_mode
def test_refused_part_of_a_store_over_a_page_boundary(mode, refused):
    """One of two tables, or both: the store is made, whole, and never through the emulator where that was refused."""
    twins = crossing(mode, TABLE, TABLE)
    guest = twins.guest
    low, high = guest.entry(USER) & -PAGE, guest.entry(FAR) & -PAGE
    refuses = {"first": {low}, "second": {high}, "both": {low, high}}[refused]
    asked = []

    def answer(gva, gpa, nbytes):
        asked.append((gva, gpa, nbytes))
        return gpa & -PAGE not in refuses

    twins.do(lambda g: [g.cpu.read(CROSS, 4), g.cpu.read(CROSS + PAGE, 4)])
    guest.vm.mmu.can_emulate = answer
    with guest.counting() as moved:
        twins.do(lambda g: g.cpu.write(CROSS + PAGE - 3, 0x1122334455667788, 8))
    assert (CROSS + PAGE - 3, low + PAGE - 3, 3) in asked or refused == "second"
    assert (CROSS + PAGE, high, 5) in asked or refused == "first"
    assert moved["mmu_unprotect"] == len(refuses)
    assert moved.get("pf_emulate", 0) == 2 - len(refuses)
    assert twins.ram(low + PAGE - 3, 3) == 0x667788
    assert twins.ram(high, 5) == 0x1122334455
    twins.check()


@every_mode
def test_refused_store_to_a_root_in_use(mode):
    """It cannot be unprotected: an error, and nothing is changed; in a batch with what was done before."""
    guest, hook = hooked(mode, False)
    level = 2 if mode == "pae" else LEVELS[mode]
    gpa = guest.entry(USER, level) + 8 * guest.size
    guest.see(gpa)
    memory, roots = guest.vm.memory.bytes.tobytes(), guest.vm.mmu.roots()
    for _ in range(2):
        with pytest.raises(sc.EngineError, match="root"):
            guest.cpu.write(guest.window(gpa), 0x1000, guest.size)
        assert guest.vm.memory.bytes.tobytes() == memory
        assert guest.vm.mmu.roots() == roots
        assert guest.vm.audit().ok
    assert set(hook.asked) == {(guest.window(gpa), gpa, guest.size)}
    rows = [
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 7},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(gpa), "value": 0x1000},
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 8},
    ]
    with pytest.raises(sc.EngineError, match="root") as caught:
        guest.cpu.run(batch(rows))
    assert caught.value.result.outcome.tolist() == [0]
    assert guest.cpu.read(USER) == 7
    guest.vm.mmu.can_emulate = None
    guest.cpu.run(batch(rows[1:]))
    assert guest.cpu.read(USER) == 8
    assert int.from_bytes(guest.vm.read_physical(gpa, guest.size), "little") == 0x1000
    assert guest.vm.audit().ok


@every_mode
def test_refused_store_to_a_table_that_maps_itself(mode):
    """The leaf table of the window is mapped by itself: to make the store natively the table has to be walked, which
    protects it anew. Whatever comes of it, it is not emulated against the embedder's word."""
    guest, hook = hooked(mode, False)
    own = guest.entry(guest.window(guest.entry(USER))) & -PAGE
    assert guest.table(guest.window(own)) << 12 == own
    gpa = guest.entry(guest.window(own))
    value = guest.tables.entry(guest.window(own)).value
    guest.see(gpa)
    memory = guest.vm.memory.bytes.tobytes()
    emulated = guest.vm.stats.pf_emulate
    with pytest.raises(sc.EngineError):
        guest.cpu.write(guest.window(gpa), value | 1 << 9, guest.size)
    assert guest.vm.stats.pf_emulate == emulated
    assert guest.vm.memory.bytes.tobytes() == memory
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.write(guest.window(gpa), value | 1 << 9, guest.size)
    assert guest.tables.entry(guest.window(own)).value == value | 1 << 9


class Surprise(Exception):
    """What a hook raises."""


@pytest.mark.parametrize(
    "error", [Surprise("no idea"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: type(e).__name__
)
@every_mode
def test_exception_of_a_hook(mode, error):
    """It comes out of the call as it is; the store was not made; the next call goes on as if nothing had been."""
    guest, hook = hooked(mode, error)
    gpa = guest.entry(USER)
    memory = guest.vm.memory.bytes.tobytes()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            guest.cpu.write(guest.window(gpa), 0, guest.size)
        assert caught.value is error
        assert guest.vm.memory.bytes.tobytes() == memory
        assert guest.vm.audit().ok
    assert guest.cpu.read(USER + PAGE, 4) == 0
    hook.answer = True
    guest.cpu.write(guest.window(gpa), 0, guest.size)
    assert guest.tables.entry(USER).value == 0
    assert guest.vm.audit().ok


@every_mode
def test_exception_of_a_hook_in_a_batch(mode):
    """The batch stops there: what comes later is not done, and the exception has the result of what came before."""
    guest, hook = hooked(mode, Surprise("once"))
    rows = [
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 7},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(guest.entry(USER)), "value": 0},
        {"op": sc.Op.WRITE, "size": guest.size, "addr": guest.window(guest.entry(USER + PAGE)), "value": 0},
        {"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 8},
    ]
    with pytest.raises(Surprise) as caught:
        guest.cpu.run(batch(rows))
    assert len(hook.asked) == 1
    assert guest.cpu.read(USER) == 7
    assert guest.tables.entry(USER).value
    assert guest.tables.entry(USER + PAGE).value
    assert caught.value.result.outcome.tolist() == [0]
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.run(batch(rows[2:]))
    assert guest.cpu.read(USER) == 8
    assert not guest.tables.entry(USER + PAGE).value


REENTRY = {
    "read": lambda guest: guest.cpu.read(USER),
    "write": lambda guest: guest.cpu.write(USER, 9),
    "fetch": lambda guest: guest.cpu.fetch(USER),
    "cmpxchg": lambda guest: guest.cpu.cmpxchg(USER, 0, 9),
    "modify": lambda guest: guest.cpu.modify(USER, "add", 9),
    "invlpg": lambda guest: guest.cpu.invlpg(USER),
    "translate": lambda guest: guest.cpu.translate(USER),
    "run": lambda guest: guest.cpu.run(batch([{"op": sc.Op.WRITE, "size": 8, "addr": USER, "value": 9}])),
    "cr0": lambda guest: setattr(guest.cpu, "cr0", guest.cpu.cr0 & ~(1 << 31)),
    "cr3": lambda guest: setattr(guest.cpu, "cr3", 0),
    "cr4": lambda guest: setattr(guest.cpu, "cr4", guest.cpu.cr4 ^ 1 << 7),
    "efer": lambda guest: setattr(guest.cpu, "efer", guest.cpu.efer ^ 1),
    "pkru": lambda guest: setattr(guest.cpu, "pkru", WORD & 0xFFFF_FFFF),
    "ac": lambda guest: setattr(guest.cpu, "ac", True),
    "other": lambda guest: guest.vm.vcpus[-1].read(USER),
    "write_physical": lambda guest: guest.vm.write_physical(DATA, b"\x09"),
    "unprotect": lambda guest: guest.vm.mmu.unprotect(guest.table(USER)),
    "zap_all": lambda guest: guest.vm.mmu.zap_all(),
    "can_emulate": lambda guest: setattr(guest.vm.mmu, "can_emulate", None),
    "audit": lambda guest: guest.vm.audit(),
    "reset": lambda guest: guest.vm.stats.reset(),
    "dirty_log": lambda guest: guest.vm.memory.start_dirty_log(0),
}


@pytest.mark.parametrize("scalar", [True, False], ids=["call", "batch"])
@pytest.mark.parametrize("what", REENTRY)
def test_hook_that_uses_its_own_vm(what, scalar):
    """An error that says so, from the call in the hook; nothing has changed, and the VM is usable afterwards."""
    guest, hook = hooked("64", None)
    caught = []

    def reenter():
        with pytest.raises(sc.EngineError) as error:
            REENTRY[what](guest)
        caught.append(error.value)
        return True

    hook.answer = reenter
    registers = guest.cpu.export_state()
    row = {"op": sc.Op.WRITE, "size": 8, "addr": guest.window(guest.entry(USER + 40 * PAGE)), "value": 0}
    if scalar:
        guest.cpu.write(row["addr"], row["value"])
    else:
        assert guest.cpu.run(batch([row])).emulated.tolist() == [1]
    assert len(caught) == 1
    same = {name: value for name, value in registers.items() if not name.startswith("flood")}
    assert {name: guest.cpu.export_state()[name] for name in same} == same
    assert guest.vm.memory.words[DATA // 8] == 0
    assert guest.vm.stats.pf_emulate == 1
    assert guest.vm.audit().ok
    hook.answer = True
    guest.cpu.write(USER, 3)
    assert guest.cpu.read(USER) == 3


def test_hook_that_uses_its_own_vm_is_told_so():
    """There is no other thread: what is wrong is the call from the callback."""
    guest, _ = hooked("64", lambda: guest.cpu.read(USER))
    with pytest.raises(sc.EngineError, match=r"callback|can_emulate"):
        guest.edit(USER, 0)


def test_hook_may_use_another_vm():
    other = Guest("64")
    guest, hook = hooked("64", lambda: other.cpu.read(USER) == 0)
    guest.edit(USER, 0)
    assert len(hook.asked) == 1
    assert guest.tables.entry(USER).value == 0


def test_what_can_be_a_hook():
    guest = Guest("64")
    for nonsense in (1, "yes", True, object()):
        with pytest.raises(sc.ConfigError, match="can_emulate"):
            guest.vm.mmu.can_emulate = nonsense
    assert guest.vm.mmu.can_emulate is None
    hook = Hook(True)
    guest.vm.mmu.can_emulate = hook
    assert guest.vm.mmu.can_emulate is hook


def test_native_has_nothing_to_ask_for():
    guest, hook = hooked("64", False, mmu="native")
    guest.edit(USER, 0)
    assert hook.asked == []
    assert guest.cpu.translate(USER + PAGE).gpa == DATA + PAGE


def test_unused_flags():
    """Guests of these tests map with accessed and dirty bits set: what they count is not mixed with setting those."""
    assert USED["accessed"]
    assert USED["dirty"]
