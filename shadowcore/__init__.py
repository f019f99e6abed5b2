"""Exact, fast, embeddable models of memory virtualization: an x86 shadow paging engine over flat arrays."""

from . import pagetables, trace
from ._version import __version__
from .audit import AuditReport, Violation
from .batch import OP_DTYPE
from .config import TLB, Features, MemorySlot, Native, Op, Quirk, Shadow
from .errors import (
    AuditError,
    ConfigError,
    EngineError,
    GeneralProtection,
    GuestFault,
    Interrupted,
    MMIOAccess,
    PageFault,
    PoolExhausted,
    ShadowcoreError,
    SnapshotError,
    TraceError,
)
from .events import Stats
from .machine import VM
from .memory import Memory
from .mmu import Mmu
from .pagetables import PageTables
from .results import RunResult
from .vcpu import Translation, VCpu

__all__ = [
    "OP_DTYPE",
    "TLB",
    "VM",
    "AuditError",
    "AuditReport",
    "ConfigError",
    "EngineError",
    "Features",
    "GeneralProtection",
    "GuestFault",
    "Interrupted",
    "MMIOAccess",
    "Memory",
    "MemorySlot",
    "Mmu",
    "Native",
    "Op",
    "PageFault",
    "PageTables",
    "PoolExhausted",
    "Quirk",
    "RunResult",
    "Shadow",
    "ShadowcoreError",
    "SnapshotError",
    "Stats",
    "TraceError",
    "Translation",
    "VCpu",
    "Violation",
    "__version__",
    "pagetables",
    "trace",
]
