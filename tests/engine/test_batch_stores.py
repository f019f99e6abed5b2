"""Stores to page tables amid a batch under `native`: the walks of the operations that follow see them, whichever
fast path these take, and however many walks are under way at once."""

import numpy as np
import pytest
from operations import operations
from oracle import A, D, P, W

import shadowcore as sc

MIB = 1 << 20
MODES = ["32", "pae", "64", "la57"]
X, WINDOW, MANY = 0x40_0000, 0x80_0000, 0x1000_0000
FRAMES = [0x1_0000, 0x2_0000, 0x3_0000]
FLAGS = P | W | A | D


# Not packed: with the padding of a C structure.
ALIGNED = np.dtype([(name, sc.OP_DTYPE[name]) for name in ("op", "user", "size", "addr", "value")], align=True)


class Guest:
    """X leads to the first of FRAMES, by a leaf table that WINDOW maps; MANY are 4096 pages that lead to RAM."""

    def __init__(self, mode, aligned):
        self.aligned = aligned
        self.vm = sc.VM("8MiB", "native")
        tables = sc.PageTables(self.vm, mode)
        tables.map(X, FRAMES[0], 4096, "rwx", accessed=True, dirty=True)
        self.entry = tables.entry(X).gpa
        tables.map(WINDOW, self.entry & ~0xFFF, 4096, "rwx", accessed=True, dirty=True)
        for region in range(8):
            tables.map(MANY + region * 2 * MIB, 0, 2 * MIB, "rwx", page_size=4096, accessed=True, dirty=True)
        self.pages = MANY + 4096 * np.arange(4096)
        for frame in FRAMES:
            self.vm.memory.words[frame // 8] = frame
        self.cpu = self.vm.vcpus[0]
        for name, value in tables.registers.items():
            setattr(self.cpu, name, value)

    def turn(self, frame):
        """The store that makes X lead to another frame."""
        return (sc.Op.WRITE, WINDOW + (self.entry & 0xFFF), frame | FLAGS)

    def run(self, *rows):
        result = self.cpu.run(operations(*rows, dtype=ALIGNED if self.aligned else sc.OP_DTYPE, size=4))
        assert not result.outcome.any()
        return result.value.tolist()

    def forget_the_memo(self):
        """After accesses none of which repeats another, batches do without the memo."""
        assert self.run(*[(sc.Op.READ, int(va), 0) for va in self.pages])


READ = (sc.Op.READ, X, 0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("between", [0, 1, 29])
def test_a_store_ends_a_group_of_walks(mode, aligned, between):
    """Without the memo, up to 32 operations are walked before the bytes of the first of them move."""
    guest = Guest(mode, aligned)
    guest.forget_the_memo()
    some = [(sc.Op.READ, int(va), 0) for va in guest.pages[:between]]
    for frame, before in ((FRAMES[1], FRAMES[0]), (FRAMES[2], FRAMES[1])):
        values = guest.run(READ, guest.turn(frame), *some, READ)
        assert (values[0], values[-1]) == (before, frame)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_store_that_the_memo_knows_comes_before_the_next_walk(mode, aligned):
    """The frame is that of no table so far as the memo knows, which lets stores reach it: their bytes have not moved
    yet when the first access comes that is walked through it."""
    guest = Guest(mode, aligned)
    assert guest.run(guest.turn(FRAMES[1]), guest.turn(FRAMES[2]), READ)[-1] == FRAMES[2]
    assert guest.run(guest.turn(FRAMES[0]), READ, guest.turn(FRAMES[1]), READ, READ)[1::2] == [FRAMES[0], FRAMES[1]]
