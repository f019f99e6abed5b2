"""Row 21: accesses that a modelled TLB of two levels translates."""

import kvm
import numpy as np
import pytest
from guests import MIB, PAGE, Guest, accesses

import shadowcore as sc

OPERATIONS = 100_000
TLB = sc.ProcessorTLB(load=(sc.TLBBank(64, 4),), second=(sc.TLBBank(2048, 4),))
DRCACHESIM = {32: 19.0, 1024: 63.0}
"""Nanoseconds of the TLB core of drcachesim alone, least recently used, of these banks, by pages: the lowest that were
measured, on the machine of kvm.WALK_NS. It knows neither rights nor flushes."""


@pytest.mark.benchmark(group="tlb")
@pytest.mark.parametrize("pages", DRCACHESIM)
@pytest.mark.parametrize("mmu", ["native", "cached", "nested"])
def test_tlb_hits(side_by_side, yardsticks, mmu, pages):
    guest = Guest("64", 4 * MIB, mmu, tlb=TLB).map().start()
    number = np.random.default_rng(7).integers(0, pages, OPERATIONS).astype(np.uint64)
    ops = accesses(number * np.uint64(PAGE), sc.Op.READ)
    for _ in range(2):
        guest.run(ops)
    walked = guest.vm.vcpus[0].translate(int(ops["addr"][0]))
    once = guest.run(ops)
    first = once.stats.tlb_load_hits / OPERATIONS
    assert once.gpa[0] == walked.gpa

    def check(result):
        assert not result.outcome.any()
        assert (result.gpa == once.gpa).all()
        assert result.stats.tlb_hits == OPERATIONS
        assert result.stats.walk_references == 0

    walks = DRCACHESIM[pages] / kvm.WALK_NS
    side_by_side(
        row=21,
        what=f"hits of a TLB of two levels, {pages} pages, {mmu} ({first:.0%} in the first)",
        goal=0.3,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        factor=walks,
        named=f"drcachesim: {walks:.1f} walks",
        check=check,
    )
