"""Row 5: the whole exit of a store to a write-protected guest table, through small and through large pages."""

import pytest
from guests import MIB, MODES, PAGE, accesses, editing_guest, entries_of, pages, stores_to
from kvm import STORE, in_walks

LARGE = [("64", 2 * MIB), ("64", 1024 * MIB), ("pae", 2 * MIB), ("32", 4 * MIB)]


@pytest.mark.benchmark(group="emulated store")
@pytest.mark.parametrize("filled", [True, False], ids=["present", "empty"])
@pytest.mark.parametrize(("mode", "page_size"), [*((mode, PAGE) for mode in MODES), *LARGE])
def test_store(side_by_side, yardsticks, mode, page_size, filled):
    """present: the shadow has the entry, and drops it. empty: it does not. page_size: of the mapping stored through."""
    guest, tables = editing_guest(mode, page_size=page_size)
    ops = stores_to(guest, entries_of(guest, tables))
    fill = accesses(pages(guest.size // PAGE))
    look = accesses(guest.edit_address(tables), user=0)

    def prepare():
        assert not guest.run(fill).outcome.any()
        guest.run(look)
        if not filled:
            guest.run(ops, data=True)

    def check(result):
        assert not result.outcome.any()
        assert result.stats.exits_total == result.stats.exits["emulate"] == len(ops)
        assert result.stats.mmu_pte_write == len(ops)
        assert result.stats.mmu_shadow_zapped == 0
        assert result.stats.spte_removed == (len(ops) if filled else 0)

    side_by_side(
        row=5,
        what=f"emulated store, whole exit, {mode}, shadow entry {'present' if filled else 'empty'}"
        + ("" if page_size == PAGE else f", through {page_size // MIB} MiB"),
        goal=1.0,
        ours=lambda: guest.run(ops, data=True),
        operations=len(ops),
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        **in_walks(STORE[mode]),
        check=check,
        prepare=prepare,
    )
