from typing import Any, SupportsIndex

from numpy.typing import NDArray

from ..engine.machine import VM

def replay(
    vm: VM,
    arrays: dict[str, NDArray[Any]],
    start: SupportsIndex,
    stop: SupportsIndex,
    direct_map: SupportsIndex = 0xFFFF888000000000,
) -> dict[str, Any]: ...
