from collections.abc import Callable, Iterable
from typing import Final, Self

from numpy.typing import ArrayLike
from typing_extensions import disjoint_base

from ..engine.mmu import Mmu
from ..engine.results import RunResult
from ..engine.vcpu import VCpu

EVENTS: Final[tuple[str, ...]]

def access_many(
    cpu: VCpu,
    gva: ArrayLike,
    kind: str | int | ArrayLike = "r",
    *,
    size: int | ArrayLike = 8,
    user: bool | ArrayLike | None = None,
    value: int | ArrayLike | None = None,
    data: bool | None = None,
) -> RunResult: ...

@disjoint_base
class EventHook:
    def __new__(
        cls, mmu: Mmu, function: Callable[[str, int, int | None, int], object], kinds: Iterable[str]
    ) -> Self: ...
    @staticmethod
    def remove(mmu: Mmu) -> None: ...
