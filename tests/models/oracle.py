"""A slow x86 processor that walks the guest's own page tables at every access.

It is the yardstick of the tests: written from the architecture's rules, in plain Python, and sharing no
code with the engine or with its table builder.  "SDM" is the Intel Software Developer's Manual, volume 3A,
chapter 4 ("Paging") unless a section says otherwise; "APM" is the AMD Architecture Programmer's Manual,
volume 2, chapter 5.  The manual's steps are quoted as numbered comments above the lines that perform them.

Where the architecture leaves a choice, this model takes the following ones (the engine takes the same):

1. Entries are examined from the root down.  The first entry that is not present ends the walk with P=0, the
   first present entry with a reserved bit ends it with RSVD and P.  Rights are judged after a complete walk
   only, on the AND over all levels.
2. An access that faults changes no accessed or dirty bit.  One that succeeds sets A in every entry used (the
   four PAE page-directory-pointer entries have none) and D in the last one if it writes, before data moves.
3. A paging structure in a frame without memory reads as zeros: not present.
4. An access to a frame without memory is an MMIO access.  Its A and D updates are those of a success.
5. Outside 64-bit modes the linear address is truncated to 32 bits.
"""

from dataclasses import dataclass
from functools import cache

PAGE = 4096
NO_GPA = (1 << 64) - 1

# Outcomes of one operation, as the engine's batches number them.
OK, PAGE_FAULT, GENERAL_PROTECTION, MMIO = range(4)
UNDEFINED = 6

# Operation codes.
READ, WRITE, FETCH, CR3, CR0, CR4, EFER, INVLPG = range(8)
INVPCID = 16

# Paging-structure entry bits (SDM tables 4-4 to 4-20).
P, W, U, A, D, PS = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 7
NX = 1 << 63

# Page-fault error code (SDM figure 4-12).
PF_P, PF_W, PF_U, PF_RSVD, PF_I, PF_PK = 1, 2, 4, 8, 16, 32

# Control register bits (SDM 2.5).
CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_ET, CR0_NE = (1 << bit for bit in range(6))
CR0_WP, CR0_AM, CR0_NW, CR0_CD, CR0_PG = 1 << 16, 1 << 18, 1 << 29, 1 << 30, 1 << 31
CR0_FLAGS = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG
CR4_PSE, CR4_PAE, CR4_PGE = 1 << 4, 1 << 5, 1 << 7
CR4_UMIP, CR4_LA57, CR4_FSGSBASE, CR4_PCIDE, CR4_OSXSAVE = 1 << 11, 1 << 12, 1 << 16, 1 << 17, 1 << 18
CR4_SMEP, CR4_SMAP, CR4_PKE = 1 << 20, 1 << 21, 1 << 22
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1 << 0, 1 << 8, 1 << 10, 1 << 11
EFER_FFXSR, EFER_TCE = 1 << 14, 1 << 15  # AMD alone

# SDM 4.4.1: with PAE paging, MOV to CR0 or CR4 loads the PDPTEs if it modifies one of these.
CR0_PDPTE_BITS = CR0_CD | CR0_NW | CR0_PG
CR4_PDPTE_BITS = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP


@cache
def bits(high, low):
    """A mask of the bits high:low, both included; empty if high < low."""
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


@dataclass(frozen=True)
class Features:
    """What CPUID would report."""

    maxphyaddr: int = 46
    nx: bool = True
    gbpages: bool = True
    la57: bool = True
    pku: bool = True
    smep: bool = True
    smap: bool = True
    pse36: bool = True
    invpcid: bool = True
    vendor: str = "intel"
    # Not CPUID's: refuse reserved and ignored bits of CR0 and CR3, as the recorded streams of 2007 have it.
    refuses_ignored_bits: bool = False


class Fault(Exception):
    """A fault of the guest; `walked` is the list of (level, entry address, entry) seen on the way."""

    def __init__(self, error_code=0, walked=()):
        super().__init__(error_code)
        self.error_code = error_code
        self.walked = list(walked)


class PageFault(Fault):
    pass


class GeneralProtection(Fault):
    pass


class UndefinedInstruction(Fault):
    pass


class MMIOAccess(Exception):
    def __init__(self, gpa):
        super().__init__(hex(gpa))
        self.gpa = gpa


class Memory:
    """Sparse guest memory: slots are (first frame, frames); frames appear, zeroed, when they are written."""

    def __init__(self, *slots):
        self.slots = [range(first, first + frames) for first, frames in slots]
        self.frames = {}

    @classmethod
    def of_frames(cls, nframes, gfns=(), pages=()):
        memory = cls((0, nframes))
        for gfn, page in zip(gfns, pages, strict=True):
            memory.frames[int(gfn)] = bytearray(page.tobytes())
        return memory

    def __contains__(self, gpa):
        frame = gpa // PAGE
        for slot in self.slots:  # noqa: SIM110
            if frame in slot:
                return True
        return False

    def read(self, gpa, size):
        frame = self.frames.get(gpa // PAGE)
        offset = gpa % PAGE
        return int.from_bytes(frame[offset : offset + size], "little") if frame else 0

    def write(self, gpa, value, size):
        frame = self.frames.setdefault(gpa // PAGE, bytearray(PAGE))
        offset = gpa % PAGE
        frame[offset : offset + size] = (value & bits(8 * size - 1, 0)).to_bytes(size, "little")


@dataclass(slots=True)
class Translation:
    gpa: int
    page_size: int
    levels: list  # (level, entry address, entry), from the root down
    width: int  # bytes of an entry
    writable: bool = True  # AND of W over the levels
    user: bool = True  # AND of U over the levels
    executable: bool = True  # no XD bit in any level
    key: int = 0  # protection key of the last entry

    @property
    def entry(self):
        return self.levels[-1][2]


class Cpu:
    """One processor: registers with their checks, the walk, and plain reads and writes."""

    def __init__(self, memory, features=None):
        self.memory = memory
        self.features = features or Features()
        # State at reset (SDM table 10-1): caches off, paging off.
        self.cr0, self.cr2, self.cr3, self.cr4, self.efer = 0x60000010, 0, 0, 0, 0
        self.pkru = 0
        self.ac = False
        self.pdptes = [0, 0, 0, 0]

    # -- registers -------------------------------------------------------------------------------------------

    @property
    def mode(self):
        """SDM table 4-1: the paging mode follows from CR0.PG, CR4.PAE, EFER.LME and CR4.LA57."""
        if not self.cr0 & CR0_PG:
            return "off"
        if not self.cr4 & CR4_PAE:
            return "32"
        if not self.efer & EFER_LME:
            return "pae"
        return "la57" if self.cr4 & CR4_LA57 else "64"

    def _read_pdptes(self, cr3):
        """SDM 4.4.1: the four PDPTEs are loaded into registers and checked when they are loaded.

        1. The table is at the 32-byte aligned address in CR3 bits 31:5.
        2. If any PDPTE has P (bit 0) and a reserved bit set, the load raises #GP(0) and no register changes.
        3. Reserved are bits 2:1, 8:5 and 63:MAXPHYADDR (table 4-8).
        """
        base = cr3 & bits(31, 5)
        loaded = [self._read_entry(base + 8 * i, 8) for i in range(4)]
        reserved = bits(2, 1) | bits(8, 5) | bits(63, self.features.maxphyaddr)
        if any(entry & P and entry & reserved for entry in loaded):
            raise GeneralProtection
        return loaded

    def load_cr0(self, value):
        # SDM 2.5 and vol. 2 "MOV - Move to/from Control Registers", protected mode exceptions, #GP(0):
        # 1. an attempt to set one of bits 63:32 (2.5: "must be written with zeros");
        if value & bits(63, 32) or (self.features.refuses_ignored_bits and value & ~CR0_FLAGS):
            raise GeneralProtection
        # 2. an invalid combination: PG without PE, or NW without CD;
        if (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD):
            raise GeneralProtection
        # 3. setting PG with EFER.LME=1 and CR4.PAE=0 (vol. 3A 4.1.2);
        if value & CR0_PG and self.efer & EFER_LME and not self.cr4 & CR4_PAE:
            raise GeneralProtection
        # 4. clearing PG with CR4.PCIDE=1 (4.10.1);
        if not value & CR0_PG and self.cr4 & CR4_PCIDE:
            raise GeneralProtection
        # 5. PDPTEs that are not valid when they are to be loaded (4.4.1).
        pae_paging = value & CR0_PG and self.cr4 & CR4_PAE and not self.efer & EFER_LME
        if pae_paging and (value ^ self.cr0) & CR0_PDPTE_BITS:
            self.pdptes = self._read_pdptes(self.cr3)
        # Vol. 2 MOV: "Reserved bits in CR0 ... remain clear after any load of those registers; attempts to set
        # them have no impact.  ... CR0.ET remains set after any load of CR0".
        self.cr0 = value & CR0_FLAGS | CR0_ET
        # EFER.LMA = EFER.LME & CR0.PG (4.1.1).
        long_mode = value & CR0_PG and self.efer & EFER_LME
        self.efer = self.efer & ~EFER_LMA | (EFER_LMA if long_mode else 0)

    def load_cr3(self, value):
        long_mode = self.efer & EFER_LMA
        if long_mode:
            # Figure 4-10.  Without PCIDs bits 11:5 and 2:0 are ignored (table 4-12), with them 11:0 are the PCID
            # (4-13).
            ignored = 0 if self.cr4 & CR4_PCIDE else bits(11, 5)
            if self.cr4 & CR4_PCIDE:
                # SDM 4.10.4.1: with PCIDE=1, bit 63 of the source only chooses whether to flush and is not
                # kept.
                value &= ~(1 << 63)
            # Bits 63:MAXPHYADDR are reserved, and must be 0: vol. 2 MOV, #GP(0).
            if value & bits(63, self.features.maxphyaddr):
                raise GeneralProtection
        else:
            # Vol. 2 MOV: "The operand size for these instructions is always 32 bits in non-64-bit modes".  Bits
            # 63:32 are ignored (tables 4-3 and 4-7) and here not even written.
            value &= bits(31, 0)
            # 32-bit paging ignores 11:5 and 2:0; PAE paging 4:0.  What is ignored is kept, and reads back.
            ignored = bits(2, 0)
        if self.features.refuses_ignored_bits and value & ignored:
            raise GeneralProtection
        if self.mode == "pae":
            self.pdptes = self._read_pdptes(value)
        self.cr3 = value

    def load_cr4(self, value):
        f = self.features
        allowed = bits(10, 0) | CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE
        allowed |= (f.la57 and CR4_LA57) | (f.smep and CR4_SMEP) | (f.smap and CR4_SMAP) | (f.pku and CR4_PKE)
        # SDM vol. 2 MOV, #GP(0):
        # 1. an attempt to set a reserved bit of CR4;
        if value & ~allowed:
            raise GeneralProtection
        changed = value ^ self.cr4
        # 2. clearing PAE, or changing LA57, in IA-32e mode;
        if self.efer & EFER_LMA and (not value & CR4_PAE or changed & CR4_LA57):
            raise GeneralProtection
        # 3. setting PCIDE outside IA-32e mode, or with CR3[11:0] not 0;
        if changed & value & CR4_PCIDE and (not self.efer & EFER_LMA or self.cr3 & 0xFFF):
            raise GeneralProtection
        # 4. PDPTEs that are not valid when they are to be loaded (4.4.1).
        pae_paging = self.cr0 & CR0_PG and value & CR4_PAE and not self.efer & EFER_LME
        if pae_paging and changed & CR4_PDPTE_BITS:
            self.pdptes = self._read_pdptes(self.cr3)
        self.cr4 = value

    def load_efer(self, value):
        # SDM vol. 4 (IA32_EFER) and vol. 3A 4.1.2: #GP(0) for a reserved bit, or if LME changes while PG=1.
        allowed = EFER_SCE | EFER_LME | EFER_LMA | (self.features.nx and EFER_NXE)
        if self.features.vendor == "amd":
            # APM vol. 2, 3.1.7: FFXSR and TCE are there; LMA is read/write, and #GP if it is not the hardware's value.
            allowed |= EFER_FFXSR | EFER_TCE
            if value & EFER_LMA != self.efer & EFER_LMA:
                raise GeneralProtection
        if value & ~allowed:
            raise GeneralProtection
        if (value ^ self.efer) & EFER_LME and self.cr0 & CR0_PG:
            raise GeneralProtection
        # LMA is read only.
        self.efer = value & ~EFER_LMA | self.efer & EFER_LMA

    def invpcid(self, kind, descriptor, address, user=False):
        """SDM vol. 2, INVPCID: what is refused. There is nothing to invalidate here."""
        if not self.features.invpcid:
            raise UndefinedInstruction
        # #GP(0): CPL is not 0; an invalid type; bits 63:12 of the descriptor are not 0; types 0 and 1 with CR4.PCIDE=0
        # and a PCID that is not 0; type 0 with an address that is not canonical (64-bit mode).
        if user or kind > 3 or descriptor & bits(63, 12):
            raise GeneralProtection
        if kind in (0, 1) and not self.cr4 & CR4_PCIDE and descriptor & bits(11, 0):
            raise GeneralProtection
        if kind == 0 and self.mode in ("64", "la57"):
            width = 57 if self.mode == "la57" else 48
            if address >> (width - 1) not in (0, bits(64 - width, 0)):
                raise GeneralProtection

    def init(self):
        """SDM table 10-1, column INIT: CR0 60000010H with CD and NW unchanged; CR2, CR3, CR4 0; EFLAGS 2; PKRU
        unchanged.  EFER 0: APM vol. 2 table 14-1."""
        self.cr0 = self.cr0 & (CR0_CD | CR0_NW) | CR0_ET
        self.cr2 = self.cr3 = self.cr4 = self.efer = 0
        self.ac = False

    # -- the walk --------------------------------------------------------------------------------------------

    def _read_entry(self, gpa, width):
        # Choice 3 of the module's head: no memory, not present.
        return self.memory.read(gpa, width) if gpa in self.memory else 0

    def translate(self, address):
        """Walk without side effect.  Raises PageFault with the P and RSVD bits only, or GeneralProtection."""
        mode = self.mode
        if mode == "off":
            # SDM 4.1.1: with CR0.PG=0 every linear address is its own physical address.
            gpa = address & bits(31, 0)
            return Translation(gpa, PAGE, [], 0)
        if mode == "32":
            return self._translate_32(address & bits(31, 0))
        if mode == "pae":
            return self._translate_pae(address & bits(31, 0))
        # SDM vol. 1, 3.3.7.1: an address is canonical if bits 63:47 (5-level: 63:56) are all equal.
        # A reference to one that is not raises #GP(0).
        width = 57 if mode == "la57" else 48
        upper = address >> (width - 1)
        if upper not in (0, bits(64 - width, 0)):
            raise GeneralProtection
        return self._translate_long(address, 5 if mode == "la57" else 4)

    def _translate_32(self, la):
        """SDM 4.3 "32-bit paging"."""
        # 1. The page directory is at the address in CR3 bits 31:12; a PDE is selected by
        #    bits 31:22 of the linear address.
        where = self.cr3 & bits(31, 12) | (la >> 22) << 2
        pde = self._read_entry(where, 4)
        walked = [(2, where, pde)]
        # 2. P=0: there is no translation.
        if not pde & P:
            raise PageFault(0, walked)
        # 3. If CR4.PSE=1 and the PDE's PS=1, it maps a 4-MByte page: physical address bits 39:32 are
        #    PDE bits 20:13, bits 31:22 are PDE bits 31:22, bits 21:0 those of the linear address.
        if self.cr4 & CR4_PSE and pde & PS:
            # 4. Reserved: with PSE-36, M = min(40, MAXPHYADDR), bits 21:(M-19); without it bits 21:13.
            m = min(40, self.features.maxphyaddr) if self.features.pse36 else 32
            if pde & bits(21, m - 19):
                raise PageFault(PF_P | PF_RSVD, walked)
            gpa = (pde & bits(20, 13)) << 19 | pde & bits(31, 22) | la & bits(21, 0)
            return self._complete(gpa, 4 << 20, walked, 4)
        # 5. Otherwise PDE bits 31:12 locate a page table; a PTE is selected by bits 21:12.
        #    CR4.PSE=0: bit 7 of a PDE is ignored.
        where = pde & bits(31, 12) | (la >> 12 & 0x3FF) << 2
        pte = self._read_entry(where, 4)
        walked.append((1, where, pte))
        if not pte & P:
            raise PageFault(0, walked)
        # 6. No bit of a 4-byte PTE is reserved (bit 7 is PAT).
        gpa = pte & bits(31, 12) | la & bits(11, 0)
        return self._complete(gpa, PAGE, walked, 4)

    def _translate_pae(self, la):
        """SDM 4.4 "PAE paging"."""
        # 1. Bits 31:30 of the linear address select a PDPTE register.  P=0: no translation.
        #    (The register was checked when it was loaded; it holds no rights and no A bit.)
        pdpte = self.pdptes[la >> 30]
        if not pdpte & P:
            raise PageFault(0, [])
        # 2. PDPTE bits (M-1):12 locate the page directory; bits 29:21 select a PDE.
        return self._descend(la, pdpte, 2, bits(62, self.features.maxphyaddr))

    def _translate_long(self, la, top):
        """SDM 4.5 "4-level paging and 5-level paging": CR3 bits (M-1):12 locate the PML4 or PML5 table."""
        return self._descend(la, self.cr3, top, bits(51, self.features.maxphyaddr))

    def _descend(self, la, base, level, reserved_address):
        """The levels of 8-byte entries (SDM 4.4.2 and 4.5.4), `base` locating the table of `level`."""
        walked = []
        while True:
            # 1. Nine bits of the linear address select the entry: 56:48, 47:39, 38:30, 29:21, 20:12.
            shift = 12 + 9 * (level - 1)
            where = base & bits(51, 12) | (la >> shift & 0x1FF) << 3
            entry = self._read_entry(where, 8)
            walked.append((level, where, entry))
            # 2. P=0: no translation.  The other bits are ignored then.
            if not entry & P:
                raise PageFault(0, walked)
            # 3. Bits at and above MAXPHYADDR are reserved: up to 51 in 4-level and 5-level paging, up to 62
            #    in PAE paging.  Bit 63 (XD) is reserved if EFER.NXE=0.
            reserved = reserved_address | (0 if self.efer & EFER_NXE else NX)
            # 4. Bit 7 (PS): reserved in PML5E and PML4E; in a PDPTE it maps 1 GByte where that is supported
            #    (else reserved); in a PDE it maps 2 MByte; in a PTE it is PAT.  CR4.PSE does not matter here.
            large = bool(entry & PS) and level in (2, 3)
            if level >= 4 or (level == 3 and not self.features.gbpages):
                reserved |= PS
            # AMD: bit 8, that of G, is MBZ where an entry of these levels can map no page (APM vol. 2, 5.3.3).
            if level >= 4 and self.features.vendor == "amd":
                reserved |= bits(8, 8)
            # 5. A large page's unused low address bits are reserved: 29:13 or 20:13 (bit 12 is PAT).
            if large:
                reserved |= bits(shift - 1, 13)
            if entry & reserved:
                raise PageFault(PF_P | PF_RSVD, walked)
            # 6. The last entry gives the upper bits of the physical address, the linear address the rest.
            if large or level == 1:
                gpa = entry & bits(51, shift) | la & bits(shift - 1, 0)
                return self._complete(gpa, 1 << shift, walked, 8)
            base = entry
            level -= 1

    @staticmethod
    def _complete(gpa, page_size, walked, width):
        """SDM 4.6: an address is a user-mode address if U/S=1 in every entry; writes need R/W=1 in every
        entry; a fetch needs XD=0 in every entry.  SDM 4.6.2: the key is bits 62:59 of the last entry."""
        every, some = -1, 0
        for _, _, entry in walked:
            every &= entry
            some |= entry
        return Translation(
            gpa,
            page_size,
            walked,
            width,
            writable=bool(every & W),
            user=bool(every & U),
            executable=not some & NX,
            key=entry >> 59 & 15,
        )

    # -- rights ----------------------------------------------------------------------------------------------

    def _permitted(self, t, op, user, implicit=False):
        """SDM 4.6.1 "Determination of Access Rights", line by line."""
        wp, smep, smap = self.cr0 & CR0_WP, self.cr4 & CR4_SMEP, self.cr4 & CR4_SMAP
        nxe = self.efer & EFER_NXE
        if implicit and smap and t.user:
            # "If CR4.SMAP = 1, ... [for] implicit supervisor-mode accesses: data may not be read from [written to] any
            # user-mode address", whatever EFLAGS.AC is.
            return False
        if not user:
            if op == READ:
                # Data may be read from a supervisor-mode address; from a user-mode address if SMAP=0 or AC=1.
                return not t.user or not smap or self.ac
            if op == WRITE:
                # To a supervisor-mode address: WP=0, or R/W=1.  To a user-mode address: the same, and
                # SMAP=0 or AC=1.
                return (not wp or t.writable) and (not t.user or not smap or self.ac)
            # Fetch from a supervisor-mode address: NXE=0 or XD=0.  From a user-mode address: the same, and
            # SMEP=0.
            return (not nxe or t.executable) and (not t.user or not smep)
        # User-mode accesses: never to a supervisor-mode address.  Write: R/W=1.  Fetch: NXE=0 or XD=0.
        if not t.user:
            return False
        if op == WRITE:
            return t.writable
        return op == READ or not nxe or t.executable

    def _key_violation(self, t, op, user):
        """SDM 4.6.2 "Protection Keys": 4-level and 5-level paging with CR4.PKE=1, data accesses (in either
        mode) to user-mode addresses.  AD (bit 2k of PKRU) forbids any; WD (bit 2k+1) forbids user writes, and
        supervisor writes if CR0.WP=1."""
        if not self.cr4 & CR4_PKE or op == FETCH or not t.user or self.mode not in ("64", "la57"):
            return False
        access_disable, write_disable = self.pkru >> 2 * t.key & 1, self.pkru >> 2 * t.key & 2
        return bool(access_disable or (write_disable and op == WRITE and (user or self.cr0 & CR0_WP)))

    def _error_code(self, op, user):
        """SDM 4.7: W/R and U/S describe the access.  I/D is set for a fetch if EFER.NXE=1 and CR4.PAE=1,
        or CR4.SMEP=1."""
        code = (PF_W if op == WRITE else 0) | (PF_U if user else 0)
        reports_fetch = (self.efer & EFER_NXE and self.cr4 & CR4_PAE) or self.cr4 & CR4_SMEP
        return code | (PF_I if op == FETCH and reports_fetch else 0)

    # -- accesses --------------------------------------------------------------------------------------------

    def check(self, address, op, user=False, implicit=False):
        """The translation that an access would use, or its fault; changes nothing.

        implicit: SDM 4.6.1, "some operations implicitly access system data structures ... with a linear address; the
        resulting accesses are called implicit supervisor-mode accesses regardless of CPL"."""
        user = user and not implicit
        try:
            t = self.translate(address)
        except PageFault as fault:
            fault.error_code |= self._error_code(op, user)
            raise
        if not t.levels:
            return t
        permitted, key_violation = self._permitted(t, op, user, implicit), self._key_violation(t, op, user)
        if not permitted or key_violation:
            # SDM 4.7: P=1, for the translation exists; PK whenever the key forbids the access, be there
            # another cause or not.
            code = PF_P | self._error_code(op, user) | (PF_PK if key_violation else 0)
            raise PageFault(code, t.levels)
        return t

    def access(self, address, op, user=False, implicit=False):
        """The architecture's part of one access: rights, CR2, A and D.  Returns the physical address."""
        try:
            t = self.check(address, op, user, implicit)
        except PageFault:
            # SDM 4.7: CR2 is the linear address.
            self.cr2 = address & bits(31 if self.mode in ("32", "pae") else 63, 0)
            raise
        # SDM 4.8: A in every entry used, D in the one that maps the page if it is a write.
        for i, (_, where, entry) in enumerate(t.levels):
            flags = A | (D if op == WRITE and i == len(t.levels) - 1 else 0)
            if entry & flags != flags:
                self.memory.write(where, self.memory.read(where, 1) | flags, 1)
        if t.gpa not in self.memory:
            raise MMIOAccess(t.gpa)
        return t.gpa

    def read(self, address, size=8, user=False, implicit=False):
        return self.memory.read(self.access(address, READ, user, implicit), size)

    def write(self, address, value, size=8, user=False):
        self.memory.write(self.access(address, WRITE, user), value, size)

    def fetch(self, address, user=False):
        return self.access(address, FETCH, user)

    # -- batches ---------------------------------------------------------------------------------------------

    def step(self, op, address=0, value=0, size=8, user=False, implicit=False):
        """One operation: (outcome, error code, gpa, value read)."""
        gpa = NO_GPA
        try:
            if op in (READ, WRITE, FETCH):
                gpa = self.access(address, op, user, implicit)
                if op == WRITE:
                    self.memory.write(gpa, value, size)
                    return OK, 0, gpa, 0
                return OK, 0, gpa, self.memory.read(gpa, size)
            if op == INVPCID:
                self.invpcid(size, value, address, user)
            # INVLPG of any address changes nothing here: this processor has no TLB.
            loads = {CR3: self.load_cr3, CR0: self.load_cr0, CR4: self.load_cr4, EFER: self.load_efer}
            if op in loads:
                loads[op](value)
            return OK, 0, gpa, 0
        except PageFault as fault:
            return PAGE_FAULT, fault.error_code, gpa, 0
        except GeneralProtection:
            return GENERAL_PROTECTION, 0, gpa, 0
        except UndefinedInstruction:
            return UNDEFINED, 0, gpa, 0
        except MMIOAccess as access:
            return MMIO, 0, access.gpa, 0

    def run(self, ops):
        """Operations as records with fields op, user, size, addr, value; a list of what `step` returns."""
        fields = (ops[name].tolist() for name in ("op", "addr", "value", "size", "user"))
        return [self.step(*record) for record in zip(*fields, strict=True)]
