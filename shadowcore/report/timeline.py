"""A study as a timeline: the trace-event JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each design is a process with tracks of counters, slices for the phases that a recording marks and for the address
spaces that its guest loads, and instants where pages were zapped, recycled, or synced: one for each exit that did so,
where the study has a log of exits, else one for each window in which it happened. The format counts time in
microseconds; what stands there is the number of operations done, so that the designs lie one under the other, or the
microseconds that the model says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..engine.counters import EXIT_REASONS
from ..engine.reported import UNSYNC
from ..errors import ConfigError
from ..files import replace
from ..recording.format import PROGRAM
from ..recording.kinds import LOAD_CR3
from ..studies.heat import ROOT
from ..studies.results import Swept
from ..studies.settings import written
from .document import EXITS, edges

__all__ = [
    "events",
    "write",
]

TIMES = ("operations", "microseconds")

UNITS = {"operations": "1 us is one operation", "microseconds": "microseconds of the cost model"}

_INSTANTS = {
    "zap": ("mmu_shadow_zapped", "zapped"),
    "flood": ("mmu_flooded", "flooded"),
    "recycle": ("mmu_recycled", "recycled"),
    "sync": ("synced", "synced"),
}
"""What happened: the counter of windows that says how often, and the column of logs of exits."""
_MOST = 50_000
"""Instants of a kind that a design has at most: if there are more exits that did so, windows are told of."""
_SPACES = 20_000
"""Slices of address spaces, at most: beyond, the shortest are left out."""
_PHASES, _ADDRESS_SPACES, _EVENTS = 1, 2, 3
"""Tracks of a process, beside those of counters."""

_RATES = {
    "shadow pages zapped": "mmu_shadow_zapped",
    "entries read by walks": "walk_references",
    **{label: name for name, label in UNSYNC.items()},
}


_Spans = list[tuple[str, int, int]]
"""Slices: name, first operation, end."""


def write(study: Any, path: str | os.PathLike[str], time: str = "operations") -> None:
    """Write a study, or one over values of settings, to `path`; an older file is replaced when all is done.

    time: "operations", or "microseconds": those of the cost model, spread over the windows of a design by the cycles
    that the windows have (`cycles`), or else by their operations.
    ConfigError: another time, a study without windows, or without costs where they are asked for. OSError: the file
    cannot be written.
    """
    replace(path, json.dumps(events(study, time), allow_nan=False, separators=(",", ":")).encode("utf-8"))


def events(study: Any, time: str = "operations") -> dict[str, Any]:
    """The same as an object."""
    if time not in TIMES:
        raise ConfigError(f"time: one of {', '.join(TIMES)} expected, not {time!r}")
    named: list[dict[str, Any]] = []
    counted: list[dict[str, Any]] = []
    told: list[tuple[str, str, Any]] = []
    if not isinstance(study, Swept):
        told += [(name, f"{name} ({study.workload})", each) for name, each in study.designs.items()]
    else:
        for value, one in study.points:
            labels = ", ".join(f"{name}={written(each)}" for name, each in study.labels(value).items())
            told += [(name, f"{name}, {labels} ({one.workload})", each) for name, each in one.designs.items()]
        study = study.points[0][1]
    begin = None if getattr(study, "stream", None) == PROGRAM else _counted(study)[0]
    phases, spaces = _phases(study), _spaces(study) if len(told) == len(study.designs) else []
    for place, (name, title, result) in enumerate(told):
        pid = place + 1
        named += _names(pid, place, title, UNITS[time])
        counters = list(_counters(pid, name, result, time))
        counted += counters
        if counters:
            counted += _instants(pid, name, result, time, begin)
            counted += _slices(pid, name, result, time, phases, spaces)
    if not counted:
        raise ConfigError("timeline: the study has no windows: counters every N operations are needed")
    counted.sort(key=lambda event: event["ts"])
    return {
        "traceEvents": named + counted,
        "displayTimeUnit": "ms",
        "otherData": {
            "shadowcore": __version__,
            "workload": str(study.workload),
            "operations": int(study.operations),
            "warm_up": int(getattr(study, "warm_up", 0)),
            "notes": " ".join(getattr(study, "notes", ())),
            "recording_complete": bool(getattr(study, "recording_complete", True)),
            "command": str(study.command),
            "settings": json.dumps(study.settings, default=str),
            "time": UNITS[time],
        },
    }


def _names(pid: int, place: int, name: str, unit: str) -> Iterator[dict[str, Any]]:
    labels = {"process_name": {"name": name}, "process_sort_index": {"sort_index": place}}
    for kind, value in (labels | {"process_labels": {"labels": unit}}).items():
        yield {"name": kind, "ph": "M", "pid": pid, "tid": 0, "args": value}
    for track, title in ((_PHASES, "phases"), (_ADDRESS_SPACES, "address spaces"), (_EVENTS, "events")):
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": track, "args": {"name": title}}


def _counters(pid: int, name: str, result: Any, time: str) -> Iterator[dict[str, Any]]:
    """A value holds from its event to the next one of the track: of each window, one at its beginning."""
    windows = {key: np.asarray(values) for key, values in (getattr(result, "windows", None) or {}).items()}
    if not len(windows.get("operation", ())):
        return
    borders = _times(name, result, windows, time)
    tracks: dict[str, dict[str, NDArray[Any]]] = {
        "VM exits": {
            label: windows[f"exits_{reason}"]
            for reason, label in EXITS.items()
            if f"exits_{reason}" in windows and windows[f"exits_{reason}"].any()
        },
        "shadow pages": {
            key.removeprefix("pages_"): windows[key] for key in ("pages_mean", "pages_max") if key in windows
        },
    } | {track: {"in the window": windows[key]} for track, key in _RATES.items() if key in windows}
    for track, series in tracks.items():
        if not any(values.any() for values in series.values()):
            continue
        plain = {key: values.tolist() for key, values in series.items()}
        for i, begin in enumerate(borders[:-1]):
            yield _event(pid, track, begin, {key: values[i] for key, values in plain.items()})
        yield _event(pid, track, borders[-1], dict.fromkeys(plain, 0))


def _instants(pid: int, name: str, result: Any, time: str, begin: int | None) -> Iterator[dict[str, Any]]:
    """One for each exit at which it happened; or at the beginning of each window in which it did, with how often.

    begin: the number that the first operation counted has in a log of exits; None: logs have other operations.
    """
    windows = {key: np.asarray(values) for key, values in result.windows.items()}
    borders = _times(name, result, windows, time)
    log = None if begin is None else getattr(result, "exit_log", None)
    for label, (key, column) in _INSTANTS.items():
        at = {"name": label, "ph": "i", "s": "t", "pid": pid, "tid": _EVENTS}
        rows = log[log[column] > 0] if log is not None else None
        if rows is not None and len(rows) <= _MOST:
            operations = rows["operation"].astype(np.float64) - float(begin or 0)
            times = np.round(np.interp(operations, edges(windows["operation"]), borders), 4).tolist()
            for when, row in zip(times, rows, strict=True):
                told = {"pages": int(row[column]), "exit": EXITS[EXIT_REASONS[row["reason"]]]}
                yield at | {
                    "ts": when,
                    "args": told | {"address": f"{row['gva']:#x}", "operation": int(row["operation"])},
                }
            continue
        values = windows.get(key, np.zeros(0))
        for i in np.flatnonzero(values):
            yield at | {"ts": borders[i], "args": {"in the window": int(values[i])}}


def _slices(pid: int, name: str, result: Any, time: str, phases: _Spans, spaces: _Spans) -> Iterator[dict[str, Any]]:
    windows = {key: np.asarray(values) for key, values in result.windows.items()}
    operations, borders = edges(windows["operation"]), _times(name, result, windows, time)
    for track, title, spans in ((_PHASES, "phases", phases), (_ADDRESS_SPACES, "address spaces", spaces)):
        for label, begin, end in spans:
            begins, ends = (float(each) for each in np.interp((begin, end), operations, borders))
            if ends > begins:
                at = {"name": label, "ph": "X", "pid": pid, "tid": track, "ts": round(begins, 4)}
                yield at | {"dur": round(ends - begins, 4), "args": {"kind": title, "operation": begin}}


def _phases(study: Any) -> _Spans:
    """Boot and the phases that a recording marks: name, first operation counted, end."""
    recording = getattr(study, "recording", None)
    found = sorted(getattr(recording, "phases", {}).items(), key=lambda item: item[1])
    begin, length = _counted(study)
    names = ["boot" if "boot" in dict(found) else "", *("workload" if n == "boot" else n for n, _ in found)]
    borders = [0, *(min(max(at - begin, 0), length) for _, at in found), length]
    return [(n, a, b) for n, a, b in zip(names, borders, borders[1:], strict=False) if n and b > a]


def _spaces(study: Any) -> _Spans:
    """What a recorded guest's CR3 points to, while it does: its root, first operation counted, end. Of a guest with one
    processor."""
    recording = getattr(study, "recording", None)
    if recording is None or recording.holdings.get("vcpus", 1) > 1:
        return []
    begin, length = _counted(study)
    at, roots = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for base, piece in recording.pieces():
        here = np.flatnonzero(piece.kind == LOAD_CR3)
        at.append(here + base)
        roots.append(np.asarray(piece.addr)[here] & ROOT)
    places, loaded = np.concatenate(at) - begin, np.concatenate(roots)
    if not len(loaded):
        return []
    changed = np.flatnonzero(np.append(True, loaded[1:] != loaded[:-1]))
    starts = np.clip(places[changed], 0, length)
    ends = np.append(starts[1:], length)
    lengths = ends - starts
    kept = np.flatnonzero(lengths > 0)
    if len(kept) > _SPACES:
        kept = np.sort(kept[np.argsort(-lengths[kept], kind="stable")[:_SPACES]])
    return [(f"root {int(loaded[changed[k]]):#x}", int(starts[k]), int(ends[k])) for k in kept]


def _counted(study: Any) -> tuple[int, int]:
    """The record at which counting begins, and how many operations are counted."""
    begin = int(dict(study.settings).get("start", 0)) + int(getattr(study, "warm_up", 0))
    return begin, max((int(result.operations) for result in study.designs.values()), default=0)


def _event(pid: int, track: str, begin: float, values: dict[str, float]) -> dict[str, Any]:
    return {"name": track, "ph": "C", "pid": pid, "tid": 0, "ts": begin, "args": values}


def _times(name: str, result: Any, windows: dict[str, NDArray[Any]], time: str) -> list[float]:
    """Where windows begin, and where the last one ends."""
    operations = edges(windows["operation"])
    if time == "operations":
        return [int(each) for each in operations]
    cost = getattr(result, "cost", None)
    whole = getattr(cost, "microseconds", None)
    if whole is None:
        raise ConfigError(f"time: {name} has no cost in microseconds")
    parts = windows["cycles"].astype(np.float64) if "cycles" in windows else np.diff(operations)
    done = np.concatenate(([0.0], np.cumsum(parts)))
    return [float(each) for each in np.round(done / (done[-1] or 1) * float(whole), 4)]
