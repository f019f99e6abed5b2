"""Rows 3, 4 and 6: page-fault exits that mend the shadow."""

import pytest
from guests import MIB, MODES, Guest, accesses, one_per_region, pages
from kvm import DIRTY, LEAF, NEW_TABLE, PRESENT, RECYCLED, in_walks

import shadowcore as sc

TABLES = 200
PER_TABLE = 512
"""Leaves of a shadow table; that of a 32-bit guest table has two such halves."""


def faulting(mode):
    """A guest of TABLES leaf tables; the first page of each, whose access builds it, and all others."""
    guest = Guest(mode, TABLES * 2 * MIB, sc.Shadow.cached(pool_pages=1024)).map().start()
    every = pages(TABLES * PER_TABLE).reshape(TABLES, PER_TABLE)
    return guest, every[:, 0].copy(), every[:, 1:].ravel()


def only(result, reason, count):
    """Every operation was done, with `count` exits, all for `reason`."""
    assert not result.outcome.any()
    assert result.stats.exits_total == result.stats.exits[reason] == count


def set_dirty(guest, on):
    """Set or clear D in every leaf, as if by somebody whom the MMU need not know of."""
    for table in guest.leaf_tables(0, guest.size):
        entries = guest.entries(table)
        if on:
            entries |= 1 << 6
        else:
            entries &= ~entries.dtype.type(1 << 6)


@pytest.mark.benchmark(group="fault")
@pytest.mark.parametrize("mode", MODES)
def test_leaf(side_by_side, yardsticks, mode):
    guest, first, rest = faulting(mode)
    first, rest = accesses(first), accesses(rest)

    def prepare():
        guest.vm.mmu.zap_all()
        guest.run(first)

    def check(result):
        only(result, "fill", len(rest))
        assert result.stats.mmu_cache_miss == 0

    side_by_side(
        row=3,
        what=f"leaf fault, sequential, {mode}",
        goal=1.0,
        ours=lambda: guest.run(rest),
        operations=len(rest),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(LEAF[mode]),
        check=check,
        prepare=prepare,
        again=lambda: guest.run(rest),
    )


@pytest.mark.benchmark(group="fault")
@pytest.mark.parametrize("mode", MODES)
def test_dirty(side_by_side, yardsticks, mode):
    """A store to a page whose leaf is there, not writable until the guest's dirty bit is set."""
    guest, first, rest = faulting(mode)
    loads, stores = accesses(rest), accesses(rest, sc.Op.WRITE)

    def prepare():
        guest.vm.mmu.zap_all()
        set_dirty(guest, False)
        guest.run(accesses(first))
        guest.run(loads)

    side_by_side(
        row=4,
        what=f"store that sets dirty, {mode}",
        goal=1.0,
        ours=lambda: guest.run(stores),
        operations=len(stores),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(DIRTY[mode]),
        check=lambda result: only(result, "write", len(stores)),
        prepare=prepare,
        again=lambda: guest.run(stores),
    )


@pytest.mark.benchmark(group="fault")
@pytest.mark.parametrize("mode", MODES)
def test_present(side_by_side, yardsticks, mode):
    """A store that finds the leaf and the guest's dirty bit there: only W is missing."""
    guest, first, rest = faulting(mode)
    loads, stores = accesses(rest), accesses(rest, sc.Op.WRITE)

    def prepare():
        guest.vm.mmu.zap_all()
        set_dirty(guest, False)
        guest.run(accesses(first))
        guest.run(loads)
        set_dirty(guest, True)

    side_by_side(
        row=4,
        what=f"fault on an existing leaf, {mode}",
        goal=1.0,
        ours=lambda: guest.run(stores),
        operations=len(stores),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(PRESENT[mode]),
        check=lambda result: only(result, "write", len(stores)),
        prepare=prepare,
        again=lambda: guest.run(stores),
    )


def sparse(regions, pool_pages):
    """A guest with one mapped page in each of so many 2 MiB regions, and one access to each."""
    guest = Guest("64", 16 * MIB, sc.Shadow.cached(pool_pages=pool_pages))
    va = one_per_region(regions)
    for number, address in enumerate(va.tolist()):
        guest.map(address, number % 4096 * 4096, 4096)
    return guest.start(), va


@pytest.mark.benchmark(group="fault")
def test_new_table(side_by_side, yardsticks):
    guest, va = sparse(2048, 4096)
    regions = va.reshape(-1, 512)
    first, rest = accesses(regions[:, 0].copy()), accesses(regions[:, 1:].ravel())

    def prepare():
        guest.vm.mmu.zap_all()
        guest.run(first)

    def check(result):
        only(result, "fill", len(rest))
        assert result.stats.mmu_cache_miss == len(rest)
        assert result.stats.mmu_recycled == 0

    side_by_side(
        row=6,
        what="fault that needs a new table",
        goal=1.2,
        ours=lambda: guest.run(rest),
        operations=len(rest),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(NEW_TABLE),
        check=check,
        prepare=prepare,
        again=lambda: guest.run(rest),
    )


@pytest.mark.benchmark(group="fault")
def test_new_table_recycled(side_by_side, yardsticks):
    """512 regions take turns in a pool of 256 pages: every access needs a table."""
    guest, va = sparse(512, 256)
    ops = accesses(va[:, None].repeat(200, axis=1).T.ravel())
    guest.run(ops)

    def check(result):
        only(result, "fill", len(ops))
        assert result.stats.mmu_cache_miss >= len(ops)
        assert result.stats.mmu_recycled >= len(ops)

    side_by_side(
        row=6,
        what="fault that needs a new table, recycling",
        goal=1.0,
        ours=lambda: guest.run(ops),
        operations=len(ops),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(RECYCLED),
        check=check,
    )
