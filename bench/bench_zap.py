"""Row 8: a write flood zaps a full leaf table."""

import pytest
from guests import MODES, PAGE, accesses, editing_guest, pages, stores_to
from kvm import ZAP, in_walks


@pytest.mark.benchmark(group="zap")
@pytest.mark.parametrize("mode", MODES)
def test_flood(side_by_side, yardsticks, mode):
    """With a threshold of 1 the first store to a table is a flood: one exit, 512 entries (mode 32: 1024)."""
    guest, tables = editing_guest(mode, flood_threshold=1)
    per_table = PAGE // guest.entry_dtype.itemsize
    ops = stores_to(guest, tables)
    fill = accesses(pages(guest.size // PAGE))
    look = accesses(guest.edit_address(tables), user=0)

    def prepare():
        assert not guest.run(fill).outcome.any()
        guest.run(look)

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == result.stats.exits["emulate"] == len(ops)
        assert result.stats.mmu_flooded == len(ops) * (2 if mode == "32" else 1)
        # The entry of the directory goes as well, in mode 32 one for each half.
        assert result.stats.spte_removed == len(ops) * (per_table + per_table // 512)

    side_by_side(
        row=8,
        what=f"zap of a full leaf table, {mode}",
        goal=0.7,
        ours=lambda: guest.run(ops, data=True),
        operations=len(ops),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(ZAP[mode]),
        check=check,
        prepare=prepare,
    )
