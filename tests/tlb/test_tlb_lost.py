"""A flush that is forgotten is found out, whatever its reason: by the audit of the TLBs against the shadow at once,
and, where it shows at all, by what a guest sees, against the same guest without a TLB.

Random guests flush so often that one flush more or less is hardly ever the one that counts.  So here each event stands
alone: all pages are read, for two processors' TLBs to be full, then one thing happens, then it is looked at."""

import random

import numpy as np
import pytest
from oracle import CR0, CR0_WP, CR3, INVLPG, READ, WRITE, A, D, P, U, W
from tlb_programs import DIRECT, MODES, TABLES, Choices, Steps, edit, linear_pages, machine, registers

import shadowcore as sc
from shadowcore.engine.mmu import FLUSHES


class Event(Steps):
    """One processor of a machine without a model beside it: operations, and what came of them."""

    def __init__(self, vm, number, mode):
        super().__init__(mode, vm.vcpus[number])
        self.vm, self.ops = vm, np.zeros(1, dtype=sc.OP_DTYPE)
        for op, value in registers(mode):
            self.op(op, value=value)

    def op(self, op, address=0, value=0, size=8, user=0):
        self.ops[0] = (op, user, size, address, value)
        result = self.cpu.run(self.ops)
        return tuple(int(getattr(result, name)[0]) for name in ("outcome", "error_code", "gpa", "value"))

    def touch(self):
        return [self.op(READ, address, user=user) for address in linear_pages(self.mode) for user in (0, 1)]


def events(mode, seed, count=25):
    """(processor, what, ...): the events of a guest without global pages, and without PCIDs."""
    rng = random.Random(seed)
    for _ in range(count):
        choose = Choices(rng.getrandbits(64))
        who = choose([0, 1])
        seldom = ["device", "unprotect", "cr3", "wp", "wp", "log", "zap", "invlpg", "table"]
        kind = choose(["access"] * 6 + ["edit"] * 6 + seldom)
        address = choose(linear_pages(mode))
        if kind == "access":
            yield who, kind, choose([READ, WRITE, WRITE]), address, choose([0, 1])
        elif kind in ("edit", "device"):
            (frame, index), entry = edit(mode, choose)
            entry = entry & ~D if choose([0, 1]) else entry
            entry = entry & P | entry & ~7 | U if choose([0, 1]) else entry  # read-only: what CR0.WP = 0 is about
            yield who, kind, (frame << 12) + index * mode.width, entry & ~(1 << 8)
        elif kind in ("invlpg", "log"):
            yield who, kind, address
        elif kind == "table":
            yield who, kind, choose([W, 0]), choose([12, 13]), choose([0, 1])
        elif kind == "unprotect":
            yield who, kind, choose(list(TABLES))
        elif kind == "cr3":
            yield who, kind, mode.roots[choose([0, 1])]
        else:
            yield who, kind


class Guest:
    """Two processors on one machine; after each event `seen` has what reads of all pages give on both."""

    def __init__(self, mode, mmu, tlb, *lost):
        self.mode = MODES[mode]
        self.vm = machine([self.mode] * 2, mmu, tlb)
        self.parts = [Event(self.vm, i, self.mode) for i in range(2)]
        for part in self.parts:
            part.cpu.cr4 = self.mode.cr4
        self.vm.memory.start_dirty_log()
        self.seen = [part.touch() for part in self.parts]
        self.vm.mmu.lose_flushes(*lost)

    def happen(self, who, kind, *details):
        part = self.parts[who]
        match kind, *details:
            case "access", op, address, user:
                self.seen.append(part.op(op, address + 0x18, 0x77, user=user))
            case "edit", gpa, entry:
                self.seen.append(part.op(WRITE, (DIRECT << self.mode.shift) + gpa, entry, self.mode.width))
            case "device", gpa, entry:
                self.vm.write_physical(gpa, entry.to_bytes(self.mode.width, "little"))
            case "unprotect", gfn:
                self.vm.mmu.unprotect(gfn)
            case "invlpg", address:
                part.op(INVLPG, address)
            case "table", *how:
                self.becomes_a_table(part, self.parts[1 - who], *how)
            case "cr3", root:
                part.op(CR3, value=root)
            case "wp", *_:
                for each in self.parts:
                    each.op(CR0, value=part.cpu.cr0 ^ CR0_WP)
            case "log", address:
                for _ in range(2):
                    self.seen.append(part.op(WRITE, address + 0x18, 0x77))
                    self.seen.append(self.vm.memory.dirty_log().tolist())
                    self.vm.memory.clear_dirty_log()
            case "zap", *_:
                self.vm.mmu.zap_all()

    def device(self, frame, index, entry):
        width = self.mode.width
        self.vm.write_physical((frame << 12) + index * width, entry.to_bytes(width, "little"))

    def becomes_a_table(self, one, other, w, frame, audit):
        """A frame that `one` could store to by a page (read-only, but for CR0.WP = 0, where w is 0), which `other` then
        read as the user, becomes a leaf table, and `one` stores to it."""
        mode, index, region = self.mode, 24 // self.mode.width, 4
        for each in self.parts:
            each.op(CR0, value=one.cpu.cr0 & ~CR0_WP)
            each.op(CR3, value=mode.roots[0])
        for place, entry in mode.upper.items():
            self.device(*place, entry)
        self.device(3, 0, 4 << 12 | P | W | U | A)
        self.device(4, 0, frame << 12 | P | U | A | D | w)
        leads = [to << 12 | P | W | U | A | D for to in (14, 15)]
        one.op(WRITE, 0x18, leads[0], mode.width)
        other.op(READ, 0, user=1)
        self.device(3, region, frame << 12 | P | W | U | A)
        table = (region << mode.shift) + (index << 12)
        self.seen.append(other.op(READ, table))
        if not audit:  # else it is looked at now
            one.op(WRITE, 0x18, leads[1], mode.width)
            self.seen.append(other.op(READ, table))

    def look(self):
        """All pages are read by both, first by one of them; True if the audit is content in between as well."""
        order = [0, 1] if len(self.seen) % 2 else [1, 0]
        self.seen.append(self.parts[order[0]].touch())
        between = self.vm.audit().ok
        self.seen.append(self.parts[order[1]].touch())
        return between


def guests(mode, number, tlb, *lost):
    """Guests and their events, with pools that are enough and that are not."""
    for seed in range(number):
        yield Guest(mode, cached(32 if seed % 2 else 12), tlb, *lost), events(MODES[mode], seed)


def cached(pages):
    return sc.Shadow.cached(pool_pages=pages, flood_threshold=None)


def found_by_audit(mode, number, *lost):
    """The audit reports something after an event."""
    for guest, happenings in guests(mode, number, sc.TLB(), *lost):
        for event in happenings:
            guest.happen(*event)
            if not guest.vm.audit().ok or not guest.look():
                return True
    return False


def outcomes(guest, happenings):
    for event in happenings:
        guest.happen(*event)
        guest.look()
    return guest.seen, guest.vm.memory.bytes.tobytes()


def shows(mode, number, *lost):
    """What a guest sees is not what it sees without a TLB."""
    pairs = zip(guests(mode, number, sc.TLB(), *lost), guests(mode, number, None), strict=True)
    return any(outcomes(*one) != outcomes(*other) for one, other in pairs)


NUMBERS = [8, pytest.param(100, marks=pytest.mark.slow)]

# Without "withheld" no stale entry can be left: see test_tlb_flushes.py. Nor without "slots", as all pages are zapped,
# each with a flush. "host" has a test of its own.
AUDITED = [name for name in FLUSHES if name not in ("withheld", "slots", "host")]
# What "link" is about does not show either; "invlpg" and "fault" not where every store is followed. The rest is rare.
SHOWN = ["protect", "zap", "store", "leaf", "log", "cr3"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", AUDITED)
def test_the_audit_finds_what_a_lost_flush_leaves(mode, lost):
    assert found_by_audit(mode, 40, lost)


@pytest.mark.parametrize("mode", MODES)
def test_the_audit_finds_what_a_host_leaves_that_takes_frames(mode):
    """Frames go, with the leaves that map them; TLBs keep them where the flush is lost, and only there."""
    for lost in ((), ("host",)):
        guest = Guest(mode, cached(32), sc.TLB(), *lost)
        before = guest.vm.stats.tlb_flush
        for slot in guest.vm.memory.slots:
            guest.vm.host_unmap(slot.gpa >> 12, slot.size >> 12)
        assert guest.vm.stats.tlb_flush > before
        assert guest.vm.audit().ok == (not lost)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", NUMBERS)
def test_the_audit_finds_nothing_where_no_flush_is_lost(mode, number):
    assert not found_by_audit(mode, number)
    assert not found_by_audit(mode, number // 2, "withheld")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", SHOWN)
def test_a_lost_flush_shows_in_what_guests_see(mode, lost):
    assert shows(mode, 40, lost)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_tlb_does_not_show(mode, number):
    """`cached` follows every store, and so do the TLBs of all processors: a guest without global pages and PCIDs cannot
    tell that they are there, whatever it leaves out."""
    assert not shows(mode, number)
    for name in ("link", "withheld"):
        assert not shows(mode, number // 4, name)
