"""Guests whose code runs in Unicorn and whose memory goes through our MMU.

`Machine(vm, way)`: with way "walker" Unicorn's own page walker runs on the tables of the host, which are our shadow
tables: its physical memory is `vm.memory.bytes` and the shadow pool, its CR3 the root; a page fault that it meets is an
exit, handled and resumed as on hardware. With way "fills" Unicorn asks for each translation. `boot(path)` starts a
multiboot image. docs/unicorn.md says what happens in which case, and what the limits are.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .batch import OP_DTYPE
from .config import Features, Native, Op, Shadow
from .errors import ConfigError, EngineError, ShadowcoreError
from .machine import VM
from .unicorn_cpu import (
    CPUID,
    EXCEPTION,
    FLAT_CODE,
    FLAT_DATA,
    HLT,
    INVLPG,
    MSR,
    N_WINDOWS,
    PDPT,
    PRIVATE_SIZE,
    READ_CR,
    SHUTDOWN,
    SOFTWARE_INTERRUPT,
    SVM_INSTRUCTIONS,
    TF,
    WINDOWS,
    WRITE_CR,
    Processor,
    address_of,
    flat,
    layout,
    uc,
    x86,
)

if TYPE_CHECKING:
    from .events import Stats

PAGE = ~0xFFF
WORD = (1 << 64) - 1
DB, UD, DF, TS, NP, SS, GP, PF = 1, 6, 8, 10, 11, 12, 13, 14
ERROR_CODES = {DF, TS, NP, SS, GP, PF, 17}
CONTRIBUTORY = {0, TS, NP, SS, GP}
CR0_PE, CR0_WP, CR0_PG = 1, 1 << 16, 1 << 31
CR4_PAE, CR4_SMAP = 1 << 5, 1 << 21
EFER_LME, EFER_LMA, EFER_NXE = 1 << 8, 1 << 10, 1 << 11
FLAG_IF, FLAG_NT, FLAG_RF, FLAG_AC = 1 << 9, 1 << 14, 1 << 16, 1 << 18
# What the processor has of CR4 besides what the paging mode asks for.
CR4_PASSED = 1 << 2 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21
FIRMWARE = 0x510  # port of the firmware configuration: how much memory, how many processors
SERIAL, EXIT_PORT, LOCAL_APIC, IO_APIC = 0x3F8, 0xF4, 0xFEE00000, 0xFEC00000
SAME_FAULT = 100  # times in a row that one fault is taken before the walkers are said to disagree
WAYS = ("walker", "fills")


class TripleFault(ShadowcoreError):
    """The guest could not take an exception while taking another: a processor resets there. The message has both."""


class Unsupported(ShadowcoreError):
    """The guest does what `shadowcore.unicorn` does not do: the message says what, and at which RIP."""


class _Fault(Exception):
    """An exception for the guest."""

    def __init__(self, vector: int, code: int = 0) -> None:
        self.vector = vector
        self.code = code
        super().__init__(vector, code)


class Recording:
    """The operations that reached the MMU, to be run again without Unicorn.

    ops: an OP_DTYPE array. data: bool[n], which of them moved bytes. entries: (operation, gpa, size, value): what an
    entry of a guest table held just before the operation. Stores that no MMU sees, to tables that no shadow follows,
    are known by them.
    """

    def __init__(self) -> None:
        self._ops: list[tuple[int, int, int, int, int]] = []
        self._data: list[bool] = []
        self.entries: list[tuple[int, int, int, int]] = []
        self._known: dict[int, np.ndarray[Any, Any] | None] = {}

    @property
    def ops(self) -> np.ndarray[Any, Any]:
        return np.array(self._ops, dtype=OP_DTYPE)

    @property
    def data(self) -> np.ndarray[Any, Any]:
        return np.array(self._data, dtype=bool)

    def __len__(self) -> int:
        return len(self._ops)

    def _entry(self, gpa: int, size: int, value: int) -> None:
        """An entry of a table that a shadow follows: replay checks it."""
        self.entries.append((len(self._ops), gpa, size, value))

    def _table(self, gpa: int, words: np.ndarray[Any, Any]) -> None:
        """All of a table that no shadow follows."""
        known = self._known.get(gpa, np.zeros_like(words))
        changed = range(len(words)) if known is None else np.flatnonzero(words != known).tolist()
        for i in changed:
            self.entries.append((len(self._ops), gpa + 8 * i, 8, int(words[i])))
        self._known[gpa] = words.copy()

    def _followed(self, gpa: int) -> None:
        """From now on the operations change the table at gpa."""
        self._known[gpa] = None

    def _add(self, op: tuple[int, int, int, int, int], data: bool) -> None:
        self._ops.append(op)
        self._data.append(data)

    def replay(self, vm: VM) -> Stats:
        """Run the operations on a fresh `vm` of the same settings; its counters.

        Entries that the guest stored unseen are put in place before the operation that reads them. EngineError if
        that would change a table that a shadow follows: every store to it has to be among the operations.
        """
        cpu = vm.vcpus[0]
        ram = vm.memory.bytes
        frames = None if isinstance(vm.mmu.design, Native) else vm.mmu.arrays["frames"]["shadowed"]
        ops, data, at = self.ops, self.data, 0
        for number in range(len(ops)):
            while at < len(self.entries) and self.entries[at][0] == number:
                _, gpa, size, value = self.entries[at]
                at += 1
                start = (vm.memory.frame(gpa >> 12) << 12) + (gpa & 0xFFF)
                if int.from_bytes(ram[start : start + size].tobytes(), "little") == value:
                    continue
                if frames is not None and frames[start >> 12]:
                    raise EngineError(
                        f"replay: operation {number} finds another entry at gpa {gpa:#x} of a shadowed table"
                    )
                # As a device would, for no memo may outlive it; the counters are those of a table that is not shadowed.
                vm.write_physical(gpa, value.to_bytes(size, "little"))
            cpu.run(ops[number : number + 1], data=bool(data[number]))
        return vm.stats


class Machine:
    """A guest in Unicorn on `vm` (its vcpu 0), entered in 32-bit protected mode with paging off, see `start`.

    way: "walker" or "fills". record: keep the operations that reach the MMU, in `.recording`.
    serial: what was written to port 0x3f8. exit_code: what was written to port 0xf4, once that happened.
    exits: exits by name. devices: (gpa, size, value or None) is called for addresses in no memory slot that are not an
    APIC: value None asks for a read, whose result it returns. ConfigError for memory that leaves no room for the page
    tables of the host itself, and for processors that Unicorn has not.
    """

    def __init__(self, vm: VM, way: str = "walker", *, record: bool = False, devices: Any = None) -> None:
        if way not in WAYS:
            raise ConfigError(f"way: {way!r} is not one of {', '.join(WAYS)}")
        self.vm = vm
        self.way = way
        self.cpu = vm.vcpus[0]
        self.devices = devices
        self.shadow = isinstance(vm.mmu.design, Shadow)
        self.recording = Recording() if record else None
        self.serial = bytearray()
        self.exit_code: int | None = None
        self.exits: Counter[str] = Counter()
        self.halted = False
        self._op_array = np.zeros(1, dtype=OP_DTYPE)
        self._frames = vm.mmu.arrays["frames"]["shadowed"] if self.shadow else None
        self._firmware = b""  # what is left of the item of the firmware configuration that was chosen
        self._apic: dict[int, int] = {}
        self._error: BaseException | None = None
        self._fault: _Fault | None = None  # of the fill that was refused
        self._page = 0  # its linear page
        self._step = False  # it asks for a step
        self._syscall = False
        self._stepping = False
        self._device: tuple[int, int] | None = None  # linear page and gpa of a device access that was counted
        self._windows: list[tuple[str, int, int]] = []
        self._last: tuple[int, int, int] | None = None
        self._repeated = 0
        self._flushes = 0
        self._flush_wanted = False
        self._cpuid: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self._hardware: dict[str, int] = {}
        layout()
        self._map()

    # ----------------------------------------------------------------------------------------------- physical space

    def _map(self) -> None:
        memory = self.vm.memory
        regions: list[tuple[int, int, int]] = []
        base = address_of(memory.bytes)
        if self.shadow:
            regions.append((memory.ram_hpa, memory.bytes.size, base))
            pool = memory.pool
            assert pool is not None
            regions.append((memory.pool_hpa, pool.nbytes, address_of(pool)))
        else:
            offset = 0
            for slot in memory.slots:
                regions.append((slot.gpa, int(slot.size), base + offset))
                offset += int(slot.size)
        for private in range(0xF0000000, 0x10000000, -0x1000000):
            if all(private + PRIVATE_SIZE <= start or private >= start + size for start, size, _ in regions):
                break
        else:
            raise ConfigError("memory: slots leave no 64 KiB below 4 GiB for the processor's own pages")
        self.p = Processor(private)
        engine = self.p.uc
        for start, size, pointer in regions:
            if start + size > 1 << 40:
                raise ConfigError(f"memory: Unicorn has 40 physical address bits, a slot ends at {start + size:#x}")
            engine.mem_map_ptr(start, size, uc.UC_PROT_ALL, pointer)
        for i in range(N_WINDOWS):
            engine.mmio_map(private + WINDOWS + (i << 12), 4096, self._window_read, i, self._window_write, i)
        engine.hook_add(uc.UC_HOOK_TLB_FILL, self._fill)
        engine.hook_add(uc.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        engine.hook_add(uc.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        engine.hook_add(uc.UC_HOOK_INSN, self._on_syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)

    def _host(self, gpa: int) -> int:
        """Where Unicorn has the frame of `gpa`."""
        if not self.shadow:
            return gpa & PAGE
        return self.vm.memory.ram_hpa + (self.vm.memory.frame(gpa >> 12) << 12)

    def _ram(self, gpa: int) -> int | None:
        """Index of `gpa` in RAM, or None."""
        try:
            return (self.vm.memory.frame(gpa >> 12) << 12) + (gpa & 0xFFF)
        except ConfigError:
            return None

    # ------------------------------------------------------------------------------------------ operations of the MMU

    def _op(self, op: int, addr: int = 0, value: int = 0, size: int = 1, user: bool = False, data: bool = False) -> Any:
        """One operation on the vcpu; its RunResult."""
        fields = (int(op), int(user), size, addr & WORD, value & WORD)
        tables = [] if self.recording is None else self._remember(op, addr, value)
        if self.recording is not None:
            self.recording._add(fields, data)
        self._op_array[0] = fields
        result = self.cpu.run(self._op_array, data=data)
        for table, index in tables:
            if self._frames is not None and self._frames[index >> 12]:
                assert self.recording is not None
                self.recording._followed(table)
        if self.vm.stats.tlb_flush != self._flushes:
            self._flushes = self.vm.stats.tlb_flush
            self._flush_wanted = True
        return result

    def _remember(self, op: int, addr: int, value: int) -> list[tuple[int, int]]:
        """Record what the operation reads of guest tables: (gpa, index in RAM) of those not followed so far."""
        assert self.recording is not None
        tables: dict[int, int] = {}
        size = 4 if self.cpu.mode == "32" else 8
        if op not in (Op.READ, Op.WRITE, Op.FETCH):
            root = (value if op == Op.CR3 else self.cpu.cr3) & 0x000F_FFFF_FFFF_FFE0
            found = [root & PAGE]
            start = self._ram(root)
            if start is not None:  # PAE: the tables that its four root entries lead to
                words = self.vm.memory.words[start >> 3 : (start >> 3) + 4].tolist()
                found += [word & 0x000F_FFFF_FFFF_F000 for word in words if word & 1]
            levels: list[tuple[int, int | None]] = [(gpa, None) for gpa in found]
        else:
            levels = [(gpa, entry) for _, gpa, entry in self.cpu.walk_levels(addr & WORD)]
        for gpa, entry in levels:
            index = self._ram(gpa & PAGE)
            if index is None:
                continue
            if self._frames is None or not self._frames[index >> 12]:
                self.recording._table(gpa & PAGE, self.vm.memory.words[index >> 3 : (index >> 3) + 512])
                tables[gpa & PAGE] = index
            elif entry is not None:
                self.recording._entry(gpa, size, entry)
        return list(tables.items())

    def _sync_ac(self) -> None:
        if self.cpu.cr4 & CR4_SMAP:
            on = bool(self.p.rflags & FLAG_AC)
            if on != self.cpu.ac:
                self._op(Op.AC, value=on)

    def _needs_emulation(self, va: int, user: bool) -> bool:
        """A store to `va` is one that the emulator has to make, or may have to."""
        if self._frames is None:
            return False
        try:
            found = self.cpu.translate(va, "w", user)
        except ShadowcoreError:
            return False
        index = self._ram(found.gpa)
        if index is None:
            return False
        # The second case: the store of a supervisor with CR0.WP clear, which the processor, with WP set, refuses.
        return bool(self._frames[index >> 12]) or (not found.writable and self.cpu.mode != "off")

    def _resolve(self, va: int, kind: int, user: bool) -> int | None:
        """Have an access handled that the processor could not make: the gpa, or None if it has to be stepped."""
        self._sync_ac()
        if kind == Op.WRITE and self._needs_emulation(va, user):
            return None
        result = self._op(kind, va, user=user)
        outcome = int(result.outcome[0])
        if outcome == 1:
            raise _Fault(PF, int(result.error_code[0]))
        if outcome == 2:
            raise _Fault(GP, 0)
        gpa = int(result.gpa[0])
        if outcome == 3:
            self._device = (va & PAGE, gpa & PAGE)
            return None
        if result.emulated[0]:
            raise EngineError(f"unicorn: a store at {va:#x} was emulated before its bytes were known")
        return gpa

    # -------------------------------------------------------------------------------------------------- way "fills"

    def _fill(self, _uc: Any, va: int, access: int, entry: Any, _data: Any) -> bool:
        try:
            return self._filled(va & PAGE, access, entry)
        except BaseException as error:  # carried out of emu_start by run()
            if self._error is None:
                self._error = error
            return False

    def _filled(self, page: int, access: int, entry: Any) -> bool:
        if self.p.entering:
            self.p.entering = False
            if page == self.p.private:
                entry.paddr, entry.perms = page, uc.UC_PROT_ALL
                return True
        if self._error is not None or self._fault is not None:
            return False
        kind = {16: Op.READ, 17: Op.WRITE}.get(access, Op.FETCH)
        user = self.p.cpl == 3
        if user and kind == Op.READ:
            gdt, limit = self.p.table("GDTR")
            user = not gdt & PAGE <= page <= gdt + limit  # descriptors are read as the supervisor does
        try:
            if self._stepping and self._device is not None and self._device[0] == page:
                gpa = None
            else:
                gpa = self._resolve(page, kind, user)
        except _Fault as fault:
            self._fault, self._page = fault, page
            return False
        if gpa is None:
            if not self._stepping:
                self._step, self._page = True, page
                return False
            entry.paddr = self._window(page, user)
            entry.perms = uc.UC_PROT_READ | uc.UC_PROT_WRITE
            return True
        entry.paddr = self._host(gpa)
        entry.perms = {Op.READ: uc.UC_PROT_READ, Op.WRITE: uc.UC_PROT_READ | uc.UC_PROT_WRITE}.get(
            kind, uc.UC_PROT_EXEC
        )
        return True

    # ----------------------------------------------------------- one instruction whose accesses we make: a step

    def _window(self, page: int, user: bool) -> int:
        if self._device is not None and self._device[0] == page:
            window = ("device", page, self._device[1])
        else:
            window = ("user" if user else "supervisor", page, self.cpu.translate(page, "w", user).gpa)
        if window not in self._windows:
            if len(self._windows) == N_WINDOWS:
                raise Unsupported(f"one instruction at {self.p.rip:#x} that stores to more than {N_WINDOWS} such pages")
            self._windows.append(window)
        return self.p.private + WINDOWS + (self._windows.index(window) << 12)

    def _window_read(self, _uc: Any, offset: int, size: int, number: int) -> int:
        try:
            kind, _, gpa = self._windows[number]
            if kind == "device":
                return self._device_read(gpa + offset, size)
            return int.from_bytes(self.vm.read_physical(gpa + offset, size), "little")
        except BaseException as error:
            self._error = self._error or error
            return 0

    def _window_write(self, _uc: Any, offset: int, size: int, value: int, number: int) -> None:
        try:
            kind, page, gpa = self._windows[number]
            if kind == "device":
                self._device_write(gpa + offset, size, value)
                return
            result = self._op(Op.WRITE, page + offset, value, size, kind == "user", data=True)
            if result.outcome[0]:
                raise EngineError(f"unicorn: a store at {page + offset:#x} that was possible is so no longer")
        except BaseException as error:
            self._error = self._error or error

    def _step_instruction(self) -> None:
        """Run one instruction with the fill hook, in which stores to guest tables and accesses to devices go through
        windows: pages of Unicorn's space that call us with offset, size and value."""
        self.exits["step"] += 1
        self._stepping, self._step, self._fault, self._windows = True, False, None, []
        self.p.set_virtual(True)
        traced = self.p.rflags & TF
        self.p.rflags |= TF
        try:
            reason = self._go()
        finally:
            self._stepping, self._device = False, None
            self.p.set_virtual(self.way == "fills")
            if not traced:
                self.p.rflags &= ~TF
        if reason == EXCEPTION + DB and not traced:
            return
        self._handle(reason)

    # ------------------------------------------------------------------------------------------------------ devices

    def _device_read(self, gpa: int, size: int) -> int:
        if gpa & PAGE == LOCAL_APIC:
            return {0x20: 0, 0x30: 0x50014}.get(gpa & 0xFFF, self._apic.get(gpa, 0)) & ((1 << 8 * size) - 1)
        if gpa & PAGE == IO_APIC:
            return 0
        if self.devices is not None:
            return int(self.devices(gpa, size, None)) & ((1 << 8 * size) - 1)
        return (1 << 8 * size) - 1

    def _device_write(self, gpa: int, size: int, value: int) -> None:
        if gpa & PAGE == LOCAL_APIC:
            self._apic[gpa] = value & ~(1 << 12) if gpa & 0xFFF == 0x300 else value
        elif gpa & PAGE != IO_APIC and self.devices is not None:
            self.devices(gpa, size, value)

    def _in(self, _uc: Any, port: int, size: int, _data: Any) -> int:
        self.exits["io"] += 1
        if port == FIRMWARE + 1:
            value, self._firmware = self._firmware[:1], self._firmware[1:]
            return value[0] if value else 0
        return 0x60 if port == SERIAL + 5 else (1 << 8 * size) - 1 if port != SERIAL else 0

    def _on_syscall(self, engine: Any, _data: Any) -> None:
        self._syscall = True  # Unicorn does nothing more, and goes on behind it
        engine.emu_stop()

    def _out(self, engine: Any, port: int, size: int, value: int, _data: Any) -> None:
        self.exits["io"] += 1
        if port == SERIAL:
            self.serial.append(value & 0xFF)
        elif port == FIRMWARE:
            ram = self.vm.memory.bytes.size
            items = {0: b"QEMU", 1: b"\1\0\0\0", 3: struct.pack("<Q", ram), 5: b"\1\0", 15: b"\1\0"}
            self._firmware = items.get(value & 0xFFFF, b"")
        elif port == EXIT_PORT:
            self.exit_code = value
            engine.emu_stop()

    # -------------------------------------------------------------------------------------------- registers, entries

    def start(self, rip: int, *, rax: int = 0, rbx: int = 0, rsp: int = 0) -> None:
        """Registers as a multiboot loader leaves them: protected mode, flat segments, paging and interrupts off."""
        self._op(Op.CR0, value=0x11)
        segments = {name: flat(0x10, FLAT_DATA) for name in ("es", "ss", "ds")} | {"cs": flat(8, FLAT_CODE)}
        self.p.set_virtual(self.way == "fills")
        self._load(segments, rip, rsp, 2, rax)
        self.p.set_gpr(3, rbx)

    def _wanted(self) -> dict[str, int]:
        """The registers that the processor has to run with."""
        cpu = self.cpu
        efer = cpu.efer
        cr0, cr3, cr4 = cpu.cr0, cpu.cr3, cpu.cr4 & ~(1 << 17)
        if self.shadow:
            roots = self.vm.mmu.roots(cpu.number)
            pool = self.vm.memory.pool_hpa
            cr0 |= CR0_PG | CR0_WP | CR0_PE
            cr4 = (cr4 & CR4_PASSED) | CR4_PAE
            efer |= EFER_NXE
            entries = [0 if page is None else pool + (page << 12) | 1 for page in roots]
            if len(entries) == 1 and entries[0]:
                cr3 = entries[0] & PAGE
            else:
                cr3 = self.p.private + PDPT
                self.p.put(PDPT, struct.pack("<4Q", *(entries * 4 if len(entries) == 1 else entries)))
        if not cpu.cr0 & CR0_PE:
            raise Unsupported(f"real mode (CR0.PE clear), RIP {self.p.rip:#x}")
        return {"cr0": cr0, "cr3": cr3, "cr4": cr4, "efer": efer}

    def _load(
        self, segments: dict[str, tuple[int, int, int, int]], rip: int, rsp: int, rflags: int, rax: int | None = None
    ) -> None:
        """Go on by VMRUN with these segments, at rip."""
        self._hardware = self._wanted()
        registers = {"rip": rip, "rsp": rsp, "rflags": rflags, "rax": self.p.gpr(0) if rax is None else rax}
        self.p.enter(segments, self._hardware | registers, self.p.table("GDTR"), self.p.table("IDTR"))
        self._flush_wanted = False

    def _sync(self) -> None:
        """Give the processor what the MMU wants it to run with now."""
        if self.p.entering and self.p.rip == self.p.private:
            return
        wanted, had = self._wanted(), self._hardware
        if wanted != had:
            changed = (wanted["cr0"] ^ had["cr0"]) & CR0_PG or (wanted["cr4"] ^ had["cr4"]) & (CR4_PAE | 1 << 12)
            if changed or (wanted["efer"] ^ had["efer"]) & (EFER_LMA | EFER_LME):
                self._load(self.p.segments(), self.p.rip, self.p.gpr(4), self.p.rflags)
                return
            write = self.p.uc.reg_write
            if wanted["efer"] != had["efer"]:
                self.p.set_efer(wanted["efer"])
            for name, register in (
                ("cr0", x86.UC_X86_REG_CR0),
                ("cr4", x86.UC_X86_REG_CR4),
                ("cr3", x86.UC_X86_REG_CR3),
            ):
                if wanted[name] != had[name]:
                    write(register, wanted[name])
            self._hardware = wanted
            self._flush_wanted = True
        if self._flush_wanted:
            self.p.flush()
            self._flush_wanted = False

    # -------------------------------------------------------------------------------------------- exceptions, frames

    def _push(self, rsp: int, value: int, size: int) -> int:
        rsp = (rsp - size) & (WORD if size == 8 else 0xFFFFFFFF)
        result = self._op(Op.WRITE, rsp, value, size, data=True)
        if result.outcome[0]:
            self._own_fault(result)
        return rsp

    def _own_fault(self, result: Any) -> None:
        outcome = int(result.outcome[0])
        if outcome == 1:
            raise _Fault(PF, int(result.error_code[0]))
        if outcome == 2:
            raise _Fault(GP)
        raise Unsupported(f"a frame or a descriptor table in a device (RIP {self.p.rip:#x})")

    def _own_read(self, va: int, size: int) -> int:
        result = self._op(Op.READ, va, size=size, data=True)
        if result.outcome[0]:
            self._own_fault(result)
        return int(result.value[0])

    def deliver(self, vector: int, code: int = 0, rip: int | None = None, software: bool = False) -> None:
        """Take an exception through the guest's IDT. TripleFault if that fails twice."""
        self.exits[f"vector {vector}"] += 1
        if rip is None:
            rip = self.p.rip
        story = []
        for _ in range(3):
            story.append(
                f"vector {vector}, error code {code:#x}" + (f", CR2 {self.cpu.cr2:#x}" if vector == PF else "")
            )
            try:
                if len(story) == 3:
                    break
                self._frame(vector, code, rip, software)
                return
            except _Fault as second:
                first, software = vector, False
                if first == DF:
                    break
                both = first in CONTRIBUTORY and second.vector in CONTRIBUTORY
                if both or (first == PF and (second.vector in CONTRIBUTORY or second.vector == PF)):
                    vector, code = DF, 0
                else:
                    vector, code = second.vector, second.code
        raise TripleFault(f"triple fault at RIP {rip:#x}: " + "; then ".join(story))

    def _frame(self, vector: int, code: int, rip: int, software: bool) -> None:
        long = bool(self.cpu.efer & EFER_LMA)
        width = 8 if long else 4
        base, limit = self.p.table("IDTR")
        at = vector * 2 * width
        where = vector * 8 + 2 + (not software)
        if at + 2 * width - 1 > limit:
            raise _Fault(GP, where)
        gate = self._own_read(base + at, 8)
        kind, dpl, present = gate >> 40 & 0xF, gate >> 45 & 3, gate >> 47 & 1
        segments = self.p.segments()
        cpl = segments["ss"][1] >> 5 & 3
        if kind not in (14, 15):
            raise _Fault(GP, where)
        if software and dpl < cpl:
            raise _Fault(GP, where)
        if not present:
            raise _Fault(NP, where)
        target = (gate & 0xFFFF) | (gate >> 48) << 16
        if long:
            target |= (self._own_read(base + at + 8, 8) & 0xFFFFFFFF) << 32
        selector = gate >> 16 & 0xFFFC
        cs = self._descriptor(selector, segments["cs"])
        new_cpl = cs[1] >> 5 & 3 if not cs[1] & 4 else cpl  # a conforming segment keeps the privilege level
        stack = gate >> 32 & 7 if long else 0
        rsp, ss = self.p.gpr(4), segments["ss"]
        if new_cpl < cpl or stack:
            task, _ = self.p.table("TR")
            if long:
                rsp = self._own_read(task + (0x1C + 8 * stack if stack else 4 + 8 * new_cpl), 8)
            else:
                rsp = self._own_read(task + 4 + 8 * new_cpl, 4)
        if new_cpl < cpl:
            if long:
                ss = (new_cpl, FLAT_DATA & ~0x60 | new_cpl << 5, 0xFFFFFFFF, 0)
            else:
                ss = self._descriptor(self._own_read(task + 8 + 8 * new_cpl, 2), segments["ss"])
        rflags = self.p.rflags
        old_rsp = self.p.gpr(4)
        if long:
            rsp &= ~15
        frame = [rflags | (FLAG_RF if not software and vector != DB else 0), segments["cs"][0], rip]
        if long or new_cpl < cpl:
            frame = [segments["ss"][0], old_rsp, *frame]
        if not software and vector in ERROR_CODES:
            frame.append(code)
        for value in frame:
            rsp = self._push(rsp, value, width)
        keep = rflags & ~(TF | FLAG_NT | FLAG_RF | 1 << 17 | (FLAG_IF if kind == 14 else 0))
        cs = ((selector & ~3) | new_cpl, *cs[1:])
        if new_cpl != cpl or cs != segments["cs"]:
            self._load(segments | {"cs": cs, "ss": ss}, target, rsp, keep)
        else:
            self.p.set_gpr(4, rsp)
            self.p.rflags = keep
            self.p.rip = target

    def _descriptor(self, selector: int, current: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Segment `selector` of the GDT, as cached."""
        if not selector & ~3:
            raise _Fault(GP, 0)
        if selector & ~3 == current[0] & ~3:
            return current
        base, limit = self.p.table("GDTR")
        if selector & 4 or (selector | 7) > limit:
            raise _Fault(GP, selector & ~3)
        raw = self._own_read(base + (selector & ~7), 8)
        size = (raw & 0xFFFF) | (raw >> 32 & 0xF0000)
        if raw >> 55 & 1:
            size = size << 12 | 0xFFF
        attributes = (raw >> 40 & 0xFF) | (raw >> 44 & 0xF00)
        if not attributes & 0x80:
            raise _Fault(NP, selector & ~3)
        return selector, attributes | 1, size, (raw >> 16 & 0xFFFFFF) | (raw >> 32 & 0xFF000000)

    # -------------------------------------------------------------------------------------------- the loop, the exits

    def _go(self) -> int | None:
        """Run to the next exit. None: something that self says."""
        try:
            reason = self.p.run()
        except uc.UcError as error:
            reason = None
            if self._error is None and self._fault is None and not self._step:
                if error.errno == uc.UC_ERR_FETCH_UNMAPPED:
                    raise Unsupported(f"code in a device, RIP {self.p.rip:#x}") from error
                if error.errno in (uc.UC_ERR_READ_UNMAPPED, uc.UC_ERR_WRITE_UNMAPPED) and not self._stepping:
                    self._step = True  # native: Unicorn's walker came to an address without memory, a device
                    return None
                raise EngineError(f"unicorn: {error}, RIP {self.p.rip:#x}") from error
        if self._error is not None:
            error_, self._error = self._error, None
            raise error_
        return reason

    def run(self, seconds: float | None = None) -> int | None:
        """Run until the guest writes to port 0xf4 (the value is returned), halts for good, or `seconds` are over.

        None in the last two cases; `.halted` tells which. TripleFault, Unsupported, and what a device raises.
        """
        over = threading.Event()

        def stop() -> None:
            over.set()
            self.p.uc.emu_stop()

        timer = None if seconds is None else threading.Timer(seconds, stop)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            while self.exit_code is None and not self.halted and not over.is_set():
                self._sync()
                self._handle(self._go())
        finally:
            if timer is not None:
                timer.cancel()
        return self.exit_code

    def _handle(self, reason: int | None) -> None:
        if reason is None:
            fault, self._fault = self._fault, None
            if fault is not None:
                if fault.vector == PF:
                    self.cpu.cr2 = self._exact_address(self._page)
                self.deliver(fault.vector, fault.code)
            elif self._step:
                self._step_instruction()
            elif self._syscall:
                self._syscall = False
                self._enter_syscall()
            return
        rip = self.p.rip
        if reason == EXCEPTION + PF:
            self._page_fault(rip)
        elif EXCEPTION <= reason < EXCEPTION + 32:
            vector = reason - EXCEPTION
            self.deliver(vector, self.p.error_code if vector in ERROR_CODES else 0)
        elif READ_CR <= reason < READ_CR + 16 or WRITE_CR <= reason < WRITE_CR + 16:
            self._privileged(self._control_register, rip)
        elif reason == INVLPG:
            self._privileged(self._invlpg, rip)
        elif reason == MSR:
            self._privileged(self._efer, rip)
        elif reason == CPUID:
            self._emulate_cpuid(rip)
        elif reason == SOFTWARE_INTERRUPT:
            text = self._text(rip, 2)
            self.deliver(*((3, 0, rip + 1, True) if text[0] == 0xCC else (text[1], 0, rip + 2, True)))
        elif reason == HLT:
            self.exits["hlt"] += 1
            self.halted = True
        elif reason in SVM_INSTRUCTIONS:
            self.deliver(UD)
        elif reason == SHUTDOWN:
            raise TripleFault(f"shutdown at RIP {rip:#x}")
        else:
            raise Unsupported(f"exit {reason:#x} at RIP {rip:#x}")

    def _enter_syscall(self) -> None:
        """SYSCALL, of which Unicorn leaves all to its host; RIP is behind it."""
        self.exits["syscall"] += 1
        rip, rflags, segments = self.p.rip, self.p.rflags & ~TF, self.p.segments()
        if not self.cpu.efer & 1 or not self.cpu.efer & EFER_LMA:
            self.deliver(UD, 0, rip - 2)
            return
        star, target, compat, mask = (
            int(self.p.uc.reg_read(x86.UC_X86_REG_MSR, number)) for number in range(0xC0000081, 0xC0000085)
        )
        selector = star >> 32 & 0xFFFC
        code, data = (selector, 0xA9B, 0xFFFFFFFF, 0), (selector + 8, FLAT_DATA, 0xFFFFFFFF, 0)
        self.p.set_gpr(1, rip)
        self.p.set_gpr(11, rflags & ~FLAG_RF)
        rip = target if segments["cs"][1] & 0x200 else compat
        self._load(segments | {"cs": code, "ss": data}, rip, self.p.gpr(4), rflags & ~(mask | FLAG_RF) | 2)

    def _privileged(self, action: Any, rip: int) -> None:
        try:
            self.p.rip = rip + action(rip)
        except _Fault as fault:
            self.deliver(fault.vector, fault.code, rip)

    def _page_fault(self, rip: int) -> None:
        """Way "walker": Unicorn's walk failed."""
        va, code = self.p.fault_address, self.p.error_code
        kind = Op.WRITE if code & 2 else Op.FETCH if code & 16 or self._is_fetch(va, rip, code) else Op.READ
        self.exits["page fault"] += 1
        try:
            stepped = self._resolve(va, kind, bool(code & 4)) is None
        except _Fault as fault:
            if fault.vector == PF:
                self.cpu.cr2 = va
            self.deliver(fault.vector, fault.code)
            return
        if stepped:
            self._last = None
            self._step_instruction()
            return
        same = (rip, va, code)
        self._repeated = self._repeated + 1 if same == self._last else 0
        self._last = same
        if self._repeated >= SAME_FAULT:
            raise EngineError(
                f"unicorn: its walker refuses what the MMU allows: {va:#x}, error code {code:#x}, RIP {rip:#x}"
            )

    def _is_fetch(self, va: int, rip: int, code: int) -> bool:
        """Without EFER.NXE and SMEP the error code does not tell fetches from loads."""
        if self.shadow or code & 2 or self.cpu.efer & EFER_NXE or self.cpu.cr4 >> 20 & 1:
            return False
        return va == rip or (not va & 0xFFF and rip < va < rip + 15)

    def _exact_address(self, page: int) -> int:
        """Way "fills": the hook is told the page alone. Unicorn's walker, on the same tables, refuses the same
        access and has all of the address."""
        self._sync()
        self.p.set_virtual(False)
        try:
            reason = self._go()
        finally:
            self.p.set_virtual(self.way == "fills")
        va = self.p.fault_address
        return va if reason == EXCEPTION + PF and va & PAGE == page else page

    # --------------------------------------------------------------------------- instructions that the hypervisor does

    def _text(self, rip: int, size: int = 15) -> bytes:
        """Bytes of the instruction at rip, as many as are there."""
        out = b""
        while size:
            try:
                gpa = self.cpu.translate(rip, "x").gpa
                part = min(size, 4096 - (gpa & 0xFFF))
                out += self.vm.read_physical(gpa, part)
            except ShadowcoreError:
                break
            rip, size = rip + part, size - part
        return out

    def _decode(self, rip: int) -> tuple[bytes, int, int, int, bool]:
        """The instruction: its bytes, offset of the opcode after 0F, REX, segment prefix, is it 64-bit code."""
        text = self._text(rip)
        long = bool(self.p.segments()["cs"][1] & 0x200)
        at, rex, segment = 0, 0, 0
        while text[at] in b"\x66\x67\xf0\xf2\xf3\x2e\x36\x3e\x26\x64\x65":
            segment = text[at] if text[at] in b"\x64\x65" else segment
            at += 1
        if long and text[at] & 0xF0 == 0x40:
            rex = text[at]
            at += 1
        return text, at + 1, rex, segment, long

    def _control_register(self, rip: int) -> int:
        text, at, rex, _, long = self._decode(rip)
        opcode = text[at]
        cpu = self.cpu
        self.exits["control register"] += 1
        if opcode == 0x06:  # CLTS
            self._write_cr(0, cpu.cr0 & ~8)
            return at + 1
        modrm = text[at + 1]
        if opcode == 0x01:  # SMSW, LMSW
            if modrm >> 6 != 3:
                raise Unsupported(f"SMSW or LMSW with memory, RIP {rip:#x}")
            number = (modrm & 7) | (rex & 1) << 3
            if modrm >> 3 & 7 == 4:
                self.p.set_gpr(number, cpu.cr0)
            else:
                self._write_cr(0, (cpu.cr0 & ~0xE) | (self.p.gpr(number) & 0xF) | (cpu.cr0 & 1))
            return at + 2
        register = (modrm >> 3 & 7) | (rex & 4) << 1
        number = (modrm & 7) | (rex & 1) << 3
        if opcode == 0x22:
            value = self.p.gpr(number)
            self._write_cr(register, value if long else value & 0xFFFFFFFF)
        else:
            values = {0: cpu.cr0, 2: cpu.cr2, 3: cpu.cr3, 4: cpu.cr4, 8: 0}
            if register not in values:
                raise _Fault(UD)
            self.p.set_gpr(number, values[register])
        return at + 2

    def _write_cr(self, register: int, value: int) -> None:
        if register == 2:
            self.cpu.cr2 = value
        elif register in (0, 3, 4):
            op = {0: Op.CR0, 3: Op.CR3, 4: Op.CR4}[register]
            if self._op(op, value=value).outcome[0]:
                raise _Fault(GP)
            self._flush_wanted = True
        elif register != 8:
            raise _Fault(UD)

    def _efer(self, rip: int) -> int:
        text, at, _, _, _ = self._decode(rip)
        self.exits["msr"] += 1
        if text[at] == 0x30:
            value = (self.p.gpr(0) & 0xFFFFFFFF) | (self.p.gpr(2) & 0xFFFFFFFF) << 32
            if self._op(Op.EFER, value=value).outcome[0]:
                raise _Fault(GP)
            self._flush_wanted = True
        else:
            self.p.set_gpr(0, self.cpu.efer & 0xFFFFFFFF)
            self.p.set_gpr(2, self.cpu.efer >> 32)
        return at + 1

    def _invlpg(self, rip: int) -> int:
        text, at, rex, segment, long = self._decode(rip)
        self.exits["invlpg"] += 1
        address, length = self._effective(rip, text, at + 1, rex, segment, long)
        self._op(Op.INVLPG, address)
        self._flush_wanted = True
        return length

    def _effective(self, rip: int, text: bytes, at: int, rex: int, segment: int, long: bool) -> tuple[int, int]:
        """Linear address of the memory operand whose ModRM byte is at `at`, and where the instruction ends."""
        mod, rm = text[at] >> 6, text[at] & 7
        at += 1
        address, base = 0, rm | (rex & 1) << 3
        if 0x67 in text[: at - 3] and not long:
            raise Unsupported(f"INVLPG with a 16-bit address, RIP {rip:#x}")
        relative = False
        if rm == 4:
            sib = text[at]
            at += 1
            index, base = (sib >> 3 & 7) | (rex & 2) << 2, (sib & 7) | (rex & 1) << 3
            if index != 4:
                address = self.p.gpr(index) << (sib >> 6)
            if sib & 7 == 5 and mod == 0:
                mod, base = 4, -1
        elif rm == 5 and mod == 0:
            mod, base, relative = 4, -1, long
        if base >= 0:
            address += self.p.gpr(base)
        if mod == 1:
            address += struct.unpack_from("<b", text, at)[0]
            at += 1
        elif mod in (2, 4):
            address += struct.unpack_from("<i", text, at)[0]
            at += 4
        if relative:
            address += rip + at
        if segment:
            address += int(self.p.uc.reg_read(x86.UC_X86_REG_FS_BASE if segment == 0x64 else x86.UC_X86_REG_GS_BASE))
        return address & (WORD if long else 0xFFFFFFFF), at

    def _emulate_cpuid(self, rip: int) -> None:
        self.exits["cpuid"] += 1
        leaf, sub = self.p.gpr(0) & 0xFFFFFFFF, self.p.gpr(1) & 0xFFFFFFFF
        eax, ebx, ecx, edx = self._cpuid_of(leaf, sub)
        features = self.vm.features
        if leaf == 1:
            ecx &= ~(1 << 17 | 1 << 21 | 1 << 3)  # PCID, x2APIC, MONITOR
        elif leaf == 7 and sub == 0:
            ebx &= ~((not features.smep) << 7 | (not features.smap) << 20)
            ecx = (ecx & ~(1 << 3)) | features.la57 << 16
        elif leaf == 0x80000001:
            ecx &= ~(1 << 2)  # SVM
            edx &= ~((not features.nx) << 20 | (not features.gbpages) << 26)
        for number, value in ((0, eax), (3, ebx), (1, ecx), (2, edx)):
            self.p.set_gpr(number, value)
        self.p.rip = rip + 2

    def _cpuid_of(self, leaf: int, sub: int) -> tuple[int, int, int, int]:
        key = (leaf, sub)
        if key not in self._cpuid:
            other = uc.Uc(uc.UC_ARCH_X86, uc.UC_MODE_64)
            other.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
            other.mem_map(0x1000, 0x1000)
            other.mem_write(0x1000, b"\x0f\xa2")
            other.reg_write(x86.UC_X86_REG_RAX, leaf)
            other.reg_write(x86.UC_X86_REG_RCX, sub)
            other.emu_start(0x1000, 0x1002)
            names = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)
            a, b, c, d = (int(other.reg_read(name)) & 0xFFFFFFFF for name in names)
            self._cpuid[key] = (a, b, c, d)
        return self._cpuid[key]


def load_multiboot(vm: VM, image: bytes, command_line: str = "") -> tuple[int, int]:
    """Put the segments of a multiboot (version 1) ELF into memory; its entry point and the gpa of the information.

    ConfigError for what is no such file, or does not fit.
    """
    at = image[:8192].find(struct.pack("<I", 0x1BADB002))
    if image[:4] != b"\x7fELF" or at < 0 or at % 4:
        raise ConfigError(
            "boot: a multiboot ELF is needed: the magic number is not there, on 4 bytes, in the first 8 KiB"
        )
    wide = image[4] == 2
    try:
        entry, table = struct.unpack_from("<QQ" if wide else "<II", image, 24)
        size, count = struct.unpack_from("<HH", image, 54 if wide else 42)
        end = 0
        for i in range(count):
            head = table + i * size
            if wide:
                kind, _, offset, _, target, filled, total = struct.unpack_from("<IIQQQQQ", image, head)
            else:
                kind, offset, _, target, filled, total = struct.unpack_from("<IIIIII", image, head)
            if kind != 1 or not total:
                continue
            if offset + filled > len(image) or filled > total:
                raise ConfigError(f"boot: program header {i} leads beyond the file")
            vm.write_physical(target, image[offset : offset + filled])
            vm.write_physical(target + filled, bytes(total - filled))
            end = max(end, target + total)
    except struct.error as error:
        raise ConfigError(f"boot: the file is too short: {error}") from None
    if not end:
        raise ConfigError("boot: the file has no segment to load")
    slot = vm.memory.slots[0]
    if slot.gpa or int(slot.size) < 0x100000:
        raise ConfigError("boot: the first memory slot must hold the first MiB")
    # Below the image: information, command line, memory map.
    info, line, names = 0x9000, 0x9800, 0x9400
    vm.write_physical(line, command_line.encode() + b"\0")
    entries = b"".join(struct.pack("<IQQI", 20, s.gpa, int(s.size), 1) for s in vm.memory.slots)
    vm.write_physical(names, entries)
    upper = (int(slot.size) >> 10) - 1024
    fields = (
        struct.pack("<IIIII", 1 | 4 | 64, 640, upper, 0, line) + bytes(24) + struct.pack("<II", len(entries), names)
    )
    vm.write_physical(info, fields)
    return int(entry), info


def boot(
    path: str | os.PathLike[str],
    *,
    mmu: str | Native | Shadow = "cached",
    way: str = "walker",
    memory: int | str = "64MiB",
    command_line: str = "",
    features: Features | None = None,
    record: bool = False,
    vm: VM | None = None,
) -> Machine:
    """A Machine at the entry point of a multiboot ELF file; `run()` starts it.

    Serial port 0x3f8 is captured (`.serial`), a byte to port 0xf4 ends the run (`.exit_code`), the page of the local
    APIC answers. features: default: what Unicorn's processor has as well (no PKU, no PCID).
    vm: a fresh one to use instead.
    """
    if vm is None:
        vm = VM(memory, mmu, features=features or Features(maxphyaddr=40, pku=False, pcid=False))
    with open(path, "rb") as file:
        image = file.read()
    entry, info = load_multiboot(vm, image, command_line)
    machine = Machine(vm, way, record=record)
    machine.start(entry, rax=0x2BADB002, rbx=info)
    return machine
