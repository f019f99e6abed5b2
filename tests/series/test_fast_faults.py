"""Faults that batches take in one go (`fast.pyx`) leave the pool as single accesses do, which go the long way."""

import numpy as np
import pytest
from guest2007 import BELOW_ROOT, DATA, MODES, PAGE, USER, A, Guest
from operations import operations

import shadowcore as sc

TABLES = 12  # leaf tables, each of its own directory entry


def run(mode, design, rows, single):
    guest = Guest(mode, design, pages=0)
    span = 1 << guest.tables.format.shift(2)
    for i in range(TABLES):
        guest.map(USER + i * span, DATA + 4 * i * PAGE, 4 * PAGE)
        entry = guest.tables.entry(USER + i * span, 2).value
        guest.tables.set_entry(USER + i * span, 2, entry | A)  # a walk that sets A goes the general way
    guest.cpu.cr3 = guest.cpu.cr3
    guest.vm.mmu.zap_all()  # what was there before the guest came to this mode
    ops = operations(*[(op, USER + table * span + page * PAGE) for op, table, page in rows])
    if single:
        exits = []
        for op, addr in zip(ops["op"].tolist(), ops["addr"].tolist(), strict=True):
            taken = guest.vm.stats.pf_taken
            guest.cpu.read(addr) if op == sc.Op.READ else guest.cpu.write(addr, 0)
            exits.append(guest.vm.stats.pf_taken - taken)
    else:
        result = guest.cpu.run(ops)
        assert not result.outcome.any()
        exits = result.exits.tolist()
    assert guest.clean()
    return guest, exits


def compare(mode, rows, pages, min_free, refill):
    design = sc.Shadow.cached(pool_pages=pages, min_free=min_free, refill=refill)
    (batch, taken), (single, wanted) = (run(mode, design, rows, single) for single in (False, True))
    assert taken == wanted
    assert batch.vm.stats.as_dict() == single.vm.stats.as_dict()
    assert batch.vm.stats.mmu_recycled
    assert np.array_equal(batch.vm.mmu.pages, single.vm.mmu.pages)
    assert batch.vm.mmu.pages_free == single.vm.mmu.pages_free
    assert np.array_equal(batch.vm.memory.pool, single.vm.memory.pool)


@pytest.mark.parametrize("op", [sc.Op.READ, sc.Op.WRITE])
@pytest.mark.parametrize("mode", ["64", "la57"])
def test_room_for_a_path_before_a_fault(mode, op):
    """No reserve is asked for, and a leaf table is all that is missing: still, there is room for a whole path of tables
    before each fault, as that may need one."""
    for spare in range(1, 3):
        compare(mode, [(op, i, 0) for i in range(1 + spare)], 1 + BELOW_ROOT[mode] + spare, 0, 0)


@pytest.mark.parametrize("op", [sc.Op.READ, sc.Op.WRITE])
@pytest.mark.parametrize(
    ("spare", "min_free", "refill"),
    [(6, 5, 5), (6, 5, 7), (7, 6, 6), (3, 0, 0), (2, 0, 0), (2, 1, 1), (1, 0, 0), (0, 0, 0), (4, 2, 3)],
)
@pytest.mark.parametrize("mode", MODES)
def test_pages_that_are_free_before_a_fault(mode, spare, min_free, refill, op):
    """A table is missing, and few pages are free, or fewer than the reserve: pages are recycled at the same faults, in
    the same order, and as many, however an access is made. spare: pages beyond what one path of tables takes."""
    roots = 4 if mode in ("32", "pae") else 1
    rows = [(op, i, 0) for i in range(TABLES)]
    rows += [
        (op, int(table), int(page)) for table, page in np.random.default_rng(spare).integers(0, [TABLES, 4], (80, 2))
    ]
    compare(mode, rows, roots + BELOW_ROOT[mode] + spare, min_free, refill)
