"""A run, step by step: the guest's tables, the shadow's, the reverse map and the TLB before and after each operation,
what changed and why. `capture` carries operations out one by one; report.steps makes a page of it to look inside.

What is kept is what the run meets: tables that a walk led through or that changed, not all of a large guest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import embed
from ..config import Op, Shadow
from ..engine.machine import VM
from ..errors import ConfigError, GeneralProtection
from ..pagetables import FORMATS, NX, PS, A, D, G, P, U, W
from .words import (
    ADDRESS,
    EXITS,
    IN_SYNC,
    UNSYNC,
    bits_set,
    gfn_of,
    role_words,
    spte_words,
    write_protected,
)

WHOLE = 64
"""Tables, guest's or shadow's, up to which all are shown from the start; of more, those that the run meets."""
_PATHS = 256
"""Linear addresses, the latest, along whose walks guest tables are looked at."""
_ROOTS = 16
"""Values of CR3, the latest, whose tables are looked at."""

_REGISTER_EXITS = {
    "cr3": "an exit: a CR3 load, which the MMU has to see to change roots",
    "cr0": "an exit: a CR0 load changes how tables are read",
    "cr4": "an exit: a CR4 load changes how tables are read",
    "efer": "an exit: an EFER load changes how tables are read",
    "invlpg": "an exit: INVLPG, for the shadow may hold what the guest wants to be forgotten",
}
OUTCOMES = ("done", "#PF", "#GP", "device", "refused", "retry", "#UD")
"""Names of the codes in RunResult.outcome."""

Change = tuple[str, str | None, str | None]
"""(key, value before, value after) of a thing that is looked at; None: it is not there."""


@dataclass(frozen=True)
class Action:
    """One thing that the guest does, and why: `note` in a sentence ("" where nobody said).

    title: the operation in words. gva: the address that it is about, None without one. run: carries it out, and returns
    its outcome in words ("" for a plain one). vcpu: its processor. quiet: no step of its own; what it changes is told
    with the next.
    """

    title: str
    run: Callable[[], str]
    gva: int | None = None
    vcpu: int = 0
    note: str = ""
    quiet: bool = False


@dataclass(frozen=True)
class Step:
    """An operation and what came of it.

    title, note: what the guest does, and why. outcome: what it sees. exits: VM exits by reason, in order.
    happened: sentences: hit or exit and why, then each change. changes: of the state. read: keys that the walk led
    through.
    """

    title: str
    note: str
    outcome: str
    exits: tuple[str, ...]
    happened: tuple[str, ...]
    changes: tuple[Change, ...]
    read: tuple[str, ...]


@dataclass(frozen=True)
class Steps:
    """A run under one design: the state at its start, and its steps.

    A state is a dict of strings by key. `c:exits`, `c:fill`...: counters. `v:0:cr3`: registers of vcpu 0, hexadecimal.
    `g:1a`: guest table at gfn 0x1a, its level; `g:1a:3`: its entry 3. `s:5`: shadow page 5, its level, gfn and role;
    `s:5:3`: its entry 3. `r:20`: reverse map of gfn 0x20, "page.entry" each. `t:0:400`: TLB of vcpu 0, of page 0x400.
    An entry is "value|bits|where it leads".
    """

    design: str
    mode: str
    start: dict[str, str]
    steps: tuple[Step, ...] = field(repr=False)
    first: int = 0
    """Number of the operation that the first step is."""

    def state(self, number: int) -> dict[str, str]:
        """The state after `number` steps; 0: at the start."""
        if not 0 <= number <= len(self.steps):
            raise ConfigError(f"number: {number} is not within 0 to {len(self.steps)}")
        found = dict(self.start)
        for step in self.steps[:number]:
            for key, _, after in step.changes:
                if after is None:
                    del found[key]
                else:
                    found[key] = after
        return found

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types, as `shadowcore show --json` prints it."""
        steps = [vars(step) | {"changes": [list(change) for change in step.changes]} for step in self.steps]
        return vars(self) | {
            "steps": [{k: list(v) if isinstance(v, tuple) else v for k, v in s.items()} for s in steps]
        }


def capture(
    vm: VM,
    actions: Iterable[Action],
    *,
    limit: int = 500,
    exits_only: bool = False,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
) -> Steps:
    """Carry `actions` out on `vm`, one by one, and keep what each changes.

    limit: steps that are kept, at most; the run ends there. exits_only: keep the operations that exit, with what those
    before them changed without one. progress: called with the number of steps kept. first: number of the first action.
    ConfigError where the VM's paging is off.
    """
    camera = _Camera(vm)
    exits: list[str] = []
    embed.on_event(vm, lambda event: exits.append(str(event.detail)), "exit")
    start = before = camera.look()
    stats = vm.stats.as_dict()
    steps: list[Step] = []
    try:
        for action in actions:
            exits.clear()
            camera.meet(action)
            outcome = action.run()
            if action.quiet:
                continue
            reasons = tuple(exits)
            if exits_only and not reasons:
                continue
            now = vm.stats.as_dict()
            after, read = camera.look(), camera.walked(action)
            changes = _difference(before, after)
            hit = now.get("tlb_hits", 0) > stats.get("tlb_hits", 0)
            happened = (*_verdict(vm, action, outcome, reasons, hit), *_sentences(changes, before, after))
            steps.append(Step(action.title, action.note, outcome, reasons, happened, tuple(changes), read))
            before, stats = after, now
            if progress is not None:
                progress(len(steps))
            if len(steps) >= limit:
                break
    finally:
        embed.on_event(vm, None)
    return Steps(vm.mmu.design.name, vm.vcpus[0].mode, start, tuple(steps), first)


# -- what an operation is ------------------------------------------------------------------------------------

_REGISTERS = {Op.CR3: "CR3", Op.CR0: "CR0", Op.CR4: "CR4", Op.EFER: "EFER", Op.PKRU: "PKRU"}
_WORDS = {Op.READ: "reads", Op.WRITE: "writes", Op.FETCH: "fetches from"}


def operations(vm: VM, ops: Any, notes: Sequence[str] = (), vcpu: int = 0) -> Iterable[Action]:
    """An Action for each row of `ops` (OP_DTYPE), made by processor `vcpu` of `vm`. notes: why, for the first rows."""
    cpu = vm.vcpus[vcpu]
    for i in range(len(ops)):
        row = ops[i]
        yield Action(
            _title(row),
            _runner(cpu, ops[i : i + 1]),
            None if int(row["op"]) in (*_REGISTERS, Op.AC) else int(row["addr"]),
            vcpu,
            notes[i] if i < len(notes) else "",
        )


def _title(row: Any) -> str:
    op, who = int(row["op"]), "user code" if row["user"] else "the kernel"
    if op in _REGISTERS:
        return f"{who} loads {_REGISTERS[Op(op)]} with {int(row['value']):#x}"
    if op == Op.AC:
        return f"{who} sets EFLAGS.AC to {int(row['value']) & 1}"
    gva = f"{int(row['addr']):#x}"
    if op == Op.INVLPG:
        return f"{who} executes INVLPG {gva}"
    if op in _WORDS:
        value = f" ({int(row['value']):#x})" if op == Op.WRITE else ""
        return f"{who} {_WORDS[Op(op)]} {gva}{value}"
    name = Op(op).name if op in set(Op) else f"operation {op}"
    return f"{who}: {name} at {gva}"


def _runner(cpu: Any, one: Any) -> Callable[[], str]:
    def run() -> str:
        result = cpu.run(one)
        code = int(result.outcome[0])
        if not code:
            return ""
        name = OUTCOMES[code] if code < len(OUTCOMES) else f"outcome {code}"
        return f"#PF, error code {int(result.error_code[0]):#x}" if name == "#PF" else name

    return run


# -- what is looked at ---------------------------------------------------------------------------------------


class _Camera:
    """Looks at a machine. It remembers the addresses and roots that the run met, and which shadow pages changed."""

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._mode = vm.vcpus[0].mode
        if self._mode not in FORMATS:
            raise ConfigError("vm: paging is off, so there are no tables to show")
        self._form = FORMATS[self._mode]
        self._paths: dict[int, None] = {}
        self._roots: dict[int, None] = {}
        self._shadowed = isinstance(vm.mmu.design, Shadow)
        self._table = vm.mmu.arrays["table"].copy() if self._shadowed else None
        self._met: set[int] = set()
        self._guest_tables: dict[int, tuple[bytes, dict[str, str]]] = {}
        self._shadow_pages: dict[int, dict[str, str]] = {}

    def meet(self, action: Action) -> None:
        """Remember what the next operation is about."""
        if action.gva is not None:
            page = action.gva & ~0xFFF
            self._paths.pop(page, None)
            self._paths[page] = None
            if len(self._paths) > _PATHS:
                del self._paths[next(iter(self._paths))]

    def look(self) -> dict[str, str]:
        """The state, see Steps."""
        found: dict[str, str] = {}
        vm = self._vm
        for name, count in vm.stats.as_dict().items():
            if name.startswith("exits_") and count:
                found["c:" + name.removeprefix("exits_")] = str(count)
        for number, cpu in enumerate(vm.vcpus):
            found[f"v:{number}:cr3"] = f"{cpu.cr3:#x}"
            root = cpu.cr3 & (0xFFFF_FFE0 if self._mode == "pae" else 0xF_FFFF_FFFF_F000)
            self._roots.pop(root, None)
            self._roots[root] = None
            for row in cpu.tlb:
                page, size = int(row["page"]), int(row["page_size"])
                rights = f"{int(row['gpa']):#x}|{_tlb_words(row)}|{size >> 10} KiB"
                found[f"t:{number}:{page:x}"] = rights
        if len(self._roots) > _ROOTS:
            del self._roots[next(iter(self._roots))]
        for root in list(self._roots):
            self._guest(root, found)
        if self._shadowed:
            self._shadow(found)
        return found

    def walked(self, action: Action) -> tuple[str, ...]:
        """Keys of the guest entries that a walk of the action's address leads through."""
        if action.gva is None:
            return ()
        try:
            levels = self._vm.vcpus[action.vcpu].walk_levels(action.gva)
        except GeneralProtection:
            return ()
        size = self._form.entry_size
        return tuple(f"g:{gpa >> 12:x}:{(gpa & 0xFFF) // size}" for _, gpa, _ in levels)

    def _entry(self, gpa: int) -> int:
        try:
            return int.from_bytes(self._vm.read_physical(gpa, self._form.entry_size), "little")
        except ConfigError:
            return 0  # a table in no memory slot

    def _guest(self, root: int, found: dict[str, str]) -> None:
        """Tables of one root: all of them where they are few, else those that lead to what the run met."""
        tables = self._all(root)
        if tables is None:
            tables = {root: self._form.levels}
            for gva in self._paths:
                gpa = root
                for level in range(self._form.levels, 1, -1):
                    entry = self._entry(gpa + self._form.index(gva, level) * self._form.entry_size)
                    if not entry & P or self._form.is_leaf(level, entry):
                        break
                    gpa = self._form.address(level, entry)
                    tables[gpa] = level - 1
        for gpa, level in tables.items():
            content = self._content(gpa, level)
            known = self._guest_tables.get(gpa)
            if known is None or known[0] != content or known[1][f"g:{gpa >> 12:x}"] != str(level):
                said = {f"g:{gpa >> 12:x}": str(level)}
                for index, entry in self._nonzero(gpa, level):
                    said[f"g:{gpa >> 12:x}:{index}"] = self._guest_entry(level, entry)
                known = self._guest_tables[gpa] = content, said
            found |= known[1]

    def _all(self, root: int) -> dict[int, int] | None:
        tables, todo = {root: self._form.levels}, [root]
        while todo:
            gpa = todo.pop()
            level = tables[gpa]
            if level == 1:
                continue
            for _, entry in self._nonzero(gpa, level):
                if entry & P and not self._form.is_leaf(level, entry):
                    child = self._form.address(level, entry)
                    if child not in tables:
                        tables[child] = level - 1
                        todo.append(child)
                        if len(tables) > WHOLE:
                            return None
        return tables

    def _nonzero(self, gpa: int, level: int) -> list[tuple[int, int]]:
        """(index, entry) of the entries of a table that are not 0."""
        words = np.frombuffer(self._content(gpa, level), dtype=f"<u{self._form.entry_size}")
        return [(i, int(words[i])) for i in np.flatnonzero(words).tolist()]

    def _content(self, gpa: int, level: int) -> bytes:
        """A table's bytes; none where it is in no memory slot."""
        try:
            return self._vm.read_physical(gpa, 32 if self._mode == "pae" and level == 3 else 4096)
        except ConfigError:
            return b""

    def _guest_entry(self, level: int, entry: int) -> str:
        if not entry & P:
            return f"{entry:#x}|not present|"
        leaf = self._form.is_leaf(level, entry)
        bits = "".join(n if entry & b else "-" for n, b in (("W", W), ("U", U), ("A", A), ("D", D), ("G", G)))
        if self._mode == "pae" and level == 3:
            bits = ""
        bits += " NX" if entry & NX and self._form.entry_size == 8 else ""
        gpa = self._form.address(level, entry if leaf else entry & ~PS)
        size = self._form.shift(level)
        where = f"{'page' if size == 12 else f'{1 << size - 20} MiB at'}" if leaf else "table"
        return f"{entry:#x}|{bits}|{where} {gpa >> 12:#x}"

    def _shadow(self, found: dict[str, str]) -> None:
        vm = self._vm
        table = vm.mmu.arrays["table"]
        assert self._table is not None
        changed = np.flatnonzero((table != self._table).any(axis=1)).tolist()
        self._table[changed] = table[changed]
        self._met.update(changed)
        for page in changed:
            self._shadow_pages.pop(page, None)
        pages = {int(row["page"]): row for row in vm.mmu.pages}
        roots = {root for n in range(len(vm.vcpus)) for root in vm.mmu.roots(n) if root is not None}
        frames: set[int] = set()
        for page, row in pages.items():
            if len(pages) > WHOLE and page not in self._met and page not in roots:
                continue
            level = int(row["level"])
            words = [role_words(row)] + [f"root count {int(row['root_count'])}"] * bool(row["root_count"])
            head = f"{level}|{int(row['gfn']):#x}|{', '.join(words)}"
            said = self._shadow_pages.get(page)
            if said is None or said[f"s:{page}"].split("|")[0] != str(level):
                said = self._shadow_pages[page] = self._sptes(page, level, table[page])
            said[f"s:{page}"] = head
            found |= said
            frames.update(int(text.rpartition("gfn ")[2], 16) for text in said.values() if "|gfn " in text)
        for gfn in frames:
            try:
                listed = vm.mmu.rmap(gfn)
            except ConfigError:
                continue  # of no slot
            if len(listed):
                found[f"r:{gfn:x}"] = " ".join(f"{page}.{index}" for page, index in listed.tolist())

    def _sptes(self, page: int, level: int, entries: NDArray[np.uint64]) -> dict[str, str]:
        """The entries of a shadow page that are not 0."""
        vm, found = self._vm, {f"s:{page}": ""}
        for index in np.flatnonzero(entries).tolist():
            entry, where = int(entries[index]), ""
            if entry & P and level > 1 and not entry & PS:
                where = f"shadow page {(entry & ADDRESS) - vm.memory.pool_hpa >> 12}"
            elif entry & P:
                where = f"gfn {gfn_of(vm, ((entry & ADDRESS) - vm.memory.ram_hpa) >> 12):#x}"
            found[f"s:{page}:{index}"] = f"{entry:#x}|{', '.join(spte_words(level, entry)[1:])}|{where}"
        return found


def _tlb_words(row: Any) -> str:
    access = int(row["access"])
    words = ["writable" if access & W else "read only", "user" if access & U else "supervisor only"]
    words += ["global"] if row["global_"] else []
    words += [f"PCID {int(row['pcid'])}"] if row["pcid"] else []
    return ", ".join(words)


# -- what changed --------------------------------------------------------------------------------------------


_ORDER = "gsrtvc"


def _place(key: str) -> tuple[int, ...]:
    """Where a key stands: the guest's tables first, then the shadow's, each by number."""
    kind, *rest = key.split(":")
    if kind in "vc":
        return (_ORDER.index(kind),)
    hexadecimal = {"g": (0,), "r": (0,), "t": (1,)}.get(kind, ())
    return (_ORDER.index(kind), *(int(part, 16 if i in hexadecimal else 10) for i, part in enumerate(rest)))


def _difference(before: dict[str, str], after: dict[str, str]) -> list[Change]:
    keys = [key for key in before if before[key] != after.get(key)]
    keys += [key for key in after if key not in before]
    return [(key, before.get(key), after.get(key)) for key in sorted(keys, key=_place)]


def _verdict(vm: VM, action: Action, outcome: str, exits: Sequence[str], tlb_hit: bool) -> list[str]:
    """Hit, or which exits and why; what the guest sees, where that is not the plain thing."""
    said = [EXITS.get(reason) or _REGISTER_EXITS.get(reason) or f"an exit: {reason}" for reason in exits]
    if not said and action.gva is not None:
        if outcome.startswith("#"):
            said = ["no exit: the processor delivers the fault by itself"]
        elif tlb_hit:
            said = ["no exit: the TLB has the translation"]
        elif isinstance(vm.mmu.design, Shadow):
            said = ["no exit: the processor finds all that it needs in the shadow tables"]
        else:
            said = ["no exit: the processor walks the guest's own tables"]
    elif not said:
        said = ["no exit"]
    if outcome:
        said.append(f"the guest sees {outcome}")
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in said]


def _sentences(changes: Sequence[Change], before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Each change in words; entries of shadow pages that come or go whole are told with their page."""
    found: list[str] = []
    whole = {key for key, old, new in changes if key.startswith("s:") and key.count(":") == 1 and None in (old, new)}
    tables = {key for key, old, new in changes if key.startswith("g:") and key.count(":") == 1 and None in (old, new)}
    for key, old, new in changes:
        kind, *rest = key.split(":")
        if kind == "s" and len(rest) == 1:
            found += _page_said(rest[0], old, new)
        elif kind == "s":
            if f"s:{rest[0]}" not in whole or (new is not None and old is None):
                found += _spte_said(rest[0], rest[1], old, new)
        elif kind == "g" and len(rest) == 2 and f"g:{rest[0]}" not in tables:
            found.append(_gpte_said(rest[0], rest[1], old, new))
        elif kind == "r":
            count = len(new.split()) if new else 0
            entries = "no entry" if not count else "1 entry" if count == 1 else f"{count} entries"
            found.append(f"The reverse map of gfn {int(rest[0], 16):#x} now lists {entries}.")
        elif kind == "t" and (old is None or new is None):
            verb = "takes" if old is None else "drops"
            found.append(f"The TLB {verb} the translation of page {int(rest[1], 16):#x}.")
    return found


def _page_said(page: str, old: str | None, new: str | None) -> list[str]:
    if old is None:
        return [f"Shadow page {page} is made: {(new or '').split('|')[2]}."]
    if new is None:
        return [f"Shadow page {page} is zapped: {old.split('|')[2]}."]
    was, now = (text.split("|")[2].split(", ") for text in (old, new))
    if was[0] != now[0]:
        return [f"Shadow page {page} serves another table: {new.split('|')[2]}."]
    found = []
    if "unsync" in now and "unsync" not in was:
        found.append(f"Shadow page {page} {UNSYNC}.")
    if "unsync" in was and "unsync" not in now:
        found.append(f"Shadow page {page} {IN_SYNC}.")
    before, after = (any(word.startswith("root count") for word in words) for words in (was, now))
    if before != after:
        found.append(f"Shadow page {page} is {'in use as a root' if after else 'no root in use any longer'}.")
    return found or [f"Shadow page {page} is now: {new.split('|')[2]}."]


def _spte_said(page: str, index: str, old: str | None, new: str | None) -> list[str]:
    where = f"Entry {index} of shadow page {page}"
    if new is None:
        return [f"{where} is cleared."]
    value, words, leads = new.split("|")
    before = int(old.split("|")[0], 16) if old else 0
    now = int(value, 16)
    if write_protected(before, now):
        return [f"{where} is write-protected: {words}."]
    if not leads:
        return [f"{where} becomes {value}: {words or 'not present'}."]
    return [f"{where} links {leads}." if leads.startswith("shadow page") else f"{where} maps {leads}: {words}."]


def _gpte_said(gfn: str, index: str, old: str | None, new: str | None) -> str:
    where = f"The guest's entry {index} of table {int(gfn, 16):#x}"
    before, now = (int(text.split("|")[0], 16) if text else 0 for text in (old, new))
    bits = bits_set(before, now)
    if before & P and bits and now & ~(A | D) == before & ~(A | D):
        return f"{where}: {bits} {'are' if ' ' in bits else 'is'} set."
    return f"{where} becomes {now:#x}."
