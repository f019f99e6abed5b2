from typing import Final

SENTENCES: Final[tuple[str, ...]]
