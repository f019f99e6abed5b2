from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

def misses(policy: str, pages: SupportsIndex, references: NDArray[Any], seed: SupportsIndex = 0) -> int: ...
def stack_distances(references: NDArray[Any]) -> NDArray[np.uint64]: ...
