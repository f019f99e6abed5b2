"""A study as a timeline: the trace-event JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each design is a process with tracks of counters. The format counts time in microseconds; what stands there is the
number of operations done, so that the designs lie one under the other, or the microseconds that the model says.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._version import __version__
from ..engine.reported import UNSYNC
from ..errors import ConfigError
from ..files import replace
from ..studies.results import Swept
from ..studies.settings import written
from .document import edges

__all__ = [
    "events",
    "write",
]

TIMES = ("operations", "microseconds")

_RATES = {
    "shadow pages zapped": "mmu_shadow_zapped",
    "entries read by walks": "walk_references",
    **{label: name for name, label in UNSYNC.items()},
}


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
    for place, (name, title, result) in enumerate(told):
        pid = place + 1
        named += _names(pid, place, title)
        counted += _counters(pid, name, result, time)
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
            "time": "operations: 1 us is one" if time == "operations" else "microseconds of the cost model",
        },
    }


def _names(pid: int, place: int, name: str) -> Iterator[dict[str, Any]]:
    for kind, value in (("process_name", {"name": name}), ("process_sort_index", {"sort_index": place})):
        yield {"name": kind, "ph": "M", "pid": pid, "tid": 0, "args": value}


def _counters(pid: int, name: str, result: Any, time: str) -> Iterator[dict[str, Any]]:
    """A value holds from its event to the next one of the track: of each window, one at its beginning."""
    windows = {key: np.asarray(values) for key, values in (getattr(result, "windows", None) or {}).items()}
    if not len(windows.get("operation", ())):
        return
    borders = _times(name, result, windows, time)
    tracks: dict[str, dict[str, NDArray[Any]]] = {
        "VM exits": {
            key.removeprefix("exits_"): values
            for key, values in windows.items()
            if key.startswith("exits_") and key != "exits_total" and values.any()
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
