"""Errors. Guest faults are results of the guest's own doing; the rest is host-side misuse, raised before any change."""

from __future__ import annotations

from typing import Any


def _restored(kind: type[BaseException], args: tuple[object, ...]) -> BaseException:
    """An error as it was pickled; its attributes follow."""
    return BaseException.__new__(kind, *args)


class ShadowcoreError(Exception):
    """Base of everything that this package raises by itself.

    Errors survive pickle and copy with all their attributes, so that they arrive from another process as what they are.

    >>> try:
    ...     sc.VM("16MiB", "no such design")
    ... except sc.ShadowcoreError as error:
    ...     print(type(error).__name__)
    ConfigError
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception would call the class with `args`, which hold the message and not what the class asks for.
        return _restored, (type(self), self.args), self.__dict__ or None


class ConfigError(ShadowcoreError, ValueError):
    """A setting or an argument that cannot be: the message names the field and what is allowed.

    >>> sc.VM(1000)
    Traceback (most recent call last):
        ...
    shadowcore.errors.ConfigError: memory: 1000 is not 4096 or more
    """


class TraceError(ShadowcoreError, ValueError):
    """A recording that cannot be read.

    `file` is its name, `record` the number of the offending record (None: the file as a whole), `expected` what
    should have stood there. `unit`: what is counted; lines of text are counted from 1, all else from 0.

    >>> try:
    ...     sc.trace.load(sc.__file__)
    ... except sc.TraceError as error:
    ...     print("not a recording")
    not a recording
    """

    def __init__(self, file: object, record: int | None, expected: str, unit: str = "record") -> None:
        self.file = str(file)
        self.record = record
        self.expected = expected
        self.unit = unit
        where = "" if record is None else f", {unit} {record}"
        super().__init__(f"{self.file}{where}: {expected}")


class SnapshotError(ShadowcoreError, ValueError):
    """A saved VM that cannot be loaded: `file`, and what was `expected` of it. No half-loaded machine is left.

    >>> try:
    ...     sc.VM.load(sc.__file__)
    ... except sc.SnapshotError as error:
    ...     print("not a saved VM")
    not a saved VM
    """

    def __init__(self, file: object, expected: str) -> None:
        self.file = str(file)
        self.expected = expected
        super().__init__(f"{self.file}: {expected}")


class PoolExhausted(ShadowcoreError):
    """The shadow pool cannot hold what a vCPU needs at once: `needed` pages, of `had`, `roots` (gfns) pin the rest.

    Where the pool would have held it, the failure was injected (`vm.mmu.fail_pages`).

    >>> vm = sc.VM("16MiB", sc.Shadow.cached(pool_pages=4, min_free=0), vcpus=2)
    >>> for cpu, frames in zip(vm.vcpus, (range(256, 512), range(512, 768))):
    ...     tables = sc.PageTables(vm.memory, mode="pae", allocate=frames)
    ...     for gva in (0x400000, 0x40000000, 0x80000000, 0xC0000000):
    ...         tables.map(gva, 0x200000, 0x1000, "rw")
    ...     tables.activate(cpu)
    ...     found = cpu.read(0x400000)
    Traceback (most recent call last):
        ...
    shadowcore.errors.PoolExhausted: shadow pool exhausted: 6 pages needed, the pool has 4; pinned by roots ...
    """

    def __init__(self, needed: int, had: int, roots: tuple[int, ...]) -> None:
        self.needed = needed
        self.had = had
        self.roots = roots
        pinned = ", ".join(hex(gfn) for gfn in roots) or "none"
        injected = " (injected: fail_pages)" if needed <= had else ""
        super().__init__(
            f"shadow pool exhausted{injected}: {needed} pages needed, the pool has {had}; pinned by roots {pinned}"
        )


class AuditError(ShadowcoreError):
    """Invariants do not hold: `violations`, the first of `count`, found at `point` (None: by `vm.audit`).

    From a batch it has `.result`, the operations done, the last of which is the one that was audited; from a
    replay or a run `.record`, the number of the record, or of operations done, and `.audits`, how many were made.

    >>> issubclass(sc.AuditError, sc.ShadowcoreError)
    True
    """

    def __init__(self, violations: tuple[object, ...], count: int | None = None, point: str | None = None) -> None:
        self.violations = violations
        self.count = len(violations) if count is None else count
        self.point = point
        self.result: object = None
        self.record: int | None = None
        self.audits = 0
        first = violations[0] if violations else "none"
        where = "" if point is None else f" at {point}"
        super().__init__(f"{self.count} violation(s){where}, first: {first}")


class PluginError(ShadowcoreError):
    """A policy or decision of another package raised, or answered what is no answer: `plugin`, its name.

    From a batch it has `.result`, the operations done.

    >>> raise sc.PluginError("mine", "KeyError: 3")
    Traceback (most recent call last):
    shadowcore.errors.PluginError: mine: KeyError: 3
    """

    def __init__(self, plugin: str, what: str) -> None:
        self.plugin = plugin
        self.result: object = None
        super().__init__(f"{plugin}: {what}")


class EngineError(ShadowcoreError):
    """The engine caught itself in a state that must not be (an access that never completes): a defect to report.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> vm.on_event(lambda event: vm.read_physical(0, 8))
    >>> cpu.read(0x400000)
    Traceback (most recent call last):
        ...
    shadowcore.errors.EngineError: this VM is in use, ...
    """


class GuestOutOfMemory(ShadowcoreError, MemoryError):
    """The guest kernel has no frame, or no room in one of its tables, for what it was asked; it can go on.

    >>> sc.Kernel(sc.VM("64KiB"))
    Traceback (most recent call last):
        ...
    shadowcore.errors.GuestOutOfMemory: the guest's memory of 65536 bytes does not hold its kernel
    """


class GuestPanic(ShadowcoreError):
    """The guest kernel cannot go on: its tables or registers are not what it made them.

    >>> issubclass(sc.GuestPanic, sc.ShadowcoreError)
    True
    """


class Interrupted(ShadowcoreError, KeyboardInterrupt):
    """Ctrl-C during a batch; `result` holds the operations that were completed.

    It is looked for at least every 0.1 seconds. What else the handler of a signal raises is given a `result` as well.

    >>> issubclass(sc.Interrupted, KeyboardInterrupt)
    True
    """

    def __init__(self, result: object) -> None:
        self.result = result
        super().__init__("interrupted")


class GuestFault(ShadowcoreError):
    """An access that ends in the guest, not here: #PF, #GP or a device.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> try:
    ...     cpu.read(0x500000)
    ... except sc.GuestFault as fault:
    ...     print(type(fault).__name__)
    PageFault
    """


class PageFault(GuestFault):
    """Guest #PF: `address` is the linear address (CR2), `error_code` as in SDM vol. 3, 4.7.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> try:
    ...     cpu.write(0x500000, 1)
    ... except sc.PageFault as fault:
    ...     print(fault)
    #PF at 0x500000, error code 0x2
    """

    def __init__(self, address: int, error_code: int) -> None:
        self.address = address
        self.error_code = error_code
        super().__init__(f"#PF at {address:#x}, error code {error_code:#x}")


class GeneralProtection(GuestFault):
    """Guest #GP, with its error code, and the linear address that no access can have, or None if it came of no access.

    >>> cpu = sc.VM("16MiB").vcpus[0]
    >>> cpu.cr4 = 1 << 40
    Traceback (most recent call last):
        ...
    shadowcore.errors.GeneralProtection: #GP, error code 0x0
    """

    def __init__(self, error_code: int = 0, address: int | None = None) -> None:
        self.error_code, self.address = error_code, address
        super().__init__(f"#GP, error code {error_code:#x}" + ("" if address is None else f", at {address:#x}"))


class UndefinedInstruction(GuestFault):
    """Guest #UD: the processor has no such instruction.

    >>> cpu = sc.VM("16MiB", features=sc.Features(invpcid=False)).vcpus[0]
    >>> cpu.invpcid(2)
    Traceback (most recent call last):
        ...
    shadowcore.errors.UndefinedInstruction: #UD
    """

    def __init__(self) -> None:
        super().__init__("#UD")


class MMIOAccess(GuestFault):
    """The access reaches `gpa`, which is in no memory slot: the embedder's device model has to serve it.

    Nothing was loaded or stored. If the access crosses a page boundary, `gpa` is that of the first byte in no slot, and
    a half that lies in RAM is the embedder's as well, as an access of its own.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64")
    >>> tables.map(0x400000, 0x40000000, 4096, "rw")
    >>> tables.activate(vm.vcpus[0])
    >>> vm.vcpus[0].read(0x400000)
    Traceback (most recent call last):
        ...
    shadowcore.errors.MMIOAccess: device access at gpa 0x40000000
    """

    def __init__(self, gpa: int) -> None:
        self.gpa = gpa
        super().__init__(f"device access at gpa {gpa:#x}")
