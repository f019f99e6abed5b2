from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

READ: Final[int]
WRITE: Final[int]
FETCH: Final[int]

@disjoint_base
class PageSet:
    def __new__(cls) -> PageSet: ...
    def add(
        self, op: NDArray[Any], size: NDArray[Any], addr: NDArray[Any]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]: ...
    def remove(self, first: int, stop: int) -> None: ...
    def clear(self) -> None: ...
    def __len__(self) -> int: ...
