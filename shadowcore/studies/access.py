"""One access explained in full: the guest's walk and the shadow's, what the access would do, what the guest would see.

It is done on a copy of the machine, so what is said is what the engine does, and the machine stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from .. import embed, notebook
from ..config import Shadow, check_int
from ..engine import snapshot
from ..engine.machine import VM
from ..errors import ConfigError, GeneralProtection, MMIOAccess, PageFault
from ..pagetables import PS, P
from .explain import ACCESS_NAMES, ENTRY_NAMES, Access, Explanation
from .explain import explain as walked
from .words import (
    ADDRESS,
    EXITS,
    IN_SYNC,
    UNSYNC,
    bits_set,
    gfn_of,
    role_words,
    spte_words,
    target,
    write_protected,
)


@dataclass(frozen=True)
class ShadowStep:
    """One entry of the shadow's walk.

    level: of its page. page: number of the page in the pool; role: what the page stands for, in words.
    index: of the entry in it. entry: its value; bits: in words. leads_to: what it points to, or why the walk ends.
    """

    level: int
    page: int
    role: str
    index: int
    entry: int
    bits: tuple[str, ...]
    leads_to: str


@dataclass(frozen=True)
class AccessExplanation:
    """What `explain` returns. It prints as text, shows as two columns in notebooks, and is `as_dict()` in plain types.

    gva, access ("r", "w", "x"), user, vcpu, size (bytes), design: what was asked, of which machine.
    guest: the guest's walk (None: paging is off). shadow: the shadow's, before the access (None: a design without one);
    after: the same afterwards.
    exits: VM exits by reason, in the order in which they happen. tlb_hit: the modelled TLB had the translation.
    changes: what the access changes, a sentence each, in the MMU and in the guest's tables.
    counters: what counters grow by. outcome: "done", "#PF", "#GP" or "device".
    gpa: that is reached (None: none). value: what a read returns. error_code: of a fault. sees: what the guest sees.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> found = sc.explain(vm, 0x401000)
    >>> found.design, found.access, found.guest.mode
    ('cached', 'r', '64')
    >>> len(found.guest.steps)
    4
    """

    gva: int
    access: Access
    user: bool
    vcpu: int
    size: int
    design: str
    guest: Explanation | None
    shadow: tuple[ShadowStep, ...] | None
    after: tuple[ShadowStep, ...] | None
    exits: tuple[str, ...]
    tlb_hit: bool
    changes: tuple[str, ...]
    counters: dict[str, int] = field(repr=False)
    outcome: str
    gpa: int | None
    value: int | None
    error_code: int | None
    sees: str

    @property
    def hit(self) -> bool:
        """No exit: the processor does it alone."""
        return not self.exits

    def verdict(self) -> list[str]:
        """Whether it hits; which exits, and why."""
        if self.hit and self.outcome == "#GP":
            return ["no exit: the processor refuses the address before any walk"]
        if self.hit and self.outcome == "#PF" and self.shadow is not None:
            return ["no exit: the processor delivers the fault by itself"]
        if self.tlb_hit and self.hit:
            return ["hit: the TLB has the translation"]
        if self.hit and self.shadow is None:
            return ["no exit: the processor walks the guest's own tables"]
        if self.hit:
            return ["hit: the shadow's tables serve, no exit"]
        return [EXITS.get(reason, f"an exit: {reason}") for reason in self.exits]

    def lines(self) -> list[str]:
        """The explanation as text, a line each."""
        lines = [self._title(), "", "THE GUEST'S WALK"]
        lines += ["paging is off: the gpa is the linear address"] if self.guest is None else self.guest.lines()
        if self.shadow is not None:
            lines += ["", "THE SHADOW'S WALK"]
            for step in self.shadow:
                lines += _shadow_lines(step)
            lines += [] if self.shadow else ["no root: the next entry to the guest makes one"]
        lines += ["", "WHAT THE ACCESS WOULD DO", *self.verdict()]
        lines += [f"  - {change}" for change in self.changes] or ["  - nothing changes"]
        return [*lines, "", "WHAT THE GUEST WOULD SEE", self.sees]

    def _title(self) -> str:
        who = "user" if self.user else "supervisor"
        size = "" if self.access == "x" else f" of {self.size} byte{'s' * (self.size > 1)}"
        return f"{who} {ACCESS_NAMES[self.access]}{size} at gva {self.gva:#x}, design {self.design}"

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def as_dict(self) -> dict[str, Any]:
        """The explanation in plain types, as `shadowcore explain --json` prints it."""
        plain = vars(self) | {"hit": self.hit, "verdict": self.verdict()}
        plain["guest"] = None if self.guest is None else self.guest.as_dict()
        for name in ("shadow", "after"):
            steps = plain[name]
            plain[name] = None if steps is None else [vars(step) | {"bits": list(step.bits)} for step in steps]
        return plain | {"exits": list(self.exits), "changes": list(self.changes)}

    def html(self) -> str:
        """The explanation as a part of a page: the two walks in columns, then what happens."""
        guest = [] if self.guest is None else [_cell(_guest_lines(step)) for step in self.guest.steps]
        shadow = [] if self.shadow is None else [_cell(_shadow_lines(step)) for step in self.shadow]
        if self.guest is None:
            guest = [_cell(["paging is off"])]
        if self.shadow is None:
            shadow = [_cell([f"{self.design} has no shadow"])]
        walks = notebook.columns(self._title(), {"the guest's walk": guest, "the shadow's walk": shadow})
        said = [] if self.guest is None else self.guest.lines()
        end = said[len(said) - said[::-1].index("") :] if said else []
        parts = {"the guest's tables say": end, "the access would do": [*self.verdict(), *self.changes]}
        parts["the guest would see"] = [self.sees]
        return walks + "".join(
            f"<p><b>{escape(name)}</b></p><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
            for name, lines in parts.items()
            if lines
        )

    def page(self) -> str:
        """The explanation as a page of its own, which fetches nothing."""
        head = f'<meta charset="utf-8"><title>{escape(self._title())}</title>'
        style = "<style>body{font-family:sans-serif}td{padding:.5em;border:1px solid #ccc}</style>"
        return f"<!DOCTYPE html>\n<html><head>{head}{style}</head><body>{self.html()}</body></html>\n"

    def _repr_html_(self) -> str:
        return self.html()


def explain(
    vm: VM, gva: int, access: Access = "r", user: bool | None = None, *, vcpu: int = 0, size: int | None = None
) -> AccessExplanation:
    """One access of a machine in full: both walks entry by entry, hit or exit and why, what the MMU would change, and
    what the guest would see. The machine stays as it is: the access is done on a copy, which takes as much memory again
    as the guest uses.

    gva: linear address. access: "r", "w" or "x". user: None: by cpu.cpl. vcpu: number of the processor.
    size: bytes, 1, 2, 4 or 8 (None: as many as the address is aligned to). A write stores what is there already.
    ConfigError for what cannot be asked; PoolExhausted where the access would meet it.

    >>> vm = sc.VM("16MiB")
    >>> tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    >>> tables.map(0x400000, 0x200000, 0x10000, "rw")
    >>> cpu = vm.vcpus[0]
    >>> tables.activate(cpu)
    >>> sc.explain(vm, 0x401000, "w").guest.steps[0].leads_to
    'leads to the level 3 table at gpa 0x101000'
    """
    if access not in ACCESS_NAMES:
        raise ConfigError(f"access: one of r, w, x is needed, not {access!r:.40}")
    check_int("gva", gva, 0, (1 << 64) - 1)
    check_int("vcpu", vcpu, 0, len(vm.vcpus) - 1)
    if size is None:
        size = min(8, gva & -gva or 8)
    if size not in (1, 2, 4, 8):
        raise ConfigError(f"size: 1, 2, 4 or 8 bytes are needed, not {size!r:.40}")
    cpu = vm.vcpus[vcpu]
    user = cpu.cpl == 3 if user is None else bool(user)
    guest = None if cpu.mode == "off" else walked(vm, gva, access, user, vcpu)
    twin = snapshot.copy(VM, vm)
    before = twin.stats.as_dict()
    exits: list[str] = []
    embed.on_event(twin, lambda event: exits.append(str(event.detail)), "exit")
    try:
        result = _do(twin, vcpu, gva, access, user, size)
    finally:
        embed.on_event(twin, None)
    after = twin.stats.as_dict()
    counters = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    outcome, gpa, value, code, sees = result
    return AccessExplanation(
        gva=gva,
        access=access,
        user=user,
        vcpu=vcpu,
        size=size,
        design=vm.mmu.design.name,
        guest=guest,
        shadow=_walk(vm, vcpu, gva),
        after=_walk(twin, vcpu, gva),
        exits=tuple(exits),
        tlb_hit=bool(counters.get("tlb_hits")),
        changes=tuple(_changes(vm, twin, guest)),
        counters=counters,
        outcome=outcome,
        gpa=gpa,
        value=value,
        error_code=code,
        sees=sees,
    )


def _do(
    vm: VM, vcpu: int, gva: int, access: Access, user: bool, size: int
) -> tuple[str, int | None, int | None, int | None, str]:
    """The access, done: outcome, gpa, value, error code, and what the guest sees of it."""
    cpu = vm.vcpus[vcpu]
    try:
        gpa = gva if cpu.mode == "off" else cpu.translate(gva, access, user).gpa
    except (PageFault, GeneralProtection):
        gpa = None
    try:
        if access == "x":
            gpa = cpu.fetch(gva, user=user)
            return "done", gpa, None, None, f"the instruction at gpa {gpa:#x} is fetched"
        if access == "r":
            value = cpu.read(gva, size, user=user)
            return "done", gpa, value, None, f"{value:#x}, read from gpa {gpa:#x}"
        there = _stored(vm, gpa, size)
        cpu.write(gva, there, size, user=user)
        return "done", gpa, None, None, f"its store to gpa {gpa:#x} is done"
    except PageFault as fault:
        return "#PF", None, None, fault.error_code, f"#PF, error code {fault.error_code:#x}, CR2 {cpu.cr2:#x}"
    except GeneralProtection as fault:
        return "#GP", None, None, fault.error_code, "#GP: the address is not canonical"
    except MMIOAccess as device:
        return "device", device.gpa, None, None, f"what the device at gpa {device.gpa:#x} answers"


def _stored(vm: VM, gpa: int | None, size: int) -> int:
    try:
        return 0 if gpa is None else int.from_bytes(vm.read_physical(gpa, size), "little")
    except ConfigError:
        return 0


# -- the shadow's walk ---------------------------------------------------------------------------------------


def _walk(vm: VM, vcpu: int, gva: int) -> tuple[ShadowStep, ...] | None:
    if not isinstance(vm.mmu.design, Shadow):
        return None
    pages = {int(row["page"]): row for row in vm.mmu.pages}
    roots = [int(root) if root is not None else None for root in vm.mmu.roots(vcpu)]
    first = next((root for root in roots if root is not None and root in pages), None)
    if first is None:
        return ()
    # Shadow tables are those of PAE, whose root entries are four roots, or of 4- and 5-level paging.
    number: int | None = first if pages[first]["level"] > 2 or len(roots) == 1 else roots[gva >> 30 & 3]
    steps: list[ShadowStep] = []
    while number is not None and number in pages:
        page = pages[number]
        level = int(page["level"])
        index = gva >> 12 + 9 * (level - 1) & 511
        entry = int(vm.mmu.table(number)[index])
        child, leads_to = target(vm, level, entry, pages)
        steps.append(ShadowStep(level, number, role_words(page), index, entry, spte_words(level, entry), leads_to))
        number = child
    return tuple(steps)


# -- what changes --------------------------------------------------------------------------------------------

_KEY = ("page", "gfn", "glevels", "level", "quadrant", "direct", "access", "nxe", "pse", "wp0")


def _changes(vm: VM, twin: VM, guest: Explanation | None) -> list[str]:
    """How the copy differs from the machine, in sentences."""
    found: list[str] = []
    if isinstance(vm.mmu.design, Shadow):
        old = {tuple(int(row[name]) for name in _KEY): row for row in vm.mmu.pages}
        new = {tuple(int(row[name]) for name in _KEY): row for row in twin.mmu.pages}
        found += [f"shadow page {key[0]} is zapped: {role_words(row)}" for key, row in old.items() if key not in new]
        found += [f"shadow page {key[0]} is made: {role_words(row)}" for key, row in new.items() if key not in old]
        for key, row in new.items():
            if key in old and row["unsync"] != old[key]["unsync"]:
                found.append(f"shadow page {key[0]} {UNSYNC if row['unsync'] else IN_SYNC}")
        found += _entries(vm, twin, {int(row["page"]): row for row in (*old.values(), *new.values())})
    for step in guest.steps if guest is not None else ():
        size = 4 if guest is not None and guest.mode == "32" else 8
        now = int.from_bytes(twin.read_physical(step.gpa, size), "little")
        if bits := bits_set(step.entry, now):
            found.append(f"{bits} of the guest's {step.name} {step.index} at gpa {step.gpa:#x} is set")
        elif now != step.entry:
            found.append(f"the guest's {step.name} {step.index} at gpa {step.gpa:#x} becomes {now:#x}")
    return found


def _entries(vm: VM, twin: VM, pages: dict[int, Any]) -> list[str]:
    """Shadow entries that differ, and what that does to the reverse map."""
    old, new = vm.mmu.arrays["table"].reshape(-1), twin.mmu.arrays["table"].reshape(-1)
    found, frames = [], set()
    for spte in np.flatnonzero(old != new).tolist():
        page, index, before, after = spte >> 9, spte & 511, int(old[spte]), int(new[spte])
        level = int(pages[page]["level"]) if page in pages else 0
        where = f"entry {index} of shadow page {page}"
        for value in (before, after):
            if value & P and (level == 1 or value & PS):
                frames.add(gfn_of(vm, ((value & ADDRESS) - vm.memory.ram_hpa) >> 12))
        if not after:
            found.append(f"{where} is cleared, it was {before:#x}")
        elif write_protected(before, after):
            found.append(f"{where} is write-protected: {before:#x} becomes {after:#x}")
        else:
            words = f"{', '.join(spte_words(level, after))}; {target(twin, level, after, pages)[1]}"
            found.append(f"{where} becomes {after:#x} (it was {before:#x}): {words}")
    for gfn in sorted(frames):
        try:
            lengths = vm.mmu.rmap_length(gfn), twin.mmu.rmap_length(gfn)
        except ConfigError:
            continue  # of no slot
        if lengths[0] != lengths[1]:
            found.append(f"the reverse map of gfn {gfn:#x} has {lengths[1]} entries, not {lengths[0]}")
    return found


# -- text and HTML -------------------------------------------------------------------------------------------


def _shadow_lines(step: ShadowStep) -> list[str]:
    return [
        f"level {step.level}  entry {step.index} of shadow page {step.page} = {step.entry:#018x}",
        f"         the page: {step.role}",
        f"         {', '.join(step.bits)}",
        f"         {step.leads_to}",
    ]


def _guest_lines(step: Any) -> list[str]:
    lines = [f"level {step.level}  {ENTRY_NAMES[step.level]} {step.index} at gpa {step.gpa:#x} = {step.entry:#x}"]
    lines += [", ".join(step.bits), step.leads_to]
    return lines + ([f"so far: {step.rights}"] if step.rights else [])


def _cell(lines: list[str]) -> str:
    first, *rest = (escape(line.strip()) for line in lines)
    return f"<b>{first}</b>" + "".join(f"<br>{line}" for line in rest)
