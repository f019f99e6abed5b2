"""What predictions of published figures are made of: rows, what a workload counts under a hypervisor, and its prices.

What a guest's own work takes is not the engine's. A figure is that of the row's `kvm-ept` column, less what EPT costs
there, and on top what the column's hypervisor costs: counts of the engine times prices. Prices are calibrated on round
trips of exits and on getpid (engine.presets); no price is set by a figure that is predicted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import design
from ..engine.costs import Costs
from ..engine.machine import VM
from ..guest.kernel import Kernel
from ..guest.options import KernelOptions
from ..workload import WORKLOADS, Guest
from . import published as seen

SOURCES = {"pvm-2023": seen.PVM, "shadowbox-2026": seen.SHADOWBOX}
"""By name, where what is predicted was measured. "molnar-2007" is studies.reproduction's."""
FAR = 20.0
"""Percent from which a row is told why."""
ISOLATED = {"isolation": True, "pcid": True}
Counts = dict[str, float]
"""Counters of the engine, of one page, call or process."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A published figure beside its prediction.

    table, test, column: where it stands. unit: of both. kind: "predicted"; "given": the column that the others of the
    row start from; "calibrates": a price was made of it. counts: what the engine counted for it, by name. why: what a
    miss of more than FAR percent is put down to; empty elsewhere.
    """

    table: str
    test: str
    column: str
    unit: str
    published: float
    predicted: float
    kind: str = "predicted"
    counts: Counts = dataclasses.field(default_factory=dict)
    why: str = ""

    @property
    def error(self) -> float:
        """In percent of the published figure; of a share, which is in percent itself, the difference."""
        difference = self.predicted - self.published
        return difference if self.unit == "%" else 100 * difference / self.published

    @property
    def far(self) -> bool:
        """A prediction that misses by more than FAR percent."""
        return self.kind == "predicted" and abs(self.error) > FAR


@dataclasses.dataclass(frozen=True)
class Validity:
    """All rows of a source, in the order of its tables."""

    source: str
    rows: tuple[Row, ...]

    @property
    def predicted(self) -> tuple[Row, ...]:
        """Without those that calibrate or are given."""
        return tuple(row for row in self.rows if row.kind == "predicted")

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        rows = [dataclasses.asdict(row) | {"error_percent": row.error} for row in self.rows]
        return {"source": self.source, "where": SOURCES[self.source], "rows": rows}


class Machine:
    """Runs workloads and keeps what they counted."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._known: dict[Any, Counts] = {}
        self._step = step

    def counts(
        self,
        name: str,
        mmu: str,
        unit: float,
        rounds: int = 3,
        warm: int = 2,
        *,
        isolated: bool = False,
        backing: str = "warm",
        host: str = "2MiB",
        vcpus: int = 1,
        memory: str | None = None,
        parameters: dict[str, int] | None = None,
        every: int = 1,
        seed: int = 0,
        **settings: Any,
    ) -> Counts:
        """Counters of `rounds` rounds, after `warm` that are not counted, divided by rounds and `unit`. every: of the
        parts of a round only the first of so many is counted."""
        key = (
            name,
            mmu,
            unit,
            rounds,
            warm,
            isolated,
            backing,
            host,
            vcpus,
            memory,
            every,
            seed,
            repr((parameters, settings)),
        )
        if key in self._known:
            return self._known[key]
        workload = WORKLOADS[name]
        chosen = design(mmu, **settings)
        vm = VM(memory or workload.memory, chosen, vcpus, host_page_size=host, backing=backing)
        options = workload.options | (ISOLATED if isolated else {})
        kernel = Kernel(vm, KernelOptions(**options))
        steps = workload.function(Guest(kernel, np.random.default_rng(seed)), **workload.checked(parameters or {}))
        for _ in range(1 + warm * every):
            next(steps)
        total: Counts = {}
        for _ in range(rounds):
            before = _all(vm, kernel)
            next(steps)
            for counter, count in _all(vm, kernel).items():
                total[counter] = total.get(counter, 0) + count - before[counter]
            for _ in range(every - 1):
                next(steps)
        found = {counter: count / rounds / unit for counter, count in total.items()}
        self._known[key] = found
        self._step()
        return found


def _all(vm: VM, kernel: Kernel) -> dict[str, int]:
    guest = kernel.counters
    return vm.stats.as_dict() | {
        "operations": guest["accesses"] + guest["kernel_accesses"] + guest["cr3_loads"] + guest["invlpg"],
        "guest_cr3_loads": guest["cr3_loads"],
        "guest_invlpg": guest["invlpg"],
        "guest_faults": guest["faults"],
    }


_BIG = 1_000_000
"""Counts of a page are fractions; prices take whole numbers, of so many pages."""
_NOT_OURS = ("work", "translation")


def microseconds(costs: Costs, counts: Counts) -> float:
    """What a hypervisor, and the guest's own loads of registers and faults, cost: not its work."""
    breakdown = costs.of({name: max(0, round(count * _BIG)) for name, count in counts.items()})
    cycles = sum(part for name, part in breakdown.components.items() if name not in _NOT_OURS)
    return cycles / costs.clock_ghz / 1000 / _BIG


SHOWN = {
    "exits_guest": "passed on",
    "exits_fill": "fills",
    "exits_write": "rights",
    "exits_emulate": "emulated",
    "exits_cr3": "CR3",
    "exits_invlpg": "INVLPG",
    "npf_violation": "EPT violations",
    "host_faults": "first touches",
}
"""Counters that rows show."""


def shown(counts: Counts) -> Counts:
    """By the names of SHOWN. Under nested paging fills and rights are EPT violations, and told once."""
    left_out = ("exits_fill", "exits_write") if counts.get("npf_violation") else ()
    return {
        label: round(counts[name], 4)
        for name, label in SHOWN.items()
        if name not in left_out and counts.get(name, 0) > 0.00005
    }


class Column:
    """A hypervisor: what a workload counts under it, and prices."""

    def __init__(self, machine: Machine, costs: Costs, mmu: str, isolated: bool) -> None:
        self.machine, self.costs, self.mmu, self.isolated = machine, costs, mmu, isolated

    def counts(self, name: str, unit: float, **how: Any) -> Counts:
        """Of one `unit`. Under PVM the guest has no isolation of its own, for the two halves of each address space have
        roots anyway: what an isolated guest loads natively is switched without an exit."""
        found = dict(self.machine.counts(name, self.mmu, unit, isolated=self.isolated, **how))
        if self.costs.levels.control == "user":
            native = self.machine.counts(name, "native", unit, isolated=True, **how)
            found["guest_cr3_loads"] = native["guest_cr3_loads"]
        return found

    def microseconds(self, counts: Counts) -> float:
        return microseconds(self.costs, counts)


def ept(machine: Machine, costs: Costs, isolated: bool) -> Column:
    """EPT: nested paging."""
    return Column(machine, costs, "nested", isolated)


Counted = Callable[[Column], Counts]


def across(
    columns: dict[str, Column],
    table: str,
    test: str,
    unit: str,
    published: dict[str, float],
    counted: Counted,
    scale: float = 1.0,
    why: dict[str, str] | None = None,
) -> list[Row]:
    """A row of a table: its first column is given, the others follow. scale: units of the table in a microsecond."""
    base_name, base = next(iter(published.items()))
    counts = counted(columns[base_name])
    own = base - scale * columns[base_name].microseconds(counts)
    rows = [Row(table, test, base_name, unit, base, base, "given", shown(counts))]
    for name, value in list(published.items())[1:]:
        counts = counted(columns[name])
        predicted = own + scale * columns[name].microseconds(counts)
        row = Row(table, test, name, unit, value, predicted, counts=shown(counts))
        rows.append(dataclasses.replace(row, why=(why or {}).get(name, "")) if row.far else row)
    return rows


SWITCH = (
    "no exits are counted: what is predicted is a guest that loads two roots; PVM's switcher crosses rings twice a call"
)
SMALL = (
    "the exits are those of a process of the size that is assumed here; the process that was measured is not "
    "described, and each page more that it copies or reads takes two exits, or four under isolation"
)
"""Why they are missed: what several tables share."""
