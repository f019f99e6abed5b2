"""The dirty log and the stores that are more than one page's, or more than stores: what one page decides, two decide.

Whatever changes RAM is in the log, however the store was made: natively, by the emulator because a page holds a table
or because no leaf can grant it (CR0.WP = 0 with SMEP, SMAP or protection keys), over a page boundary, as part of a
read-modify-write, in a batch. And nothing is in it that was not stored to: `native`, which sees each store, is the
measure.
"""

import itertools

import numpy as np
import pytest
from guest2007 import every_mode
from page_stores import (
    CR0_WP,
    CR4_PKE,
    CR4_SMAP,
    CR4_SMEP,
    PAGE,
    PAGES,
    PLACE,
    RAM,
    STATES,
    STORES,
    TABLES,
    Guest,
    batch,
    outcome,
    ran,
    same_as_native,
)

import shadowcore as sc
from shadowcore.pagetables import A, D, P, U, W


@pytest.mark.parametrize("state", STATES)
@every_mode
def test_store_that_no_leaf_can_grant(mode, state):
    """CR0.WP = 0: both pages of a supervisor store to read-only pages are logged, and what the emulator did is
    counted, whether the store has one page or two, is a store alone or part of a read-modify-write."""
    for name in STORES:
        for left, size in ((4, 8), (1, 2), (0, 8), (8, 8)):
            kinds = ("read-only", "read-only, clean")
            guest, _ = same_as_native(mode, "cached", kinds, state, name, size, left)
            stats = guest.vm.stats
            pages = (left > 0) + (left < size)
            assert set(guest.log()) >= set(guest.gfn[left == 0 : 1 + (left < size)]), (name, size, left)
            emulates = STATES[state][0] & ~(CR4_PKE if mode in ("32", "pae") else 0)
            assert stats.pf_emulate == stats.exits["emulate"] == (pages if emulates else 0), (name, size, left)


PAIRS = [(first, second) for first in PAGES for second in PAGES]


def enumerate_pairs(mode, state, pairs, names, splits, design="cached"):
    for kinds in pairs:
        for name in names:
            for size, left in splits:
                for wp in (False, True):
                    same_as_native(mode, design, kinds, state, name, size, left, wp)


@pytest.mark.parametrize("state", ["leaves", "all"])
@every_mode
def test_pairs_of_pages(mode, state):
    """A sample of the pairs: every kind first and second once."""
    names = list(PAGES)
    pairs = [(first, names[(3 * i + 2) % len(names)]) for i, first in enumerate(names)]
    pairs += [("device", "writable"), ("clean", "device"), ("device", "clean"), ("read-only, clean", "device")]
    enumerate_pairs(mode, state, pairs, ["write", "batch, or"], [(8, 4)])


@pytest.mark.slow
@pytest.mark.parametrize("design", ["cached", "flush"])
@pytest.mark.parametrize("state", STATES)
@every_mode
def test_all_pairs_of_pages(mode, state, design):
    design = sc.Shadow.flush(quirks=0) if design == "flush" else design
    enumerate_pairs(mode, state, PAIRS, STORES, [(8, 4), (2, 1), (8, 0), (8, 8)], design)


@pytest.mark.parametrize("design", ["native", "cached", "flush"])
@pytest.mark.parametrize("name", ["write", "add", "batch", "no data"])
@every_mode
def test_store_that_straddles_memory_and_a_device(mode, name, design):
    """The embedder makes all of it. A and D are set in both pages, as the guest's processor sets them before it
    stores; no byte has moved, and the log shows neither page: the same whichever side is RAM."""
    seen = []
    for kinds in (("clean", "device"), ("device", "clean")):
        guest = Guest(mode, design, kinds, wp=True)
        before = guest.memory.words.copy()
        ram, device = kinds.index("clean"), kinds.index("device")
        gpa = RAM + device * PAGE + (PAGE - 4 if device == 0 else 0)
        assert outcome(STORES[name], guest, guest.at(8, 4), 8) == repr(sc.MMIOAccess(gpa))
        used = guest.entries()
        assert [entries[-1] for entries in used] == [A | D, A | D]
        changed = {int(n) for n in np.flatnonzero((guest.memory.words != before).reshape(-1, 512).any(axis=1))}
        assert changed <= set(TABLES)
        assert set(guest.log()) == changed
        seen.append(used[::-1] if ram else used)
        # The half that is the embedder's, made with the sizes that there are, is logged as ever.
        guest.cpu.write(guest.va[1] if ram else guest.va[1] - 4, 0x01020304, 4)
        assert guest.gfn[ram] in guest.log()
        assert guest.vm.audit().ok
    assert seen[0] == seen[1]


@pytest.mark.parametrize("design", ["native", "cached", "flush"])
@every_mode
def test_load_that_straddles_memory_and_a_device(mode, design):
    """A is set in both, and nothing is logged but tables."""
    for kinds in (("clean", "device"), ("device", "clean")):
        guest = Guest(mode, design, kinds, wp=True)
        with pytest.raises(sc.MMIOAccess):
            guest.cpu.read(guest.at(8, 4), 8)
        assert [entries[-1] for entries in guest.entries()] == [A, A]
        assert set(guest.log()) <= set(TABLES)


@pytest.mark.parametrize("design", ["native", "cached", "flush"])
@pytest.mark.parametrize("first", ["clean", "device"])
@every_mode
def test_store_whose_second_page_faults_leaves_no_trace_at_the_first(mode, first, design):
    """Be the first RAM or a device."""
    design = sc.Shadow.flush(quirks=0) if design == "flush" else design
    for second in ("missing", "read-only, clean"):
        guest = Guest(mode, design, (first, second), wp=True)
        for name in ("write", "cmpxchg", "batch"):
            assert "PF at" in outcome(STORES[name], guest, guest.at(8, 4), 8)
            assert guest.entries()[0][-1] == 0
            assert guest.log() == []


@every_mode
def test_table_that_is_recycled_between_the_pages_of_a_store(mode):
    """The exit of the first page said "emulate"; the second page's needs room, and the table goes. The store is then
    made natively, and no leaf was granted that would have logged it."""
    native = 0
    for reserve, pool, name in itertools.product(range(1, 5), range(5, 11), ("write", "batch", "no data")):
        design = sc.Shadow.cached(pool_pages=pool, min_free=reserve, refill=pool)
        guest = Guest(mode, design, ("table", "clean"), wp=True)
        guest.vm.mmu.zap_all()
        guest.cpu.read(guest.table_of[0])  # the table's shadow is the oldest page, but for upper tables
        guest.memory.clear_dirty_log()
        stats = guest.vm.stats
        exits, emulated = stats.exits["emulate"], stats.pf_emulate
        STORES[name](guest, guest.at(8, 4), 8)
        assert set(guest.log()) >= set(guest.gfn), (reserve, pool, name)
        native += stats.exits["emulate"] - exits > stats.pf_emulate - emulated
        assert guest.vm.audit().ok
    assert native, "no pool size for which this happens"


# -- at random -----------------------------------------------------------------------------------------------------

KINDS = ["writable", "clean", "read-only", "read-only, clean", "supervisor's", "table", "read-only table", "device"]
AT = 0x10000000 - 16 * PAGE  # 32 pages, across two leaf tables


class Walked:
    """A guest with 32 neighbouring pages of all kinds, which stores to them at random under registers that change.

    `hook`: answers whether the emulator may make a store.
    """

    def __init__(self, mode, design, seed, tlb=None):
        rng = np.random.default_rng(seed)
        self.vm = sc.VM(RAM, design, tlb=tlb)
        self.memory, self.cpu, self.mode = self.vm.memory, self.vm.vcpus[0], mode
        self.tables = sc.PageTables(self.memory, mode, allocate=TABLES)
        self.tables.map(AT, PLACE << 12, 32 * PAGE, "rwxu")  # the tables are there
        for number, kind in enumerate(rng.choice(KINDS, 32).tolist()):
            rights, used = PAGES[kind]
            gpa = (PLACE + number) << 12
            if kind in ("table", "read-only table"):
                level = int(rng.integers(1, 3))
                gpa = self.tables.entry(AT + int(rng.integers(0, 32)) * PAGE, level).gpa & -PAGE
            elif kind == "device":
                gpa = RAM + number * PAGE
            pkey = int(rng.integers(0, 3)) if mode in ("64", "la57") else 0
            self.tables.map(AT + number * PAGE, gpa, PAGE, rights, PAGE, accessed=used, dirty=used, pkey=pkey)
        for name, value in self.tables.registers.items():
            setattr(self.cpu, name, value)
        self.memory.start_dirty_log()


def random_steps(mode, rng, n):
    """(what, ...): registers, INVLPG, a device's store, the log cleared; most are operations of a batch or a call."""
    cr4 = [CR4_SMEP, CR4_SMAP, *([CR4_PKE] * 2 if mode in ("64", "la57") else [])]
    for _ in range(n):
        kind = rng.random()
        if kind < 0.12:
            yield "cr0", CR0_WP
        elif kind < 0.24:
            yield "cr4", int(rng.choice(cr4))
        elif kind < 0.28:
            yield "ac", None
        elif kind < 0.31:
            yield "pkru", int(rng.choice([0, 1 << 2, 2 << 2, 2 << 4]))
        elif kind < 0.34:
            yield "cr3", None
        elif kind < 0.42:
            yield "clear", None
        elif kind < 0.45:
            yield "device", ((PLACE + int(rng.integers(0, 32))) << 12) - 3
        else:
            op = int(rng.choice([sc.Op.READ, *[sc.Op.WRITE] * 3, sc.Op.CMPXCHG, sc.Op.ADD, sc.Op.OR, sc.Op.XOR]))
            size = int(
                rng.choice([1, 2, 4, 8, 8, 8, 16] if op < sc.Op.XCHG and op != sc.Op.CMPXCHG else [1, 2, 4, 8, 8])
            )
            page = int(rng.integers(1, 32))
            offset = -int(rng.integers(1, size)) if size > 1 and rng.random() < 0.6 else 8 * int(rng.integers(0, 500))
            # Bits of rights, A and D of one entry: what an operating system edits.
            flip = int(rng.choice([0, A, D, A | D, W, W, U, P])) << 8 * (-offset % 8 if offset < 0 else 0)
            user = bool(rng.random() < 0.2)
            yield "access", op, size, AT + page * PAGE + offset, flip, user, rng.random() < 0.5, rng.random() < 0.8


def do(guest, step):
    """What became of it."""
    cpu = guest.cpu
    match step:
        case ("cr0" | "cr4" as name, bit):
            setattr(cpu, name, getattr(cpu, name) ^ bit)
        case ("ac", _):
            cpu.ac = not cpu.ac
        case ("pkru", value):
            cpu.pkru = value
        case ("cr3", _):
            cpu.cr3 = cpu.cr3
        case ("device", gpa):
            guest.vm.write_physical(gpa, b"device")
        case ("access", op, size, va, flip, user, scalar, data):
            value = flip
            if op == sc.Op.WRITE:  # what is there, but for the bits
                value = int.from_bytes(b"".join(present(guest, va + i) for i in range(size)), "little") ^ flip
            value &= (1 << 8 * size) - 1
            if scalar and op == sc.Op.READ:
                return cpu.read(va, size, user)
            if scalar and op == sc.Op.WRITE:
                return cpu.write(va, value, size, user)
            ran(guest, batch(op, va, value, size, user), data)
    return None


def present(guest, va):
    """The byte at `va`, by the guest's tables; 0 if they lead nowhere."""
    try:
        return guest.vm.read_physical(guest.cpu.translate(va, "r").gpa, 1)
    except (sc.GuestFault, sc.ConfigError):
        return b"\0"


def walk_at_random(mode, design, seed, steps, tlb=None):
    """Every step under `design` and `native`: what is not in the log has not changed, and the logs are equal."""
    guests = [Walked(mode, made, seed, tlb) for made in (design, "native")]
    clean = [guest.memory.words.copy() for guest in guests]
    emulated = 0
    for step in random_steps(mode, np.random.default_rng(seed), steps):
        if step[0] == "clear":
            for number, guest in enumerate(guests):
                guest.memory.clear_dirty_log()
                clean[number] = guest.memory.words.copy()
            continue
        came = [outcome_of(guest, step) for guest in guests]
        assert came[0] == came[1], step
        logs = [guest.memory.dirty_log() for guest in guests]
        for guest, was, log in zip(guests, clean, logs, strict=True):
            changed = (guest.memory.words != was).reshape(-1, 512).any(axis=1)
            assert not (changed & ~log).any(), (step, np.flatnonzero(changed & ~log))
        assert np.array_equal(guests[0].memory.words, guests[1].memory.words), step
        assert np.array_equal(*logs), (step, np.flatnonzero(logs[0] ^ logs[1]))
    assert guests[0].vm.audit().ok
    emulated = guests[0].vm.stats.pf_emulate
    return emulated


def outcome_of(guest, step):
    try:
        return do(guest, step)
    except sc.GuestFault as fault:
        return repr(fault)


@pytest.mark.parametrize("seed", range(3))
@every_mode
def test_random_stores(mode, seed):
    """RAM that changed since the log was cleared is logged; and nothing that `native` does not show."""
    assert walk_at_random(mode, "cached", seed, 150)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["cached", "8 pages", "every store zaps"])
@pytest.mark.parametrize("seed", range(20))
@every_mode
def test_random_stores_for_long(mode, seed, design):
    designs = {"8 pages": sc.Shadow.cached(pool_pages=8), "every store zaps": sc.Shadow.cached(flood_threshold=1)}
    walk_at_random(mode, designs.get(design, design), 1000 + seed, 1500)
