"""One mechanism over the years: KVM's shadow MMU as releases of Linux had it, on the workloads and the recording here.

A release is a setting of the engine where what it did is known and the engine can do it; RELEASES says what changed by
which commit, LEFT_OUT what is not made.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..config import Quirk, Shadow
from ..errors import GuestPanic
from .results import Study
from .source import Source, opened
from .study import study

OPERATIONS = 200_000
"""Of each workload, where nothing else is said; the recording is replayed from end to end."""
REASONS = {
    "fill": "missing entry",
    "write": "more rights",
    "emulate": "store to a table",
    "guest": "guest's own fault",
    "loads": "CR3, CR0, CR4 load",
    "invlpg": "INVLPG",
}
"""Exits as the picture stacks them."""
MENDED_2_6_20 = (
    Quirk.TWO_EXITS | Quirk.ACCESSED_EARLY | Quirk.DIRTY_LOST | Quirk.NO_REFILL_AT_CR3 | Quirk.PROCESSOR_CODE
)
MENDED_2_6_21 = MENDED_2_6_20 | Quirk.PDE_WRITE
MENDED_2_6_22 = MENDED_2_6_21 | Quirk.ROLE_WITHOUT_ACCESS | Quirk.ABSENT_PDPTES
MENDED_2_6_23 = MENDED_2_6_22 | Quirk.RMAP_LEAK | Quirk.ROOT_EMPTIED | Quirk.NX_LEAF_ONLY


@dataclasses.dataclass(frozen=True)
class Release:
    """A release. design: the setting. pool: shadow pages; None: a fiftieth of the
    guest's frames, at least 64. date: when it came out.
    changed: what is different from the one before. real: a release, and not one part of a later one by itself."""

    name: str
    date: str
    design: Shadow
    pool: int | None
    changed: str
    real: bool = True

    def made(self, frames: int) -> Shadow:
        """The setting, for a guest of so many frames."""
        return dataclasses.replace(self.design, name=self.name, pool_pages=self.pool or max(64, frames // 50))


def _without(mended: Quirk, **settings: Any) -> Shadow:
    return Shadow.kvm_2007(quirks=Quirk.KVM_2007 & ~mended, **settings)


RELEASES = (
    Release(
        "2.6.20-rc3",
        "January 2007",
        Shadow.flush(),
        256,
        "before the series: a CR3 load throws away every table with a leaf that is not global",
    ),
    Release(
        "the series",
        "January 2007",
        Shadow.kvm_2007(),
        256,
        "33 patches, cd4a4e537411 to 37a7d8b046da: tables survive CR3 loads, guest tables are write-protected and "
        "stores to them emulated; INVLPG no longer exits",
    ),
    Release(
        "2.6.20",
        "February 2007",
        _without(MENDED_2_6_20),
        256,
        "rights are checked in the guest's walk, so that a violation takes one exit (7993ba43db1c); D is set for an "
        "emulated store (760db773fbd0); the pool is refilled at CR3 loads (7f7417d67ea6)",
    ),
    Release(
        "2.6.21",
        "April 2007",
        _without(MENDED_2_6_21),
        256,
        "stores to 32-bit directories drop the right entries (ac1b714e78c8, 6b8d0f9b180c; of the right quadrant "
        "alone since fce0657ff9f1, 2.6.23: here at once)",
    ),
    Release(
        "2.6.22",
        "July 2007",
        _without(MENDED_2_6_22),
        256,
        "rights of the levels above are in the role (d28c6cfbbc5e for large pages; b1bd5cba3306, 2021, for all: "
        "here at once); no roots for absent PAE entries (417726a3fbec)",
    ),
    Release(
        "2.6.23",
        "October 2007",
        _without(MENDED_2_6_23, flood_reset=True),
        1024,
        "1024 pages; a fault that is no store to a table ends a flood (a25f7e1f8c1f); recycling passes over roots "
        "in use (22d95b128281); rights in one place (63b1ad24d269), no-execute of all levels (d55e2cb20123)",
    ),
    Release(
        "2.6.25",
        "April 2008",
        _without(MENDED_2_6_23, flood_reset=True, notpresent_marker=True),
        None,
        "entries of leaf tables that the guest does not have are marked, and the processor delivers faults at them "
        "without an exit (bypass_guest_pf, c7addb902054; on Intel's processors); a fiftieth of memory as the pool",
    ),
    Release(
        "2.6.28",
        "December 2008",
        Shadow.unsync(prefetch=0, prev_roots=0, release="2.6.28", notpresent_marker=True),
        None,
        "leaf tables run out of sync until the guest flushes (4731d4c7a077 and the 12 with it), if they are shadowed "
        "in one role; markers only in tables in sync; INVLPG exits again, and drops the entry",
    ),
    Release(
        "unsync alone",
        "",
        Shadow.unsync(prefetch=0, prev_roots=0),
        None,
        "a part of what follows by itself: tables in any number of roles run out of sync; INVLPG makes the entry again "
        "(ad218f85e38, 2.6.30); entries that the guest does not have are not marked any more",
        real=False,
    ),
    Release(
        "with prefetch",
        "",
        Shadow.unsync(prev_roots=0),
        None,
        "the same, and a fault fills the aligned group of 8 entries around it as far as the guest's are used",
        real=False,
    ),
    Release(
        "6.1",
        "December 2022",
        Shadow.kvm_6_1(),
        None,
        "the same, and three previous roots are kept; exact to Linux 6.1",
    ),
    Release(
        "6.12",
        "November 2024",
        Shadow.kvm_6_12(),
        None,
        "INVLPG brings an entry in line instead of making it anew (9fd4a4e3a3d9, 6.4); exact to Linux 6.12",
    ),
)
"""In their order."""
LEFT_OUT = (
    '2.6.23 also updated a shadow entry at an emulated store instead of dropping it (0028425f647b, "three vmexits '
    'become two"), and zapped at stores of less than 4 bytes (e925c5ba9380): neither is made here, and its exits are '
    "too many",
    "2.6.25 to 2.6.27: the flood filter by accessed bits (12b7d28fc102), markers in directories, halves of PAE entries "
    "(489f1d6526ab): not made",
    "2.6.28 is the mechanism of 6.1 with what its row says: out of sync in one role alone, a sync of a table that is "
    "looked up, INVLPG, markers. Not of that release are the count of floods (here of each page, there of the vcpu and "
    "with the filter of 2.6.25), stores to tables in sync (here they drop the entry, there they update it), and what "
    "later releases mended (the quirks below are off); there are no recorded answers of it",
    "`EXIT_FLUSHES`, `PAGING_OFF_UNPROTECTED`, `ROLE_WITHOUT_MODE` (3dbe141595fa, 2.6.35), `GLOBAL_WITHOUT_PGE` and "
    "`IGNORED_BITS_REFUSED` stay on from the series to 2.6.25",
    "large host pages, several processors and MMIO: the guests here have none of them",
)


@dataclasses.dataclass(frozen=True)
class Evolution:
    """What was found: `studies` by source, in which each release of RELEASES is a design; operations of a workload."""

    studies: dict[str, Study]
    operations: int

    def exits(self, source: str, release: str) -> dict[str, int]:
        """Exits by REASONS; none if it stopped."""
        if self.stopped(source, release):
            return {}
        n = self.studies[source].designs[release].exits
        loads = sum(n[reason] for reason in ("cr0", "cr3", "cr4", "efer"))
        return {reason: loads if reason == "loads" else n[reason] for reason in REASONS}

    def stopped(self, source: str, release: str) -> bool:
        """A defect of the release ended the guest."""
        return release not in self.studies[source].designs

    def total(self, source: str, release: str) -> int:
        """All exits; 0 if it stopped."""
        return 0 if self.stopped(source, release) else self.studies[source].designs[release].exits_total

    def shown(self, source: str, release: str) -> str:
        """All exits, as tables show them."""
        if self.stopped(source, release):
            return "stopped"
        return f"{self.total(source, release):,}" + ("" if self.same(source, release) else " *")

    def same(self, source: str, release: str) -> bool:
        """The guest did the same as under 2.6.20-rc3, or, of a recording, as recorded. False if it stopped."""
        if self.stopped(source, release):
            return False
        found = self.studies[source].designs[release]
        first = next(iter(self.studies[source].designs.values()))
        return found.history == first.history if found.history is not None else not found.gpa_mismatches

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain types."""
        return {
            "operations": self.operations,
            "releases": {
                each.name: {"date": each.date, "release": each.real, "changed": each.changed} for each in RELEASES
            },
            "exits": {
                source: {
                    each.name: {
                        "total": self.total(source, each.name),
                        "stopped": self.stopped(source, each.name),
                        "same": self.same(source, each.name),
                        **self.exits(source, each.name),
                    }
                    for each in RELEASES
                }
                for source in self.studies
            },
        }


def evolution(
    sources: Iterable[str | None] | None = None,
    operations: int = OPERATIONS,
    progress: Callable[[int, int], None] | None = None,
) -> Evolution:
    """Run each source under each release.

    sources: names of workloads, paths of recordings, None: the recording of the package. None: it and all workloads.
    operations: of each workload. progress: called with sources done, and all.
    """
    studies: dict[str, Study] = {}
    for source in opened(sources, progress):
        settings: dict[str, Any] = {"operations": operations} if source.workload else {}
        studies[source.name] = _studied(source, [each.made(source.frames()) for each in RELEASES], settings)
    return Evolution(studies, operations)


def _studied(source: Source, designs: list[Shadow], settings: dict[str, Any]) -> Study:
    """Those designs under which the guest goes on to the end."""
    try:
        return study(source, designs, windows=0, **settings)
    except GuestPanic:
        done = []
        for each in designs:
            with suppress(GuestPanic):
                done.append(study(source, [each], windows=0, **settings))
        return dataclasses.replace(done[0], designs={name: made for one in done for name, made in one.designs.items()})


def _steps(found: Evolution) -> list[str]:
    """What each step came to, in sentences."""
    told = []
    for before, after in itertools.pairwise(RELEASES):
        pairs = {
            source: (found.total(source, before.name), found.total(source, after.name))
            for source in found.studies
            if not found.stopped(source, before.name) and not found.stopped(source, after.name)
        }
        fewer = {source: 1 - new / old for source, (old, new) in pairs.items() if new < 0.995 * old}
        more = {source: new / old for source, (old, new) in pairs.items() if old and new > 1.005 * old}
        parts = []
        if fewer:
            most = max(fewer, key=lambda source: fewer[source])
            parts.append(f"fewer exits in {len(fewer)} of {len(pairs)} (most in {most}: {fewer[most]:.0%} fewer)")
        if more:
            most = max(more, key=lambda source: more[source])
            parts.append(f"more in {len(more)} (most in {most}: {more[most]:.2f} times as many)")
        first = [source for source, (old, new) in pairs.items() if new and not old]
        if first:
            parts.append(f"the first ones in {', '.join(first)}")
        told.append(f"- {before.name} to {after.name}: {', '.join(parts) or 'nothing changes by half a percent'}.")
    return told


def page(found: Evolution) -> str:
    """docs/evolution.md."""
    names = [each.name for each in RELEASES]
    lines = [
        "# Eighteen years of one mechanism",
        "",
        "<!-- Made by: shadowcore evolution --write docs/evolution.md --svg docs/images/evolution.svg -->",
        "",
        "KVM's shadow MMU from January 2007 to November 2024, as settings of one engine, on the recording of a Linux",
        f"guest and on every workload here ({found.operations:,} operations each). `shadowcore evolution` measures all",
        "of it and writes this page and its picture. How far the engine is exact: the first two rows to the recorded",
        "answers of the code of 2007, 2.6.21 but for the streams that [series.md](series.md) lists, 6.1 and 6.12 to",
        "those of the kernels ([unsync.md](unsync.md)); the others are settings between them.",
        "",
        "![VM exits by release, for each workload](images/evolution.svg)",
        "",
        "## What changed",
        "",
        "| | came out | what is different from the row above |",
        "|---|---|---|",
    ]
    lines += [f"| {each.name} | {each.date or '*no release*'} | {each.changed} |" for each in RELEASES]
    lines += ["", "Left out, as the engine does not do it:", ""]
    lines += [f"- {each}." for each in LEFT_OUT]
    lines += [
        "",
        "## VM exits",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "--:|" * len(names),
    ]
    cells = {source: [found.shown(source, name) for name in names] for source in found.studies}
    lines += [f"| {source} | " + " | ".join(row) + " |" for source, row in cells.items()]
    every = [cell for row in cells.values() for cell in row]
    if any("*" in cell for cell in every):
        lines += ["", "\\* The guest did something else than under 2.6.20-rc3: a defect of that release reached it."]
    if "stopped" in every:
        lines += [
            "",
            "Stopped: a defect of that release showed the guest's kernel other memory than its own, and it gave up.",
        ]
    lines += [
        "",
        "Pools differ: 256 pages up to 2.6.22, 1024 in 2.6.23, a fiftieth of the guest's memory from 2.6.25 on.",
        "The recording has no access that the guest refused, so that its markers (2.6.25) have nothing to save there.",
        "",
    ]
    lines += ["Step by step:", "", *_steps(found), ""]
    return "\n".join(lines)
