"""A walk of guest page tables explained in words: each entry, what it grants, where it leads; the outcome.

The engine does the walking and gives the verdict; this module reads the entries that it met. Sections are
those of the Intel SDM, volume 3A, chapter 4.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..config import Design, Features
from ..engine.machine import VM, set_registers
from ..errors import ConfigError, GeneralProtection, PageFault, TraceError
from ..pagetables import FORMATS, NX, PAT, PAT_LARGE, PKEY_SHIFT, PS, A, D, Format, G, P, U, W
from ..recording.npz import read_arrays

CR0_WP, CR4_PSE, CR4_SMAP, EFER_NXE = 1 << 16, 1 << 4, 1 << 21, 1 << 11
PWT, PCD = 1 << 3, 1 << 4

Access = Literal["r", "w", "x"]

MODE_NAMES = {
    "32": "32-bit paging",
    "pae": "PAE paging",
    "64": "4-level paging",
    "la57": "5-level paging",
}
ENTRY_NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}
ACCESS_NAMES = {"r": "read", "w": "write", "x": "instruction fetch"}

# Page-fault error code (4.7).
PF_P, PF_W, PF_U, PF_RSVD, PF_I, PF_PK = 1, 2, 4, 8, 16, 32
_PF_WORDS = {
    PF_W: "W: it was a write",
    PF_U: "U: it was made in user mode",
    PF_RSVD: "RSVD: a reserved bit is set",
    PF_I: "I: it was an instruction fetch",
    PF_PK: "PK: a protection key forbids it",
}


# -- images ----------------------------------------------------------------------------------------------

_ARRAYS = {"mem_gfn": ("<u4", 1), "mem_page": ("u1", 2), "root": ("<u8", 1)}
_SCALARS = ("nframes", "cr0", "cr3", "cr4", "efer")


@dataclass(frozen=True, eq=False)
class Image:
    """A dump of a guest's page tables and registers.

    mode: "32", "pae", "64" or "la57". nframes: guest RAM in frames of 4096 bytes.
    frames: gfns of the frames that the image holds; pages: their contents, uint8[frames, 4096].
    roots: CR3 values of the guest's address spaces.
    """

    name: str
    mode: str
    nframes: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    frames: NDArray[np.uint32]
    pages: NDArray[np.uint8]
    roots: tuple[int, ...]

    def machine(self, cr3: int | None = None, mmu: str | Design = "native") -> VM:
        """A VM that stands where the guest stood; cr3: load this one instead. mmu: its design, whose shadow is new."""
        cr3 = self.cr3 if cr3 is None else cr3
        root = cr3 & (0xFFFF_F000 if FORMATS[self.mode].va_bits == 32 else 0x000F_FFFF_FFFF_F000)
        if root >> 12 not in self.frames:
            roots = ", ".join(hex(root) for root in self.roots)
            raise ConfigError(f"cr3: the image holds no table at {cr3:#x}; its roots are {roots}")
        vm = VM(self.nframes << 12, mmu, features=Features(maxphyaddr=52))
        vm.memory.bytes.reshape(-1, 4096)[self.frames] = self.pages
        if self.mode == "pae":
            # Emulators set A in the root entries, too, where processors reserve the bit (table 4-8).
            first = (cr3 & 0xFFFF_FFE0) >> 3
            vm.memory.words[first : first + 4] &= np.uint64(~A & (1 << 64) - 1)
        cpu = vm.vcpus[0]
        try:
            set_registers(vm, cpu, cr0=self.cr0, cr3=cr3, cr4=self.cr4, efer=self.efer)
        except GeneralProtection:
            raise ConfigError(f"cr3: {cr3:#x} with the other registers of the image is #GP") from None
        if cpu.mode != self.mode:
            expected = f"registers of mode {self.mode!r} expected, not of {cpu.mode!r}"
            raise TraceError(self.name, None, expected)
        return vm


def load_image(path: str | os.PathLike[str]) -> Image:
    """Read an .npz dump: mode, nframes, cr0, cr3, cr4, efer, mem_gfn, mem_page, root; else TraceError."""
    members = read_arrays(path, ("mode", *_SCALARS, *_ARRAYS))
    mode = str(members["mode"])
    if mode not in FORMATS:
        raise TraceError(path, None, f"'mode': one of {', '.join(FORMATS)} expected, not {mode:.20}")
    for name in _SCALARS:
        if members[name].ndim or members[name].dtype.kind != "u":
            raise TraceError(path, None, f"{name!r}: one unsigned integer expected")
    for name, (dtype, ndim) in _ARRAYS.items():
        if members[name].dtype != np.dtype(dtype) or members[name].ndim != ndim:
            raise TraceError(path, None, f"array {name!r}: {ndim} dimension(s) of {np.dtype(dtype)} expected")
    nframes, frames, pages = int(members["nframes"]), members["mem_gfn"], members["mem_page"]
    if not 1 <= nframes <= 1 << 40:
        raise TraceError(path, None, f"'nframes': 1 to {1 << 40:#x} expected, not {nframes:#x}")
    if pages.shape != (len(frames), 4096):
        expected = f"array 'mem_page': shape ({len(frames)}, 4096) expected, not {pages.shape}"
        raise TraceError(path, None, expected)
    if len(frames) and int(frames.max()) >= nframes:
        raise TraceError(path, int(frames.argmax()), f"'mem_gfn': a gfn below {nframes:#x} expected")
    registers = {name: int(members[name]) for name in _SCALARS if name != "nframes"}
    roots = tuple(int(root) for root in members["root"])
    return Image(Path(path).stem, mode, nframes, frames=frames, pages=pages, roots=roots, **registers)


# -- walks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One entry of a walk.

    level: of its table. name: as the SDM calls it. index: its number in the table.
    gpa: where it lies. entry: its value. bits: its bits in words.
    leads_to: what it points to, or why the walk ends here.
    rights: what it and the entries above grant together, in words; "" where the walk ends.
    """

    level: int
    name: str
    index: int
    gpa: int
    entry: int
    bits: tuple[str, ...]
    leads_to: str
    rights: str


@dataclass(frozen=True)
class Explanation:
    """A walk: `steps` from the root down, then where it led, or the fault and its reason.

    gva, access ("r", "w", "x"), user, mode, cr3: what was asked.
    gpa, page_size (bytes), rights (in words): the translation (gpa None: a fault).
    mmio: the gpa is in no memory slot.
    fault: "#PF", "#GP" or None. error_code; code_bits: its bits in words; why: the cause in one sentence.
    """

    gva: int
    access: Access
    user: bool
    mode: str
    cr3: int
    steps: tuple[Step, ...]
    gpa: int | None = None
    page_size: int = 0
    rights: str = ""
    mmio: bool = False
    fault: str | None = None
    error_code: int = 0
    code_bits: tuple[str, ...] = ()
    why: str = ""

    def lines(self) -> list[str]:
        """The explanation as text, a line each."""
        what = f"{'user' if self.user else 'supervisor'} {ACCESS_NAMES[self.access]}"
        lines = [f"gva {self.gva:#x}: {what}, {MODE_NAMES[self.mode]}, CR3 {self.cr3:#x}"]
        digits = 10 if self.mode == "32" else 18
        for step in self.steps:
            where = f"{step.name} {step.index} at gpa {step.gpa:#x}"
            lines += ["", f"level {step.level}  {where} = {step.entry:#0{digits}x}"]
            lines += [f"         {', '.join(step.bits)}", f"         {step.leads_to}"]
            lines += [f"         so far: {step.rights}"] if step.rights else []
        lines.append("")
        if self.fault is None:
            lines.append(f"gpa {self.gpa:#x}, in a page of {_size(self.page_size)}: {self.rights}")
            lines += ["         in no memory slot: a device (MMIO)"] if self.mmio else []
        else:
            lines.append(f"{self.fault}, error code {self.error_code:#x}: {self.why}")
            lines += [f"         {bit}" for bit in self.code_bits]
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The explanation in plain types, as `shadowcore walk --json` prints it."""
        plain = {k: v for k, v in vars(self).items() if k not in ("steps", "code_bits")}
        plain["levels"] = [vars(step) | {"bits": list(step.bits)} for step in self.steps]
        plain["code_bits"] = list(self.code_bits)
        return plain


def explain(vm: VM, gva: int, access: Access = "r", user: bool = False, vcpu: int = 0) -> Explanation:
    """Walk `gva` for `access` ("r", "w" or "x") with the tables and registers of a vcpu of `vm`."""
    cpu = vm.vcpus[vcpu]
    if cpu.mode not in FORMATS:
        raise ConfigError("vm: paging is off")
    form = FORMATS[cpu.mode]
    if form.va_bits == 32 and gva >> 32:
        raise ConfigError(f"gva: {gva:#x} has more than the 32 bits of {MODE_NAMES[cpu.mode]}")
    asked: dict[str, Any] = dict(gva=gva, access=access, user=user, mode=cpu.mode, cr3=cpu.cr3)
    try:
        t = cpu.translate(gva, access, user)
    except GeneralProtection:
        why = f"the address is not canonical: bits 63 to {form.va_bits - 1} are not all equal"
        return Explanation(**asked, steps=(), fault="#GP", why=why)
    except PageFault as fault:
        steps, reached = _steps(cpu, form, gva)
        return Explanation(
            **asked,
            steps=steps,
            fault="#PF",
            error_code=fault.error_code,
            code_bits=_code_words(fault.error_code),
            why=_why(cpu, fault.error_code, access, user, steps[-1], reached),
        )
    steps, reached = _steps(cpu, form, gva)
    slots = ((slot.gpa, slot.gpa + int(slot.size)) for slot in vm.memory.slots if slot is not None)
    mmio = not any(first <= t.gpa < end for first, end in slots)
    return Explanation(**asked, steps=steps, gpa=t.gpa, page_size=t.page_size, rights=reached.words(), mmio=mmio)


@dataclass
class _Reached:
    """What a walk has come to: its last entry, and the first one that withheld each right ("": none)."""

    entry: int = 0
    no_write: str = ""
    no_user: str = ""
    no_execute: str = ""

    def words(self) -> str:
        return ", ".join(
            (
                "read only" if self.no_write else "read and write",
                "supervisor only" if self.no_user else "user and supervisor",
                "not executable" if self.no_execute else "executable",
            )
        )


def _steps(cpu: Any, form: Format, gva: int) -> tuple[tuple[Step, ...], _Reached]:
    met = list(cpu.walk_levels(gva))
    if cpu.mode == "pae":  # The root entries are in registers (4.4.1).
        index = form.index(gva, 3)
        met.insert(0, (3, (cpu.cr3 & 0xFFFF_FFE0) + 8 * index, cpu.pdptes[index]))
    reached, steps = _Reached(), []
    nxe = bool(cpu.efer & EFER_NXE)
    for level, gpa, value in met:
        name, rights = ENTRY_NAMES[level], ""
        pae_root = cpu.mode == "pae" and level == 3
        leaf = form.is_leaf(level, value) and (cpu.mode != "32" or level == 1 or bool(cpu.cr4 & CR4_PSE))
        reserved = 0 if pae_root else value & _reserved(cpu.mode, form, level, value, leaf, nxe)
        reached.entry = value
        if not value & P:
            leads_to = "ends the walk: nothing is mapped here"
        elif reserved:
            leads_to = f"ends the walk: {_bit_numbers(reserved)} must be 0"
        else:
            what = f"a page of {_size(1 << form.shift(level))}" if leaf else f"the level {level - 1} table"
            leads_to = f"leads to {what} at gpa {form.address(level, value if leaf else value & ~PS):#x}"
            if not pae_root:
                reached.no_write = reached.no_write or ("" if value & W else name)
                reached.no_user = reached.no_user or ("" if value & U else name)
                reached.no_execute = reached.no_execute or (name if value & NX and nxe else "")
            rights = reached.words()
        bits = _bit_words(value, form, level, leaf, pae_root, nxe)
        steps.append(Step(level, name, form.index(gva, level), gpa, value, bits, leads_to, rights))
    return tuple(steps), reached


def _reserved(mode: str, form: Format, level: int, value: int, leaf: bool, nxe: bool) -> int:
    """Bits that must be 0 in a present entry, with 52 physical address bits (tables 4-4 to 4-20)."""
    low = (1 << form.shift(level)) - (1 << 13) if leaf and level > 1 else 0
    if mode == "32":
        return low & ~(0xFF << 13)  # PSE-36 keeps address bits there.
    high = ((1 << 63) - (1 << 52) if mode == "pae" else 0) | (0 if nxe else NX)
    return high | low | (PS if level >= 4 else 0)


def _bit_words(value: int, form: Format, level: int, leaf: bool, pae_root: bool, nxe: bool) -> tuple[str, ...]:
    if not value & P:
        return ("not present",) if not value else ("not present", "the other bits are the guest's own")
    words = ["present"]
    if not pae_root:
        words += ["writable" if value & W else "read only", "user" if value & U else "supervisor only"]
        words.append("accessed" if value & A else "not accessed yet")
    if leaf:
        words.append("dirty" if value & D else "clean")
        words += [f"maps a page of {_size(1 << form.shift(level))}"] if level > 1 else []
        words += ["global"] if value & G else []
        words += ["PAT"] if value & (PAT if level == 1 else PAT_LARGE) else []
    words += ["write-through"] if value & PWT else []
    words += ["uncached"] if value & PCD else []
    if form.entry_size == 8 and value & NX and not pae_root:
        words.append("not executable" if nxe else "bit 63 with EFER.NXE clear")
    if leaf and form.levels > 3 and value >> PKEY_SHIFT & 15:
        words.append(f"protection key {value >> PKEY_SHIFT & 15}")
    return tuple(words)


def _bit_numbers(mask: int) -> str:
    numbers = [str(bit) for bit in range(64) if mask >> bit & 1]
    return f"bit {numbers[0]}" if len(numbers) == 1 else f"bits {', '.join(numbers)}"


def _code_words(code: int) -> tuple[str, ...]:
    first = "P: an entry is there" if code & PF_P else "P clear: an entry is not present"
    if code & PF_P and not code & PF_RSVD:
        first = "P: the page is mapped, rights forbid the access"
    return (first, *(words for bit, words in _PF_WORDS.items() if code & bit))


def _why(cpu: Any, code: int, access: str, user: bool, last: Step, reached: _Reached) -> str:
    """The cause of a page fault in one sentence (4.6, 4.7)."""
    where = f"the level {last.level} entry ({last.name} {last.index})"
    if not code & PF_P:
        return f"{where} is not present"
    if code & PF_RSVD:
        return f"{where} is present with a reserved bit set"
    if user and reached.no_user:
        return f"a user access to a page for the supervisor only: U is clear in the {reached.no_user}"
    if access == "x" and reached.no_execute:
        return f"a fetch from a page that is not executable: XD is set in the {reached.no_execute}"
    if access == "x":
        return "a supervisor fetch from a user page, with CR4.SMEP set"
    if access == "w" and reached.no_write and (user or cpu.cr0 & CR0_WP):
        return f"a write to a page that is read only: W is clear in the {reached.no_write}"
    if not user and not reached.no_user and cpu.cr4 & CR4_SMAP and not cpu.ac:
        return "a supervisor access to a user page, with CR4.SMAP set and EFLAGS.AC clear"
    return f"protection key {reached.entry >> PKEY_SHIFT & 15} of the page, with PKRU {cpu.pkru:#x}, forbids it"


def _size(page_size: int) -> str:
    shift, unit = max((s, u) for s, u in ((10, "KiB"), (20, "MiB"), (30, "GiB")) if page_size >> s)
    return f"{page_size >> shift} {unit}"
