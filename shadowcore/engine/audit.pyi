from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from typing_extensions import disjoint_base

from ..errors import AuditError
from .invariants import Violation as Violation
from .mmu import Mmu

POINTS: Final[tuple[str, ...]]

@dataclass(frozen=True)
class AuditReport:
    violations: tuple[Violation, ...]
    count: int
    sptes: int

    @property
    def ok(self) -> bool: ...

def audit(mmu: Mmu) -> AuditReport: ...

@disjoint_base
class AuditPoints:
    def __new__(cls, mmu: Mmu) -> Self: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @names.setter
    def names(self, value: Iterable[str]) -> None: ...
    def take(self) -> AuditError | None: ...
