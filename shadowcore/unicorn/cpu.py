"""A processor for `shadowcore.unicorn`: Unicorn as the guest mode of AMD's virtualization extension (SVM).

Unicorn's x86 has SVM. One VMRUN puts it into guest mode, with intercepts for everything that a hypervisor has to see:
exceptions, control registers, INVLPG, EFER, CPUID, HLT, INT n. An intercepted event reaches UC_HOOK_INTR as 0x100 + its
exit code, with RIP at the instruction; no code hook is needed, and code that causes no exit runs at full speed. VMRUN
is also the way to load what the register interface cannot: a privilege level, cached segments, another paging mode.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from typing import Any

import numpy as np

from ..engine.memory import allocate
from ..errors import ConfigError, EngineError

try:
    # Its annotations are not complete: Any for what comes from it.
    uc: Any = importlib.import_module("unicorn")
    x86: Any = importlib.import_module("unicorn.x86_const")
except ImportError as error:
    raise ImportError(
        'shadowcore.unicorn needs the package unicorn, 2.1 or newer: pip install "shadowcore[unicorn]"'
    ) from error

EXIT = 0x100  # what UC_HOOK_INTR adds to an exit code
READ_CR, WRITE_CR, EXCEPTION = 0x00, 0x10, 0x40  # exit codes: + number of the register, of the vector
CPUID, SOFTWARE_INTERRUPT, HLT, INVLPG, MSR, SHUTDOWN = 0x72, 0x75, 0x78, 0x79, 0x7C, 0x7F
SVM_INSTRUCTIONS = range(0x80, 0x87)

EFER, EFER_SVME = 0xC0000080, 1 << 12
HSAVE = 0xC0010117
TF = 1 << 8

# The private pages, by offset.
ENTRY, VMCB, HOST, PDPT, MSRPM, WINDOWS, PRIVATE_SIZE = 0x0, 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0x10000
N_WINDOWS = 4
MSR_EFER = MSRPM + 0x800 + 0x80 // 4  # its permissions
SAVE = VMCB + 0x400
SEGMENTS = ("es", "cs", "ss", "ds")
_NAMES = ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", *(f"R{i}" for i in range(8, 16)))
GPRS = tuple(getattr(x86, f"UC_X86_REG_{name}") for name in _NAMES)
FLAGS_BEFORE = 8  # bytes from the word with the privilege level to the cached segments
MODEL = x86.UC_CPU_X86_EPYC


class _Layout:
    """Where a saved context of this release of Unicorn has what its register interface does not give."""

    def __init__(self, error_code: int, segments: int) -> None:
        self.error_code = error_code
        self.segments = segments


_layout: list[_Layout] = []


class Processor:
    """Unicorn in guest mode. `private`: 64 KiB of its physical space, below 4 GiB, that nothing else uses."""

    def __init__(self, private: int) -> None:
        self.uc = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
        self.uc.ctl_set_cpu_model(MODEL)
        # No address at which to stop: Unicorn would look it up after each run, through the guest's tables.
        self.uc.ctl_exits_enabled(True)
        self.uc.ctl_set_exits([])
        self.private = private
        self.pages = allocate(WINDOWS)  # which nobody can resize
        self.uc.mem_map_ptr(private, self.pages.size, uc.UC_PROT_ALL, self.pages.ctypes.data)
        self.put(ENTRY, b"\x67\x0f\x01\xd8")  # vmrun eax
        self.pages[MSR_EFER] = 3  # reads and writes
        misc = 1 << 18 | 1 << 21 | 1 << 24 | 1 << 25 | 1 << 28 | 1 << 31
        self.put(VMCB, struct.pack("<HHIII", 0xFFFF, 0xFFFF, 0, 0xFFFFFFFF, misc))
        self.put(VMCB + 0x10, struct.pack("<I", 0x7E))  # all of SVM but VMRUN, which `enter` uses again
        self.put(VMCB + 0x48, struct.pack("<Q", private + MSRPM))
        self.put(VMCB + 0x58, struct.pack("<II", 1, 1))  # ASID; drop every translation
        self.entering = True
        self.exit: int | None = None
        self.fault_address = 0  # linear, of the #PF that was intercepted last
        self.virtual = False
        self._context: Any = None
        self.uc.hook_add(uc.UC_HOOK_INTR, self._on_exit)
        # The way through the module takes ten times as long.
        self._word = ctypes.c_uint64()
        self._read, self._write = self.function("uc_reg_read"), self.function("uc_reg_write")
        self._engine = getattr(self.uc, "_uch", None)
        self.reader = ctypes.cast(self._read, ctypes.c_void_p).value if self._read is not None else None

    def _on_exit(self, engine: Any, number: int, _data: Any) -> None:
        self.exit = number
        self.fault_address = int.from_bytes(self.pages[VMCB + 0x80 : VMCB + 0x88].tobytes(), "little")  # EXITINFO2
        engine.emu_stop()

    @staticmethod
    def function(name: str) -> Any:
        """A function of the C library behind the module; None if this release does not show it."""
        try:
            return getattr(importlib.import_module("unicorn.unicorn_py3.unicorn").uclib, name)
        except (ImportError, AttributeError):
            return None

    def hook_fills(self, function: int, data: int) -> bool:
        """Have the C function at that address serve misses of the TLB; False if this release does not let us."""
        add = self.function("uc_hook_add")
        if add is None or self._engine is None:
            return False
        number, everywhere = ctypes.c_size_t(), (ctypes.c_uint64(1), ctypes.c_uint64(0))
        pointers = ctypes.c_void_p(function), ctypes.c_void_p(data)
        status = add(self._engine, ctypes.byref(number), uc.UC_HOOK_TLB_FILL, *pointers, *everywhere)
        if status != uc.UC_ERR_OK:
            raise uc.UcError(status)
        return True

    def put(self, offset: int, data: bytes) -> None:
        """Bytes into the private pages."""
        self.pages[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)

    def enter(
        self, segments: dict[str, tuple[int, int, int, int]], registers: dict[str, int], gdt: Any, idt: Any
    ) -> None:
        """The next run starts by VMRUN with this state.

        segments: selector, attributes (as in the VMCB), limit, base of es, cs, ss, ds; the privilege level is that of
        ss. registers: cr0, cr3, cr4, efer, rip, rsp, rax, rflags. gdt, idt: base, limit.
        """
        for i, name in enumerate(SEGMENTS):
            self.put(SAVE + 16 * i, struct.pack("<HHIQ", *segments[name]))
        self.put(SAVE + 0x60, struct.pack("<HHIQ", 0, 0, gdt[1], gdt[0]))
        self.put(SAVE + 0x80, struct.pack("<HHIQ", 0, 0, idt[1], idt[0]))
        self.pages[SAVE + 0xCB] = segments["ss"][1] >> 5 & 3
        for offset, name in ((0x148, "cr4"), (0x150, "cr3"), (0x158, "cr0"), (0x170, "rflags"), (0x178, "rip")):
            self.put(SAVE + offset, struct.pack("<Q", registers[name]))
        self.put(SAVE + 0xD0, struct.pack("<Q", registers["efer"] | EFER_SVME))
        self.put(SAVE + 0x160, struct.pack("<QQ", 0x400, 0xFFFF0FF0))  # DR7, DR6
        self.put(SAVE + 0x1D8, struct.pack("<Q", registers["rsp"]))
        self.put(SAVE + 0x1F8, struct.pack("<Q", registers["rax"]))
        # VMRUN wants privilege level 0, which is in the flags word of a context; then the way out of whatever mode.
        if _layout:
            at = self._saved() + _layout[0].segments - FLAGS_BEFORE
            ctypes.c_uint32.from_address(at).value &= ~3
            self.uc.context_restore(self._context)
        write = self.set_word
        write(x86.UC_X86_REG_EFLAGS, 2)
        write(x86.UC_X86_REG_CR0, 0x10)
        write(x86.UC_X86_REG_CR4, 0)
        write(x86.UC_X86_REG_CS, 0)
        write(x86.UC_X86_REG_CR0, 0x11)
        self.set_efer(0)
        self.uc.reg_write(x86.UC_X86_REG_MSR, (HSAVE, self.private + HOST))
        write(x86.UC_X86_REG_RAX, self.private + VMCB)
        write(x86.UC_X86_REG_RIP, self.private + ENTRY)
        self.entering = True

    @property
    def pending(self) -> bool:
        """The VMRUN of `enter` is still to come: registers are not the guest's."""
        return self.entering and self.rip == self.private

    def run(self) -> int | None:
        """Run until an exit: its code, or None if something else stopped the run."""
        self.exit = None
        self.uc.emu_start(self.rip, 0)
        return self._taken()

    def _taken(self) -> int | None:
        if self.exit is not None and self.exit < EXIT:
            raise EngineError(f"unicorn: vector {self.exit} arrived outside of guest mode")
        return None if self.exit is None else self.exit - EXIT

    def flush(self) -> None:
        """Drop every translation that Unicorn holds."""
        self.uc.ctl(uc.UC_CTL_TLB_FLUSH, uc.UC_CTL_IO_WRITE)

    def set_efer(self, value: int) -> None:
        """Load EFER. Intercepts hold for the register interface as well, and an exit from there would be fatal."""
        self.pages[MSR_EFER] = 0
        self.uc.reg_write(x86.UC_X86_REG_MSR, (EFER, value | EFER_SVME))
        self.pages[MSR_EFER] = 3

    def set_virtual(self, on: bool) -> None:
        """Who translates: the fill hook, or Unicorn's walker by CR3."""
        if on != self.virtual:
            self.uc.ctl_set_tlb_mode(uc.UC_TLB_VIRTUAL if on else uc.UC_TLB_CPU)
            self.virtual = on
        self.flush()

    def word(self, register: int) -> int:
        """A register of at most 64 bits."""
        if self._read is None or self._engine is None:
            return int(self.uc.reg_read(register))
        self._word.value = 0
        status = self._read(self._engine, register, ctypes.byref(self._word))
        if status != uc.UC_ERR_OK:
            raise uc.UcError(status)
        return self._word.value

    def set_word(self, register: int, value: int) -> None:
        """Load a register of at most 64 bits."""
        if self._write is None or self._engine is None:
            self.uc.reg_write(register, value)
            return
        self._word.value = value
        status = self._write(self._engine, register, ctypes.byref(self._word))
        if status != uc.UC_ERR_OK:
            raise uc.UcError(status)

    @property
    def rip(self) -> int:
        return self.word(x86.UC_X86_REG_RIP)

    @rip.setter
    def rip(self, value: int) -> None:
        self.set_word(x86.UC_X86_REG_RIP, value)

    @property
    def rflags(self) -> int:
        return self.word(x86.UC_X86_REG_EFLAGS)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.set_word(x86.UC_X86_REG_EFLAGS, value)

    @property
    def cpl(self) -> int:
        return self.word(x86.UC_X86_REG_CS) & 3

    def gpr(self, number: int) -> int:
        return self.word(GPRS[number])

    def set_gpr(self, number: int, value: int) -> None:
        self.set_word(GPRS[number], value)

    def table(self, name: str) -> tuple[int, int]:
        """Base and limit of "GDTR", "IDTR" or "TR"."""
        _, base, limit, _ = self.uc.reg_read(getattr(x86, f"UC_X86_REG_{name}"))
        return int(base), int(limit)

    def _saved(self) -> int:
        """Where a context lies that was saved just now."""
        if self._context is None:
            self._context = self.uc.context_save()
        else:
            self.uc.context_update(self._context)
        return int(self._context.context.value)

    def context(self) -> bytes:
        """All of Unicorn's state of the processor, in its own layout."""
        self._saved()
        return bytes(self._context)

    @property
    def error_code(self) -> int:
        """Error code of the exception that was intercepted last."""
        return ctypes.c_uint32.from_address(self._saved() + layout().error_code).value

    def segments(self) -> dict[str, tuple[int, int, int, int]]:
        """The cached segments, as `enter` takes them."""
        state = self.context()
        found = {}
        for i, name in enumerate(SEGMENTS):
            selector, base, limit, flags = struct.unpack_from("<I4xQII", state, layout().segments + 24 * i)
            found[name] = (selector, flags >> 8 & 0xFF | flags >> 12 & 0xF00, limit, base)
        return found


FLAT_CODE, FLAT_DATA = 0xC9B, 0xC93


def flat(selector: int, attributes: int) -> tuple[int, int, int, int]:
    """A segment over all of the linear space."""
    return selector, attributes, 0xFFFFFFFF, 0


def layout() -> _Layout:
    """Find out, once, by two faults whose error codes are known, and segments of which no two are alike."""
    if _layout:
        return _layout[0]
    found: set[int] = set()
    segments = -1
    for code, cpl in ((0xABC8, 0), (0x5A58, 3)):
        processor = Processor(0xF0000000)
        ram = np.zeros(0x2000, dtype=np.uint8)
        processor.uc.mem_map_ptr(0, ram.size, uc.UC_PROT_ALL, ram.ctypes.data)
        text = b"\x66\xb8" + struct.pack("<H", code) + b"\x8e\xe8"  # mov ax, code; mov gs, ax
        ram[0x1000 : 0x1000 + len(text)] = np.frombuffer(text, dtype=np.uint8)
        caches = {name: (8 * i + 16, FLAT_DATA | cpl << 5, 0x12345FFF, 0x111000 * i) for i, name in enumerate(SEGMENTS)}
        caches["cs"] = flat(8 | cpl, FLAT_CODE | cpl << 5)
        registers = {
            "cr0": 0x11,
            "cr3": 0,
            "cr4": 0,
            "efer": 0,
            "rip": 0x1000,
            "rsp": 0x800,
            "rax": 0x1110000,
            "rflags": 2,
        }
        processor.enter(caches, registers, (0, 0x1F), (0, 0))
        if processor.run() != EXCEPTION + 13:
            raise ConfigError("unicorn: this release does not run guests under SVM as 2.1 does")
        state = processor.context()
        places = {at for at in range(0, len(state) - 4, 4) if struct.unpack_from("<I", state, at)[0] == code}
        found = found & places if found else places
        for at in range(0, len(state) - 96, 8):
            if all(
                struct.unpack_from("<I4xQI", state, at + 24 * i) == (caches[n][0], caches[n][3], caches[n][2])
                for i, n in enumerate(SEGMENTS)
            ):
                segments = at
        if segments < 0 or struct.unpack_from("<I", state, segments - FLAGS_BEFORE)[0] & 3 != cpl:
            break
    else:
        cpl = -1
    if len(found) != 1 or segments < 0 or cpl >= 0:
        raise ConfigError(f"unicorn: the layout of this release's contexts is not known ({sorted(found)}, {segments})")
    _layout.append(_Layout(found.pop(), segments))
    return _layout[0]


def address_of(array: np.ndarray[Any, Any]) -> int:
    """Where the bytes of an array are."""
    return ctypes.cast(array.ctypes.data, ctypes.c_void_p).value or 0
