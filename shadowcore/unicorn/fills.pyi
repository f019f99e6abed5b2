from collections.abc import Callable
from typing import final

from ..engine.vcpu import VCpu

def may_store(cpu: VCpu, gva: int, user: bool) -> bool: ...

@final
class Fills:
    error: BaseException | None
    def __init__(
        self,
        cpu: VCpu,
        read: int,
        registers: tuple[int, int, int, int, int],
        other: Callable[[int, int], tuple[int, int] | None],
        is_alone: Callable[[], bool],
        flush: Callable[[], None],
    ) -> None: ...
    def begin(self) -> None: ...
    @property
    def function(self) -> int: ...
    @property
    def data(self) -> int: ...
