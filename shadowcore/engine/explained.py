"""What design `adaptive` says of a guest table: how it is kept, by which rule, and what it has come to."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("unsync", "emulate", "zap")
"""How a leaf table is kept."""
_SAID = {
    "unsync": "a store lets it run out of sync",
    "emulate": "stores are emulated, and leaves updated in place",
    "zap": "a store zaps what shadows it, and the guest stores by itself until it is used again",
}
REASONS = {
    "first": "nothing has spoken against that yet",
    "short": "it went out of sync for so few stores that to emulate them is cheaper",
    "long": "to emulate its stores has cost more than running out of sync would have",
    "invlpg": "the guest's INVLPGs of entries that nothing used have cost more than to make the used ones again",
    "refaults": "to make it again after each zap has cost more than its INVLPGs did",
    "trial": "it was zapped for so long that it is tried again",
}
"""Why, by the name of the rule."""


@dataclass(frozen=True)
class TableHistory:
    """How design `adaptive` keeps a guest table: `Mmu.explain`. `str` of it is a sentence.

    gfn: of the table. level: the highest that it is shadowed at now, 0: at none. Above 1 stores are emulated, whatever
        was decided while it was a leaf table. known: it has been stored to, and is remembered.
    kept, why: the way, one of WAYS, and the rule that chose it, one of REASONS, as numbers; `way` and `rule` are their
        names.
    balance: cycles that the way has cost more than another would have; past the threshold it changes.
    storm: cycles of INVLPGs that zapping would have spared. doubts: how often the threshold has been doubled, for each
        change that proved wrong. changes: of the way.
    stores: that were emulated. unsyncs: times that it ran out of sync; idle: of these, when nothing was found that had
        needed it. fills: leaves made at faults since it was first stored to. invlpgs: INVLPG exits for it. zaps: of its
        pages.

    >>> sc.VM("16MiB", "adaptive").mmu.explain(7).way
    'unsync'
    """

    gfn: int
    level: int = 0
    known: bool = False
    kept: int = 0
    why: int = 0
    balance: int = 0
    storm: int = 0
    doubts: int = 0
    changes: int = 0
    stores: int = 0
    unsyncs: int = 0
    idle: int = 0
    fills: int = 0
    invlpgs: int = 0
    zaps: int = 0

    @property
    def way(self) -> str:
        """One of WAYS; "emulate" above the leaves."""
        return "emulate" if self.level > 1 else WAYS[self.kept % len(WAYS)]

    @property
    def rule(self) -> str:
        """One of REASONS; "upper" above the leaves."""
        return "upper" if self.level > 1 else list(REASONS)[self.why % len(REASONS)]

    def __str__(self) -> str:
        if self.level > 1:
            told = f"table {self.gfn:#x}: stores are emulated, for it is shadowed at level {self.level}"
        elif not self.known:
            return f"table {self.gfn:#x}: {_SAID['unsync']}, for nothing is known of it"
        else:
            told = f"table {self.gfn:#x}: {_SAID[self.way]}, for {REASONS[self.rule]}"
        return (
            f"{told} ({self.unsyncs} times unsync, {self.idle} for nothing; {self.stores} stores emulated, "
            f"{self.fills} fills, {self.invlpgs} INVLPG exits, {self.zaps} zaps; changed {self.changes} times, "
            f"balance {self.balance} cycles)"
        )
