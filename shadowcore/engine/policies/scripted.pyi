from typing_extensions import disjoint_base

ANSWERS: tuple[str, ...]

@disjoint_base
class Scripted:
    @property
    def name(self) -> str: ...
