"""What one would use or write instead of the engine, over the same guest memory and the same 4-level tables.

PythonWalk, NumpyWalk: page walkers as one writes them by hand. PythonShadow: a shadow MMU in dictionaries. Unicorn: the
emulator from PyPI, with its own MMU. Each is compared with the engine before it is measured (test_rivals).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from guests import PAGE, Guest

import shadowcore as sc

P, W, U, A, D, PS = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
NX = 1 << 63
ADDRESS = 0x000F_FFFF_FFFF_F000
READ, WRITE, FETCH = 0, 1, 2
FAULT = -1


class PythonWalk:
    """A page walker in plain Python: four levels, rights of all of them, accessed and dirty bits, large pages."""

    def __init__(self, memory: np.ndarray, root: int) -> None:
        self.words = memoryview(memory).cast("B").cast("Q")
        self.root = root

    def walk(self, va: int, op: int, user: int) -> tuple[int, int, list[int]]:
        """gpa, bits W, U and NX of all levels with the leaf's D, and the words used; or FAULT and the error code."""
        words, base, rights, nx, used = self.words, self.root, W | U, 0, []
        code = (2 if op == WRITE else 16 if op == FETCH else 0) | (4 if user else 0)
        for shift in (39, 30, 21, 12):
            index = base + ((va >> shift & 511) << 3) >> 3
            entry = words[index]
            if not entry & P:
                return FAULT, code, used
            rights &= entry
            nx |= entry & NX
            used.append(index)
            if shift == 12 or (entry & PS and shift < 39):
                break
            base = entry & ADDRESS
        if (user and not rights & U) or (op == WRITE and not rights & W) or (op == FETCH and nx):
            return FAULT, code | 1, used
        for above in used[:-1]:
            if not words[above] & A:
                words[above] |= A
        bits = A | D if op == WRITE else A
        if entry & bits != bits:
            entry = words[index] = entry | bits
        mask = (1 << shift) - 1
        return entry & ADDRESS & ~mask | va & mask, rights | nx | entry & D, used

    def run(self, ops: list[tuple[int, int, int]]) -> list[int]:
        """The gpa of each (op, va, user), FAULT where there is none."""
        walk = self.walk
        return [walk(va, op, user)[0] for op, va, user in ops]


class NumpyWalk:
    """A page walker that does all addresses at once, level by level: presence and rights, pages of 4 KiB.

    It sets no accessed or dirty bit and knows no large page: what fits in a few lines of numpy.
    """

    def __init__(self, memory: np.ndarray, root: int) -> None:
        self.words = memory.view(np.uint64)
        self.root = root

    def run(self, va: np.ndarray, required: int = P | U) -> np.ndarray:
        """The gpa of each address; all ones where a level lacks one of the `required` bits."""
        page = (va >> np.uint64(12)).view(np.int64)
        base: Any = self.root >> 3
        rights: Any = required
        for shift in (27, 18, 9, 0):
            entry = self.words.take((page >> shift & 511) + base).view(np.int64)
            rights = rights & entry
            base = (entry & ADDRESS) >> 3
        gpa = (base << 3 | va.view(np.int64) & 4095).view(np.uint64)
        gpa[rights != required] = np.uint64(2**64 - 1)
        return gpa


class PythonShadow:
    """A shadow MMU as one writes it by hand: a dictionary for each address space from page to frame and rights.

    It fills on faults, sets A and D by its walker, protects the frames that it has walked through, and drops what a
    store to one of them made stale. It has no pool, no limit and no audit, and it keeps shadows per CR3, not per table.
    """

    def __init__(self, memory: np.ndarray, cr3: int) -> None:
        self.memory = memory
        self.words = memoryview(memory).cast("B").cast("Q")
        self.spaces: dict[int, dict[int, int]] = {}
        self.tables: set[int] = set()
        self.writable: dict[int, list[tuple[dict[int, int], int]]] = {}
        self.fills = self.writes = self.emulated = self.faults = 0
        self.load_cr3(cr3)

    def load_cr3(self, cr3: int) -> None:
        self.walker = PythonWalk(self.memory, cr3 & ADDRESS)
        self.shadow = self.spaces.setdefault(cr3 & ADDRESS, {})

    def clear(self) -> None:
        self.shadow.clear()
        self.writable.clear()

    def _protect(self, frame: int) -> None:
        """A table that an entry was made from must not be written unseen."""
        self.tables.add(frame)
        for shadow, page in self.writable.pop(frame, ()):
            if page in shadow:
                shadow[page] &= ~W

    def fault(self, op: int, va: int, user: int) -> int:
        """What the shadow does not translate: the gpa, after mending it, or FAULT."""
        gpa, rights, used = self.walker.walk(va, op, user)
        if gpa == FAULT:
            self.faults += 1
            return FAULT
        for index in used:
            if index >> 9 not in self.tables:
                self._protect(index >> 9)
        page, frame = va >> 12, gpa >> 12
        rights = rights & (U | NX) | (rights & W if rights & D and frame not in self.tables else 0)
        if op == WRITE and not rights & W:
            self.emulated += 1
            for shadow in self.spaces.values():  # which entries came from this table nobody knows
                shadow.clear()
            return gpa
        if page in self.shadow:
            self.writes += 1
        else:
            self.fills += 1
        self.shadow[page] = frame << 12 | rights
        if rights & W:
            self.writable.setdefault(frame, []).append((self.shadow, page))
        return gpa

    def run(self, ops: list[tuple[int, int, int]]) -> list[int]:
        """The gpa of each (op, va, user), FAULT where there is none."""
        get, result = self.shadow.get, []
        append = result.append
        for op, va, user in ops:
            entry = get(va >> 12)
            if entry is None or (user and not entry & U) or (op and (entry & NX if op == FETCH else not entry & W)):
                append(self.fault(op, va, user))
            else:
                append(entry & ADDRESS | va & 4095)
        return result


class Unicorn:
    """The emulator's own MMU: guest code that loads 8 bytes from each of a list of addresses and adds them up."""

    CODE = 0x7000_0000_0000
    LIST = 0x7000_4000_0000

    # mov rbx, [rsi]; add rax, [rbx]; add rsi, 8; dec rcx; jnz to the start
    LOOP = bytes.fromhex("488b1e 480303 4883c608 48ffc9 75f1 90")

    def __init__(self, guest: Guest, va: np.ndarray, scratch: int) -> None:
        """guest: with paging in mode 64. scratch: a gpa behind which code and list have room."""
        import unicorn
        from unicorn import x86_const as x86

        self.va, self.x86 = va, x86
        size = -(-va.nbytes // PAGE) * PAGE
        memory = guest.vm.memory.bytes
        memory[scratch : scratch + len(self.LOOP)] = np.frombuffer(self.LOOP, dtype=np.uint8)
        memory[scratch + PAGE : scratch + PAGE + va.nbytes] = va.view(np.uint8)
        guest.tables.map(self.CODE, scratch, PAGE, "rwx", page_size=PAGE, accessed=True, dirty=True)
        guest.tables.map(self.LIST, scratch + PAGE, size, "rwx", page_size=PAGE, accessed=True, dirty=True)
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_CPU)
        uc.mem_map_ptr(0, memory.nbytes, unicorn.UC_PROT_ALL, memory.ctypes.data)
        uc.msr_write(0xC0000080, 1 << 8 | 1 << 10 | 1 << 11 | 1)  # LME, LMA, NXE, SCE
        uc.reg_write(x86.UC_X86_REG_CR4, 1 << 5)
        uc.reg_write(x86.UC_X86_REG_CR3, guest.tables.cr3)
        uc.reg_write(x86.UC_X86_REG_CR0, 1 << 31 | 1 << 16 | 1)
        self.uc, self.memory = uc, memory  # the array must outlive the machine

    def run(self) -> int:
        """The sum of what was loaded, modulo 2**64."""
        x86, uc = self.x86, self.uc
        uc.reg_write(x86.UC_X86_REG_RAX, 0)
        uc.reg_write(x86.UC_X86_REG_RSI, self.LIST)
        uc.reg_write(x86.UC_X86_REG_RCX, len(self.va))
        uc.emu_start(self.CODE, self.CODE + len(self.LOOP) - 1)
        return uc.reg_read(x86.UC_X86_REG_RAX)


def as_list(ops: np.ndarray) -> list[tuple[int, int, int]]:
    """Operations as the engines in Python want them."""
    assert np.isin(ops["op"], (sc.Op.READ, sc.Op.WRITE, sc.Op.FETCH)).all()
    return list(zip(ops["op"].tolist(), ops["addr"].tolist(), ops["user"].tolist(), strict=True))
