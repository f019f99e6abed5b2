from typing import Any, Final

from numpy.typing import NDArray
from typing_extensions import Buffer

MORE: Final[int]
FULL: Final[int]
OTHER: Final[int]
BAD: Final[int]

def parse(
    text: Buffer,
    start: int,
    stop: int,
    kind: NDArray[Any],
    size: NDArray[Any],
    addr: NDArray[Any],
    filled: int,
) -> tuple[int, int, int]: ...
