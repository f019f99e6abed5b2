from typing import Self

from typing_extensions import Buffer, disjoint_base

@disjoint_base
class Held:
    def __new__(cls, array: Buffer) -> Self: ...
