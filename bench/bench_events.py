"""Row 15: what it costs that events (exits, zaps, protections, flushes) are told to a C function. Counters are always
on: there is nothing to compare them with."""

import ctypes

import pytest
from bench_capi import loops
from bench_fault import faulting
from bench_hits import OPERATIONS, hot_guest
from guests import MIB, accesses

from shadowcore import embed

__all__ = ["loops"]
ALL = 15


def watched(loops, vm):
    """The VM with every event counted, and the count."""
    count = ctypes.c_uint64()
    number = embed.handle(vm)
    api = ctypes.c_void_p(embed.table_address())
    assert loops.watch(api, ctypes.c_uint64(number), ctypes.c_uint32(ALL), ctypes.byref(count)) == 0
    return count


@pytest.mark.benchmark(group="events")
def test_hits(side_by_side, loops):
    (guest, ops), (silent, silent_ops) = hot_guest(64 * MIB), hot_guest(64 * MIB)
    count = watched(loops, guest.vm)
    side_by_side(
        row=15,
        what="hits, events told",
        goal=1.1,
        ours=lambda: guest.run(ops),
        operations=OPERATIONS,
        yardstick=lambda: silent.run(silent_ops),
        units=OPERATIONS,
        named="ours, no events",
    )
    assert count.value == 0


@pytest.mark.benchmark(group="events")
def test_leaf_faults(side_by_side, loops):
    guest, first, rest = faulting("64")
    silent, _, _ = faulting("64")
    first, rest = accesses(first), accesses(rest)
    count = watched(loops, guest.vm)

    def prepare(which):
        which.vm.mmu.zap_all()
        which.run(first)
        count.value = 0

    def check(result):
        assert result.stats.exits["fill"] == len(rest)
        assert count.value >= len(rest)

    side_by_side(
        row=15,
        what="leaf fault, events told",
        goal=1.2,
        ours=lambda: guest.run(rest),
        operations=len(rest),
        yardstick=lambda: silent.run(rest),
        units=len(rest),
        named="ours, no events",
        check=check,
        prepare=lambda: prepare(guest),
        prepare_yardstick=lambda: prepare(silent),
    )
