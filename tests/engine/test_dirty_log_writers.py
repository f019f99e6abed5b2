"""Everything that writes to a logged slot: accessed and dirty bits, tables, devices, batches, several processors."""

import numpy as np
import pytest
from guest2007 import every_mode
from logged_guest import DATA, PAGE, READ_ONLY, SLOTS, Guest, every_design, va
from operations import operations

import shadowcore as sc
from shadowcore.pagetables import A, D, P, U, W


@every_mode
@every_design
def test_accessed_and_dirty_bits_are_logged(design, mode):
    """A walk that sets a bit writes to the table: each one in which a bit changes is shown, and no other."""
    guest = Guest(mode, design)
    gfn = DATA[30]
    levels = {"32": 2, "pae": 2, "64": 4, "la57": 5}[mode]  # PAE root entries have no such bits
    tables = {guest.table(gfn, level) for level in range(1, levels + 1)}
    guest.clear()
    guest.cpu.read(va(gfn))
    assert guest.logged() == tables
    guest.clear()
    guest.cpu.read(va(gfn))
    assert guest.logged() == set()
    guest.cpu.write(va(gfn), 1)
    assert guest.logged() == {gfn, guest.table(gfn)}
    assert guest.tables.entry(va(gfn)).value & (A | D) == A | D
    guest.clear()
    guest.cpu.write(va(gfn), 1)
    assert guest.logged() == {gfn}
    guest.clear()
    guest.cpu.read(va(gfn + 1))  # the upper tables have their bits
    assert guest.logged() == {guest.table(gfn + 1)}


OPERATIONS = {
    "store": lambda cpu, address, old: cpu.write(address, old | 1 << 9, 4),
    "one byte": lambda cpu, address, old: cpu.write(address + 1, old >> 8 & 255, 1),
    "16 bytes": lambda cpu, address, old: cpu.write(address & -16, 0, 16),
    "cmpxchg": lambda cpu, address, old: cpu.cmpxchg(address, old & 0xFFFFFFFF, old & 0xFFFFFFFF | 1 << 9, 4),
    "mismatch": lambda cpu, address, old: cpu.cmpxchg(address, 0, 0, 4),
    "modify": lambda cpu, address, old: cpu.modify(address, "and", 0xFF & ~W, 1),
    "nothing new": lambda cpu, address, old: cpu.modify(address, "or", 0, 1),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@every_mode
@every_design
def test_stores_to_tables_are_logged(design, mode, operation):
    """Emulated ones, natively made ones after a refusal, and those of `native`. A locked operation stores always, be it
    what was there."""
    for refuse in (False, True):
        guest = Guest(mode, design)
        gfn = DATA[-30]  # in another leaf table than the frames of tables
        entry = guest.tables.entry(va(gfn)).gpa
        guest.cpu.write(va(gfn), 1)
        window = va(entry >> 12) + entry % PAGE
        guest.cpu.write(window ^ 0x800, 0, 4)  # all bits are set in the tables that lead there
        guest.cpu.read(va(gfn))
        if refuse:
            guest.vm.mmu.can_emulate = lambda *store: False
        guest.clear()
        emulated = guest.vm.stats.pf_emulate
        OPERATIONS[operation](guest.cpu, window, guest.tables.entry(va(gfn)).value)
        assert guest.vm.stats.pf_emulate - emulated == (design == "cached" and not refuse)
        assert guest.logged() == {entry >> 12}
        assert guest.vm.audit().ok


@every_design
def test_both_pages_of_a_store_are_logged(design):
    guest = Guest("64", design, dirty=True)
    guest.clear()
    guest.cpu.write(va(DATA[6]) - 3, 0x1122334455667788, 8)
    assert guest.logged() >= {DATA[5], DATA[6]}
    guest.clear()
    guest.cpu.cmpxchg(va(DATA[8]) - 1, 5, 6, 2)  # does not fit: stored to all the same
    assert guest.logged() == {DATA[7], DATA[8]}


@every_design
def test_stores_of_devices_are_logged(design):
    guest = Guest("64", design)
    guest.clear()
    guest.vm.write_physical(DATA[3] << 12, b"")
    assert guest.logged() == set()
    guest.vm.write_physical((DATA[3] << 12) + 4095, b"ab")
    assert guest.logged() == {DATA[3], DATA[4]}
    guest.vm.write_physical(SLOTS[1][0] << 12, bytes(3 * PAGE))
    assert guest.logged() == {DATA[3], DATA[4], *(SLOTS[1][0] + i for i in range(3))}
    end = SLOTS[1][0] + SLOTS[1][1]
    guest.clear()
    with pytest.raises(sc.ConfigError):
        guest.vm.write_physical((end << 12) - 8, bytes(16))  # into the hole
    assert guest.logged() == set()
    # To a table in use, and to a page that a shadow maps writable.
    guest.cpu.write(va(DATA[3]), 1)
    guest.clear()
    guest.vm.write_physical(guest.tables.entry(va(DATA[3])).gpa, (DATA[4] << 12 | P | W | U).to_bytes(8, "little"))
    guest.vm.write_physical(DATA[3] << 12, b"x")
    assert guest.logged() == {guest.table(DATA[3]), DATA[3]}
    guest.vm.read_physical(0, PAGE)
    guest.memory.words[DATA[9] * 512] = 1  # the embedder's own doing
    assert guest.logged() == {guest.table(DATA[3]), DATA[3]}


@every_mode
@every_design
def test_page_of_a_large_page_is_logged_alone(design, mode):
    guest = Guest(mode, design)
    large = 1 << guest.tables.format.shift(2)
    other = 0xC0000000
    guest.tables.map(other, 0, large, "rwxu", large, accessed=True, dirty=True)
    guest.cpu.cr3 = guest.tables.cr3
    guest.cpu.read(va(DATA[1], other))
    guest.clear()
    guest.cpu.write(va(DATA[2], other) + 0x123, 1)
    assert guest.logged() == {DATA[2]}
    guest.clear()
    assert guest.exits(lambda: guest.cpu.write(va(DATA[2], other), 1)) == (design != "native")
    assert guest.logged() == {DATA[2]}


@every_design
def test_batch_without_data(design):
    """data=False: the stores are those of a recording, and count as stores."""
    guest = Guest("64", design, dirty=True)
    guest.cpu.read(va(DATA[0], READ_ONLY))
    guest.clear()
    guest.cpu.run(operations(*[(sc.Op.WRITE, va(gfn), 1) for gfn in DATA[:5]]), data=False)
    assert guest.logged() >= set(DATA[:5])
    assert guest.logged() - set(DATA[:5]) <= {guest.table(DATA[0], level) for level in range(1, 5)}
    assert not guest.memory.words[DATA[0] * 512]


@pytest.mark.parametrize("tlb", [None, sc.TLB()], ids=["walks", "tlb"])
@every_design
def test_several_processors(design, tlb):
    """A log that is cleared concerns every processor, whatever its TLB holds; what one stores, all see logged."""
    guest = Guest("64", design, tlb=tlb, vcpus=3, dirty=True)
    gfn = DATA[11]
    for cpu in guest.vm.vcpus:
        cpu.write(va(gfn), 1)
    for cpu in guest.vm.vcpus:
        guest.clear()
        assert guest.exits(lambda cpu=cpu: cpu.write(va(gfn), 2)) == (design != "native")
        assert guest.logged() == {gfn}
        guest.memory.clear_dirty_log(0)
        for other in reversed(guest.vm.vcpus):
            other.write(va(gfn), 3)
            assert guest.logged() == {gfn}
        assert guest.vm.audit().ok


@every_design
def test_lists_of_writable_leaves_survive_clearing(design):
    """Clear, store, edit, over and over: what was taken off the lists by the log is put back by stores."""
    guest = Guest("64", design)
    rng = np.random.default_rng(4)
    for _ in range(30):
        for gfn in rng.choice(DATA, 20).tolist():
            guest.cpu.write(va(gfn), 1)
        gfn = int(rng.choice(DATA))
        entry = guest.tables.entry(va(gfn)).gpa
        guest.cpu.write(va(entry >> 12) + entry % PAGE, gfn << 12 | P | W | U, 8)
        guest.cpu.invlpg(va(gfn))
        guest.memory.clear_dirty_log(int(rng.integers(3)))
        assert guest.vm.audit().ok
