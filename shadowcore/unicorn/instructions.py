"""Instructions that the hypervisor does for a guest in Unicorn."""

from __future__ import annotations

import struct
from typing import Any

from ..config import Op
from ..errors import GuestFault, ShadowcoreError
from .cpu import FLAT_DATA, TF, uc, x86
from .exceptions import Exceptions
from .guest import EFER_LMA, FLAG_RF, GP, PAGE, UD, WORD, Fault, Unsupported

# What an instruction that Unicorn runs does besides the accesses that code makes.
NOTHING, DESCRIPTORS, FAR_RETURN, FAR_CALL = range(4)
_PREFIXES = b"\x66\x67\xf0\xf2\xf3\x2e\x36\x3e\x26\x64\x65"
_ONE_BYTE = {0x07, 0x17, 0x1F, 0x8E, 0xEA}  # POP ES, SS, DS; MOV to a segment register; far JMP
_TWO_BYTES = {0x00, 0x02, 0x03, 0xA1, 0xA9, 0xB2, 0xB4, 0xB5}  # LLDT, LTR, VERR, VERW; LAR; LSL; POP FS, GS; LSS ...


def _far(text: bytes, at: int, long: bool) -> int:
    """Which of these the instruction is whose opcode is at `at`."""
    opcode, modrm = text[at], text[at + 1]
    if opcode == 0x0F:
        return DESCRIPTORS if modrm in _TWO_BYTES else NOTHING
    if opcode == 0xFF:  # far CALL and JMP with memory
        return {3: FAR_CALL, 5: DESCRIPTORS}.get(modrm >> 3 & 7, NOTHING)
    if opcode in (0xC4, 0xC5):  # LES, LDS; else VEX
        return NOTHING if long or modrm >> 6 == 3 else DESCRIPTORS
    if opcode in (0xCA, 0xCB, 0xCF):  # far RET, IRET
        return FAR_RETURN
    return FAR_CALL if opcode == 0x9A else DESCRIPTORS if opcode in _ONE_BYTE else NOTHING


class Instructions(Exceptions):
    """Control registers, EFER, INVLPG, INVPCID, CPUID, SYSCALL."""

    def _text(self, rip: int, size: int = 15) -> bytes:
        """Bytes of the instruction at rip, as many as are there."""
        out = b""
        user = self.p.cpl == 3
        while size:
            try:
                gpa = self.cpu.translate(rip, "x", user).gpa
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
        while text[at] in _PREFIXES:
            segment = text[at] if text[at] in b"\x64\x65" else segment
            at += 1
        if long and text[at] & 0xF0 == 0x40:
            rex = text[at]
            at += 1
        return text, at + 1, rex, segment, long

    def _far(self) -> int:
        """DESCRIPTORS, FAR_RETURN or FAR_CALL if the instruction at RIP is one that reads descriptors, else NOTHING."""
        text = self._text(self.p.rip)
        at = len(text) - len(text.lstrip(_PREFIXES))
        long = bool(self.p.segments()["cs"][1] & 0x200)
        text += bytes(3)
        if long and text[at] & 0xF0 == 0x40:
            at += 1
        return _far(text, at, long)

    def _in_table(self, page: int) -> bool:
        """Some of the GDT, the LDT or the TSS lies in `page`."""
        for name in ("GDTR", "LDTR", "TR"):
            base, limit = self.p.table(name)
            if limit and base & PAGE <= page <= base + limit:
                return True
        return False

    def _is_user(self, page: int, kind: int) -> bool:
        """Is the access that Unicorn makes to `page` one of user code? While CPL = 3, all are but those to descriptors
        and to the TSS, and those to the stack behind a call gate (SDM vol. 3, 4.6.1)."""
        if self.p.cpl != 3:
            return False
        if kind == Op.FETCH:
            return True
        if self._in_table(page):
            return self._far() == NOTHING
        if kind != Op.WRITE or page in (self._stack() & PAGE, (self._stack() - 1) & PAGE, (self._stack() - 16) & PAGE):
            return True
        try:
            self.cpu.translate(page, "w", True)
        except GuestFault:
            return self._far() != FAR_CALL
        return True

    def _stack(self) -> int:
        return self.p.gpr(4) & (WORD if self.cpu.efer & EFER_LMA else 0xFFFFFFFF)

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
                raise Fault(UD)
            self.p.set_gpr(number, values[register])
        return at + 2

    def _write_cr(self, register: int, value: int) -> None:
        if register == 2:
            self.cpu.cr2 = value
        elif register in (0, 3, 4):
            op = {0: Op.CR0, 3: Op.CR3, 4: Op.CR4}[register]
            if self._op(op, value=value).outcome[0]:
                raise Fault(GP)
            self._flush_wanted = True
        elif register != 8:
            raise Fault(UD)

    def _efer(self, rip: int) -> int:
        text, at, _, _, _ = self._decode(rip)
        self.exits["msr"] += 1
        if text[at] == 0x30:
            value = (self.p.gpr(0) & 0xFFFFFFFF) | (self.p.gpr(2) & 0xFFFFFFFF) << 32
            if self._op(Op.EFER, value=value).outcome[0]:
                raise Fault(GP)
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

    def _is_invpcid(self, rip: int) -> bool:
        """Unicorn's processor has no INVPCID (66 0F 38 82), and takes #UD where one is."""
        text, at, *_ = self._decode(rip)
        return text[at - 1 : at + 2] == b"\x0f\x38\x82" and 0x66 in text[: at - 1] and text[at + 2] >> 6 != 3

    def _invpcid(self, rip: int) -> int:
        text, at, rex, segment, long = self._decode(rip)
        self.exits["invpcid"] += 1
        if not self.vm.features.invpcid:
            raise Fault(UD)
        address, length = self._effective(rip, text, at + 2, rex, segment, long)
        user = self.p.cpl == 3
        if user:
            raise Fault(GP)
        kind = self.p.gpr((text[at + 2] >> 3 & 7) | (rex & 4) << 1)
        words = []
        for offset in (0, 8):
            self._set_ac(explicit=True)
            result = self._op(Op.READ, address + offset, size=8, data=True)
            if result.outcome[0]:
                self._own_fault(result)
            words.append(int(result.value[0]))
        if self._op(Op.INVPCID, words[1], words[0], min(kind if long else kind & 0xFFFFFFFF, 255)).outcome[0]:
            raise Fault(GP)
        self._flush_wanted = True
        return length

    def _effective(self, rip: int, text: bytes, at: int, rex: int, segment: int, long: bool) -> tuple[int, int]:
        """Linear address of the memory operand whose ModRM byte is at `at`, and where the instruction ends."""
        mod, rm = text[at] >> 6, text[at] & 7
        at += 1
        address, base = 0, rm | (rex & 1) << 3
        if 0x67 in text[: at - 3] and not long:
            raise Unsupported(f"INVLPG or INVPCID with a 16-bit address, RIP {rip:#x}")
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
            ebx = ebx & ~(1 << 10) | features.invpcid << 10
            ebx &= ~((not features.smep) << 7 | (not features.smap) << 20)
            ecx = (ecx & ~(1 << 3)) | features.la57 << 16
        elif leaf == 0x80000001:
            ecx &= ~(1 << 2)  # SVM
            edx &= ~((not features.nx) << 20 | (not features.gbpages) << 26)
        elif leaf == 0x80000008:
            eax = (eax & ~0xFFFF) | (57 if features.la57 else 48) << 8 | features.maxphyaddr
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
        except Fault as fault:
            self.deliver(fault.vector, fault.code, rip)
