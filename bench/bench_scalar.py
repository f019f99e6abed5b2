"""Row 12: single calls from Python, against a method that does nothing."""

from itertools import repeat

import numpy as np
import pytest
from guests import MIB, Guest, accesses

import shadowcore as sc

CALLS = 10_000
VA = 0x12340


class Nothing:
    def method(self, va):
        pass


def looped(function, argument, calls):
    """A call that calls `function` so many times; the loop is part of both sides."""

    def loop():
        result = None
        for _ in repeat(None, calls):
            result = function(argument)
        return result

    return loop


@pytest.fixture
def compare(side_by_side):
    def measured(what, goal, function, argument, check, calls=CALLS):
        guest.cpu.read(VA)
        side_by_side(
            row=12,
            what=what,
            goal=goal,
            ours=looped(function, argument, calls),
            operations=calls,
            yardstick=looped(Nothing().method, VA, CALLS),
            units=CALLS,
            named="a method that does nothing",
            check=check,
            counters=lambda _: {name: n for name, n in guest.vm.stats.as_dict().items() if n},
        )

    guest = Guest("64", 2 * MIB).map().start()
    return guest, measured


@pytest.mark.benchmark(group="scalar")
def test_translate(compare):
    guest, measured = compare

    def check(translation):
        assert translation.gpa == VA + guest.table_room

    measured("cpu.translate(va)", 2.5, guest.cpu.translate, VA, check)


@pytest.mark.benchmark(group="scalar")
def test_read(compare):
    guest, measured = compare
    guest.cpu.write(VA, 42)

    def check(value):
        assert value == 42

    measured("cpu.read(va)", 2.5, guest.cpu.read, VA, check)


@pytest.mark.benchmark(group="scalar")
def test_batch_of_one(compare):
    guest, measured = compare
    ops = accesses(np.array([VA], dtype=np.uint64), sc.Op.READ)

    def check(result):
        assert result.gpa.tolist() == [VA + guest.table_room]
        assert result.outcome.tolist() == [0]

    measured("cpu.run of one operation", 12, guest.cpu.run, ops, check, calls=CALLS // 10)
