"""Row 7: a load of CR3 whose root is cached, and cold faults in many address spaces."""

import numpy as np
import pytest
from guests import MIB, MODES, PAGE, Guest, accesses
from kvm import CR3, in_walks

import shadowcore as sc

OPERATIONS = 100_000


def switch(guests_cr3, count):
    """So many loads of CR3, one address space after the other."""
    return accesses(np.zeros(count), sc.Op.CR3, value=np.resize(np.array(guests_cr3, dtype=np.uint64), count))


@pytest.mark.benchmark(group="cr3")
@pytest.mark.parametrize("spaces", [2, 8, 32])
@pytest.mark.parametrize("mode", MODES)
def test_cached_root(side_by_side, yardsticks, mode, spaces):
    """Each space has a page in every GiB of the first four, so that PAE loads four roots."""
    guest = Guest(mode, 4 * MIB, sc.Shadow.cached(pool_pages=1024))
    spaces = [guest.tables] + [guest.address_space() for _ in range(spaces - 1)]
    for tables in spaces:
        for quarter in range(4):
            guest.map_in(tables, quarter << 30, quarter * PAGE, PAGE)
    guest.start()
    touch = accesses(np.arange(4, dtype=np.uint64) << np.uint64(30))
    for tables in spaces:
        guest.cpu.cr3 = tables.cr3
        assert not guest.run(touch).outcome.any()
    loads = switch([tables.cr3 for tables in spaces], OPERATIONS)

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == result.stats.exits["cr3"] == OPERATIONS
        assert result.stats.mmu_cache_miss == 0
        assert result.stats.root_loads == OPERATIONS * (1 if mode == "64" else 4)

    side_by_side(
        row=7,
        what=f"CR3 load, cached root, {mode}, {len(spaces)} spaces",
        goal=1.5,
        ours=lambda: guest.run(loads),
        operations=OPERATIONS,
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(CR3[mode]),
        check=check,
    )
    assert guest.run(touch).stats.exits_total == 0


@pytest.mark.benchmark(group="cr3")
def test_cold_faults_in_many_spaces(side_by_side):
    """Row 10: 64 spaces that map the same frames, all faulted in cold, against one."""
    pages, spaces = 4096, 64
    sides = []
    for number in (spaces, 1):
        guest = Guest("64", pages * PAGE, sc.Shadow.cached(pool_pages=1024))
        tables = [guest.tables] + [guest.address_space() for _ in range(number - 1)]
        for space in tables:
            guest.map_in(space)
        guest.start()
        load = switch([space.cr3 for space in tables], number)
        touch = accesses(np.arange(pages, dtype=np.uint64) * np.uint64(PAGE))
        ops = np.concatenate([part for i in range(number) for part in (load[i : i + 1], touch)])
        sides.append((guest, ops))
    (many, ops), (one, ops_of_one) = sides

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits["fill"] == pages * spaces
        assert result.stats.exits["cr3"] == spaces

    side_by_side(
        row=10,
        what=f"cold fault, {spaces} spaces that share frames",
        goal=3.0,
        ours=lambda: many.run(ops),
        operations=len(ops),
        yardstick=lambda: one.run(ops_of_one),
        units=len(ops_of_one),
        named="ours, one space",
        check=check,
        prepare=many.vm.mmu.zap_all,
        prepare_yardstick=one.vm.mmu.zap_all,
    )
