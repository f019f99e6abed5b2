"""Row 22: walks in two dimensions, 4 levels on 4, on the design `nested`."""

import numpy as np
import pytest
from guests import MIB, Guest, accesses

import shadowcore as sc

OPERATIONS = 100_000


@pytest.mark.benchmark(group="nested")
@pytest.mark.parametrize(("size", "what"), [(2, "in cache"), (1024, "1 GiB")])
def test_nested_walk(side_by_side, yardsticks, size, what):
    size *= MIB
    guest = Guest("64", size, "nested", table_room=size // 256 + 4 * MIB).map().start()
    rng = np.random.default_rng(7)
    ops = accesses(rng.integers(0, size // 8, OPERATIONS, dtype=np.uint64) * np.uint64(8), sc.Op.READ)
    every = accesses(np.arange(0, size, 4096, dtype=np.uint64), sc.Op.READ)
    guest.run(every)  # the host's tables are there
    walks = yardsticks.nested(guest.vm, guest.tables, ops)

    def check(result):
        assert not result.outcome.any()
        assert (result.gpa == walks.gpa).all()
        assert result.stats.walk_references == 24 * OPERATIONS
        assert result.stats.exits_total == 0

    walks()
    assert not walks.outcome.any()
    side_by_side(
        row=22,
        what=f"nested walks, 4 x 4, {what}",
        goal=1.15,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=walks,
        units=OPERATIONS,
        named="the same walks in C",
        check=check,
    )
