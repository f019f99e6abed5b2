"""A processor that may remember: the oracle's processor with every translation that a TLB may hold.

An access then has several right outcomes.  This model lists them; whoever tests an engine says which one it chose,
and the model goes on from there.

What may be held (SDM vol. 3A, 4.10): at each access the processor may keep the translation that it walked to, of
the whole page as the guest mapped it, with the rights of all levels, the dirty flag, the PCID, and whether it is
global (G with CR4.PGE=1).  It may forget at any time, and it must forget:

- INVLPG: what translates that address, under every PCID, global or not (the manual asks that of the current PCID
  and of global ones; more may go, and this project promises all).
- A load of CR3: what is not global and has the PCID that is loaded, unless bit 63 is set with CR4.PCIDE=1.
- INVPCID: of type 0 what translates that address under that PCID, of type 1 all of a PCID, but for global ones; of type
  3 all that is not global; of type 2 everything.
- A change of CR0.PG, CR0.WP, CR4.PGE, PAE, SMEP, of CR4.PCIDE to 0, or of EFER.NXE: everything.
- A page fault (4.10.4.1): what translates the faulting address, of the current PCID or global.

Translations that are not present are not held, nor, but for a processor that reads ahead, ones that lead to no memory.
Rights are judged by the
registers as they are at the access; where what is held forbids an access, or is not dirty and the access is a
store, the tables are walked."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import oracle
from oracle import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_SMEP,
    EFER_NXE,
    GENERAL_PROTECTION,
    MMIO,
    NO_GPA,
    OK,
    PAGE_FAULT,
    WRITE,
    A,
    D,
)

G = 1 << 8
CR4_DROPS = CR4_PGE | CR4_PAE | CR4_SMEP


class FlatMemory(oracle.Memory):
    """Memory in one array, slots one after the other, so that it compares quickly."""

    def __init__(self, *slots):
        super().__init__(*slots)
        self.bytes = np.zeros(sum(map(len, self.slots)) * oracle.PAGE, np.uint8)
        self.view = memoryview(self.bytes)

    def offset(self, gpa):
        first = 0
        for slot in self.slots:
            if gpa // oracle.PAGE in slot:
                return (first - slot.start) * oracle.PAGE + gpa
            first += len(slot)
        raise LookupError(hex(gpa))

    def read(self, gpa, size):
        at = self.offset(gpa)
        return int.from_bytes(self.view[at : at + size], "little")

    def write(self, gpa, value, size):
        at = self.offset(gpa)
        self.view[at : at + size] = (value & oracle.bits(8 * size - 1, 0)).to_bytes(size, "little")


class Held(NamedTuple):
    """A translation as a TLB holds it."""

    page: int
    page_size: int
    gpa: int
    writable: bool
    user: bool
    executable: bool
    key: int
    dirty: bool
    pcid: int
    is_global: bool


@dataclass
class Outcome:
    """One right outcome of an access: `result` as RunResult has it, and all that it changes."""

    result: tuple  # (outcome, error code, gpa)
    marks: list = field(default_factory=list)  # (gpa of an entry, bits that are set in it)
    store: tuple | None = None  # (gpa, value, size)
    held: Held | None = None  # what may be held from now on


class LazyCpu(oracle.Cpu):
    """See the module's head.

    early: faulting walks may set A in the entries that they met.  keeps_refused: a translation that refused an
    access may be held as well.  (Two habits of the code of 2007 before the series.)  rereads: what a page fault drops
    may be held again at once, as far as it is what the tables say at that moment (4.10.2.3: a processor may read ahead
    of the code, with what has A in every entry).  ahead: linear addresses that the processor reads ahead for
    (4.10.2.3): whatever the tables said of them at any moment, with A in every entry, it may hold, and what leads to no
    memory as well.  A shadow MMU whose leaves lag does so.  holds: False for a processor without a TLB.
    """

    def __init__(self, memory, early=False, keeps_refused=False, rereads=False, ahead=(), holds=True):
        super().__init__(memory)
        self.early, self.keeps_refused, self.rereads, self.holds = early, keeps_refused, rereads, holds
        self.ahead = ahead
        self.beside = [self]  # the processors that read the same memory
        self.held = set()

    @property
    def pcid(self):
        return self.cr3 & 0xFFF if self.cr4 & CR4_PCIDE else 0

    # -- what is forgotten -----------------------------------------------------------------------------------

    def load_cr0(self, value):
        changed = value ^ self.cr0
        super().load_cr0(value)
        if changed & (CR0_PG | CR0_WP):
            self.held.clear()

    def load_cr3(self, value):
        super().load_cr3(value)
        if not (self.cr4 & CR4_PCIDE and value >> 63):
            self.held = {t for t in self.held if t.is_global or t.pcid != self.pcid}

    def load_cr4(self, value):
        changed = value ^ self.cr4
        super().load_cr4(value)
        if changed & CR4_DROPS or changed & ~value & CR4_PCIDE:
            self.held.clear()

    def load_efer(self, value):
        changed = value ^ self.efer
        super().load_efer(value)
        if changed & EFER_NXE:
            self.held.clear()

    def invlpg(self, address):
        address = self._linear(address)
        self.held = {t for t in self.held if not t.page <= address < t.page + t.page_size}

    def invpcid(self, kind, pcid, address, user=False):
        super().invpcid(kind, pcid, address, user)
        address = self._linear(address)

        def goes(t):
            if kind == 2:
                return True
            if t.is_global or (kind < 2 and t.pcid != pcid):
                return False
            return kind > 0 or t.page <= address < t.page + t.page_size

        self.held = {t for t in self.held if not goes(t)}

    def faulted(self, address):
        """A page fault at `address`."""
        at = self._linear(address)
        gone = {t for t in self.held if t.page <= at < t.page + t.page_size and (t.is_global or t.pcid == self.pcid)}
        self.held -= gone
        if not self.rereads:
            return
        try:
            now = self.translate(address)
        except oracle.PageFault:
            return
        if all(entry & A for _, _, entry in now.levels):
            read = self._holding(now, address)
            self.held |= {t for t in gone if t in (read._replace(pcid=t.pcid), read._replace(pcid=t.pcid, dirty=False))}

    def read_ahead(self):
        """Hold what may be held of the tables as they are now.  To be called before they, or registers, change."""
        for address in self.ahead:
            try:
                now = self.translate(address)
            except oracle.Fault:
                continue
            if now.levels and all(entry & A for _, _, entry in now.levels):
                self.held.add(self._holding(now, address))

    # -- what an access may come to --------------------------------------------------------------------------

    def _linear(self, address):
        return address & oracle.bits(31, 0) if self.mode in ("32", "pae") else address

    def outcomes(self, op, address, value=0, size=8, user=False):
        """Every right outcome, the one without a TLB first."""
        found = self._by_walk(op, address, value, size, user)
        for gpa in self._by_held(op, self._linear(address), user):
            if gpa not in self.memory:
                found.append(Outcome((MMIO, 0, gpa)))
                continue
            found.append(Outcome((OK, 0, gpa), store=(gpa, value, size) if op == WRITE else None))
        return found

    def _by_walk(self, op, address, value, size, user):
        try:
            t = self.check(address, op, user)
        except oracle.PageFault as fault:
            result = PAGE_FAULT, fault.error_code, NO_GPA
            refused = fault.error_code & (oracle.PF_P | oracle.PF_RSVD) == oracle.PF_P
            held = self._holding(self.translate(address), address) if refused and self.keeps_refused else None
            found = [Outcome(result, held=held)]
            if self.early:
                valid = fault.walked if refused else fault.walked[:-1]
                found.append(Outcome(result, [(where, A) for _, where, _ in valid], held=held))
            return found
        except oracle.GeneralProtection:
            return [Outcome((GENERAL_PROTECTION, 0, NO_GPA))]
        if not t.levels:
            return [Outcome((OK, 0, t.gpa), store=(t.gpa, value, size) if op == WRITE else None)]
        dirty = D if op == WRITE else 0
        marks = [(where, A | dirty * (where == t.levels[-1][1])) for _, where, _ in t.levels]
        if t.gpa not in self.memory:
            return [Outcome((MMIO, 0, t.gpa), marks)]
        held = self._holding(t, address, dirty)
        return [Outcome((OK, 0, t.gpa), marks, (t.gpa, value, size) if op == WRITE else None, held)]

    def _holding(self, t, address, dirty=0):
        within = address & (t.page_size - 1)
        return Held(
            self._linear(address) - within,
            t.page_size,
            t.gpa - within,
            t.writable,
            t.user,
            t.executable,
            t.key,
            bool((t.entry | dirty) & D),
            self.pcid,
            bool(t.entry & G and self.cr4 & CR4_PGE),
        )

    def _by_held(self, op, address, user):
        """Where held translations lead."""
        for t in self.held:
            if not (t.page <= address < t.page + t.page_size and (t.is_global or t.pcid == self.pcid)):
                continue
            if op == WRITE and not t.dirty:
                continue
            if self._permitted(t, op, user) and not self._key_violation(t, op, user):
                yield t.gpa | address - t.page

    # -- what it has come to ---------------------------------------------------------------------------------

    def happened(self, outcome, address):
        """Go on from `outcome` of an access to `address`."""
        for where, flags in outcome.marks:
            self.memory.write(where, self.memory.read(where, 1) | flags, 1)
        if outcome.marks:
            for cpu in self.beside:
                cpu.read_ahead()
        if outcome.store:
            self.memory.write(*outcome.store)
        if outcome.result[0] == PAGE_FAULT:
            self.cr2 = self._linear(address)
            self.faulted(address)
        if outcome.held and self.holds:
            self.held.add(outcome.held)
