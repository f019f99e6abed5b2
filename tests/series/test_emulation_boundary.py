"""Accesses over a page boundary where a page is a guest table in use, read-only, missing or a device's.

The same operations run on `native`, which has nothing to emulate: results, CR2 and every byte of memory have to
be equal.
"""

import pytest
from guest2007 import PAGE, RAM, USER, A, D, P, W, every_mode
from twins import CROSS, DEVICE, FAR, KINDS, MISSING, PLACE, READ_ONLY, TABLE, WORD, Twins, crossing, frame

import shadowcore as sc

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
                assert came == repr(sc.GeneralProtection(0, start))
    twins.do(lambda guest: guest.cpu.write(edge - 8, 0x55, 8))
    assert twins.ram(PLACE + PAGE - 8, 8) == 0x55
    assert twins.guest.vm.stats.gp_guest > 10
    twins.check()
