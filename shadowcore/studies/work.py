"""What another process does for a sweep: some runs, one after the other, each kept as soon as it is done."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from .._version import __version__
from ..engine.costs import Costs
from . import shared
from .plan import RESULTS, Run
from .results import StudyDesign
from .store import Store
from .study import prepared


@dataclasses.dataclass(frozen=True)
class Task:
    """runs: what is done. sources: what they refer to, by number. store: the folder for results, and a file in it by
    which another machine tells that it sees the same folder; None: results go back."""

    runs: tuple[Run, ...]
    sources: dict[int, shared.Shared]
    store: tuple[str, str] | None


@dataclasses.dataclass(frozen=True)
class Done:
    """What a run came to. result: as it is stored; None: it is in the store already. seconds: that it took."""

    run: str
    error: dict[str, Any] | None
    seconds: float
    result: dict[str, Any] | None


def work(task: Task) -> list[Done]:
    """Do it. OSError where a result cannot be kept; errors of a run itself are its result."""
    store = None
    if task.store is not None and Path(*task.store).exists():
        store = Store(task.store[0])
    done = []
    for run in task.runs:
        begin = time.perf_counter()
        try:
            result = _result(run, task.sources[run.source])
        except Exception as error:
            result = failed(run.key, error)
        seconds = time.perf_counter() - begin
        if store is not None:
            store.put(result)
        done.append(Done(run.key, result["error"], seconds, None if store is not None else result))
    return done


def _result(run: Run, source: shared.Shared) -> dict[str, Any]:
    opened = shared.find(source)
    made = prepared(
        opened,
        run.design,
        run.given,
        costs=Costs.modern(),  # its TLB is not asked for: `given` has one, or none
        operations=run.operations,
        seed=run.seed,
        skip_boot=run.skip_boot,
        warm_up=run.warm_up,
    ).run()
    return _head(run.key) | {"error": None} | _figures(made)


def _figures(made: StudyDesign) -> dict[str, Any]:
    figures = {
        "seconds": made.seconds,
        "operations": made.operations,
        "pages_mean": made.pages_mean,
        "pages_max": made.pages_max,
        "gpa_mismatches": None if made.history is not None else made.gpa_mismatches,
        "history": None if made.history is None else f"{made.history:#018x}",
    }
    return {"figures": figures, "counters": {name: count for name, count in made.counters.items() if count}}


def failed(key: str, error: BaseException) -> dict[str, Any]:
    """The result of a run that ended by an error."""
    kind = type(error).__name__
    return _head(key) | {"error": {"type": kind, "message": " ".join(str(error).split()) or kind}}


def _head(key: str) -> dict[str, Any]:
    return {"run": key, "shadowcore": __version__, "results": RESULTS}
