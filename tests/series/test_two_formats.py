"""One frame that serves as a table of 4-byte and of 8-byte entries at once, on two processors.

A and D are bits 5 and 6 in both formats. So where a walk sets them in the lower half of an 8-byte entry, both views
have the same; where a walk by 4-byte entries sets them in an upper half, they are bits 37 and 38 of the address in the
other view, whose shadow has to follow."""

import itertools

import numpy as np
import pytest
from oracle import PS, A, D, P, W

import shadowcore as sc

X = 0x40_0000  # the frame is the leaf table of these 2 MiB, in the view by 8 bytes
TABLE, DATA = 0x3000, 0x1_0000
K = 10  # its entry in question; in the other view entries 20 and 21
OTHERS = (K - 1, K + 1, K // 2, 2 * K, 2 * K + 1, 8 * K)
MODES = ["pae", "64", "la57"]


def one(cpu, op, address):
    return cpu.run(np.array([(op, 0, 4, address, 0x5A)], sc.OP_DTYPE))


class TwoViews:
    """Entry K leads to DATA, with `upper` as its upper half; other entries of the table to DATA too."""

    def __init__(self, mmu, mode, level, upper, maxphyaddr=46):
        high = upper << 32
        slots = [sc.MemorySlot(0, "4MiB")] + ([sc.MemorySlot(high + DATA, "64KiB")] if high else [])
        features = sc.Features(maxphyaddr=maxphyaddr)
        self.vm = vm = sc.VM(memory=slots, mmu=mmu, vcpus=2, features=features)
        self.wide, self.narrow = vm.vcpus
        tables = sc.PageTables(vm, mode, allocate=range(0x40, 0x60))
        tables.map(X, DATA, 4096, "rwx")
        tables.set_entry(X, 2, TABLE | P | W | A)
        for k in OTHERS:
            self.put(TABLE + 8 * k, DATA | P | W | A | D, 8)
        self.put(TABLE + 8 * K, high | DATA | P | W | A, 8)
        vm.write_physical(high + DATA, b"here")
        # By 4-byte entries it is a table of leaves, or a directory.
        directory = TABLE if level == 2 else 0x4000
        if level == 2:
            self.put(0, DATA | P | W | A | D, 4)  # entry 0 of the table to which an entry without an address leads
            self.shift = 22
        else:
            self.put(directory, TABLE | P | W | A, 4)
            self.shift = 12
        for cpu, root, registers in (
            (self.wide, tables.cr3, tables.registers),
            (self.narrow, directory, sc.PageTables(vm, "32", allocate=range(0x60, 0x64)).registers),
        ):
            for name, value in (registers | {"cr3": root}).items():
                setattr(cpu, name, value)

    def put(self, gpa, value, width):
        self.vm.write_physical(gpa, value.to_bytes(width, "little"))

    def by_wide(self, k):
        """(outcome, error code, gpa) of a load through entry k."""
        result = one(self.wide, sc.Op.READ, X + 4096 * k)
        return int(result.outcome[0]), int(result.error_code[0]), int(result.gpa[0])

    def by_narrow(self, entry, op):
        result = one(self.narrow, op, entry << self.shift)
        assert result.outcome[0] == 0
        return int(result.gpa[0])

    def exits(self, access, *arguments):
        before = self.vm.stats.pf_taken
        access(*arguments)
        return self.vm.stats.pf_taken - before


# (level of the entry, its bits before, operation): what sets A, or D, or both.
UPPER = [
    (1, P | W, sc.Op.READ),
    (1, P | W, sc.Op.WRITE),
    (1, P | W | A, sc.Op.WRITE),
    (2, P | W, sc.Op.READ),
    (2, P | W | PS, sc.Op.WRITE),
    (2, P | W | PS | A, sc.Op.WRITE),
]


@pytest.mark.parametrize("mmu", ["native", "cached", "unsync", "adaptive"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("level", "upper", "op"), UPPER)
@pytest.mark.parametrize("maxphyaddr", [46, 40])
def test_bits_that_are_part_of_an_address_in_the_other_view(mmu, mode, level, upper, op, maxphyaddr):
    """The load that read RAM meets no memory where the entry leads now."""
    views = TwoViews(mmu, mode, level, upper, maxphyaddr)
    assert views.by_wide(K) == (0, 0, upper << 32 | DATA)
    for k in OTHERS:
        assert views.by_wide(k) == (0, 0, DATA)
    views.by_narrow(2 * K + 1, op)
    new = upper | A | (D if op == sc.Op.WRITE else 0)
    assert views.vm.read_physical(TABLE + 8 * K + 4, 4) == new.to_bytes(4, "little")
    assert views.vm.audit().ok
    assert views.by_wide(K) == (3, 0, new << 32 | DATA)
    if mmu == "cached":
        assert sum(views.exits(views.by_wide, k) for k in OTHERS) == 0  # no other entry was dropped
    assert views.vm.audit().ok


@pytest.mark.parametrize("mode", MODES)
def test_bits_that_become_reserved_in_the_other_view(mode):
    for mmu in ("native", "cached", "unsync"):
        views = TwoViews(mmu, mode, 1, P | W, maxphyaddr=37)
        assert views.by_wide(K) == (0, 0, (P | W) << 32 | DATA)
        views.by_narrow(2 * K + 1, sc.Op.READ)
        assert views.by_wide(K) == (1, 9, 2**64 - 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", [sc.Op.READ, sc.Op.WRITE])
@pytest.mark.parametrize("first", ["wide", "narrow"])
def test_bits_that_both_views_have_in_common(mode, op, first):
    """In the lower half A and D are A and D in both views: nothing is dropped, and both lead where they led."""
    for a, b in itertools.product((0, A), repeat=2):
        views = TwoViews("cached", mode, 1, 0)
        views.put(TABLE + 8 * K, DATA | P | W | a, 4)
        views.put(TABLE + 8 * (K + 1), DATA | P | W | A | b, 4)
        assert views.by_wide(K)[2] == views.by_narrow(2 * K, sc.Op.READ) == DATA
        if first == "wide":
            one(views.wide, op, X + 4096 * K)
            assert views.exits(views.by_narrow, 2 * K, sc.Op.READ) == 0
        else:
            views.by_narrow(2 * K, op)
            assert views.exits(views.by_wide, K) == 0
        assert views.by_wide(K)[2] == views.by_narrow(2 * K, op) == DATA
        assert views.vm.audit().ok
