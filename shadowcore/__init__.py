"""Exact, fast, embeddable models of memory virtualization: an x86 shadow paging engine over flat arrays."""

from . import embed, importers, pagetables, programs, recordings, trace, workload
from ._capi import get_include
from ._version import __version__
from .audit import AuditReport, Violation
from .batch import OP_DTYPE
from .config import TLB, Features, MemorySlot, Native, Op, Quirk, Shadow
from .costs import CostBreakdown, Costs
from .errors import (
    AuditError,
    ConfigError,
    EngineError,
    GeneralProtection,
    GuestFault,
    GuestOutOfMemory,
    GuestPanic,
    Interrupted,
    MMIOAccess,
    PageFault,
    PoolExhausted,
    ShadowcoreError,
    SnapshotError,
    TraceError,
)
from .events import Stats
from .guest_options import Call, File, KernelOptions, Program, Prot, Touch
from .kernel import CALL_DTYPE, Kernel
from .machine import VM
from .memory import Memory
from .mmu import Mmu
from .pagetables import PageTables
from .process import Process
from .results import RunResult
from .study import Study, StudyDesign, StudyInterrupted, study
from .vcpu import Translation, VCpu

__all__ = [
    "CALL_DTYPE",
    "OP_DTYPE",
    "TLB",
    "VM",
    "AuditError",
    "AuditReport",
    "Call",
    "ConfigError",
    "CostBreakdown",
    "Costs",
    "EngineError",
    "Features",
    "File",
    "GeneralProtection",
    "GuestFault",
    "GuestOutOfMemory",
    "GuestPanic",
    "Interrupted",
    "Kernel",
    "KernelOptions",
    "MMIOAccess",
    "Memory",
    "MemorySlot",
    "Mmu",
    "Native",
    "Op",
    "PageFault",
    "PageTables",
    "PoolExhausted",
    "Process",
    "Program",
    "Prot",
    "Quirk",
    "RunResult",
    "Shadow",
    "ShadowcoreError",
    "SnapshotError",
    "Stats",
    "Study",
    "StudyDesign",
    "StudyInterrupted",
    "Touch",
    "TraceError",
    "Translation",
    "VCpu",
    "Violation",
    "__version__",
    "embed",
    "get_include",
    "importers",
    "pagetables",
    "programs",
    "recordings",
    "study",
    "trace",
    "workload",
]
