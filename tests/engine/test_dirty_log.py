"""The dirty log: no frame is written unseen, whoever writes it, and none is shown that was not written.

The log of a slot says which of its frames were written since it was started or cleared: by stores, natively
made or emulated, by walks that set accessed and dirty bits, by devices. `native` logs each store. A shadow MMU
takes W away when a log is started or cleared, and logs the store that has it granted again.
"""

import numpy as np
import pytest
from guest2007 import every_mode
from logged_guest import BASE, DATA, DESIGNS, MODES, PAGE, READ_ONLY, SLOTS, Guest, every_design, va
from operations import operations

import shadowcore as sc

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
        result = guest.cpu.run(operations(*[rows[i] for i in order]))
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
