"""The dirty log: no frame is written unseen, whoever writes it, and none is shown that was not written.

The log of a slot says which of its frames were written since it was started or cleared: by stores, natively
made or emulated, by walks that set accessed and dirty bits, by devices. `native` logs each store. A shadow MMU
takes W away when a log is started or cleared, and logs the store that has it granted again.
"""

import numpy as np
import pytest

import shadowcore as sc
from shadowcore.pagetables import A, D, P, U, W

PAGE = 4096
DESIGNS = ["native", "cached", "flush"]
MODES = ["32", "pae", "64", "la57"]

# Three slots with holes between them, of sizes that fill no whole word of a log; tables lie in the first.
SLOTS = ((0, 512), (1024, 70), (4096, 193))  # first gfn, frames
BASE = 0x40000000  # linear address of gpa 0
READ_ONLY = 0x80000000  # the same, not writable
TABLES = range(384, 512)
DATA = [gfn for first, frames in SLOTS for gfn in range(first, first + frames) if gfn > 15 and gfn not in TABLES]

every_design = pytest.mark.parametrize("design", DESIGNS)
every_mode = pytest.mark.parametrize("mode", MODES)


class Guest:
    """A guest that maps its three slots, all of it clean and not accessed. `log`: the slots that are logged from the
    start."""

    def __init__(self, mode="64", design="cached", log=(0, 1, 2), tlb=None, vcpus=1, dirty=False):
        self.slots = [
            sc.MemorySlot(first << 12, frames << 12, dirty_log=number in log)
            for number, (first, frames) in enumerate(SLOTS)
        ]
        self.vm = sc.VM(self.slots, mmu=design, tlb=tlb, vcpus=vcpus)
        self.memory = self.vm.memory
        self.tables = sc.PageTables(self.memory, mode)
        for slot in self.slots:
            for base, rights in ((BASE, "rwxu"), (READ_ONLY, "rxu")):
                self.tables.map(base + slot.gpa, slot.gpa, slot.size, rights, PAGE, accessed=dirty, dirty=dirty)
        self.cpu = self.vm.vcpus[0]
        for cpu in self.vm.vcpus:
            for name, value in self.tables.registers.items():
                setattr(cpu, name, value)

    def log(self):
        """Of all slots, one after the other, as RAM is."""
        return np.concatenate([self.memory.dirty_log(slot) for slot in range(3)])

    def logged(self):
        """The gfns in the logs that are kept."""
        found = set()
        for number, (first, _) in enumerate(SLOTS):
            if number in self.memory.logged_slots:
                found |= {first + int(n) for n in np.flatnonzero(self.memory.dirty_log(number))}
        return found

    def clear(self):
        for slot in range(3):
            self.memory.clear_dirty_log(slot)

    def frames(self):
        return self.memory.words.reshape(-1, 512).copy()

    def table(self, gfn, level=1):
        """gfn of the guest's table of `level` for the page of `gfn`."""
        return self.tables.entry(BASE + (gfn << 12), level).gpa >> 12

    def exits(self, call):
        taken = self.vm.stats.pf_taken
        call()
        return self.vm.stats.pf_taken - taken


def batch(rows):
    ops = np.zeros(len(rows), dtype=sc.OP_DTYPE)
    for i, (op, addr, value) in enumerate(rows):
        ops[i] = op, 0, 8, addr, value
    return ops


def va(gfn, base=BASE):
    return base + (gfn << 12)


# -- the logic of a dirty log test ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tlb", [None, sc.TLB(16, 4, 0, 1, 0, 1)], ids=["walks", "tlb"])
@every_mode
@every_design
def test_random_pages_over_iterations(design, mode, tlb):
    """Random pages get the number of the iteration; the host collects the logs and looks at the pages. A page that
    was written is logged; one that is not logged has not changed, and holds an older number; nothing else is shown but
    tables in which bits were set. Logs are cleared slot by slot, not all of them each time."""
    rng = np.random.default_rng([DESIGNS.index(design), MODES.index(mode), tlb is None])
    guest = Guest(mode, design, tlb=tlb)
    frame = {gfn: guest.memory.frame(gfn) for gfn in DATA}
    ends = np.cumsum([frames for _, frames in SLOTS])
    touched = np.zeros(ends[-1], dtype=bool)  # written since the log of its slot was cleared
    number = dict.fromkeys(DATA, 0)
    for iteration in range(1, 25):
        before = guest.frames()
        written = rng.choice(DATA, rng.integers(1, 60), replace=False).tolist()
        read = rng.choice(DATA, rng.integers(0, 40), replace=False).tolist()
        rows = [(sc.Op.WRITE, va(gfn), iteration) for gfn in written]
        rows += [(sc.Op.READ, va(gfn, int(rng.choice([BASE, READ_ONLY]))), 0) for gfn in read]
        rows += [(sc.Op.CR3, 0, guest.tables.cr3)] * int(rng.integers(0, 3))
        order = rng.permutation(len(rows))
        result = guest.cpu.run(batch([rows[i] for i in order]))
        assert not result.outcome.any()
        log, changed = guest.log(), (guest.frames() != before).any(axis=1)
        number |= dict.fromkeys(written, iteration)
        for gfn in DATA:
            value = int(guest.memory.words[frame[gfn] * 512])
            assert value == number[gfn]
            assert log[frame[gfn]] or value < iteration
        touched |= changed
        touched[[frame[gfn] for gfn in written]] = True
        assert np.array_equal(log, touched)
        assert guest.vm.audit().ok
        for slot, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if rng.random() < 0.7:
                guest.memory.clear_dirty_log(slot)
                touched[start:end] = False
                assert not guest.memory.dirty_log(slot).any()


# -- what is not written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [False, True], ids=["clean", "dirty"])
@every_mode
@every_design
def test_loads_are_not_logged(design, mode, dirty):
    """Loads and fetches with all accessed bits set write nothing, also where the guest's entry would let stores pass
    and the shadow is made anew, at a CR3 load."""
    guest = Guest(mode, design, dirty=dirty)
    pages = [*DATA[:4], *DATA[-4:]]

    def look():
        for gfn in pages:
            guest.cpu.read(va(gfn, READ_ONLY))
            guest.cpu.read(va(gfn))
            guest.cpu.fetch(va(gfn), user=True)
            guest.cpu.translate(va(gfn), "w")

    look()
    for _ in range(2):
        guest.clear()
        look()
        assert guest.logged() == set()
        guest.cpu.cr3 = guest.tables.cr3
        look()
        assert guest.logged() == set()
        # A store to one that was only read so far is seen.
        guest.cpu.write(va(pages[1]), 1)
        assert guest.logged() == {pages[1]} | (set() if dirty else guest.logged() & {guest.table(pages[1])})


@every_design
def test_paging_off(design):
    """All of memory is writable then: what is written is shown, and not what is read."""
    guest = Guest("64", design)
    guest.cpu.cr0 &= ~(1 << 31)
    guest.clear()
    for _ in range(2):
        guest.cpu.read(DATA[2] << 12)
        assert guest.logged() == set()
        guest.cpu.write(DATA[1] << 12, 1)
        guest.cpu.read(DATA[1] << 12)
        assert guest.logged() == {DATA[1]}
        guest.clear()


def at_the_edge(design, mode):
    """A guest with a page that is not present, 40, and one that is no memory, behind the last of the first slot."""
    guest = Guest(mode, design, dirty=True)
    last = va(SLOTS[0][1])
    guest.tables.unmap(va(40), PAGE)
    guest.tables.map(last, SLOTS[0][1] << 12, PAGE, "rwxu", PAGE, accessed=True, dirty=True)
    for address in (va(20, READ_ONLY), va(39), last - 8):
        guest.cpu.read(address)
    with pytest.raises(sc.MMIOAccess):
        guest.cpu.write(last, 1)
    guest.clear()
    return guest, last


def fails(guest, address, size):
    with pytest.raises((sc.PageFault, sc.MMIOAccess)):
        guest.cpu.write(address, 1, size)
    with pytest.raises((sc.PageFault, sc.MMIOAccess)):
        guest.cpu.cmpxchg(address, 0, 1, size)


@every_mode
@every_design
def test_stores_that_fault_are_not_logged(design, mode):
    """To a page that is read-only, not present, or no memory."""
    guest, last = at_the_edge(design, mode)
    for address in (va(20, READ_ONLY), va(40), last, last + 8):
        fails(guest, address, 8)
    assert guest.logged() == set()
    guest.cpu.write(last - 8, 1)
    assert guest.logged() == {SLOTS[0][1] - 1}


@every_mode
@every_design
def test_first_page_of_a_store_that_faults_is_not_logged(design, mode):
    """The second page does not allow it, or is no memory, so that the first is not written either."""
    guest, last = at_the_edge(design, mode)
    for address in (va(40) - 4, last - 4):
        fails(guest, address, 8)
    assert guest.logged() == set()
    # That store was not made, but the next one is, and is seen.
    guest.cpu.write(va(40) - 8, 1)
    assert guest.logged() == {39}


# -- clearing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tlb", [None, sc.TLB()], ids=["walks", "tlb"])
@every_mode
@every_design
def test_clearing_write_protects_again(design, mode, tlb):
    """The next store to each frame costs one exit and is logged; those after it, and loads, cost none."""
    guest = Guest(mode, design, tlb=tlb)
    pages = DATA[5:12]
    for gfn in pages:
        guest.cpu.write(va(gfn), 1)
    one = 0 if design == "native" else 1
    for _ in range(3):
        guest.clear()
        for gfn in pages:
            assert guest.exits(lambda gfn=gfn: guest.cpu.read(va(gfn))) == 0
        assert guest.logged() == set()
        for number, gfn in enumerate(pages):
            before = guest.vm.stats.exits["write"]
            assert guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn), 2)) == one
            assert guest.vm.stats.exits["write"] - before == one
            assert guest.logged() == set(pages[: number + 1])
            assert guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn) + 8, 2)) == 0
        assert guest.vm.audit().ok


@every_mode
@pytest.mark.parametrize("design", ["cached", "flush"])
def test_all_mappings_of_a_frame_lose_w(design, mode):
    """A frame that is mapped twice, the second time within a large page."""
    guest = Guest(mode, design)
    large = 1 << guest.tables.format.shift(2)
    other = 0xC0000000
    guest.tables.map(other, 0, large, "rwu" if mode != "32" else "rwxu", large)
    guest.cpu.cr3 = guest.tables.cr3
    gfn = DATA[7]
    for base in (BASE, other):
        guest.cpu.write(va(gfn, base), 1)
    assert len(guest.vm.mmu.rmap(gfn)) == 2
    guest.clear()
    assert len(guest.vm.mmu.rmap(gfn)) == 0
    assert guest.vm.audit().ok
    for base in (other, BASE):
        assert guest.exits(lambda base=base: guest.cpu.write(va(gfn, base), 2)) == 1
        assert guest.logged() == {gfn}
    assert guest.vm.audit().ok


@every_design
def test_slots_have_logs_of_their_own(design):
    """Clearing one takes W from its frames alone; the first and last frames of a slot, next to holes, are in theirs."""
    guest = Guest("64", design)
    edges = [gfn for first, frames in SLOTS for gfn in (first + 8, first + frames - 1)]
    edges[1] = SLOTS[0][1] - 200  # the last ones of the first slot are tables
    for gfn in edges:
        guest.cpu.write(va(gfn), 1)
    guest.clear()
    for gfn in edges:
        guest.cpu.write(va(gfn), 2)
    assert guest.logged() == set(edges)
    for number, (first, frames) in enumerate(SLOTS):
        log = guest.memory.dirty_log(number)
        assert log.dtype == bool
        assert len(log) == frames
        assert {first + int(n) for n in np.flatnonzero(log)} == {gfn for gfn in edges if first <= gfn < first + frames}
    guest.memory.clear_dirty_log(1)
    assert guest.logged() == {*edges[:2], *edges[4:]}
    one = 0 if design == "native" else 1
    assert [guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn), 3)) for gfn in edges] == [0, 0, one, one, 0, 0]
    assert guest.logged() == set(edges)


@every_design
def test_only_the_logged_slot_pays(design):
    guest = Guest("64", design, log=())
    pages = [SLOTS[0][0] + 20, SLOTS[1][0] + 3, SLOTS[2][0] + 100]
    for gfn in pages:
        guest.cpu.write(va(gfn), 1)
    guest.memory.start_dirty_log(1)
    one = 0 if design == "native" else 1
    for _ in range(2):
        assert guest.logged() == set()
        assert [guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn), 1)) for gfn in pages] == [0, one, 0]
        assert guest.logged() == {pages[1]}
        guest.memory.clear_dirty_log(1)


@pytest.mark.parametrize("tlb", [None, sc.TLB()], ids=["walks", "tlb"])
@every_mode
@every_design
def test_a_log_started_late(design, mode, tlb):
    """Frames are writable by then, and a TLB may know it: starting takes W from them all. What was written before is
    not shown."""
    guest = Guest(mode, design, log=(), tlb=tlb)
    pages = DATA[5:30:5]
    for gfn in pages:
        guest.cpu.write(va(gfn), 1)
        assert guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn), 1)) == 0
    for slot in range(3):
        guest.memory.start_dirty_log(slot)
    assert guest.logged() == set()
    if design != "native":
        assert not any(len(guest.vm.mmu.rmap(gfn)) for gfn in pages)
    for number, gfn in enumerate(pages):
        assert guest.exits(lambda gfn=gfn: guest.cpu.write(va(gfn), 2)) == (design != "native")
        assert guest.logged() == set(pages[: number + 1])
    assert guest.vm.audit().ok


def test_a_log_that_is_stopped_and_started_again():
    guest = Guest("64", "cached")
    gfn = DATA[9]
    guest.cpu.write(va(gfn), 1)
    assert gfn in guest.logged()
    guest.memory.start_dirty_log(0)  # runs already: nothing is lost
    assert gfn in guest.logged()
    guest.memory.stop_dirty_log(0)
    assert guest.memory.logged_slots == (1, 2) or list(guest.memory.logged_slots) == [1, 2]
    for call in (guest.memory.dirty_log, guest.memory.clear_dirty_log, guest.memory.stop_dirty_log):
        with pytest.raises(sc.ConfigError, match="slot"):
            call(0)
    assert guest.exits(lambda: guest.cpu.write(va(gfn), 2)) == 0
    guest.memory.start_dirty_log(0)
    assert not guest.memory.dirty_log(0).any()
    assert guest.exits(lambda: guest.cpu.write(va(gfn), 3)) == 1
    assert guest.logged() == {gfn}


def test_what_is_handed_out_is_a_copy():
    guest = Guest("64", "cached")
    guest.cpu.write(va(DATA[3]), 1)
    log = guest.memory.dirty_log(0)
    assert log[DATA[3]]
    log[:] = False
    assert DATA[3] in guest.logged()


@pytest.mark.parametrize("slot", [-1, 3, 1 << 40, 1.5, None, "0", True])
def test_slots_that_are_none(slot):
    memory = Guest("64", "cached").memory
    for call in (memory.dirty_log, memory.clear_dirty_log, memory.start_dirty_log, memory.stop_dirty_log):
        with pytest.raises(sc.ConfigError, match="slot"):
            call(slot)


# -- everything that writes ----------------------------------------------------------------------------------------


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
    guest.cpu.run(batch([(sc.Op.WRITE, va(gfn), 1) for gfn in DATA[:5]]), data=False)
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
