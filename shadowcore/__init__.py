"""Exact, fast, embeddable models of memory virtualization: an x86 shadow paging engine over flat arrays."""

from . import embed, importers, pagetables, programs, recordings, trace, workload
from ._capi.table import get_include
from ._version import __version__
from .config import TLB, Features, MemorySlot, Native, Op, Quirk, Shadow
from .engine.audit import AuditReport, Violation
from .engine.batch import OP_DTYPE
from .engine.costs import CostBreakdown, Costs
from .engine.counters import Stats
from .engine.levels import Levels
from .engine.machine import VM
from .engine.memory import Memory
from .engine.mmu import Mmu
from .engine.results import RunResult
from .engine.translation import Translation
from .engine.vcpu import VCpu
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
from .guest.kernel import CALL_DTYPE, Kernel
from .guest.options import Call, File, KernelOptions, Program, Prot, Touch
from .guest.process import Process
from .pagetables import PageTables
from .studies.access import AccessExplanation, explain
from .studies.collect import Sweep, collect
from .studies.results import Study, StudyDesign, Swept
from .studies.spread import SweepError
from .studies.store import StoreError
from .studies.study import StudyInterrupted, compare, study
from .studies.sweep import SweepInterrupted, sweep

__all__ = [
    "CALL_DTYPE",
    "OP_DTYPE",
    "TLB",
    "VM",
    "AccessExplanation",
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
    "Levels",
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
    "StoreError",
    "Study",
    "StudyDesign",
    "StudyInterrupted",
    "Sweep",
    "SweepError",
    "SweepInterrupted",
    "Swept",
    "Touch",
    "TraceError",
    "Translation",
    "VCpu",
    "Violation",
    "__version__",
    "collect",
    "compare",
    "embed",
    "explain",
    "get_include",
    "importers",
    "pagetables",
    "programs",
    "recordings",
    "study",
    "sweep",
    "trace",
    "workload",
]


def __dir__() -> list[str]:
    """What is public; the packages behind it are found by name."""
    return __all__
