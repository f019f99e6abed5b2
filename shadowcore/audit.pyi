from dataclasses import dataclass
from typing import Final

from .mmu import Mmu

SENTENCES: Final[tuple[str, ...]]

@dataclass(frozen=True)
class Violation:
    invariant: str
    what: str
    page: int | None
    index: int
    gfn: int

@dataclass(frozen=True)
class AuditReport:
    violations: tuple[Violation, ...]
    count: int
    sptes: int

    @property
    def ok(self) -> bool: ...

def audit(mmu: Mmu) -> AuditReport: ...
