"""Exceptions of a guest in Unicorn: a frame on the guest's stack, by way of its own tables."""

from __future__ import annotations

from typing import Any

from ..config import Op
from .cpu import FLAT_DATA, TF
from .guest import (
    CONTRIBUTORY,
    DB,
    DF,
    EFER_LMA,
    ERROR_CODES,
    FLAG_IF,
    FLAG_NT,
    FLAG_RF,
    GP,
    NP,
    PF,
    WORD,
    Fault,
    Guest,
    TripleFault,
    Unsupported,
)


class Exceptions(Guest):
    """Delivers exceptions through the guest's IDT."""

    def _push(self, rsp: int, value: int, size: int, cpl: int) -> int:
        """Store a word of the frame, as the code that `cpl` is the level of would."""
        rsp = (rsp - size) & (WORD if size == 8 else 0xFFFFFFFF)
        user = cpl == 3
        if not user:
            self._set_ac(explicit=True)
        result = self._op(Op.WRITE, rsp, value, size, user, data=True)
        if result.outcome[0]:
            self._own_fault(result)
        return rsp

    def _own_fault(self, result: Any) -> None:
        outcome = int(result.outcome[0])
        if outcome == 1:
            raise Fault(PF, int(result.error_code[0]))
        if outcome == 2:
            raise Fault(GP)
        raise Unsupported(f"a frame or a descriptor table in a device (RIP {self.p.rip:#x})")

    def _own_read(self, va: int, size: int) -> int:
        """Read from the IDT, GDT or TSS, as the processor does at any CPL."""
        self._set_ac(explicit=False)
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
            except Fault as second:
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
            raise Fault(GP, where)
        gate = self._own_read(base + at, 8)
        kind, dpl, present = gate >> 40 & 0xF, gate >> 45 & 3, gate >> 47 & 1
        segments = self.p.segments()
        cpl = segments["ss"][1] >> 5 & 3
        if kind not in (14, 15):
            raise Fault(GP, where)
        if software and dpl < cpl:
            raise Fault(GP, where)
        if not present:
            raise Fault(NP, where)
        target = (gate & 0xFFFF) | (gate >> 48) << 16
        if long:
            target |= (self._own_read(base + at + 8, 8) & 0xFFFFFFFF) << 32
        selector = gate >> 16 & 0xFFFC
        cs = self._descriptor(selector)
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
                ss = self._descriptor(self._own_read(task + 8 + 8 * new_cpl, 2))
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
            rsp = self._push(rsp, value, width, new_cpl)
        keep = rflags & ~(TF | FLAG_NT | FLAG_RF | 1 << 17 | (FLAG_IF if kind == 14 else 0))
        cs = ((selector & ~3) | new_cpl, *cs[1:])
        if new_cpl != cpl or cs != segments["cs"]:
            self._load(segments | {"cs": cs, "ss": ss}, target, rsp, keep)
        else:
            self.p.set_gpr(4, rsp)
            self.p.rflags = keep
            self.p.rip = target

    def _descriptor(self, selector: int) -> tuple[int, int, int, int]:
        """Segment `selector` of the GDT, as cached."""
        if not selector & ~3:
            raise Fault(GP, 0)
        base, limit = self.p.table("GDTR")
        if selector & 4 or (selector | 7) > limit:
            raise Fault(GP, selector & ~3)
        raw = self._own_read(base + (selector & ~7), 8)
        size = (raw & 0xFFFF) | (raw >> 32 & 0xF0000)
        if raw >> 55 & 1:
            size = size << 12 | 0xFFF
        attributes = (raw >> 40 & 0xFF) | (raw >> 44 & 0xF00)
        if not attributes & 0x80:
            raise Fault(NP, selector & ~3)
        return selector, attributes | 1, size, (raw >> 16 & 0xFFFFFF) | (raw >> 32 & 0xFF000000)
