"""The virtual machine: memory, an MMU of one design, and vcpus."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import notebook
from ..config import TLB, Design, Features, MemorySlot, Shadow, check_bool, check_int, design, taken
from ..errors import AuditError, ConfigError
from . import snapshot
from .audit import AuditPoints, audit
from .counters import Stats
from .events import EVENTS, on_event
from .exitlog import ExitLog
from .future import Future
from .memory import Memory
from .mmu import Mmu
from .tlbs import ProcessorTLB, check_tlb, label
from .vcpu import VCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from . import events
    from .audit import AuditReport


CR4_PCIDE, EFER_LMA = 1 << 17, 1 << 10


def set_registers(vm: VM, cpu: VCpu, *, cr0: int, cr3: int, cr4: int, efer: int) -> None:
    """Bring a processor of a new VM to registers that another was seen with, by loads that lead there.

    GeneralProtection if a load is refused. What only long mode can hold, PCIDs and a root above 4 GiB, comes after
    paging is on (SDM volume 2, MOV to control registers).
    """
    cpu.efer = efer & ~EFER_LMA
    cpu.cr4 = cr4 & ~CR4_PCIDE
    cpu.cr3 = cr3
    cpu.cr0 = cr0
    if cr4 & CR4_PCIDE:
        cpu.cr3 &= ~0xFFF
        cpu.cr4 = cr4
    if cpu.efer & EFER_LMA and cpu.cr3 != cr3:
        on_the_way = cpu.cr3
        cpu.cr3 = cr3
        if (cpu.cr3 ^ on_the_way) >> 12 and isinstance(vm.mmu.design, Shadow):
            vm.mmu.zap_all()  # what was the root before is no table of the guest's


class VCpus(tuple[VCpu, ...]):
    """The processors of a VM, by number."""

    __slots__ = ()

    def __getitem__(self, number: Any) -> Any:
        try:
            return super().__getitem__(number)
        except IndexError:
            count = "one, number 0" if len(self) == 1 else f"{len(self)}, numbers 0 to {len(self) - 1}"
            raise IndexError(f"vcpus: there is no number {number}; the VM has {count}") from None


class VM:
    """A machine with guest RAM, an MMU and `vcpus` processors.

    memory: bytes (int), a text such as "64MiB", a uint8 array used in place, or a list of MemorySlot.
    mmu: "native", "flush", "cached", "kvm-2007", or a Native or Shadow object.
    tlb: TLB(...) or ProcessorTLB(...) models a hardware TLB in each vcpu; None: every access walks tables.
    slots: with bytes or an array, the MemorySlots that map it one after the other. What they leave is free for
        `add_slot`; there is never more guest RAM than at first.
    backing: what the host has of guest RAM at first, where a MemorySlot does not say it: "warm", "cold" or "thp".
    outer_backing: the same of an outer host, where the host is a guest itself: what of the host's own pages it has.
        It is asked when the host first touches one, and keeps it. Other than "warm" it needs a backing that is, too.
    future: for policy "optimal", how the shadow pages will be used, as an earlier run of the same operations has shown.
        record_uses: be that earlier run: see `Future`.
    features: of the processors. Raises ConfigError, and MemoryError where the host has no room.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> cpu.write(0x401000, 7)
    >>> cpu.read(0x401000)
    7
    >>> vm.stats.exits["fill"]
    1
    >>> vm.audit().ok
    True
    """

    def __init__(
        self,
        memory: int | str | np.ndarray[Any, Any] | Sequence[MemorySlot | None] = "64MiB",
        mmu: str | Design = "cached",
        vcpus: int = 1,
        tlb: TLB | ProcessorTLB | None = None,
        *,
        features: Features | None = None,
        slots: Sequence[MemorySlot | None] | None = None,
        host_page_size: int | str | None = None,
        backing: str = "warm",
        outer_backing: str = "warm",
        future: Future | None = None,
        record_uses: bool = False,
    ) -> None:
        chosen = design(mmu)
        count = check_int("vcpus", vcpus, 1, 64)
        features = Features() if features is None else taken(Features, features, "features")
        if tlb is not None:
            tlb = check_tlb(tlb)
        self.features = features
        self.tlb = tlb
        self.memory = Memory(memory, slots, host_page_size, backing, outer_backing)
        self._foresees = future is not None or bool(record_uses)
        self.mmu = Mmu(self.memory, chosen, future, check_bool("record_uses", record_uses))
        self.memory.on_log = self.mmu.slot_logged
        self.memory.on_slots = self.mmu.slots_changed
        self.memory.on_backing = self.mmu.host_backs
        self._audit_points = AuditPoints(self.mmu)
        self._exit_log: ExitLog | None = None
        self.vcpus: tuple[VCpu, ...] = VCpus(VCpu(self.mmu, features, tlb) for _ in range(count))

    @property
    def stats(self) -> Stats:
        """Counters of the whole VM."""
        return self.mmu.stats

    @contextmanager
    def measure(self) -> Iterator[Stats]:
        """What is counted in a `with` block: `with vm.measure() as m: ...`, then m.exits_total and so on.

        The Stats are 0 until the block ends, also by an exception. `stats.reset()` inside of the block spoils them.
        """
        counted, before = Stats(), self.stats.copy()
        try:
            yield counted
        finally:
            counted._become(self.stats - before)

    def on_event(self, callback: Callable[[events.Event], object] | None, kinds: Iterable[str] = EVENTS) -> None:
        """Call `callback` with an Event (kind, detail, vcpu, address, frames) whenever one of these `kinds` happens:
        "exit", "zap", "protect", "flush". None: no more. A VM has one callback.

        It is called in the middle of what the engine does and may not use its VM (EngineError); others it may. What it
        raises comes out of the call that was under way, after the operation is done; until then it is not called
        again. Without a callback events cost nothing; with one, a call of it (0.6 microseconds of one that counts)
        for each that happens. Not part of what `save` writes. ConfigError for another kind, or what cannot be called.

        >>> import shadowcore as sc
        >>> vm = sc.VM("16MiB")
        >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
        >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
        >>> tables.activate(vm.vcpus[0])
        >>> vm.on_event(lambda event: print(event.kind, event.detail, hex(event.address)), ["exit"])
        >>> vm.vcpus[0].write(0x401000, 1)
        exit fill 0x401000
        >>> vm.on_event(None)
        """
        on_event(self.mmu, callback, kinds)

    def write_physical(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at guest physical address `gpa` as a device does; shadow tables stay coherent.

        ConfigError, and nothing stored, unless all of it lies in memory slots.
        """
        self.mmu.write_physical(gpa, bytes(data))

    def read_physical(self, gpa: int, size: int) -> bytes:
        """`size` bytes at guest physical address `gpa`; ConfigError unless all of it lies in memory slots."""
        return self.mmu.read_physical(gpa, size)

    def add_slot(
        self,
        gpa: int | MemorySlot,
        size: int | str | None = None,
        *,
        slot: int | None = None,
        dirty_log: bool = False,
        host_page_size: int | str = 4096,
        offset: int | None = None,
        read_only: bool = False,
        backing: str | None = None,
    ) -> int:
        """Map free frames of guest RAM at `gpa` while the guest runs; the number of the slot. What is in them stays.

        gpa, size and what follows are fields of MemorySlot; or gpa is one, alone. slot: the number, 0 to 31; None: the
        lowest that is free. ConfigError, and nothing changed, where the slot would overlap another, in guest physical
        space or in guest RAM, or nothing is free. How much guest RAM there is was said when the VM was made.
        """
        if not isinstance(gpa, MemorySlot):
            if size is None:
                raise ConfigError("size: bytes, or a text such as '2MiB', are needed")
            gpa = MemorySlot(gpa, size, dirty_log, host_page_size, offset, read_only, backing)
        elif size is not None:
            raise ConfigError("size: given twice, in the MemorySlot and beside it")
        return self.memory.add_slot(gpa, slot)

    def remove_slot(self, slot: int) -> None:
        """Unmap memory slot number `slot` while the guest runs. Its addresses are a device's from now on, its dirty log
        is forgotten; its frames are free for other slots, and `memory.bytes` keeps what is in them.

        Nothing that was made of any slot stays: all shadow pages go, and what TLBs hold. ConfigError for a number that
        is free.
        """
        self.memory.remove_slot(slot)

    def set_slot(self, slot: int, *, gpa: int | None = None, dirty_log: bool | None = None) -> None:
        """Change memory slot number `slot` while the guest runs.

        gpa: it is mapped there, with its frames and its dirty log; as after `remove_slot`, nothing stays. dirty_log:
        a log is started or stopped (Memory.start_dirty_log, stop_dirty_log). Size, frames, and whether it is read-only
        cannot change, as in KVM: remove the slot and add another. ConfigError, and nothing changed, for what cannot be.
        """
        logged = None if dirty_log is None else check_bool("dirty_log", dirty_log)
        number = self.memory.slot_number(slot)
        if gpa is not None:
            self.memory.move_slot(number, gpa)
        if logged and number not in self.memory.logged_slots:
            self.memory.start_dirty_log(number)
        elif logged is False and number in self.memory.logged_slots:
            self.memory.stop_dirty_log(number)

    def record_walks(self, size: int) -> None:
        """Record the references to memory that walks of the processors make, up to `size` of them; 0: no more.

        While they are recorded all accesses take the general way: one that would hit takes some 30 times as long, under
        `nested` 200 times. No counter and no result changes. Walks that the hypervisor makes are not among them.
        ConfigError for a size that cannot be.
        """
        self.mmu.record_walks(size)

    def walks(self) -> NDArray[np.void]:
        """The references since the last call, which begins anew, in the order in which they were made.

        A structured array: hpa, of the entry; gva, the linear address that is translated; walk, a number; vcpu; level
        of the entry in its tables, 1 to 5; dimension: 0 the guest's tables, 1 the host's that translate the guest's
        addresses (nested), 2 the shadow's; size of the entry, 4 or 8 bytes. What a modelled TLB and its caches leave
        out is not there: together they are `vm.stats.walk_references`. EngineError if there were more than there was
        room for, ConfigError if none are recorded.
        """
        return self.mmu.walks()

    def record_exits(self, size: int | None = None, *, first: int = 0) -> ExitLog:
        """Log every exit from now on, with what the MMU did about it, until the log is closed: an ExitLog, which a
        `with` block closes.

        size: exits that there is room for between two looks at its rows, 1 or more; None: for all that there are (72
            bytes each).
        first: number of the operation that comes next. Operations are counted as they are made: those of `VCpu.run`,
        single calls of a VCpu, records of a replay, and what the processors of a Kernel do (its counters accesses,
        kernel_accesses, cr3_loads and invlpg; an access that is made again after a fault has the number of the last
        operation before it). Accesses by way of shadowcore.h, and Unicorn's, have the number of the operation before
        them.

        An exit has what was done about it until its vcpu entered the guest again; what the host does by itself belongs
        to none. While exits are logged all accesses take the general way, one by one: one that hits takes some 11 times
        as long, a fault 4 times, and where a TLB is modelled they take hardly longer. No counter and no result changes.
        Not part of what `save` writes.
        ConfigError for numbers that cannot be, and while another log is open.

        >>> vm = sc.VM("16MiB")
        >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
        >>> with vm.record_exits() as log:
        ...     tables.activate(vm.vcpus[0])
        >>> log.reasons()
        ['cr4', 'efer', 'cr3', 'cr0']
        """
        if self._exit_log is not None and not self._exit_log.closed:
            raise ConfigError("record_exits: exits are logged already; close that log first")
        if size is not None:
            check_int("size", size, 1, 1 << 32)
        self._exit_log = ExitLog(self.mmu, size, first)
        return self._exit_log

    def host_unmap(self, gfn: int, n: int = 1, *, discard: bool = False) -> None:
        """The host takes n frames from `gfn` on back, as it does to swap or to migrate them: a call of KVM's MMU
        notifier. Every shadow leaf that maps one goes, and what TLBs hold of it; the host has no page there until the
        next touch, by the guest, a device or `host_touch`, which finds in it what was there.

        discard: what is in them is gone, as after madvise(MADV_DONTNEED): they read as zeros. What shadows a frame
        among them goes as well.
        Where the host has pages of 2 MiB, one that goes in part is split. From the first such call on the VM keeps
        account of what the host has, as if it had been made with `backing` (`native` then takes the general way for all
        accesses). ConfigError, and nothing changed, unless all frames are in memory slots.
        """
        self.mmu.host_unmap(gfn, n, discard)

    def host_touch(self, gfn: int, n: int = 1, *, write: bool = True) -> None:
        """A program on the host accesses n frames from `gfn` on: what the host lacks is made, as for the guest's own
        accesses (`stats.host_faults`). What a caller stores through `memory.bytes` is not seen. Without `backing`,
        nothing is lacking. ConfigError unless all frames are in memory slots."""
        self.mmu.host_touch(gfn, n, write)

    def host_collapse(self, gfn: int, n: int = 512) -> None:
        """The host makes pages of 2 MiB of n frames from `gfn` on (madvise(MADV_COLLAPSE)): of each block that it has
        in small pages, with one call of the MMU notifier; and may from now on do so at first touches. ConfigError, and
        nothing changed, unless they are whole blocks of guest RAM in memory slots."""
        self.mmu.host_collapse(gfn, n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the complete state to one file. ConfigError for a machine that records uses, or knows what is to
        come, which is no part of a state, or that has a plug-in which does not say what it keeps. OSError where that
        cannot be written; an older file is then kept."""
        if self._foresees:
            raise ConfigError("save: a machine that records uses, or knows what is to come, cannot be saved")
        snapshot.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], memory: np.ndarray[Any, Any] | None = None) -> VM:
        """The VM that `save` wrote; it continues bit for bit. SnapshotError for a file that is not whole and sound.

        memory: a uint8 array of the size of its RAM, to be used in place; what is in it is overwritten.
        """
        return snapshot.load(VM, path, memory)

    def audit(self, strict: bool = False) -> AuditReport:
        """Check every invariant of the MMU. strict: raise AuditError instead of reporting violations."""
        report = audit(self.mmu)
        if strict and not report.ok:
            raise AuditError(report.violations, report.count)
        return report

    @property
    def audit_points(self) -> tuple[str, ...]:
        """Points at which every invariant is checked: some of "pre-fault", "post-fault", "pre-write", "post-write"
        (an emulated or device store to RAM), "post-cr3"; in design `unsync` "pre-sync" and "post-sync" (roots were put
        in place, or are synced: nothing below them stays unsync). None of them costs nothing.

        The operation under way is finished; the call that made it then raises AuditError with `.point`. ConfigError
        for another name. Not part of what `save` writes.
        """
        return self._audit_points.names

    @audit_points.setter
    def audit_points(self, names: Iterable[str]) -> None:
        self._audit_points.names = names

    def _repr_html_(self) -> str:
        stats = self.stats
        rows = [
            ("memory", f"{self.memory.bytes.size >> 20:,} MiB"),
            ("design", self.mmu.design.name),
            ("processors", len(self.vcpus)),
            ("TLB, its name or entries for 4 KiB pages", "none" if self.tlb is None else str(label(self.tlb))),
            ("shadow pages in use", f"{len(self.mmu.pages):,}"),
            ("accesses", f"{stats.accesses:,}"),
            *((f"exits: {reason}", f"{count:,}") for reason, count in stats.exits.items() if count),
            ("exits, all", f"{stats.exits_total:,}"),
        ]
        return notebook.table("VM", ("", ""), rows)

    def __repr__(self) -> str:
        size = self.memory.bytes.size >> 20
        return f"VM({size} MiB, mmu={self.mmu.design.name!r}, vcpus={len(self.vcpus)})"
