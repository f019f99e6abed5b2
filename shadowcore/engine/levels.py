"""What runs below a guest: the processor alone, one hypervisor, or one that is itself a guest of another.

How often the processor changes between worlds for an exit is a count, and says nothing of what a change costs: prices
are in `costs`. The counts are those of Huang et al., "PVM: Efficient Shadow Paging for Deploying Secure Containers in
Cloud-native Environment", SOSP 2023; with n levels of tables missing, a first touch takes there:

    shadow on EPT   4n + 8 switches, 2n + 4 exits to the outer hypervisor
    EPT on EPT      2n + 6 switches, n + 3
    PVM on EPT      2n + 4 switches, none
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from ..errors import ConfigError

PAGING = ("none", "shadow", "ept")
CONTROL = ("none", "hardware", "user")
_MOST = 1 << 20


@dataclasses.dataclass(frozen=True)
class Levels:
    """Hypervisors below a guest, and the changes between worlds that an exit takes. Presets: LEVELS, by name.

    name: what reports call it.
    hypervisors: 0, 1, or 2 where the guest's hypervisor is a guest of an outer one, which gives it EPT.
    paging: how the guest's hypervisor maps its memory: "none" (there is no hypervisor), "shadow", "ept".
    control: how that hypervisor takes control: "none", "hardware" (VM exits), or "user" (the guest's kernel runs in
        user mode, as under PVM, so that an exit is an exception, a system call or an interrupt).

    Counts, each for one event; defaults by the fields above:

    exit_switches: changes of world for an exit to the guest's hypervisor, there and back: 2; 4 where hardware gives
        each exit to the outer hypervisor first.
    exit_outer: exits to the outer hypervisor among them: 2 (one to be passed on, one to come back), else 0.
    violation_switches, violation_outer: of an EPT violation, beside the tables: 2 and 0; 6 and 3 for EPT on EPT.
    table_switches, table_outer: of each table of the guest's hypervisor that has to be changed for a violation: 2 and 1
        for EPT on EPT, whose tables the outer hypervisor shadows; else 0.
    backing_switches: of a page that the outer hypervisor has to find first: 2 where there is one, else 0. It is one
        exit.

    ConfigError for fields that contradict each other.

    >>> sc.Costs.preset("nested").levels.exit_switches
    4
    """

    name: str
    hypervisors: int
    paging: str
    control: str
    exit_switches: int | None = None
    exit_outer: int | None = None
    violation_switches: int | None = None
    violation_outer: int | None = None
    table_switches: int | None = None
    table_outer: int | None = None
    backing_switches: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"levels.name: a text is needed, not {self.name!r:.60}")
        _count("hypervisors", self.hypervisors, 2)
        for field, names in (("paging", PAGING), ("control", CONTROL)):
            if getattr(self, field) not in names:
                raise ConfigError(f"levels.{field}: {getattr(self, field)!r:.60} is not one of {', '.join(names)}")
        none = self.hypervisors == 0
        for field in ("paging", "control"):
            if (getattr(self, field) == "none") is not none:
                raise ConfigError(
                    f"levels.{field}: {getattr(self, field)!r} contradicts hypervisors: {self.hypervisors}"
                )
        if self.control == "user" and self.paging == "ept":
            raise ConfigError("levels.paging: 'ept' contradicts control: 'user', which has no second dimension")
        nested = self.hypervisors == 2
        carried = nested and self.control == "hardware"
        ept, both = self.paging == "ept", self.paging == "ept" and nested
        for field, default, there_are, what in (
            ("exit_switches", 4 if carried else 2, not none, "there is no hypervisor"),
            ("exit_outer", 2, carried, "no outer hypervisor carries exits"),
            ("violation_switches", 6 if both else 2, ept, "there are no EPT violations"),
            ("violation_outer", 3, both, "there is no EPT below EPT"),
            ("table_switches", 2, both, "no outer hypervisor shadows tables"),
            ("table_outer", 1, both, "no outer hypervisor shadows tables"),
            ("backing_switches", 2, nested, "there is no outer hypervisor"),
        ):
            value = getattr(self, field)
            if value is None:
                object.__setattr__(self, field, default if there_are else 0)
            else:
                _count(field, value, _MOST)
                if value and not there_are:
                    raise ConfigError(f"levels.{field}: {value} contradicts the rest: {what}")
        for switches, outer in (("exit_switches", "exit_outer"), ("violation_switches", "violation_outer")):
            if getattr(self, outer) * 2 > getattr(self, switches):
                raise ConfigError(
                    f"levels.{outer}: {getattr(self, outer)} exits take {2 * getattr(self, outer)} switches at least, "
                    f"and {switches} is {getattr(self, switches)}"
                )

    @property
    def nested(self) -> bool:
        """The guest's hypervisor is a guest itself."""
        return self.hypervisors == 2

    def counts(self, exits: int = 0, violations: int = 0, tables: int = 0, backed: int = 0) -> tuple[int, int]:
        """Changes of world, and exits to the outer hypervisor among them, of so many exits that are no EPT violations,
        EPT violations, tables changed for these, and pages that the outer hypervisor found first."""
        n = {name: int(value) for name, value in dataclasses.asdict(self).items() if isinstance(value, int)}
        switches = exits * n["exit_switches"] + violations * n["violation_switches"] + tables * n["table_switches"]
        outer = exits * n["exit_outer"] + violations * n["violation_outer"] + tables * n["table_outer"]
        return switches + backed * n["backing_switches"], outer + (backed if self.nested else 0)

    def first_touch(self, missing: int) -> tuple[int, int]:
        """The same of a guest's first touch of a page with so many levels of tables missing, by the paper's formulas: a
        store for each of them that exits, the guest's fault, and the hypervisor's; or one EPT violation."""
        if self.paging == "ept":
            return self.counts(violations=1, tables=missing if self.nested else 0)
        return self.counts(exits=missing + 2)

    def replace(self, **changes: Any) -> Levels:
        """The same with some fields changed. ConfigError for one that there is not."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"levels: there is no {name!r}; there are {', '.join(known)}")
        return dataclasses.replace(self, **changes)


def _count(field: str, value: object, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ConfigError(f"levels.{field}: a number from 0 to {most} is needed, not {value!r:.60}")


LEVELS = {
    made.name: made
    for made in (
        Levels("none", 0, "none", "none"),
        Levels("shadow", 1, "shadow", "hardware"),
        Levels("ept", 1, "ept", "hardware"),
        Levels("pvm", 1, "shadow", "user"),
        Levels("shadow-on-ept", 2, "shadow", "hardware"),
        Levels("ept-on-ept", 2, "ept", "hardware"),
        Levels("pvm-on-ept", 2, "shadow", "user"),
    )
}
"""By name."""


def of_design(levels: Levels, engine: str) -> Levels:
    """What lies below where the design is made in engine/designs/`engine`: `levels`, or, for nested paging, as many
    hypervisors with EPT in the place of shadow tables."""
    if engine != "nested" or levels.paging == "ept":
        return levels
    return LEVELS["ept-on-ept" if levels.nested else "ept"]


def find_levels(levels: Levels | str) -> Levels:
    """The preset of that name, or the given Levels. ConfigError, with the nearest name, for another."""
    if isinstance(levels, Levels):
        return levels
    if isinstance(levels, str) and levels in LEVELS:
        return LEVELS[levels]
    near = difflib.get_close_matches(levels, LEVELS, 1) if isinstance(levels, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(LEVELS)}"
    raise ConfigError(f"levels: there is no {levels!r:.60}{hint}")
