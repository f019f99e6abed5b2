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
from typing import Any

from ..config import Design, Features, Op
from ..engine.machine import VM
from ..errors import EngineError
from ..files import check_path
from .boot import load_multiboot
from .cpu import (
    CPUID,
    EXCEPTION,
    HLT,
    INVLPG,
    MSR,
    N_WINDOWS,
    READ_CR,
    SHUTDOWN,
    SOFTWARE_INTERRUPT,
    SVM_INSTRUCTIONS,
    TF,
    WINDOWS,
    WRITE_CR,
    uc,
    x86,
)
from .fills import Fills
from .guest import (
    CR4_SMAP,
    DB,
    EFER_NXE,
    ERROR_CODES,
    EXIT_PORT,
    FIRMWARE,
    IO_APIC,
    LOCAL_APIC,
    PAGE,
    PF,
    SAME_FAULT,
    SERIAL,
    UD,
    WAYS,
    Fault,
    TripleFault,
    Unsupported,
)
from .instructions import FAR_CALL, FAR_RETURN, Instructions
from .recording import Recording

__all__ = ["WAYS", "Machine", "Recording", "TripleFault", "Unsupported", "boot", "load_multiboot"]


class Machine(Instructions):
    """A guest in Unicorn on `vm` (its vcpu 0), entered in 32-bit protected mode with paging off, see `start`.

    way: "walker" or "fills". record: keep the operations that reach the MMU, in `.recording`.
    serial: what was written to port 0x3f8. exit_code: what was written to port 0xf4, once that happened.
    exits: exits by name. devices: (gpa, size, value or None) is called for addresses in no memory slot that are not an
    APIC: value None asks for a read, whose result it returns. ConfigError for memory that leaves no room for the page
    tables of the host itself, and for processors that Unicorn has not.
    """

    def __init__(self, vm: VM, way: str = "walker", *, record: bool = False, devices: Any = None) -> None:
        super().__init__(vm, way, record=record)
        self._step = False  # it asks for a step
        self._syscall = False
        self._page = 0  # its linear page
        self._windows: list[tuple[str, int, int]] = []
        self._mended: Counter[tuple[int, int]] = Counter()  # faults that were mended at ...
        self._at = -1  # ... this RIP, with no other exit between
        self._apic: dict[int, int] = {}
        self._line = 3  # line control register of the serial port
        self._firmware = b""  # what is left of the item of the firmware configuration that was chosen
        self.devices = devices
        self._fault: Fault | None = None  # of the fill that was refused
        self._stepping = False
        self._error: BaseException | None = None
        self.serial = bytearray()
        self.exit_code: int | None = None
        self.halted = False
        engine, private = self.p.uc, self.p.private
        for i in range(N_WINDOWS):
            engine.mmio_map(private + WINDOWS + (i << 12), 4096, self._window_read, i, self._window_write, i)
        tables = (x86.UC_X86_REG_GDTR, x86.UC_X86_REG_LDTR, x86.UC_X86_REG_TR)
        registers = (x86.UC_X86_REG_CS, x86.UC_X86_REG_EFLAGS, *tables)
        self._fills = Fills(self.cpu, self.p.reader or 0, registers, self._fill, self._is_alone, self._flush)
        if not self.p.reader or not self.p.hook_fills(self._fills.function, self._fills.data):
            engine.hook_add(uc.UC_HOOK_TLB_FILL, self._fill_entry)
        engine.hook_add(uc.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        engine.hook_add(uc.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        engine.hook_add(uc.UC_HOOK_INSN, self._on_syscall, None, 1, 0, x86.UC_X86_INS_SYSCALL)

    # -------------------------------------------------------------------------------------------------- way "fills"

    def _is_alone(self) -> bool:
        """Misses may be served by accesses alone."""
        busy = self.p.entering or self._stepping or self._step or self._fault is not None or self._error is not None
        return not busy and self.recording is None

    def _flush(self) -> None:
        """The MMU asked for a flush during a fill. The next exit would be late: before it the guest may store to what
        has just become a shadowed table."""
        self._flushes = self._flushed()
        self._flush_wanted = False
        self.p.flush()

    def _fill_entry(self, _uc: Any, va: int, access: int, entry: Any, _data: Any) -> bool:
        found = self._fill(va, access)
        if found is None:
            return False
        entry.paddr, entry.perms = found
        return True

    def _fill(self, va: int, access: int) -> tuple[int, int] | None:
        try:
            return self._filled(va & PAGE, access)
        except BaseException as error:  # carried out of emu_start by run()
            if self._error is None:
                self._error = error
            return None

    def _filled(self, page: int, access: int) -> tuple[int, int] | None:
        """What Unicorn's TLB gets for a miss: address in its physical space, and rights."""
        if self.p.entering:
            self.p.entering = False
            if page == self.p.private:
                return page, int(uc.UC_PROT_ALL)
        if self._error is not None or self._fault is not None:
            return None
        kind = {16: Op.READ, 17: Op.WRITE}.get(access, Op.FETCH)
        user = self._is_user(page, kind)
        try:
            if self._stepping and self._device is not None and self._device[0] == page:
                gpa = None
            else:
                gpa = self._resolve(page, kind, user)
        except Fault as fault:
            self._fault, self._page = fault, page
            return None
        if self._flush_wanted:
            self._flush()
        if gpa is None:
            if not self._stepping:
                self._step, self._page = True, page
                return None
            return self._window(page, user), uc.UC_PROT_READ | uc.UC_PROT_WRITE
        rights = {Op.READ: uc.UC_PROT_READ, Op.WRITE: uc.UC_PROT_READ | uc.UC_PROT_WRITE}
        return self._host(gpa), int(rights.get(kind, uc.UC_PROT_EXEC))

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
            if kind != "user":
                self._set_ac(self.p.cpl != 3)
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
        if port == SERIAL + 3:
            return self._line
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
            if not self._line & 0x80:  # else it is the divisor
                self.serial.append(value & 0xFF)
        elif port == SERIAL + 3:
            self._line = value & 0xFF
        elif port == FIRMWARE:
            ram = self.vm.memory.bytes.size
            items = {0: b"QEMU", 1: b"\1\0\0\0", 3: struct.pack("<Q", ram), 5: b"\1\0", 15: b"\1\0"}
            self._firmware = items.get(value & 0xFFFF, b"")
        elif port == EXIT_PORT:
            self.exit_code = value
            engine.emu_stop()

    # -------------------------------------------------------------------------------------------- the loop, the exits

    def _go(self) -> int | None:
        """Run to the next exit. None: something that self says."""
        self._fills.begin()
        try:
            reason = self.p.run()
        except uc.UcError as error:
            reason = None
            quiet = self._error is None and self._fills.error is None and self._fault is None
            if quiet and not self._step:
                if error.errno == uc.UC_ERR_FETCH_UNMAPPED:
                    raise Unsupported(f"code in a device, RIP {self.p.rip:#x}") from error
                devices = (uc.UC_ERR_READ_UNMAPPED, uc.UC_ERR_WRITE_UNMAPPED, uc.UC_ERR_WRITE_PROT)
                if error.errno in devices and not self._stepping:
                    self._step = True  # native: Unicorn's walker came to an address without memory, a device
                    return None
                raise EngineError(f"unicorn: {error}, RIP {self.p.rip:#x}") from error
        raised = self._error or self._fills.error
        self._error = self._fills.error = None
        if raised is not None:
            raise raised
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
                reason = self._go()
                if self.exit_code is None:  # else an exit of what came behind the OUT, in the same block of code
                    self._handle(reason)
        finally:
            if timer is not None:
                timer.cancel()
            if not self.p.pending:  # the vcpu is what its caller looks at now
                self.cpu.cpl = 3 if self.p.cpl == 3 else 0
                self._set_ac(explicit=True)
        return self.exit_code

    def _handle(self, reason: int | None) -> None:
        if reason is None:
            fault, self._fault = self._fault, None
            if fault is not None:
                if fault.vector == PF:
                    self.cpu.cr2 = self._exact_address(self._page, fault.code)
                self.deliver(fault.vector, fault.code)
            elif self._step:
                self._step_instruction()
            elif self._syscall:
                self._syscall = False
                self._enter_syscall()
            return
        rip = self.p.rip
        if reason != EXCEPTION + PF:
            self._at = -1
        if reason == EXCEPTION + PF:
            self._page_fault(rip)
        elif EXCEPTION <= reason < EXCEPTION + 32:
            vector = reason - EXCEPTION
            if vector == UD and self._is_invpcid(rip):
                self._privileged(self._invpcid, rip)
                return
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

    def _page_fault(self, rip: int) -> None:
        """Way "walker": Unicorn's walk failed."""
        va, code = self.p.fault_address, self.p.error_code
        kind = Op.WRITE if code & 2 else Op.FETCH if code & 16 or self._is_fetch(va, rip, code) else Op.READ
        self.exits["page fault"] += 1
        # Unicorn's far returns and calls use the user's stack as the supervisor: SMAP refuses for good what is allowed.
        user = bool(code & 4) or self._is_user(va & PAGE, kind)
        refused = user and not code & 4 and self.cpu.cr4 & CR4_SMAP
        try:
            stepped = self._resolve(va, kind, user) is None or refused
        except Fault as fault:
            if fault.vector == PF:
                self.cpu.cr2 = va
            self.deliver(fault.vector, fault.code)
            return
        if stepped:
            self._mended.clear()
            self._step_instruction()
            return
        if rip != self._at:
            self._at = rip
            self._mended.clear()
        self._mended[va, code] += 1
        if self._mended[va, code] >= SAME_FAULT:
            raise EngineError(
                f"unicorn: an instruction does not complete, RIP {rip:#x}: {va:#x} faults again and again (error code "
                f"{code:#x}): a pool that cannot hold all that it needs, or a walker that refuses what the MMU allows"
            )

    def _is_fetch(self, va: int, rip: int, code: int) -> bool:
        """Without EFER.NXE and SMEP the error code does not tell fetches from loads."""
        if self.shadow or code & 2 or self.cpu.efer & EFER_NXE or self.cpu.cr4 >> 20 & 1:
            return False
        return va == rip or (not va & 0xFFF and rip < va < rip + 15)

    def _exact_address(self, page: int, refused: int) -> int:
        """Way "fills": the hook is told the page alone. Unicorn's walker, on the same tables, refuses the same
        access and has all of the address. But for the user's stack in far returns and calls, which is where RSP is."""
        if refused & 4 and not refused & 16 and self._far() in (FAR_RETURN, FAR_CALL):
            return self._stack() if self._stack() & PAGE == page else page
        for _ in range(8):
            self._sync()
            self.p.set_virtual(False)
            try:
                reason = self._go()
            finally:
                self.p.set_virtual(self.way == "fills")
            va, code = self.p.fault_address, self.p.error_code
            if reason != EXCEPTION + PF:
                break
            if va & PAGE == page:
                return va
            # Another page of the instruction, whose shadow was recycled meanwhile.
            kind = Op.WRITE if code & 2 else Op.FETCH if code & 16 else Op.READ
            try:
                if self._resolve(va, kind, bool(code & 4) or self._is_user(va & PAGE, kind)) is None:
                    break
            except Fault:
                break
        return page


def boot(
    path: str | os.PathLike[str],
    *,
    mmu: str | Design = "cached",
    way: str = "walker",
    memory: int | str = "64MiB",
    command_line: str = "",
    features: Features | None = None,
    record: bool = False,
    vm: VM | None = None,
) -> Machine:
    """A Machine at the entry point of a multiboot ELF file; `run()` starts it.

    Serial port 0x3f8 is captured (`.serial`), a byte to port 0xf4 ends the run (`.exit_code`), the page of the local
    APIC answers. features: default: what Unicorn's processor has as well (no PKU, PCID, INVPCID; the last can be had).
    vm: a fresh one to use instead.
    """
    if vm is None:
        vm = VM(memory, mmu, features=features or Features(maxphyaddr=40, pku=False, pcid=False, invpcid=False))
    with open(check_path(path), "rb") as file:
        image = file.read()
    entry, info = load_multiboot(vm, image, command_line)
    machine = Machine(vm, way, record=record)
    machine.start(entry, rax=0x2BADB002, rbx=info)
    return machine
