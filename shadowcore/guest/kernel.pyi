from typing import Any, Final, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..engine.machine import VM
from .kernel_base import COUNTERS as COUNTERS
from .kernel_base import KernelBase
from .options import File, KernelOptions, Program
from .process import Process

CALL_DTYPE: Final[np.dtype[np.void]]
MAPPING_DTYPE: Final[np.dtype[np.void]]
NO_PROGRAM: Final[int]
__all__: Final = ["CALL_DTYPE", "COUNTERS", "MAPPING_DTYPE", "NO_PROGRAM", "Kernel"]

class Kernel(KernelBase):
    def __new__(cls, vm: VM, options: KernelOptions | None = None) -> Kernel: ...
    def run(self, calls: NDArray[np.void]) -> NDArray[np.uint64]: ...
    def call(
        self,
        op: SupportsIndex,
        process: SupportsIndex = 0,
        addr: SupportsIndex = 0,
        count: SupportsIndex = 0,
        value: SupportsIndex = 0,
        *,
        flags: SupportsIndex = 0,
        size: SupportsIndex = 8,
        prot: SupportsIndex = 0,
    ) -> int: ...
    def free_number(self) -> int: ...
    def spawn(self, program: Program | None = None) -> Process: ...
    def switch(self, process: Process | None) -> None: ...
    def file(self, pages: SupportsIndex, zero: bool = False, large: bool = False) -> File: ...
    def discard(self, file: File) -> int: ...
    def program(
        self,
        text: SupportsIndex = 64,
        data: SupportsIndex = 16,
        bss: SupportsIndex = 16,
        library: Program | None = None,
    ) -> Program: ...
    def pipe(self) -> int: ...
    @property
    def processes(self) -> list[Process]: ...
    @property
    def current(self) -> Process | None: ...
    def _file(self, file: File) -> int: ...
    def _program(self, program: Program | None) -> int: ...
    def state_of(self, number: SupportsIndex, generation: int) -> dict[str, Any]: ...
    def generation_of(self, number: SupportsIndex) -> int: ...
    def access(
        self,
        number: SupportsIndex,
        addresses: ArrayLike,
        write: bool | NDArray[np.bool_] | NDArray[np.uint8],
        values: ArrayLike | None,
        size: int,
        results: bool,
    ) -> Any: ...
    def replay(self, number: SupportsIndex, op: ArrayLike, size: ArrayLike, addr: ArrayLike) -> int: ...
