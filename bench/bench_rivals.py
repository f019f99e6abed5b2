"""Row 11: the engine from Python, against what one would use or write instead."""

import numpy as np
import pytest
from guests import MIB, PAGE, Guest, accesses, pages
from rivals import FAULT, NumpyWalk, PythonShadow, PythonWalk, Unicorn, as_list

import shadowcore as sc

OPERATIONS = 100_000
FEW = 10_000
"""Operations of what is written in Python."""
SIZE = 64 * MIB
UNICORN_PAGES, UNICORN_FRAMES = 16_384, 256


def guest_of(size=SIZE, mmu=None):
    return Guest("64", size, mmu or sc.Shadow.cached(pool_pages=1024)).map().start()


def at_random(size, count, seed=5):
    rng = np.random.default_rng(seed)
    return rng.integers(0, size // 8, count, dtype=np.uint64) * np.uint64(8)


@pytest.mark.benchmark(group="rivals")
def test_hits_of_python(side_by_side):
    """1024 hot pages, anywhere."""
    guest, copy = guest_of(), guest_of()
    rng = np.random.default_rng(5)
    va = rng.choice(rng.choice(pages(SIZE // PAGE), 1024, replace=False), OPERATIONS)
    ops = accesses(va)
    few = as_list(ops[:FEW])
    shadow = PythonShadow(copy.vm.memory.bytes, copy.tables.cr3)
    guest.run(ops)
    shadow.run(as_list(ops))
    assert shadow.run(few) == guest.run(ops).gpa[:FEW].tolist()

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == 0

    side_by_side(
        row=11,
        what="hits on 1024 pages",
        goal=1 / 45,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=lambda: shadow.run(few),
        units=FEW,
        named="a shadow MMU in Python",
        check=check,
    )


@pytest.mark.benchmark(group="rivals")
def test_cold_faults_of_python(side_by_side):
    guest, copy = guest_of(), guest_of()
    every = pages(SIZE // PAGE).reshape(-1, 512)
    first, rest = accesses(every[:, 0].copy()), accesses(np.random.default_rng(6).permutation(every[:, 1:].ravel()))
    few = as_list(rest[:FEW])
    shadow = PythonShadow(copy.vm.memory.bytes, copy.tables.cr3)

    def prepare():
        guest.vm.mmu.zap_all()
        guest.run(first)

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits["fill"] == len(rest)

    def theirs():
        before = shadow.fills
        shadow.run(few)
        assert shadow.fills - before == FEW

    side_by_side(
        row=11,
        what="cold faults, at random",
        goal=1 / 60,
        ours=lambda: guest.run(rest),
        operations=len(rest),
        yardstick=theirs,
        units=FEW,
        named="a shadow MMU in Python",
        check=check,
        prepare=prepare,
        prepare_yardstick=shadow.clear,
    )


@pytest.mark.benchmark(group="rivals")
def test_walks_of_python(side_by_side):
    guest = guest_of(mmu="native")
    ops = accesses(at_random(SIZE, OPERATIONS))
    few = as_list(ops[:FEW])
    walk = PythonWalk(guest.vm.memory.bytes, guest.tables.root)
    assert walk.run(few) == guest.run(ops).gpa[:FEW].tolist()
    side_by_side(
        row=11,
        what="walks of the guest's tables",
        goal=None,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=lambda: walk.run(few),
        units=FEW,
        named="a walker in Python",
    )


@pytest.mark.benchmark(group="rivals")
def test_walks_of_numpy(side_by_side):
    guest = guest_of(mmu="native")
    ops = accesses(at_random(SIZE, OPERATIONS))
    walk, va = NumpyWalk(guest.vm.memory.bytes, guest.tables.root), ops["addr"].copy()
    assert (walk.run(va) == guest.run(ops).gpa).all()
    side_by_side(
        row=11,
        what="walks of the guest's tables",
        goal=None,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=lambda: walk.run(va),
        units=OPERATIONS,
        named="numpy, no A/D, no large pages",
    )


@pytest.mark.benchmark(group="rivals")
@pytest.mark.parametrize(("design", "goal"), [("native", None), ("cached", 0.1)])
def test_misses_of_unicorn(side_by_side, design, goal):
    """Loads from 16,384 pages at random: nearly all miss Unicorn's TLB of 256 + 8 entries.

    The pages are mapped to 256 frames, so that it is translations that take the time, and not the data.
    """
    pytest.importorskip("unicorn")
    size = UNICORN_FRAMES * PAGE
    mmu = sc.Native() if design == "native" else sc.Shadow.cached(pool_pages=1024)
    guest = Guest("64", size + 4 * MIB, mmu)
    for va in range(0, UNICORN_PAGES * PAGE, size):
        guest.map(va, 0, size)
    guest.start()
    words = guest.vm.memory.bytes[guest.table_room : guest.table_room + size].view(np.uint64)
    words[:] = np.random.default_rng(4).integers(0, 2**63, len(words), dtype=np.uint64)
    va = at_random(UNICORN_PAGES * PAGE, OPERATIONS)
    unicorn = Unicorn(guest, va, guest.table_room + size)
    ops = accesses(va)
    for _ in range(2):
        guest.run(ops)
    expected = int(words[va // np.uint64(8) % np.uint64(len(words))].sum(dtype=np.uint64))

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == 0
        assert int(result.value.sum(dtype=np.uint64)) == expected

    def theirs():
        assert unicorn.run() == expected

    side_by_side(
        row=11,
        what=f"loads from {UNICORN_PAGES} pages, {design}",
        goal=goal,
        ours=lambda: guest.run(ops, data=True),
        operations=OPERATIONS,
        yardstick=theirs,
        units=OPERATIONS,
        named="Unicorn, its TLB missing",
        check=check,
    )


def test_rivals():
    """They find what the engine finds: where rights are missing as well, and after stores to tables."""
    rng = np.random.default_rng(9)
    sides = []
    for _ in range(3):
        guest = Guest("64", 8 * MIB).map()
        for table in guest.leaf_tables(0, guest.size):
            guest.entries(table)[:] &= ~np.random.default_rng(3).choice([0, 0, 1, 2, 4, 64], 512).astype(np.uint64)
        guest.tables.map(16 * MIB, 8 * MIB, 4 * MIB, "rw", page_size="2MiB")
        sides.append(guest.start())
    engine, walked, shadowed = sides
    va = rng.integers(0, 24 * MIB // 8, 20_000, dtype=np.uint64) * np.uint64(8)
    ops = accesses(va, rng.integers(0, 3, len(va)), user=rng.integers(0, 2, len(va)))
    found = engine.run(ops)
    gpa = np.where(found.outcome == 0, found.gpa, np.uint64(2**64 - 1)).view(np.int64).tolist()
    assert 0 < gpa.count(FAULT) < len(gpa)
    walk = PythonWalk(walked.vm.memory.bytes, walked.tables.root)
    assert walk.run(as_list(ops)) == gpa
    assert (walked.vm.memory.bytes == engine.vm.memory.bytes).all()  # the same A and D bits
    shadow = PythonShadow(shadowed.vm.memory.bytes, shadowed.tables.cr3)
    assert shadow.run(as_list(ops)) == gpa
    assert (shadowed.vm.memory.bytes == engine.vm.memory.bytes).all()
    assert shadow.faults == gpa.count(FAULT)
    loads = accesses(va[va < 8 * MIB])
    expected = sides[0].run(loads)
    gpa = np.where(expected.outcome == 0, expected.gpa, np.uint64(2**64 - 1))
    assert (NumpyWalk(engine.vm.memory.bytes, engine.tables.root).run(loads["addr"]) == gpa).all()


def test_stores_to_tables():
    """The shadow in Python drops what a store to a table makes stale."""
    guest = Guest("64", 4 * MIB).map().map_tables().start()
    shadow = PythonShadow(guest.vm.memory.bytes, guest.tables.cr3)
    table = int(guest.leaf_tables(0, guest.size)[0])
    load = [(0, 0x3000, 1)]
    (before,) = shadow.run(load)
    (gpa,) = shadow.run([(1, guest.kernel + table + 8 * 3, 0)])
    assert gpa == table + 8 * 3
    assert shadow.emulated == 1
    guest.entries(table)[3] += np.uint64(PAGE)
    assert shadow.run(load) == [before + PAGE]
