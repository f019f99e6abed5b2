from collections.abc import Callable, Iterable
from typing import Final, Self

from typing_extensions import disjoint_base

from .mmu import Mmu

EVENTS: Final[tuple[str, ...]]

@disjoint_base
class EventHook:
    def __new__(
        cls, mmu: Mmu, function: Callable[[str, int, int | None, int, int], object], kinds: Iterable[str]
    ) -> Self: ...
    @staticmethod
    def remove(mmu: Mmu) -> None: ...
