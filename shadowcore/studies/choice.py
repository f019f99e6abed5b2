"""Which design when: every design over every workload and the recording of the package, at three lists of prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ..config import DESIGNS, design
from ..engine.costs import Costs
from ..engine.levels import of_design
from .source import opened
from .study import study

OPERATIONS = 100_000
"""Of each workload; the recording is replayed from end to end."""
PRESETS = ("modern", "pvm", "nested")
LEFT_OUT = ("kvm-2007", "kvm-6.1", "kvm-6.12", "kvm-6.1-tdp", "kvm-6.1-direct")
"""Designs that are others with the defects of a release."""
CLOSE = 1.02
"""Slow-downs that differ by less than this are alike."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """slow: slow-down against `native`, by preset, source and design. exits: for a million operations (guest
    instructions of a recording), by source and design. faults: page faults of the guest, likewise, by source.
    operations: of each workload."""

    slow: dict[str, dict[str, dict[str, float]]]
    exits: dict[str, dict[str, float]]
    faults: dict[str, float]
    operations: int

    @property
    def designs(self) -> tuple[str, ...]:
        """Without `native`."""
        return tuple(next(iter(self.exits.values())))

    def best(self, preset: str, source: str) -> tuple[str, ...]:
        """The designs that take least, those that are alike among them."""
        by = self.slow[preset][source]
        least = min(by.values())
        return tuple(name for name, slow in by.items() if slow <= least * CLOSE)

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        return dataclasses.asdict(self)


def choice(
    sources: Iterable[str | None] | None = None,
    operations: int = OPERATIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Run each source under each design.

    sources: names of workloads, paths of recordings, None: the recording of the package. None: it and all workloads.
    operations: of each workload. progress: called with sources done, and all.
    """
    names = [name for name in DESIGNS if name not in LEFT_OUT]
    slow: dict[str, dict[str, dict[str, float]]] = {preset: {} for preset in PRESETS}
    exits: dict[str, dict[str, float]] = {}
    faults = {}
    for source in opened(sources, progress):
        counted: dict[str, Any] = {}
        if source.kind == "workload":
            counted = {"operations": 2 * operations, "warm_up": operations}
        found = study(source, names, windows=0, **counted)
        native = found.designs["native"]
        others = {name: made for name, made in found.designs.items() if name != "native"}
        per = native.counters.get("instructions") or native.operations
        exits[source.name] = {name: made.exits_per_million for name, made in others.items()}
        faults[source.name] = 1e6 * native.counters["guest_faults"] / per
        for preset in PRESETS:
            costs = Costs.preset(preset)
            slow[preset][source.name] = {}
            for name, made in others.items():
                priced = costs.replace(levels=of_design(costs.levels, design(name).engine))
                known = priced.of(made.counters, native.counters).slow_down
                assert known is not None
                slow[preset][source.name][name] = known
    return Choice(slow, exits, faults, operations)


def page(found: Choice, command: str) -> str:
    """docs/designs.md."""
    parts = [_HEAD.format(command=command, operations=f"{found.operations:,}")]
    for preset in PRESETS:
        costs = Costs.preset(preset)
        parts.append(f"\n## At the prices of {preset}\n\n{_ABOUT[preset].format(name=costs.name)}\n\n")
        heads = ("", *(f"`{name}`" for name in found.designs))
        parts.append(f"| {' | '.join(heads)} |\n|---|{'--:|' * len(found.designs)}\n")
        for source, by in found.slow[preset].items():
            best = found.best(preset, source)
            cells = [f"**{slow:.2f}**" if name in best else f"{slow:.2f}" for name, slow in by.items()]
            parts.append(f"| {source} | {' | '.join(cells)} |\n")
        parts.append("\n" + _counted(found, preset))
    parts.append(
        "\n## Exits\n\nVM exits, and page faults of the guest itself, for a million operations (of the recording: "
    )
    parts.append("guest instructions).\n\n")
    parts.append(f"| | faults | {' | '.join(f'`{name}`' for name in found.designs)} |\n")
    parts.append(f"|---|--:|{'--:|' * len(found.designs)}\n")
    for source, counts in found.exits.items():
        cells = [f"{found.faults[source]:,.0f}", *(f"{count:,.0f}" for count in counts.values())]
        parts.append(f"| {source} | {' | '.join(cells)} |\n")
    return "".join(parts)


def _counted(found: Choice, preset: str) -> str:
    """How often each design is among the best, and by what it loses elsewhere."""
    lines = []
    by_source = found.slow[preset]
    for name in found.designs:
        won = [source for source in by_source if name in found.best(preset, source)]
        worst = max(by_source, key=lambda source: by_source[source][name] / min(by_source[source].values()))
        times = by_source[worst][name] / min(by_source[worst].values())
        told = f"- `{name}` is among the best on {len(won)} of {len(by_source)}"
        told += f"; at worst ({worst}) it takes {times:.1f} times as long as the best.\n" if times > CLOSE else ".\n"
        lines.append(told)
    return "".join(lines)


_ABOUT = {
    "modern": "One hypervisor on the hardware (`{name}`). Bold: the best, and what is within 2 percent of it.",
    "pvm": "A guest in user mode, below which there is no exit of the hardware (`{name}`).",
    "nested": "A hypervisor that is itself a guest (`{name}`).",
}
_HEAD = """\
# Which design when

<!-- Made by: {command} -->

Every design over every workload and the recording of the package: {operations} operations of a workload, after its
setup and as many that warm it up; the recording from end to end. Slow-downs are against `native`, which has no
hypervisor, and estimated: counts times prices, of which [validity.md](validity.md) says how far they carry.
[workloads.md](workloads.md) has the workloads, [studies.md](studies.md#prices-with-sources) the prices. Made by
`{command}`.

Three rules come out of it:

- **Who loads CR3 often** (switches between processes, system calls under isolation) must not lose the shadow for it:
  `flush` is the worst there by far.
- **Who edits page tables often** (demand paging, fork and exec, unmapping) is what shadow paging pays for: twice for
  each page under `unsync`, three times under `cached`, whose tables stay write-protected. A process that runs alone is
  as well off under `flush`, which protects none.
- **Who does neither** (a database, a scan, idle time) does not care: what is left is TLB misses, which shadow tables do
  not make dearer.

The guest of a workload does little else than what the workload is about: a slow-down of 10 is one of that part of a
program. `nested` is hardware that every server has and a guest of a cloud may not have; `agile` needs a processor that
nobody has built; `adaptive` is a proposal of this project, for a processor as it is.
"""
