"""The host below: which pages of the client's memory it has, how it maps them, and the slots made of them.

Nothing here knows of guests. What a fault, a discard or a collapse does is that of Linux 6.1 for anonymous memory.
"""

ABSENT, ZERO, OWN = range(3)  # of a frame: nothing; the zero page, read-only; a page of its own, writable
NOTHING, TABLE, LARGE = range(3)  # of a block of 2 MiB: no page table; entries of 4 KiB; one entry of 2 MiB
LOGGED, READONLY = 1, 2  # flags of a slot
BLOCK = 512  # frames


class Host:
    """The mapping of `frames` frames. `large`: huge pages are made where nothing is mapped. `present`: runs of
    (first frame, number, kind) that are there at the start, kind 2 for parts of huge pages; all are if None.

    `changed(frame, n)` is called before the mapping of these frames is taken away.
    """

    def __init__(self, frames, large=False, present=None):
        self.frames = bytearray(frames)
        self.blocks = bytearray(-(-frames // BLOCK))
        self.large = [large] * len(self.blocks)
        for first, n, kind in [(0, frames, 1 + large)] if present is None else present:
            self.frames[first : first + n] = bytes([OWN]) * n
            for block in range(first // BLOCK, -(-(first + n) // BLOCK)):
                self.blocks[block] = LARGE if kind == 2 else TABLE

    def level(self, frame):
        """1 or 2: of the host's entry for a frame."""
        return 2 if self.blocks[frame // BLOCK] == LARGE else 1

    def writable(self, frame):
        """Whether a store to the frame needs no fault of the host."""
        return self.frames[frame] == OWN

    def touch(self, frame, write):
        """An access by the client or the kernel: what is missing is made."""
        if self.frames[frame] == OWN or (self.frames[frame] == ZERO and not write):
            return
        block = frame // BLOCK
        if self.blocks[block] == NOTHING and self.large[block]:
            self.blocks[block] = LARGE
            self.frames[block * BLOCK : (block + 1) * BLOCK] = bytes([OWN if write else ZERO]) * BLOCK
            return
        if self.blocks[block] == LARGE:
            self.split(block)
        if self.frames[frame] == ZERO:
            self.changed(frame, 1)
        self.blocks[block] = TABLE
        self.frames[frame] = OWN if write else ZERO

    def split(self, block):
        """A huge mapping becomes one of small pages; those of the huge zero page become zero pages."""
        self.changed(block * BLOCK, BLOCK)
        self.blocks[block] = TABLE

    def discard(self, first, n):
        """MADV_DONTNEED. A table of small entries stays; a huge page that goes in part is split first."""
        self.changed(first, n)
        for block in range(first // BLOCK, -(-(first + n) // BLOCK)):
            if self.blocks[block] == LARGE:
                if first <= block * BLOCK and (block + 1) * BLOCK <= first + n:
                    self.blocks[block] = NOTHING
                else:
                    self.split(block)
        self.frames[first : first + n] = bytes(n)

    def collapse(self, first, n):
        """MADV_HUGEPAGE and MADV_COLLAPSE of whole blocks; one whose frames are all absent or zero is not seen here."""
        for block in range(first // BLOCK, (first + n) // BLOCK):
            self.large[block] = True
            if self.blocks[block] == TABLE:
                self.changed(block * BLOCK, BLOCK)
                self.blocks[block] = LARGE
                self.frames[block * BLOCK : (block + 1) * BLOCK] = bytes([OWN]) * BLOCK

    def present(self):
        """The frames that are mapped, by the zero page too."""
        return {i for i, state in enumerate(self.frames) if state != ABSENT}


class Slot:
    """`n` guest frames from `base`, backed by client frames from `frame`."""

    def __init__(self, base, n, frame, flags=0):
        self.base, self.n, self.frame = base, n, frame
        self.readonly = bool(flags & READONLY)
        self.dirty = None  # offsets of dirty frames, while they are logged

    def uneven(self, level, gfn):
        """Whether an end of the slot cuts the large page around `gfn`, or it begins elsewhere in the client."""
        n = 1 << 9 * (level - 1)
        ends = [end // n for end in (self.base, self.base + self.n) if end % n]
        return bool((self.base ^ self.frame) % n) or gfn // n in ends

    def regions(self, level):
        """The number of large pages of `level` that the slot has a part of."""
        n = 1 << 9 * (level - 1)
        return (self.base + self.n - 1) // n - self.base // n + 1
