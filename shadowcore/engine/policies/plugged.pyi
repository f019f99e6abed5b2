from typing_extensions import disjoint_base

@disjoint_base
class Plugged:
    @property
    def name(self) -> str: ...

@disjoint_base
class PluggedPolicy(Plugged): ...

@disjoint_base
class PluggedDecisions(Plugged): ...
