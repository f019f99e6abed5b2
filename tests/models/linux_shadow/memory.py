"""Memory as the shadow MMU has it: slots over the client's memory, the host below, dirty logs."""

from host import LOGGED, Slot
from kvmbits import EEXIST, EINVAL, MW, W

NEXT_GENERATION = 2  # of the slots, at each change: one for each of two address spaces


class Memory:
    """The part of the MMU that knows slots and the host."""

    def slot(self, gfn):
        for slot in self.slots.values():
            if slot.base <= gfn < slot.base + slot.n:
                return slot
        return None

    def place(self, gpa, write):
        """Where the client's memory has it; the host makes the page."""
        gfn = gpa >> 12
        slot = self.slot(gfn)
        frame = gfn - slot.base + slot.frame
        self.host.touch(frame, write)
        return frame << 12 | gpa & 4095

    def read(self, gpa, n):
        at = self.place(gpa, write=False)
        return int.from_bytes(self.ram[at : at + n], "little")

    def write(self, gpa, value, n):
        at = self.place(gpa, write=True)
        self.ram[at : at + n] = value.to_bytes(n, "little")

    def mark_dirty(self, gfn):
        slot = self.slot(gfn)
        if slot.dirty is not None:
            slot.dirty.add(gfn - slot.base)

    def fault_in(self, gfn, write):
        """The host makes the page of a fault: whether it may be mapped writable; None: a store to a read-only slot."""
        slot = self.slot(gfn)
        if slot is None:
            return False
        if slot.readonly and write:
            return None
        frame = gfn - slot.base + slot.frame
        self.host.touch(frame, write)
        return not slot.readonly and self.host.writable(frame)

    def prefetchable(self, gfn, write):
        """Whether a page may be mapped, writable on the host, without waiting for it; none while stores are logged."""
        slot = self.slot(gfn)
        return (
            slot is not None
            and not slot.readonly
            and not (write and slot.dirty is not None)
            and self.host.writable(gfn - slot.base + slot.frame)
        )

    def invalidate_frames(self, frame, n):
        """The host takes away its mapping of frames of the client: so do all sptes, of large pages around them too."""
        flush = False
        for slot in self.slots.values():
            first, end = max(frame, slot.frame), min(frame + n, slot.frame + slot.n)
            if first >= end:
                continue
            self.changes += 1
            first, end = first - slot.frame + slot.base, end - slot.frame + slot.base
            for level in (1, 2, 3):
                shift = 9 * (level - 1)
                for index in range(first >> shift, (end - 1 >> shift) + 1):
                    for sp, i in list(self.rmap[level].get(index << shift, ())):
                        self.drop_spte(sp, i)
                        flush = True
        if flush:
            self.remote_flush()

    def poke(self, addr, value):
        """The client stores 8 bytes in its own memory."""
        self.host.touch(addr >> 12, True)
        self.ram[addr : addr + 8] = value.to_bytes(8, "little")

    def peek(self, addr):
        self.host.touch(addr >> 12, False)

    def discard(self, frame, n):
        self.host.discard(frame, n)
        self.ram[frame << 12 : frame + n << 12] = bytes(n << 12)

    def collapse(self, frame, n):
        self.host.collapse(frame, n)

    def set_slot(self, number, flags, gpa, size, offset):
        """A slot is made, changed, moved or deleted (`size` 0); a move and a deletion zap all pages. The errno."""
        old, new = self.slots.get(number), Slot(gpa >> 12, size >> 12, offset >> 12, flags)
        if not size:
            if old is None:
                return EINVAL
            self.delete_slot(number)
            return 0
        if old and (old.n, old.frame, old.readonly) != (new.n, new.frame, new.readonly):
            return EINVAL
        if any(s.base < new.base + new.n and new.base < s.base + s.n for n, s in self.slots.items() if n != number):
            return EEXIST
        if old and old.base == new.base:
            if (old.dirty is not None) != bool(flags & LOGGED):
                self.set_log(number, bool(flags & LOGGED))
            return 0
        if old:
            self.delete_slot(number)
        else:
            self.generation += NEXT_GENERATION
        self.slots[number] = new
        if flags & LOGGED:
            new.dirty = old.dirty if old and old.dirty is not None else self.new_log(new)
        return 0

    def delete_slot(self, number):
        self.generation += NEXT_GENERATION  # it is marked as going
        self.zap_all()
        del self.slots[number]
        self.generation += NEXT_GENERATION

    def zap_all(self):
        """All pages go; the roots in use when their processors enter."""
        self.event(18, self.used, self.valid_gen)
        self.valid_gen ^= 1
        self.request_all("obsolete")
        invalid = []
        again = True
        while again:
            again = False
            for sp in list(self.active):
                if sp.gen != self.valid_gen and self.prepare_zap(sp, invalid)[1]:
                    again = True
                    break
        self.commit(invalid)

    def new_log(self, slot):
        return set(range(slot.n)) if self.log_mode == "initially set" else set()

    def protect(self, gfns, levels, bits):
        """Take `bits` (W, or W and MW) from the sptes that map these frames."""
        for level in levels:
            shift = 9 * (level - 1)
            for gfn in gfns:
                for sp, i in self.rmap[level].get(gfn >> shift << shift, ()):
                    if sp.spt[i] & bits:
                        self.update(sp, i, sp.spt[i] & ~bits)

    def set_log(self, number, on):
        """Stores to a slot are logged from now on, or no longer."""
        slot = self.slots[number]
        self.generation += NEXT_GENERATION
        if on:
            slot.dirty = self.new_log(slot)
            if self.log_mode != "initially set":
                self.protect(range(slot.base, slot.base + slot.n), (1, 2, 3), W)
                self.remote_flush()
            return
        slot.dirty = None
        flush = False
        for gfn in range(slot.base, slot.base + slot.n):  # what can be mapped by large pages again
            for sp, i in list(self.rmap[1].get(gfn, ())):
                if sp.direct and self.goal(sp.gfn, 3) > 1:
                    self.drop_spte(sp, i)
                    flush = True
        if flush:
            self.remote_flush()

    def get_log(self, number):
        """The offsets of the dirty frames of a slot; None if it is not logged."""
        slot = self.slots.get(number)
        if slot is None or slot.dirty is None:
            return None
        dirty = sorted(slot.dirty)
        if self.log_mode == "plain":
            self.clean_frames(slot, dirty)
        return dirty

    def clear_log(self, number, first, n):
        """Frames of a slot count as clean again; whether the slot is logged at all."""
        slot = self.slots.get(number)
        if slot is None or slot.dirty is None:
            return False
        self.clean_frames(slot, [i for i in sorted(slot.dirty) if first <= i < first + n])
        return True

    def clean_frames(self, slot, offsets):
        """These dirty frames count as clean until they are stored to again."""
        words = {}
        for i in offsets:
            words.setdefault(i >> 6, []).append(slot.base + i)
        slot.dirty.difference_update(offsets)
        for gfns in words.values():
            if self.log_mode == "initially set":  # large pages were left writable then
                ends = {gfns[0] >> 9: gfns[0], gfns[-1] >> 9: gfns[-1]}
                self.protect(ends.values(), (2, 3), W | MW)
            self.protect(gfns, (1,), W)
        if offsets:
            self.remote_flush()
