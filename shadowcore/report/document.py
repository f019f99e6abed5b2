"""A study in plain types, as reports write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..engine.counters import PF_REASONS

WINDOWS = 320
"""Windows of a design that a file holds, at most: neighbours are added up until there are no more."""
EXITS = {
    "fill": "page fault: shadow entry missing",
    "write": "page fault: permission",
    "emulate": "page fault: store to a guest table",
    "guest": "page fault: the guest's own",
    "mmio": "page fault: device access",
    "cr3": "CR3 load",
    "cr0": "CR0 load",
    "cr4": "CR4 load",
    "efer": "EFER load",
    "invlpg": "INVLPG",
}
"""VM exits by reason, as reports call them, in the order in which they are listed and stacked."""
ROWS = 32
"""Address spaces that have a row of their own: those with most accesses."""


def document(study: Any, windows: int = WINDOWS, heat: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A study in plain types, as it is embedded in a page: `windows` of each design at most.

    heat: what heat.heat returned, for a study without `frames` and `processes` of its own.
    """
    designs = {str(name): _design(result, windows) for name, result in study.designs.items()}
    frames, processes = (_heat(study, heat, part) for part in ("frames", "processes"))
    return {
        "shadowcore": __version__,
        "workload": str(study.workload),
        "operations": int(study.operations),
        "unit": str(getattr(study, "unit", "operations")),
        "warm_up": int(getattr(study, "warm_up", 0)),
        "notes": [str(note) for note in getattr(study, "notes", ())],
        "complete": bool(getattr(study, "complete", True)),
        "recording_complete": bool(getattr(study, "recording_complete", True)),
        "command": str(study.command),
        "settings": {str(name): _plain(value) for name, value in dict(study.settings).items()},
        "designs": designs,
        "verdict": str(getattr(study, "verdict", "")),
        "phases": _phases(study),
        "frames": frames,
        "processes": processes,
        # What `shadowcore compare --json` prints.
        "compare": _plain(study.as_dict()) if hasattr(study, "as_dict") else None,
    }


def _phases(study: Any) -> dict[str, int]:
    """Where boot ends and marked phases begin, in operations counted."""
    found = getattr(getattr(study, "recording", None), "phases", {})
    begin = int(dict(study.settings).get("start", 0)) + int(getattr(study, "warm_up", 0))
    end = max((int(result.operations) for result in study.designs.values()), default=0)
    named = {"boot ends" if name == "boot" else str(name): int(at) - begin for name, at in found.items()}
    return {name: at for name, at in named.items() if 0 < at < end}


def components(cost: Any) -> Mapping[str, float]:
    """Cycles by component."""
    found: Mapping[str, float] = cost.components if hasattr(cost, "components") else cost.cycles
    return found


def _plain(value: Any) -> Any:
    """A value that JSON has: numbers that are none become null, what is not known becomes its text."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _design(result: Any, limit: int) -> dict[str, Any]:
    counters = {str(name): _plain(value) for name, value in result.counters.items()}
    windows = merged(getattr(result, "windows", None) or {}, limit)
    cost = getattr(result, "cost", None)
    pages = _pages(result, windows)
    return {
        "counters": counters,
        "operations": int(result.operations),
        "seconds": _plain(result.seconds),
        "pages_mean": pages[0],
        "pages_max": pages[1],
        "cost": None
        if cost is None
        else {
            "cycles": {str(part): _plain(value) for part, value in components(cost).items()},
            "total": _plain(cost.total),
            "slow_down": _plain(getattr(cost, "slow_down", None)),
            "microseconds": _plain(getattr(cost, "microseconds", None)),
            "unpriced": _plain(getattr(cost, "unpriced", {})),
        },
        "windows": {name: _plain(values) for name, values in windows.items()},
        "rates": {name: _plain(values) for name, values in _rates(windows).items()},
    }


def _pages(result: Any, windows: Mapping[str, NDArray[Any]]) -> tuple[float | None, int | None]:
    """Shadow pages in use: mean and most, as the result says, or else its windows."""
    mean, most = (getattr(result, name, result.counters.get(name)) for name in ("pages_mean", "pages_max"))
    if mean is None and len(windows.get("pages_mean", ())):
        lengths = np.diff(edges(windows["operation"]))
        mean = float(np.average(windows["pages_mean"], weights=lengths)) if lengths.any() else 0.0
    if most is None and len(windows.get("pages_max", ())):
        most = int(windows["pages_max"].max())
    return _plain(mean), _plain(most)


def edges(operation: NDArray[Any]) -> NDArray[np.float64]:
    """Where windows begin and end, from where they end."""
    return np.concatenate(([0], np.asarray(operation, dtype=np.float64)))


def merged(windows: Mapping[str, Any], limit: int) -> dict[str, NDArray[Any]]:
    """Windows, neighbours put together until there are no more than `limit`: counters add up. The last one is at least
    half as long as the others."""
    arrays = {str(name): np.asarray(values) for name, values in windows.items()}
    operation = arrays.get("operation")
    if operation is None or not len(operation):
        return {}
    step = -(-len(operation) // limit)
    begins = np.arange(0, len(operation), step)
    whole = np.diff(edges(operation))
    if len(begins) > 2 and whole[begins[-1] :].sum() < whole[: begins[1]].sum() / 2:
        begins = begins[:-1]  # a remnant, whose rates say more of chance than of the guest, joins its neighbour
    if len(begins) == len(operation):
        return arrays
    ends = np.append(begins[1:], len(operation)) - 1
    lengths = np.diff(edges(operation))
    made = {}
    for name, values in arrays.items():
        if name == "operation":
            made[name] = values[ends]
        elif name.endswith("_max"):
            made[name] = np.maximum.reduceat(values, begins)
        elif name.endswith("_mean"):
            whole = np.add.reduceat(lengths, begins)
            made[name] = np.add.reduceat(values * lengths, begins) / np.where(whole, whole, 1)
        else:
            made[name] = np.add.reduceat(values, begins)
    return made


def _rates(windows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """What the pictures of rates show, for each window; 0 where there was nothing to be a share of."""
    if not windows:
        return {}
    nothing = np.zeros(len(windows["operation"]))

    def of(name: str) -> NDArray[np.float64]:
        return np.asarray(windows.get(name, nothing), dtype=np.float64)

    def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

    accesses = of("accesses")
    faults = sum((of(f"exits_{reason}") for reason in PF_REASONS), nothing)
    found, made = of("mmu_cache_hit"), of("mmu_cache_miss")
    hits, misses = of("tlb_hits"), of("tlb_misses")
    rates = {
        "tlb": share(hits, hits + misses),
        "hits": 1 - share(np.minimum(faults, accesses), accesses),
        "found": share(found, found + made),
        "refaults": 1000 * share(refaults(of("exits_fill"), of("spte_removed")), accesses),
    }
    return {name: np.round(values, 6) for name, values in rates.items()}


def refaults(filled: NDArray[np.float64], removed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the entries filled in each window, those that may have been removed before: a removed entry counts once.

    With a stock of removed entries, from which each fill takes one if there is one left.
    """
    stock = 0.0
    again = np.zeros(len(filled))
    for i, (gone, come) in enumerate(zip(removed.tolist(), filled.tolist(), strict=True)):
        stock += gone
        again[i] = min(come, stock)
        stock -= again[i]
    return again


def _heat(study: Any, heat: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Heat in plain types: rows of counts with names; None where there is none."""
    given = getattr(study, name, None) or (heat or {}).get(name)
    if not given or "counts" not in given:
        return None
    counts = np.asarray(given["counts"])
    if counts.ndim != 2 or not counts.size:
        return None
    rows = len(counts)
    names = [str(each) for each in given.get("names", ())]
    if "first_frame" in given:
        names = [f"frames from {int(first):#x}" for first in given["first_frame"]]
    names = names if len(names) == rows else [f"row {number}" for number in range(rows)]
    operation = np.asarray(
        given.get("operation", np.arange(1, counts.shape[1] + 1) * study.operations // counts.shape[1])
    )
    matrices = {"counts": counts} | {
        f"exits {design}": np.asarray(matrix) for design, matrix in dict(given.get("exits", {})).items()
    }
    if name == "processes" and rows > ROWS:
        busiest = np.sort(np.argsort(-counts.sum(axis=1), kind="stable")[:ROWS])
        rest = np.setdiff1d(np.arange(rows), busiest)
        matrices = {key: np.vstack((each[busiest], each[rest].sum(axis=0))) for key, each in matrices.items()}
        names = [names[number] for number in busiest] + [f"{len(rest):,} others"]
    made = {"names": names, "operation": _plain(operation), "counts": _plain(matrices.pop("counts"))}
    made["exits"] = {key.removeprefix("exits "): _plain(each) for key, each in matrices.items() if each.any()}
    made["axis"] = str(given.get("axis", getattr(study, "unit", "operations")))
    if "frames_per_row" in given:
        made["frames_per_row"] = int(given["frames_per_row"])
    return made
