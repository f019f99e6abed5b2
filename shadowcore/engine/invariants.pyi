from dataclasses import dataclass
from typing import Final

SENTENCES: Final[tuple[str, ...]]

@dataclass(frozen=True)
class Violation:
    invariant: str
    what: str
    page: int | None
    index: int
    gfn: int
