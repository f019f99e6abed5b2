"""Row 16: an audit, with every invariant checked, against building what is audited."""

import pytest
from guests import MIB, MODES, Guest, accesses, pages

import shadowcore as sc

SIZE = 1024 * MIB
LEAVES = SIZE // 4096
"""262,144."""


@pytest.mark.benchmark(group="audit")
@pytest.mark.parametrize("mode", MODES)
def test_audit(side_by_side, mode):
    guest = Guest(mode, SIZE, sc.Shadow.cached(pool_pages=1024)).map().start()
    ops = accesses(pages(LEAVES))
    guest.run(ops)
    assert guest.vm.mmu.pages_used < 1024

    def check(report):
        assert report.ok
        assert report.sptes >= LEAVES

    def built():
        result = guest.run(ops)
        assert result.stats.exits["fill"] == LEAVES
        assert result.stats.spte_installed >= LEAVES

    side_by_side(
        row=16,
        what=f"audit of 262144 sptes, {mode}",
        goal=2.0,
        ours=guest.vm.audit,
        operations=LEAVES,
        yardstick=built,
        units=LEAVES,
        named="ours, building them",
        check=check,
        prepare_yardstick=guest.vm.mmu.zap_all,
        counters=lambda report: {"sptes": report.sptes},
    )
