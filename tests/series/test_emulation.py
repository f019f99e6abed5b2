"""Stores to guest tables that are in use, made by the emulator: of every size, and as parts of read-modify-writes.

The same operations run on `native`, which has nothing to emulate: results, CR2 and every byte of memory have to
be equal.
"""

import operator

import pytest
from guest2007 import DATA, LEVELS, PAGE, USER, A, D, Guest, P, U, W, every_mode
from twins import CALM, FAR, PAGES, PLACE, WORD, Twins

import shadowcore as sc

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
        assert twins.do(lambda g, v=va: g.cpu.cmpxchg(v, 0, 1, 16)) == repr(sc.GeneralProtection(0, va))
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
