"""Row 1: replay of accesses that hit, on 1024 hot pages somewhere in the guest."""

import numpy as np
import pytest
from guests import ALIGNED, MIB, PAGE, Guest, accesses

import shadowcore as sc

OPERATIONS = 100_000
HOT = 1024
SIZES = [4, 64, 1024, 16 * 1024]
"""MiB of guest memory."""


def hot_guest(size):
    """A guest of `size` bytes with its hot pages mapped, all faults behind it, and operations on them.

    The page numbers differ in their low bits, so that a direct-mapped cache can hold them all.
    """
    rng = np.random.default_rng(3)
    number = rng.integers(0, size // (HOT * PAGE), HOT) * HOT + rng.permutation(HOT)
    guest = Guest("64", size, sc.Shadow.cached(pool_pages=2048))
    for page in number.tolist():
        guest.map(page * PAGE, page * PAGE, PAGE)
    guest.start()
    va = rng.choice(number, OPERATIONS) * PAGE + rng.integers(0, PAGE // 8, OPERATIONS) * 8
    ops = accesses(va.astype(np.uint64), rng.choice([sc.Op.READ, sc.Op.READ, sc.Op.READ, sc.Op.WRITE], OPERATIONS))
    for _ in range(2):
        result = guest.run(ops)
    check(result)
    return guest, ops


def check(result):
    assert not result.outcome.any()
    assert result.stats.exits_total == 0
    assert result.stats.accesses == OPERATIONS
    assert result.stats.walk_references == 4 * OPERATIONS


@pytest.mark.benchmark(group="hits")
@pytest.mark.parametrize("layout", ["packed", "aligned"])
@pytest.mark.parametrize("size", SIZES, ids="{}MiB".format)
def test_hits(side_by_side, yardsticks, size, layout):
    guest, ops = hot_guest(size * MIB)
    if layout == "aligned":
        ops = ops.astype(ALIGNED)
    hits = yardsticks.hits(guest.vm.memory.bytes, guest.tables, ops)
    hits()
    hits()
    assert hits.misses == 0
    assert (hits.gpa == guest.run(ops).gpa).all()
    side_by_side(
        row=1,
        what=f"hits on {HOT} pages, guest of {size} MiB" + (", aligned operations" if layout == "aligned" else ""),
        goal=1.5,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=hits,
        units=OPERATIONS,
        named="direct-mapped check in C",
        check=check,
    )


@pytest.mark.benchmark(group="hits")
@pytest.mark.parametrize("size", SIZES[1:], ids="{}MiB".format)
def test_flat(side_by_side, size):
    """The same whatever the size of the guest."""
    (guest, ops), (small, small_ops) = hot_guest(size * MIB), hot_guest(SIZES[0] * MIB)
    side_by_side(
        row=1,
        what=f"hits, guest of {size} MiB against {SIZES[0]} MiB",
        goal=1.2,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=lambda: small.run(small_ops),
        units=OPERATIONS,
        named=f"ours, guest of {SIZES[0]} MiB",
        check=check,
    )
