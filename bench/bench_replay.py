"""A recording of a Linux guest, replayed under each design."""

from pathlib import Path

import pytest

import shadowcore as sc

DESIGNS = ("native", "flush", "cached")


@pytest.fixture(scope="module")
def recording():
    return sc.trace.load(Path(__file__).parents[1] / "tests" / "data" / "recordings" / "linux-fork.npz")


@pytest.mark.benchmark(group="replay")
@pytest.mark.parametrize("design", DESIGNS)
def test_replay(side_by_side, yardsticks, recording, design):
    """Per record, setup of the VM included."""

    def check(result):
        assert result.whole.records > 0
        assert result.gpa_mismatches <= 3
        assert sum(result.whole.exits.values()) == result.whole.exits_total
        assert (result.whole.exits_total == 0) == (design == "native")

    side_by_side(
        row="R",
        what=f"a record of the recording, {design}",
        goal=None,
        ours=lambda: sc.trace.replay(recording, design),
        operations=recording.operations,
        yardstick=yardsticks.walk,
        units=yardsticks.walk.operations,
        named="a walk in C",
        check=check,
        counters=lambda result: {name: n for name, n in result.whole.counters.items() if n},
        repeats=1,
        warm=False,
    )
