"""The state of a guest in Unicorn: its physical space, its registers, and the operations that reach the MMU."""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import numpy as np

from ..config import Nested, Op, Shadow
from ..engine.batch import OP_DTYPE
from ..engine.machine import VM
from ..errors import ConfigError, EngineError, GeneralProtection, ShadowcoreError
from .cpu import FLAT_CODE, FLAT_DATA, PDPT, PRIVATE_SIZE, Processor, address_of, flat, layout, uc, x86
from .fills import may_store
from .recording import Recording

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


class Fault(Exception):
    """An exception for the guest."""

    def __init__(self, vector: int, code: int = 0) -> None:
        self.vector = vector
        self.code = code
        super().__init__(vector, code)


class Guest:
    """A vcpu of a VM and the processor in Unicorn that runs its code: memory, registers, operations of the MMU."""

    def __init__(self, vm: VM, way: str = "walker", *, record: bool = False) -> None:
        if way not in WAYS:
            raise ConfigError(f"way: {way!r} is not one of {', '.join(WAYS)}")
        if way == "walker" and isinstance(vm.mmu.design, Nested):
            raise ConfigError("way: nested paging needs 'fills'; Unicorn's own walker has one dimension")
        if way == "walker" and isinstance(vm.mmu.design, Shadow) and vm.mmu.design.switching:
            raise ConfigError("way: agile paging needs 'fills'; Unicorn's own walker does not go on at marks")
        self.vm = vm
        self.way = way
        self.cpu = vm.vcpus[0]
        self.shadow = isinstance(vm.mmu.design, Shadow)
        self.recording = Recording() if record else None
        self.exits: Counter[str] = Counter()
        self._op_array = np.zeros(1, dtype=OP_DTYPE)
        self._frames = vm.mmu.arrays["frames"]["shadowed"] if self.shadow else None
        self._device: tuple[int, int] | None = None  # linear page and gpa of a device access that was counted
        self._flushes = 0
        self._flush_wanted = False
        self._cpuid: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self._hardware: dict[str, int] = {}
        layout()
        self._map()

    def _regions(self) -> list[tuple[int, int, int, int]]:
        """What the processor has for memory: start, size, protection, host address."""
        memory = self.vm.memory
        base = address_of(memory.bytes)
        if self.shadow:
            # Its walker sets A and D in the pool, as ours does, and nothing else.
            pool = memory.pool
            assert pool is not None
            return [
                (memory.ram_hpa, memory.bytes.size, uc.UC_PROT_ALL, base),
                (memory.pool_hpa, pool.nbytes, uc.UC_PROT_ALL, address_of(pool)),
            ]
        return [
            (
                slot.gpa,
                int(slot.size),
                uc.UC_PROT_READ | uc.UC_PROT_EXEC if slot.read_only else uc.UC_PROT_ALL,
                base + (memory.frame(slot.gpa >> 12) << 12),
            )
            for slot in memory.slots
            if slot is not None
        ]

    def _map(self) -> None:
        regions = self._regions()
        for private in range(0xF0000000, 0x10000000, -0x1000000):
            if all(private + PRIVATE_SIZE <= start or private >= start + size for start, size, *_ in regions):
                break
        else:
            raise ConfigError("memory: slots leave no 64 KiB below 4 GiB for the processor's own pages")
        self.p = Processor(private)
        self._mapped: list[tuple[int, int, int, int]] = []
        self._remap(regions)

    def _remap(self, regions: list[tuple[int, int, int, int]]) -> None:
        """These regions are memory now, and no others but the processor's own pages."""
        for start, size, *_ in regions:
            if start + size > 1 << 40:
                raise ConfigError(f"memory: Unicorn has 40 physical address bits, a slot ends at {start + size:#x}")
            if start < self.p.private + PRIVATE_SIZE and self.p.private < start + size:
                raise ConfigError(f"memory: the processor's own pages are in the way of the slot at {start:#x}")
        for start, size, *_ in self._mapped:
            self.p.uc.mem_unmap(start, size)
        for start, size, protection, pointer in regions:
            self.p.uc.mem_map_ptr(start, size, protection, pointer)
        self._mapped, self._slots = regions, self.vm.memory.slots

    def _follow_slots(self) -> None:
        """Memory slots may have changed."""
        if not self.shadow and self.vm.memory.slots is not self._slots:
            self._remap(self._regions())  # which drops all translations

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

    def _op(self, op: int, addr: int = 0, value: int = 0, size: int = 1, user: bool = False, data: bool = False) -> Any:
        """One operation on the vcpu; its RunResult."""
        fields = (int(op), int(user), size, addr & WORD, value & WORD)
        tables = [] if self.recording is None else self._record_tables(op, addr, value)
        if self.recording is not None:
            self.recording.add(fields, data)
        self._op_array[0] = fields
        result = self.cpu.run(self._op_array, data=data)
        for table, index in tables:
            if self._frames is not None and self._frames[index >> 12]:
                assert self.recording is not None
                self.recording.follow(table)
        if self._flushed() != self._flushes or result.outcome[0] == 1:
            # A page fault of the guest: Unicorn may hold what the tables said of the page before (SDM 4.10.4.1).
            self._flushes = self._flushed()
            self._flush_wanted = True
        return result

    def _record_tables(self, op: int, addr: int, value: int) -> list[tuple[int, int]]:
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
            try:
                levels = [(gpa, entry) for _, gpa, entry in self.cpu.walk_levels(addr & WORD)]
            except GeneralProtection:
                levels = []
        for gpa, entry in levels:
            index = self._ram(gpa & PAGE)
            if index is None:
                continue
            if self._frames is None or not self._frames[index >> 12]:
                self.recording.add_table(gpa & PAGE, self.vm.memory.words[index >> 3 : (index >> 3) + 512])
                tables[gpa & PAGE] = index
            elif entry is not None:
                self.recording.add_entry(gpa, size, entry)
        return list(tables.items())

    def _set_ac(self, explicit: bool) -> None:
        """Before each supervisor access: SMAP lets it go to user pages if EFLAGS.AC is set and it is explicit, as are
        those that code makes while CPL < 3. Those of the processor to the IDT, GDT, LDT and TSS are implicit: for
        them the vcpu has AC clear, which is the same rule (SDM vol. 3, 4.6.1)."""
        if self.cpu.cr4 & CR4_SMAP:
            on = explicit and bool(self.p.rflags & FLAG_AC)
            if on != self.cpu.ac:
                self._op(Op.AC, value=on)

    def _resolve(self, va: int, kind: int, user: bool) -> int | None:
        """Have an access handled that the processor could not make: the gpa, or None if it has to be stepped. One by
        the supervisor while CPL = 3 is implicit."""
        if not user:
            self._set_ac(self.p.cpl != 3)
        if kind == Op.WRITE and not may_store(self.cpu, va & WORD, user):
            return None
        result = self._op(kind, va, user=user)
        outcome = int(result.outcome[0])
        if outcome == 1:
            raise Fault(PF, int(result.error_code[0]))
        if outcome == 2:
            raise Fault(GP, 0)
        gpa = int(result.gpa[0])
        if outcome == 3:
            self._device = (va & PAGE, gpa & PAGE)
            return None
        if result.emulated[0]:
            raise EngineError(f"unicorn: a store at {va:#x} was emulated before its bytes were known")
        return gpa

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
        self._follow_slots()
        self._hardware = self._wanted()
        registers = {"rip": rip, "rsp": rsp, "rflags": rflags, "rax": self.p.gpr(0) if rax is None else rax}
        self.p.enter(segments, self._hardware | registers, self.p.table("GDTR"), self.p.table("IDTR"))
        self._flush_wanted = False

    def _flushed(self) -> int:
        """Flushes so far, and requests of them: those of `unsync` wait until the vcpu goes on."""
        return self.vm.stats.tlb_flush + self.vm.stats.remote_tlb_flush_requests

    def _sync(self) -> None:
        """Give the processor what the MMU wants it to run with now."""
        if self.p.pending:
            return
        self._follow_slots()
        wanted, had = self._wanted(), self._hardware
        if wanted != had:
            changed = (wanted["cr0"] ^ had["cr0"]) & CR0_PG or (wanted["cr4"] ^ had["cr4"]) & (CR4_PAE | 1 << 12)
            if changed or (wanted["efer"] ^ had["efer"]) & (EFER_LMA | EFER_LME):
                self._load(self.p.segments(), self.p.rip, self.p.gpr(4), self.p.rflags)
                return
            write = self.p.set_word
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
        if self._flush_wanted or self._flushed() != self._flushes:  # one may come from outside: a dirty log
            self._flushes = self._flushed()
            self.p.flush()
            self._flush_wanted = False
