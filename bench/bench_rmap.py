"""Row 9: faults on, and zaps of, a frame that is mapped thousands of times."""

import numpy as np
import pytest
from guests import PAGE, Guest, accesses, entries_of, pages, stores_to
from kvm import SHARED, in_walks

import shadowcore as sc

BEFORE = 4096
"""Mappings of the frame before anything is measured."""
MEASURED = 16 * 512


def guest_of(shared):
    """One that maps all its pages to one frame (or each to its own)."""
    guest = Guest("64", (BEFORE + MEASURED) * PAGE, sc.Shadow.cached(pool_pages=256)).map().map_tables()
    if shared:
        for table in guest.leaf_tables(0, guest.size):
            entries = guest.entries(table)
            entries[:] = entries[0] & np.uint64(0xFFF) | np.uint64(guest.table_room)
    return guest.start()


def prepared(guest, whole=False):
    """Drop the shadow, then build it for the first BEFORE pages, and for one page of each further table."""
    guest.vm.mmu.zap_all()
    first = pages(BEFORE)
    guest.run(accesses(first))
    guest.run(accesses(pages(guest.size // PAGE)[BEFORE :: 1 if whole else 512]))


def rest():
    """An access to each page that is not mapped then."""
    va = pages(MEASURED, first=BEFORE)
    return accesses(va.reshape(-1, 512)[:, 1:].ravel())


def check_faults(result):
    assert not result.outcome.any()
    assert result.stats.exits_total == result.stats.exits["fill"] == len(result)


@pytest.mark.benchmark(group="rmap")
def test_fault(side_by_side, yardsticks):
    guest, ops = guest_of(shared=True), rest()
    side_by_side(
        row=9,
        what="fault on a frame with 4096 mappings",
        goal=150 / SHARED,
        ours=lambda: guest.run(ops),
        operations=len(ops),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(SHARED),
        check=check_faults,
        prepare=lambda: prepared(guest),
        again=lambda: guest.run(ops),
    )
    assert guest.vm.mmu.rmap_length(guest.table_room // PAGE) == BEFORE + MEASURED


@pytest.mark.benchmark(group="rmap")
def test_zap(side_by_side, yardsticks):
    """A store to the guest's entry: the whole exit, with the removal of its mapping."""
    guest = guest_of(shared=True)
    tables = guest.leaf_tables(BEFORE * PAGE, MEASURED * PAGE)
    ops = stores_to(guest, entries_of(guest, tables))

    def prepare():
        prepared(guest, whole=True)
        guest.run(accesses(ops["addr"], user=0))

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == result.stats.exits["emulate"] == len(ops)
        assert result.stats.spte_removed == len(ops)
        assert guest.vm.mmu.rmap_length(guest.table_room // PAGE) == BEFORE

    side_by_side(
        row=9,
        what="zap of a mapping of a frame with 4096",
        goal=150 / SHARED,
        ours=lambda: guest.run(ops, data=True),
        operations=len(ops),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(SHARED),
        check=check,
        prepare=prepare,
    )


@pytest.mark.benchmark(group="rmap")
def test_constant(side_by_side):
    """The cost of a fault does not depend on the number of mappings of the frame."""
    many, few, ops = guest_of(shared=True), guest_of(shared=False), rest()
    side_by_side(
        row=9,
        what="fault, 4096 mappings against none",
        goal=1.2,
        ours=lambda: many.run(ops),
        operations=len(ops),
        yardstick=lambda: few.run(ops),
        units=len(ops),
        named="ours, frames of their own",
        check=check_faults,
        prepare=lambda: prepared(many),
        prepare_yardstick=lambda: prepared(few),
    )
