from typing_extensions import disjoint_base

ANSWERS: tuple[str, ...]

@disjoint_base
class Plugged:
    @property
    def name(self) -> str: ...

@disjoint_base
class PluggedPolicy(Plugged): ...

@disjoint_base
class PluggedDecisions(Plugged):
    embedder: object
