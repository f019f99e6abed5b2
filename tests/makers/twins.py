"""A guest under a shadow MMU beside the same guest under none, and stores to the tables that it uses."""

import numpy as np
from guest2007 import DATA, PAGE, RAM, USER, Guest

import shadowcore as sc

CALM = sc.Shadow.cached(flood_threshold=None)  # no store of a series is taken for a flood

MISSING, READ_ONLY, PLAIN, TABLE, DEVICE = "missing", "read-only", "plain", "table", "device"
WORD = (1 << 64) - 1
FAR = USER + (64 << 20)
PAGES = 8  # mapped from USER on
PLACE = DATA + (1 << 20)  # frames of pages that an access crosses


def seen(call, guest):
    """What came of a call on a guest: its value or fault, and CR2."""
    try:
        return call(guest), guest.cpu.cr2
    except sc.GuestFault as fault:
        return repr(fault), guest.cpu.cr2


def different_frames(first, second):
    first, second = (guest.vm.memory.words for guest in (first, second))
    return [] if np.array_equal(first, second) else np.unique(np.flatnonzero(first != second) // 512).tolist()


class Twins:
    """A guest under a shadow MMU, and the same guest under none."""

    def __init__(self, mode, design=CALM, pages=PAGES, setup=lambda guest: None):
        self.guests = [Guest(mode, mmu, pages) for mmu in (design, "native")]
        self.guest = self.guests[0]
        for guest in self.guests:
            setup(guest)
        self.do(lambda guest: [guest.cpu.read(USER + i * PAGE, 4) for i in range(pages)])

    def do(self, call):
        """Do the same on both; what it came to, which is the same."""
        got, wanted = (seen(call, guest) for guest in self.guests)
        assert got == wanted
        return got[0]

    def ram(self, gpa, size):
        return int.from_bytes(self.guest.vm.read_physical(gpa, size), "little")

    def check(self):
        """The memories are equal, with all accessed and dirty bits, and the shadow is sound."""
        assert different_frames(*self.guests) == []
        report = self.guest.vm.audit()
        assert report.ok, str(report)

    def look(self, base=USER, pages=PAGES):
        """Where each page leads now, for loads and for stores."""

        def translations(guest):
            found = []
            for va in range(base, base + pages * PAGE, PAGE):
                for access in "rw":
                    try:
                        guest.cpu.read(va, 4)
                        found.append(guest.cpu.translate(va, access).gpa)
                    except sc.GuestFault as fault:
                        found.append(repr(fault))
            return found

        return self.do(translations)


CROSS = USER + (32 << 20) - PAGE  # the second page has a leaf table of its own in every mode
KINDS = (PLAIN, TABLE, READ_ONLY, MISSING, DEVICE)


def crossing(mode, first, second, design=CALM):
    """Two neighbouring pages of these kinds. Tables are the leaf tables of USER and FAR, in use."""

    def setup(guest):
        guest.map(FAR, DATA + 16 * PAGE, PAGES * PAGE)
        guest.map(CROSS, PLACE, 2 * PAGE)
        for va, kind, table in ((CROSS, first, USER), (CROSS + PAGE, second, FAR)):
            if kind == TABLE:
                guest.map(va, guest.entry(table) & -PAGE)
            elif kind == READ_ONLY:
                guest.map(va, PLACE + (va - CROSS), rights="rxu")
            elif kind == DEVICE:
                guest.map(va, RAM + (va - CROSS))
            elif kind == MISSING:
                guest.tables.unmap(va, PAGE)
        for i in range(PAGES):
            guest.cpu.read(FAR + i * PAGE, 4)

    return Twins(mode, design, setup=setup)


def frame(twins, va, kind):
    """gpa behind a page of `crossing`."""
    if kind == TABLE:
        return twins.guest.entry(USER if va == CROSS else FAR) & -PAGE
    return (RAM if kind == DEVICE else PLACE) + va - CROSS


CODES = {"xchg": sc.Op.XCHG, "add": sc.Op.ADD, "and": sc.Op.AND, "or": sc.Op.OR, "xor": sc.Op.XOR}
