"""Rows 19 and 20: design unsync beside cached on the same operations, and what a sync costs."""

import numpy as np
import pytest
from bench_fault import PER_TABLE, TABLES
from guests import MIB, Guest, accesses, demand_paging, pages

import shadowcore as sc


def mapped(mmu, tables=TABLES):
    """A guest of so many leaf tables; the first page of each, and all others."""
    guest = Guest("64", tables * 2 * MIB, mmu).map().start()
    every = pages(tables * PER_TABLE).reshape(tables, PER_TABLE)
    return guest, accesses(every[:, 0].copy()), accesses(every[:, 1:].ravel())


@pytest.mark.benchmark(group="unsync")
@pytest.mark.parametrize("prefetch", [0, 8])
def test_leaf_faults(side_by_side, prefetch):
    """One access to each page, with a fault for each; and where a fault fills the pages beside it, one for 8."""
    guest, first, rest = mapped(sc.Shadow.unsync(pool_pages=1024, prefetch=prefetch))
    other, _, _ = mapped(sc.Shadow.cached(pool_pages=1024))

    def prepare(which):
        which.vm.mmu.zap_all()
        which.run(first)

    def check(result):
        assert not result.outcome.any()
        assert result.stats.pf_taken == (len(rest) if prefetch == 0 else TABLES * (PER_TABLE // prefetch - 1))

    side_by_side(
        row=19,
        what="first access to a page, " + (f"{prefetch} prefetched" if prefetch else "no prefetch"),
        goal=1.1,
        ours=lambda: guest.run(rest),
        operations=len(rest),
        yardstick=lambda: other.run(rest),
        units=len(rest),
        named="cached",
        check=check,
        prepare=lambda: prepare(guest),
        prepare_yardstick=lambda: prepare(other),
    )


def demand(mmu, tables=16):
    guest = Guest("64", tables * 2 * MIB, mmu).map().map_tables().start()
    return guest, *demand_paging(guest)


@pytest.mark.benchmark(group="unsync")
def test_demand_paging(side_by_side):
    guest, ops, prepare = demand(sc.Shadow.unsync(pool_pages=1024))
    other, _, prepare_other = demand(sc.Shadow.cached(pool_pages=1024, flood_threshold=None))

    def check(result):
        assert (result.outcome[0::3] == 1).all()
        assert not result.outcome[1::3].any()
        assert not result.outcome[2::3].any()

    side_by_side(
        row=19,
        what="demand paging by the guest: fault, store to its table, access",
        goal=1.0,
        ours=lambda: guest.run(ops, data=True),
        operations=len(ops) // 3,
        yardstick=lambda: other.run(ops, data=True),
        units=len(ops) // 3,
        named="cached",
        check=check,
        prepare=prepare,
        prepare_yardstick=prepare_other,
    )


@pytest.mark.benchmark(group="unsync")
@pytest.mark.parametrize("changed", [False, True])
def test_sync(side_by_side, yardsticks, changed):
    """A CR3 load that brings 64 leaf tables of 512 entries back in sync, beside a loop over both tables of each."""
    tables = 64
    guest, first, rest = mapped(sc.Shadow.unsync(pool_pages=1024), tables)
    guest.map_tables().start()
    leaves = guest.leaf_tables(0, guest.size)
    words = guest.vm.memory.words
    rows = words.reshape(-1, 512)[(leaves >> np.uint64(12)).astype(int)]
    stores = accesses(guest.edit_address(leaves), sc.Op.WRITE, user=0)
    stores["value"] = rows[:, 0]
    load = np.zeros(1, sc.OP_DTYPE)
    load["op"], load["value"] = sc.Op.CR3, guest.tables.cr3
    compare = yardsticks.tables(rows ^ np.uint64(2 if changed else 0), rows)
    compare()
    assert compare.differ == (rows.size if changed else 0)

    def prepare():
        for leaf, row in zip(leaves, rows, strict=True):
            words.reshape(-1, 512)[int(leaf) >> 12] = row
        guest.vm.mmu.zap_all()
        guest.run(first)
        guest.run(rest)
        guest.run(stores, data=True)  # the tables leave sync
        if changed:
            for leaf in leaves:
                words.reshape(-1, 512)[int(leaf) >> 12] ^= np.uint64(2)

    side_by_side(
        row=20,
        what="sync of a table of 512 entries, " + ("all changed" if changed else "none changed"),
        goal=10.0 if changed else 3.0,
        ours=lambda: guest.run(load),
        operations=tables,
        yardstick=compare,
        units=tables,
        named="C loop over both tables",
        check=lambda result: None,
        prepare=prepare,
    )
