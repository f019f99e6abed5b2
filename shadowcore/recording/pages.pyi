from typing import Any, Final

from numpy.typing import NDArray

PAGES_MAX: Final[int]

def split_pages(addr: NDArray[Any], pages: NDArray[Any], index: NDArray[Any], offset: NDArray[Any]) -> int: ...
def join_pages(pages: NDArray[Any], index: NDArray[Any], offset: NDArray[Any], addr: NDArray[Any]) -> int: ...
