"""Row 2: a batch of guest walks with rights, error codes, accessed and dirty bits, on the design `native`."""

import numpy as np
import pytest
from guests import ALL_MODES, MIB, PAGE, Guest, accesses, one_per_region, sparse_tables

import shadowcore as sc

OPERATIONS = 100_000


def compare(side_by_side, yardsticks, mode, size, what, goal, op, operations=OPERATIONS):
    guest = Guest(mode, size, "native", table_room=size // 256 + 4 * MIB).map().start()
    rng = np.random.default_rng(7)
    ops = accesses(rng.integers(0, size // 8, operations, dtype=np.uint64) * np.uint64(8), op)
    measure(side_by_side, yardsticks, guest, ops, what, goal)


def measure(side_by_side, yardsticks, guest, ops, what, goal):
    mode, operations = guest.mode, len(ops)
    walks = yardsticks.walks(guest.vm.memory.bytes, guest.tables, ops)
    references = operations * (2 if mode == "pae" else guest.tables.format.levels)

    def check(result):
        assert not result.outcome.any()
        assert (result.gpa == walks.gpa).all()
        assert result.stats.walk_references == references
        assert result.stats.exits_total == 0

    walks()
    assert not walks.outcome.any()
    side_by_side(
        row=2,
        what=what,
        goal=goal,
        ours=lambda: guest.run(ops),
        operations=operations,
        yardstick=walks,
        units=operations,
        named="the same walks in C",
        check=check,
    )


@pytest.mark.benchmark(group="walk")
@pytest.mark.parametrize("size", [2, 64, 1024], ids="{}MiB".format)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_walk(side_by_side, yardsticks, mode, size):
    compare(side_by_side, yardsticks, mode, size * MIB, f"guest walks, {mode}, {size} MiB", 1.15, sc.Op.READ)


@pytest.mark.benchmark(group="walk")
def test_walk_mixed(side_by_side, yardsticks):
    """Loads, stores and fetches in no order: what it costs that branches cannot be foreseen."""
    op = np.random.default_rng(8).choice([sc.Op.READ, sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH], OPERATIONS)
    compare(side_by_side, yardsticks, "64", 64 * MIB, "guest walks, 64, 64 MiB, kinds mixed", 1.15, op)


@pytest.mark.slow
@pytest.mark.benchmark(group="walk")
@pytest.mark.parametrize("size", [8, 16], ids="{}GiB".format)
def test_walk_large(side_by_side, yardsticks, size):
    """Where tables do not fit in the caches, walks must be interleaved."""
    compare(
        side_by_side,
        yardsticks,
        "64",
        size << 30,
        f"guest walks, 64, {size} GiB",
        1 / 3,
        sc.Op.READ,
        operations=1_000_000,
    )


@pytest.mark.benchmark(group="walk")
@pytest.mark.parametrize("regions", [32_768, pytest.param(262_144, marks=pytest.mark.slow)])
def test_walk_sparse(side_by_side, yardsticks, regions):
    """One page in each region of 2 MiB: a table for each page, 128 MiB and 1 GiB of tables."""
    guest = Guest("64", 16 * MIB, "native", table_room=(regions + regions // 512 + 600) * PAGE)
    va = one_per_region(regions)
    sparse_tables(guest, va)
    ops = accesses(np.random.default_rng(7).choice(va, 1_000_000))
    what = f"guest walks, 64, {regions} sparse pages"
    measure(side_by_side, yardsticks, guest.start(), ops, what, 1 / 3)


@pytest.mark.parametrize("mode", ALL_MODES)
def test_yardstick(yardsticks, mode):
    """The walks in C find what the engine finds, faults included, and set the same bits."""
    rng = np.random.default_rng(9)
    guest = Guest(mode, 8 * MIB, "native").map()
    guest.tables.map(16 * MIB, 4 * MIB, 4 * MIB, "rwxu", page_size="4MiB" if mode == "32" else "2MiB")
    for table in guest.leaf_tables(0, guest.size):
        entries = guest.entries(table)
        cleared = rng.choice([0, 1, 2, 4, 32, 64, 96], len(entries)).astype(entries.dtype)
        entries &= ~cleared
        if mode != "32":  # some are not executable, some have a reserved bit
            entries |= rng.choice([0, 0, 0, 1 << 63, 1 << 50], len(entries)).astype(np.uint64)
    guest.start()
    va = rng.integers(0, 24 * MIB // 8, 20_000, dtype=np.uint64) * np.uint64(8)
    va[::100] ^= np.uint64(1 << 62)
    ops = accesses(va, rng.integers(0, 3, len(va)), user=rng.integers(0, 2, len(va)))
    memory = guest.vm.memory.bytes.copy()
    walks = yardsticks.walks(memory, guest.tables, ops)
    walks()
    result = guest.run(ops)
    assert set(result.outcome.tolist()) == ({0, 1} if mode in ("32", "pae") else {0, 1, 2})
    assert len(np.unique(result.error_code)) >= (5 if mode == "32" else 10)
    assert (result.outcome == walks.outcome).all()
    assert (result.error_code == walks.error_code).all()
    assert (result.gpa == walks.gpa).all()
    assert (guest.vm.memory.bytes == memory).all()
