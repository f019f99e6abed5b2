"""Exact, fast, embeddable models of memory virtualization: an x86 shadow paging engine over flat arrays."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import TLB, Features, MemorySlot, Native, Nested, Op, Quirk, Shadow
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
    PluginError,
    PoolExhausted,
    ShadowcoreError,
    SnapshotError,
    TraceError,
    UndefinedInstruction,
)
from .plugins import Decisions, Policy, TableStore

if TYPE_CHECKING:
    from . import embed, importers, pagetables, programs, recordings, trace, workload
    from ._capi.table import get_include
    from .engine.audit import AuditReport, Violation
    from .engine.batch import OP_DTYPE
    from .engine.costs import CostBreakdown, Costs
    from .engine.counters import Stats
    from .engine.exitlog import ExitLog
    from .engine.levels import Levels
    from .engine.machine import VM
    from .engine.memory import Memory
    from .engine.mmu import Mmu
    from .engine.results import RunResult
    from .engine.tlbs import ProcessorTLB, TLBBank
    from .engine.translation import Translation
    from .engine.vcpu import VCpu
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
    "Decisions",
    "EngineError",
    "ExitLog",
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
    "Nested",
    "Op",
    "PageFault",
    "PageTables",
    "PluginError",
    "Policy",
    "PoolExhausted",
    "Process",
    "ProcessorTLB",
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
    "TLBBank",
    "TableStore",
    "Touch",
    "TraceError",
    "Translation",
    "UndefinedInstruction",
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


_LATER = {
    **dict.fromkeys(("embed", "importers", "pagetables", "programs", "recordings", "trace", "workload"), ""),
    "get_include": "._capi.table",
    **dict.fromkeys(("AuditReport", "Violation"), ".engine.audit"),
    "OP_DTYPE": ".engine.batch",
    **dict.fromkeys(("CostBreakdown", "Costs"), ".engine.costs"),
    "Stats": ".engine.counters",
    "Levels": ".engine.levels",
    "VM": ".engine.machine",
    "Memory": ".engine.memory",
    "Mmu": ".engine.mmu",
    "RunResult": ".engine.results",
    **dict.fromkeys(("ProcessorTLB", "TLBBank"), ".engine.tlbs"),
    "Translation": ".engine.translation",
    "VCpu": ".engine.vcpu",
    "ExitLog": ".engine.exitlog",
    "PageTables": ".pagetables",
    **dict.fromkeys(("CALL_DTYPE", "Kernel"), ".guest.kernel"),
    **dict.fromkeys(("Call", "File", "KernelOptions", "Program", "Prot", "Touch"), ".guest.options"),
    "Process": ".guest.process",
    **dict.fromkeys(("AccessExplanation", "explain"), ".studies.access"),
    **dict.fromkeys(("Study", "StudyDesign", "Swept"), ".studies.results"),
    **dict.fromkeys(("StudyInterrupted", "compare", "study"), ".studies.study"),
    **dict.fromkeys(("Sweep", "collect"), ".studies.collect"),
    "SweepError": ".studies.spread",
    "StoreError": ".studies.store",
    **dict.fromkeys(("SweepInterrupted", "sweep"), ".studies.sweep"),
}
"""What is imported at its first use: the module that has it, or "" for a module. Settings and errors are here at once:
they are all that a command needs to print its help, and they need no numpy."""


def __getattr__(name: str) -> Any:
    """A name of _LATER: imported, and from then on found here (PEP 562)."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    where = _LATER[name]
    found = getattr(import_module(where, __name__), name) if where else import_module(f".{name}", __name__)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """What is public; the packages behind it are found by name."""
    return __all__
