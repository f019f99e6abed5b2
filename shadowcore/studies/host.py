"""What a real host's KVM did, counted from its tracepoints or from `perf kvm stat`, beside what a study counted.

Taken are texts of `trace-cmd report` or of the kernel's trace file, with the events kvm:* and kvmmmu:*, and tables of
`perf kvm stat report`. There is no replay: such a trace has no accesses. What is compared are counts.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.counters import EXIT_REASONS, PF_REASONS
from ..errors import TraceError
from ..recording.importers.source import Source
from .results import Study

GROUPS: Mapping[str, tuple[str, ...]] = {
    "page faults": PF_REASONS,
    "control registers": ("cr0", "cr3", "cr4"),
    "EFER": ("efer",),
    "INVLPG": ("invlpg",),
}
"""Reasons of exits, in the groups that every source of counts tells."""

EVENTS: Mapping[str, tuple[str, str]] = {
    "kvm_mmu_get_page new": ("mmu_cache_miss", "shadow pages made"),
    "kvm_mmu_get_page existing": ("mmu_cache_hit", "shadow pages found again"),
    "kvm_mmu_prepare_zap_page": ("mmu_shadow_zapped", "shadow pages zapped"),
    "kvm_mmu_unsync_page": ("unsync_made", "leaf tables that went unsync"),
    "kvm_mmu_sync_page": ("synced", "leaf tables synced again"),
    "kvm_mmu_set_spte": ("spte_installed", "shadow entries set"),
    "kvm_emulate_insn": ("insn_emulation", "instructions emulated"),
    "mark_mmio_spte": ("pf_mmio_spte_created", "entries that remember a device"),
    "handle_mmio_page_fault": ("pf_mmio_spte_hit", "faults at such an entry"),
    "kvm_inj_exception #PF": ("pf_guest", "page faults injected"),
}
"""Events of KVM, as `HostTrace.events` has them: the counter of a study that counts the same, and what it is."""

_LINE = re.compile(
    rb"\s*(?P<task>\S.*?-\d+)\s+(?:\([ \d-]+\)\s+)?\[\d+\]\s+(?:\S+\s+)?(?P<time>\d+(?:\.\d+)?):\s+"
    rb"(?:(?:kvm|kvmmmu):)?(?P<event>\w+): *(?P<rest>.*)$"
)
_NO_EVENT = re.compile(rb"\s*$|#|cpus=\d+$|CPU \d+ is empty$|version = |\s*=> |\s*<stack trace>|trace-cmd")
_LOST = re.compile(rb"CPU:? ?\d+ \[LOST|\[LOST|\s*CPU:\d+ \[\d+ EVENTS DROPPED\]|CPU:\d+ \[EVENTS DROPPED\]")
_REASON = re.compile(rb"(?:reason )(?P<reason>.+?)(?: rip 0x[0-9a-fA-F]+| info1? |$)")
_INFO = re.compile(rb"\binfo1? (?:0x)?(?P<first>[0-9a-fA-F]+)(?: (?:info2 )?(?:0x)?(?P<second>[0-9a-fA-F]+))?")
_INTR = re.compile(rb"\bintr_info (?:0x)?(?P<info>[0-9a-fA-F]+)")
_CODE = re.compile(rb"error_code (?:0x)?(?P<code>[0-9a-fA-F]+)")
_CR = re.compile(rb"cr_write (?P<number>\d+) =")
_MSR = re.compile(rb"msr_write (?:0x)?(?P<number>[0-9a-fA-F]+)")
_SVM_CR = re.compile(rb"(?:CR(?P<first>\d)_WRITE|write_cr(?P<second>\d))")
_EFER = 0xC0000080
_NESTED = ("EPT_VIOLATION", "EPT_MISCONFIG", "npf", "NPF")
"""Reasons of exits that only hosts with two-dimensional paging have."""

_QUALIFIED = 0x180
"""Bits that no error code of a page fault has, and the qualification of an EPT violation does."""

_TABLE = re.compile(rb"\s*VM-EXIT\s+Samples\s+Samples%")
_ROW = re.compile(rb"\s*(?P<name>\S.*?)\s+(?P<samples>\d+)\s+\d+(?:\.\d+)?%\s+\d+(?:\.\d+)?%\s.*$")
_TOTAL = re.compile(rb"\s*Total Samples:\s*(?P<samples>\d+)")
_FAULTS = ("PF excp", "EXCP14", "excp_14")


@dataclass(frozen=True)
class HostTrace:
    """What one text counts.

    file: its name. kind: "trace events" or "perf kvm stat".
    exits: by the reasons of `vm.stats.exits`, None: the text does not tell. groups: the same by GROUPS.
    other: exits that an MMU has no part in, by the host's own name. events: by EVENTS, and all others by name.
    lost: the host said that events were lost. nested: exits of two-dimensional paging.
    """

    file: str
    kind: str
    exits: dict[str, int | None]
    groups: dict[str, int | None]
    other: dict[str, int]
    events: dict[str, int] = field(default_factory=dict)
    lost: bool = False
    nested: int = 0

    @property
    def exits_total(self) -> int:
        """Exits for an MMU's sake."""
        return sum(count or 0 for count in self.groups.values())

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        return vars(self) | {"exits_total": self.exits_total}

    def notes(self) -> list[str]:
        """What has to be known about the counts, in sentences."""
        found = []
        if self.lost:
            found.append("Events were lost: the host's counts are too low.")
        if self.nested:
            found.append(
                f"{self.nested:,} exits are of two-dimensional paging, which no shadow MMU has: "
                "load kvm_intel with ept=0, or kvm_amd with npt=0."
            )
        if self.kind == "perf kvm stat" and any(name == "EXCEPTION_NMI" for name in self.other):
            found.append("EXCEPTION_NMI counts all exceptions; page faults are most of them under a shadow MMU.")
        return found


def read(path: str | os.PathLike[str]) -> HostTrace:
    """Count what a text of trace events, or a table of `perf kvm stat`, has.

    TraceError for other files, and where a text ends before its time: the line, and what was expected.
    """
    with Source(path) as source:
        lines = _lines(source)
        counts = None
        for number, line in lines:
            if _TABLE.match(line):
                return _table(source.path, number, lines)
            if counts is None:
                if _NO_EVENT.match(line) or line.lstrip().startswith(b"Analyze events") or _LOST.search(line):
                    if _LOST.search(line):
                        counts = _Counts()
                        counts.lost = True
                    continue
                counts = _Counts()
            counts.take(source.path, number, line)
    if counts is None or not counts.lines:
        expected = "trace events of KVM (trace-cmd report), or a table of perf kvm stat, expected, there are none"
        raise TraceError(source.path, None, expected)
    return counts.conclude(source.path)


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    for first, text in source.lines():
        for offset, line in enumerate(text.split(b"\n")[: text.count(b"\n") or 1]):
            yield first + offset, line


@dataclass
class _Exit:
    """An exit, until its vcpu enters the guest again."""

    reason: str = ""
    fault: int | None = None  # error code of the page fault
    vector: int | None = None
    became: str = ""
    cr: int | None = None
    msr: int | None = None


class _Counts:
    """The lines of trace events, one after another. An exit is of the task that made it: the thread of the vcpu."""

    def __init__(self) -> None:
        self.lost = False
        self.lines = 0
        self._events: Counter[str] = Counter()
        self._exits: Counter[str] = Counter()
        self._other: Counter[str] = Counter()
        self._open: dict[bytes, _Exit] = {}
        self._nested = 0

    def take(self, path: str, number: int, line: bytes) -> None:
        if _LOST.search(line):
            self.lost = True
            return
        if _NO_EVENT.match(line) or b"<stack trace>" in line:
            return
        match = _LINE.match(line)
        if match is None:
            shown = ascii(line[:60].decode("latin-1"))
            expected = f"a trace event such as 'CPU 0/KVM-5 [001] 1.5: kvm_exit: reason ...' expected, not {shown}"
            raise TraceError(path, number, expected, "line")
        event = match["event"].decode()
        if not event.startswith(("kvm", "mark_mmio_spte", "handle_mmio", "fast_page_fault", "check_mmio_spte")):
            return
        self.lines += 1
        self._event(event, match["task"], match["rest"].strip())

    def _event(self, event: str, task: bytes, rest: bytes) -> None:
        name = event
        if event == "kvm_mmu_get_page":
            name = f"{event} {'new' if rest.endswith(b'new') else 'existing'}"
        elif event == "kvm_inj_exception":
            name = f"{event} {rest.split()[0].decode('latin-1') if rest else ''}".rstrip()
        self._events[name] += 1
        if event == "kvm_exit":
            self._close(task)
            self._open[task] = self._exit(rest)
            return
        if event == "kvm_entry":
            self._close(task)
            return
        pending = self._open.get(task)
        if event == "kvm_page_fault":
            if pending is None or (pending.fault is not None and not pending.reason):
                self._close(task)
                pending = self._open[task] = _Exit()
            found = _CODE.search(rest)
            pending.fault = int(found["code"], 16) if found else 0
        elif pending is None:
            return
        elif name == "kvm_inj_exception #PF":
            pending.became = "guest"
        elif event in ("kvm_mmio", "handle_mmio_page_fault"):
            pending.became = "mmio"
        elif event == "kvm_emulate_insn":
            pending.became = pending.became or "emulate"
        elif event == "kvm_cr" and (found := _CR.search(rest)):
            pending.cr = int(found["number"])
        elif event == "kvm_msr" and (found := _MSR.search(rest)):
            pending.msr = int(found["number"], 16)

    @staticmethod
    def _exit(rest: bytes) -> _Exit:
        found = _REASON.search(rest)
        made = _Exit(found["reason"].decode("latin-1").strip() if found else "unknown")
        info = _INFO.search(rest)
        if info and made.reason == "CR_ACCESS":
            qualification = int(info["first"], 16)  # SDM vol. 3, table 28-3: number, and 0 a load, 2 CLTS, 3 LMSW
            kind = qualification >> 4 & 3
            made.cr = None if kind == 1 else 0 if kind > 1 else qualification & 15
        intr = _INTR.search(rest)
        word = intr["info"] if intr else info["second"] if info else None
        if made.reason == "EXCEPTION_NMI" and word is not None and int(word, 16) >> 31:
            made.vector = int(word, 16) & 0xFF
        if match := _SVM_CR.match(made.reason.encode()):
            made.cr = int(match["first"] or match["second"])
        return made

    def _close(self, task: bytes) -> None:
        done = self._open.pop(task, None)
        if done is None:
            return
        reason = done.reason
        if reason in _NESTED or (not reason and (done.fault or 0) & _QUALIFIED):
            self._nested += 1
            self._other[reason or "EPT_VIOLATION"] += 1
        elif (
            reason in _FAULTS
            or done.vector == 14
            or (not reason and done.fault is not None)
            or (reason == "EXCEPTION_NMI" and done.vector is None and done.fault is not None)
        ):
            missing = not (done.fault or 0) & 1
            self._exits[done.became or ("fill" if missing else "write")] += 1
        elif done.cr in (0, 3, 4):
            self._exits[f"cr{done.cr}"] += 1
        elif done.msr == _EFER:
            self._exits["efer"] += 1
        elif reason.lower() == "invlpg":
            self._exits["invlpg"] += 1
        elif reason:
            self._other[reason] += 1

    def conclude(self, path: str) -> HostTrace:
        for task in list(self._open):
            self._close(task)
        exits: dict[str, int | None] = {name: self._exits[name] for name in EXIT_REASONS}
        groups: dict[str, int | None] = {
            group: sum(self._exits[name] for name in names) for group, names in GROUPS.items()
        }
        found = dict(self._other.most_common())
        events = dict(self._events.most_common())
        return HostTrace(path, "trace events", exits, groups, found, events, self.lost, self._nested)


_GROUP_OF = {
    "EXCEPTION_NMI": "page faults",
    "PF excp": "page faults",
    "CR_ACCESS": "control registers",
    "INVLPG": "INVLPG",
    "invlpg": "INVLPG",
}


def _table(path: str, number: int, lines: Iterator[tuple[int, bytes]]) -> HostTrace:
    groups, other, samples = dict.fromkeys(GROUPS, 0), Counter[str](), 0
    for number, line in lines:
        if total := _TOTAL.match(line):
            if int(total["samples"]) != samples:
                expected = f"rows of {int(total['samples'])} samples together expected, as it says here, not {samples}"
                raise TraceError(path, number, expected, "line")
            if not samples:
                raise TraceError(path, number, "samples expected, there are none", "line")
            break
        if not line.strip():
            continue
        row = _ROW.match(line)
        if row is None:
            shown = ascii(line[:60].decode("latin-1"))
            raise TraceError(path, number, f"a row of a table of perf kvm stat expected, not {shown}", "line")
        name, count = row["name"].decode("latin-1"), int(row["samples"])
        samples += count
        match = _SVM_CR.match(row["name"])
        if match and (match["first"] or match["second"]) in (b"0", b"3", b"4"):
            groups["control registers"] += count
        elif name in _GROUP_OF:
            groups[_GROUP_OF[name]] += count
            if name == "EXCEPTION_NMI":
                other[name] += 0
        else:
            other[name] += count
    else:
        expected = "the line Total Samples at the end of a table of perf kvm stat expected, the text ends before"
        raise TraceError(path, number, expected, "line")
    nested = sum(other[name] for name in _NESTED)
    exits: dict[str, int | None] = dict.fromkeys(EXIT_REASONS)
    exits["invlpg"] = groups["INVLPG"]
    told: dict[str, int | None] = groups | {"EFER": None}  # the table has no numbers of MSRs
    return HostTrace(path, "perf kvm stat", exits, told, dict(other.most_common()), {}, False, nested)


def counted(study: Study) -> dict[str, Any]:
    """What a study counted, in the terms of `HostTrace`: workload, operations, and by design exits, groups, events."""
    designs = {}
    for name, design in study.designs.items():
        groups = {group: sum(design.exits[reason] for reason in names) for group, names in GROUPS.items()}
        events = {event: design.counters[counter] for event, (counter, _) in EVENTS.items()}
        # Designs other than unsync count emulated stores alone.
        events["kvm_emulate_insn"] = max(events["kvm_emulate_insn"], design.counters["pf_emulate"])
        designs[name] = {
            "exits_total": design.exits_total,
            "exits": design.exits,
            "groups": groups,
            "events": events,
        }
    return {"workload": study.workload, "operations": study.operations, "designs": designs}
