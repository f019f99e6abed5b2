"""How the guest kernel compares with Linux: rates in a recording of a real guest beside those of a workload."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import check_int
from ..errors import TraceError
from ..recording.guest import BUNDLED, Recording, load
from ..recording.kinds import INVLPG, LOAD_CR3, STORE, TABLE
from .runner import WorkloadResult, run

INSTRUCTIONS_PER_ACCESS = 2.5
"""Of the model, which counts accesses only. An assumption: of what x86 code executes, about two in five instructions
load or store."""

_AS_ROOT = 1 << 4
_DEAD = 1 << 7
_P, _W, _A = 1, 2, 32

PER_SPACE = (
    ("table_stores", "stores to tables"),
    ("leaf_installs", "leaf entries made present"),
    ("leaf_clears", "leaf entries cleared"),
    ("write_protects", "locked instructions that take W away"),
    ("reuses", "pages made writable again in place"),
    ("tables", "tables made, all levels"),
    ("faults", "page faults (file pages mapped around one are one)"),
    ("cr3_loads", "CR3 loads"),
    ("invlpg", "INVLPGs"),
)
PER_MILLION = (
    ("table_stores", "stores to tables"),
    ("faults", "page faults"),
    ("cr3_loads", "CR3 loads"),
    ("age_young", "accessed bits cleared by the kernel"),
)


class Row(NamedTuple):
    """A rate: what it is, of what (address space made, or million instructions), in the recording, in the model.

    recording_complete: False if the recording ended before its time.
    """

    recording: str
    rate: str
    per: str
    linux: float
    model: float
    recording_complete: bool = True

    @property
    def ratio(self) -> float:
        """Model to recording; not a number where both are 0."""
        return self.model / self.linux if self.linux else float("nan") if not self.model else float("inf")


def rows(recordings: tuple[str | None, ...] = (None,), spaces: int = 120, seed: int = 1) -> list[Row]:
    """Rates of each recording (a path; None: the one in the package) beside those of the workload `shell` in the
    kernel's default settings, which are those of the recorded guests (64-bit, large and global direct map, no
    isolation, no PCIDs). From the first user-mode access on.

    Its parameters are the defaults but for `work`, the accesses of a process to its own data: that is set by the
    instructions that an address space of the recording executes. spaces: address spaces that the model makes (at
    most; long processes make it fewer, so that none takes more than some 10 s).
    """
    check_int("spaces", spaces, 1, 1 << 20)
    table: list[Row] = []
    for path in recordings:
        recording = load(path)
        linux = recording_counts(recording)
        if not linux["spaces"] or not linux["instructions"]:
            raise TraceError(recording.name, None, "an address space made after boot, and instructions, expected")
        model = model_counts(linux["instructions"] / linux["spaces"], spaces, seed)
        for key, what in PER_SPACE:
            rates = linux[key] / linux["spaces"], model[key] / model["spaces"]
            table.append(Row(recording.name, what, "address space", *rates, recording.complete))
        for key, what in PER_MILLION:
            rates = 1e6 * linux[key] / linux["instructions"], 1e6 * model[key] / model["instructions"]
            table.append(Row(recording.name, what, "million instructions", *rates, recording.complete))
    return table


def _before(recording: Recording, stores: NDArray[np.intp]) -> NDArray[np.uint64]:
    """For each of the records `stores`, the entry as it was before: 0 where its frame has just begun to serve."""
    tables = np.flatnonzero(recording.kind == TABLE)
    every = np.concatenate([stores, tables])
    frame = recording.addr[every] >> np.uint64(12)
    order = np.lexsort((every, frame))
    # The last beginning of the frame before each record, by a running maximum within the frame.
    begins = np.where(recording.kind[every[order]] == TABLE, every[order], -1)
    first = np.flatnonzero(np.append(True, frame[order][1:] != frame[order][:-1]))
    group = np.zeros(len(every), dtype=np.int64)
    group[first] = 1
    group = np.cumsum(group) * (recording.operations + 1)
    life = np.maximum.accumulate(group + begins) - group
    began = np.empty(len(every), dtype=np.int64)
    began[order] = life
    began = began[: len(stores)]

    entry = recording.addr[stores] >> np.uint64(3)
    by_entry = np.lexsort((stores, entry))
    old = np.zeros(len(stores), dtype=np.uint64)
    same = (entry[by_entry][1:] == entry[by_entry][:-1]) & (began[by_entry][1:] == began[by_entry][:-1])
    old[by_entry[1:]] = np.where(same, recording.value[stores][by_entry[:-1]], 0)
    return old


def recording_counts(recording: Recording) -> dict[str, float]:
    """Counts of what a recorded 64-bit Linux guest did to its tables, from the first user-mode access on.

    spaces: address spaces made; instructions; and the rest by the names of PER_SPACE and PER_MILLION. Stores by which
    a table is cleared after its life are left out, and the words of the kernel half of a new root.
    """
    start = recording.first_user
    if start is None:
        raise TraceError(recording.name, None, "a user-mode access expected: there is none to calibrate by")
    kind, flags = recording.kind, recording.flags
    stores = np.flatnonzero(kind == STORE)
    old = _before(recording, stores)
    new = recording.value[stores]
    snapshot = recording.snapshot[stores]
    level = flags[stores] & 7
    upper_half = (recording.addr[stores] & np.uint64(0xFFF)) >= np.uint64(2048)
    counted = (stores >= start) & ~((flags[stores] & _DEAD != 0) & ~snapshot)
    counted &= ~(snapshot & (level == 4) & upper_half)
    leaf = counted & (level == 1)
    p, w, a = np.uint64(_P), np.uint64(_W), np.uint64(_A)
    installs = leaf & (old & p == 0) & (new & p != 0)
    both = leaf & (old & p != 0) & (new & p != 0)
    protects = both & (old & w != 0) & (new & w == 0)
    reuses = both & (old & w == 0) & (new & w != 0)
    # A run of installs with A, entry after entry, is what one fault on a file maps; fork's copies have no A.
    made = np.flatnonzero(installs & (new & a != 0) & ~snapshot)
    apart = np.diff(recording.addr[stores[made]].astype(np.int64)) != 8
    runs = 1 + int(apart.sum()) if len(made) else 0
    spaces = int(((kind[start:] == TABLE) & (flags[start:] & _AS_ROOT != 0)).sum())
    if not spaces:
        raise TraceError(recording.name, None, "a new address space expected: there is none to calibrate by")
    return {
        "spaces": spaces,
        "instructions": float(recording.insns[start:].sum(dtype=np.uint64)),
        "table_stores": int(counted.sum()),
        "leaf_installs": int(installs.sum()),
        "leaf_clears": int((leaf & (old & p != 0) & (new & p == 0)).sum()),
        "write_protects": int(protects.sum()),
        "reuses": int(reuses.sum()),
        "tables": int((kind[start:] == TABLE).sum()),
        "faults": runs + int(reuses.sum()),
        "cr3_loads": int((kind[start:] == LOAD_CR3).sum()),
        "invlpg": int((kind[start:] == INVLPG).sum()),
        "age_young": int((both & (old & a != 0) & (new & a == 0)).sum()),
    }


def model_counts(instructions_per_space: float, spaces: int, seed: int) -> dict[str, float]:
    """The same counts of the workload `shell` on the guest kernel."""
    work = int(instructions_per_space / INSTRUCTIONS_PER_ACCESS)
    spaces = max(8, min(spaces, int(2e8 / max(work, 1))))
    # A process that execs makes two address spaces, and works in one.
    result: WorkloadResult = run("shell", "native", seed=seed, operations=spaces * work, work=int(work * 1.31))
    n = result.counters
    return {
        "spaces": n["roots_made"],
        "instructions": INSTRUCTIONS_PER_ACCESS * (n["accesses"] + n["kernel_accesses"]),
        "table_stores": n["table_stores"],
        "leaf_installs": n["leaf_installs"],
        "leaf_clears": n["leaf_clears"],
        "write_protects": n["write_protects"],
        "reuses": n["faults_reused"],
        "tables": n["tables_made"],
        "faults": n["faults"],
        "cr3_loads": n["cr3_loads"],
        "invlpg": n["invlpg"],
        "age_young": n["age_young"],
    }


__all__ = ["BUNDLED", "Row", "model_counts", "recording_counts", "rows"]
