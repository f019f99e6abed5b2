"""Sweeps: many studies at once, over sources, designs, settings, prices and seeds; spread, kept, and gone on with."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import check_int
from ..errors import ConfigError, ShadowcoreError
from . import shared
from .collect import Sweep
from .plan import KEYS, Plan, Run, planned, read_spec
from .spread import Executor, Stop, spread
from .store import MANIFEST, Store, manifest, packed

Progress = Callable[[int, int, int, bool], None]


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C in a sweep; `sweep` has what was done by then.

    >>> issubclass(sc.SweepInterrupted, KeyboardInterrupt)
    True
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__("interrupted")
        self.sweep = sweep

    __reduce__ = ShadowcoreError.__reduce__


def sweep(
    spec: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    store: str | os.PathLike[str] | None = None,
    resume: bool = False,
    retry: bool = False,
    jobs: int | None = None,
    executor: Executor | None = None,
    shard: tuple[int, int] | None = None,
    together: int | None = None,
    progress: Progress | None = None,
    **keys: Any,
) -> Sweep:
    """Run every point of a grid, or of a list, and say what each came to.

    spec: a file in TOML, or a mapping with the same keys; `keys` win over it:

    sources: workloads and recordings, as `study` takes them, one or several; or tables with `source` and settings that
        only this one has. None: the recording in the package. designs: as of `study`.
    settings: by name a value, several in a list, or a range such as "16..4096 x2", "0..100 +25" or "1..5". Names that
        are no key of a specification are settings as well: sweep(sources="shell", pool=[64, 256]).
    seed, operations, costs: one or several. prices: fields of Costs, changed in each list of `costs`.
    points: a list instead of, or besides, the grid: tables of settings (and source, design, seed, operations, costs),
        each of which is combined with all of `settings`.
    when: a condition, or several, that points fulfil, such as "pool >= 64 or design == 'native'".
    skip_boot, warm_up: as of `study`. name: what it is called.

    store: a folder in which each result is kept as soon as it is there. resume: go on with the sweep in it: what is
        done is not done again. retry: but for what failed. shard: (i, n): the i-th of n shares alone, 1 to n.
    jobs: processes (None: one for each processor, 1: this one alone). executor: anything with `submit`, instead of
        processes; jobs is then how many tasks it is given at a time. together: runs in a task (None: as many as last a
        while).
    progress: called with runs done, failed, and all, and whether Ctrl-C was pressed.

    A run that fails is a result with its error, and the others go on. `native` is run for each source, seed and
    machine, to measure the others against, and is no point unless it is asked for.

    ConfigError, TraceError: nothing has run. SweepError: the executor failed. StoreError: a result could not be kept.
    Ctrl-C raises SweepInterrupted when what was running has ended; a second one drops that.

    >>> spec = {"sources": ["pingpong"], "designs": ["cached"], "seed": [0, 1], "operations": 1000}
    >>> sc.sweep(spec, jobs=1)
    Sweep(sweep: 2 points, 2 done)
    """
    plan = planned(_together(spec, keys))
    share = _shard(shard)
    if jobs is not None:
        check_int("jobs", jobs, 1, 1 << 16)
    if together is not None:
        check_int("together", together, 1, 1 << 30)
    if resume and store is None:
        raise ConfigError("resume: a store is needed, the folder of the sweep that goes on")
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise ConfigError(f"executor: an object with a method submit is needed, not {executor!r:.60}")
    runs = _of_shard(plan, share)
    if store is None:
        return _Sweeping(plan, runs, None, jobs, executor, together, progress).run()
    kept = Store(store)
    held = kept.begin(plan, resume=resume, shard=share)
    try:
        return _Sweeping(plan, runs, kept, jobs, executor, together, progress, retry).run()
    finally:
        held.close()


def _together(spec: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    if spec is None:
        found: dict[str, Any] = {}
    elif isinstance(spec, Mapping):
        found = dict(spec)
    else:
        found = read_spec(spec)
    own = {name: value for name, value in keys.items() if name not in KEYS}
    found |= {name: value for name, value in keys.items() if name in KEYS}
    if own:
        settings = found.get("settings", {})
        if not isinstance(settings, Mapping):
            raise ConfigError(f"settings: a table of names and values is needed, not {settings!r:.60}")
        found["settings"] = dict(settings) | own
    return found


def _shard(shard: Any) -> tuple[int, int] | None:
    if shard is None:
        return None
    if not isinstance(shard, tuple) or len(shard) != 2:
        raise ConfigError(f"shard: (number, of how many) is needed, such as (1, 4), not {shard!r:.60}")
    count = check_int("shard", shard[1], 1, 1 << 20)
    return check_int("shard", shard[0], 1, count), count


def _of_shard(plan: Plan, shard: tuple[int, int] | None) -> list[Run]:
    """Every n-th run: neighbours, which take about as long, are of different shares."""
    runs = list(plan.runs.values())
    return runs if shard is None else runs[shard[0] - 1 :: shard[1]]


class _Sweeping:
    """A sweep that is being run."""

    def __init__(
        self,
        plan: Plan,
        runs: list[Run],
        store: Store | None,
        jobs: int | None,
        executor: Executor | None,
        together: int | None,
        progress: Progress | None,
        retry: bool = False,
    ) -> None:
        self.plan = plan
        self.runs = runs
        self.store = store
        self.jobs = jobs
        self.executor = executor
        self.together = together
        self.progress = progress or (lambda done, failed, total, stopping: None)
        self.retry = retry
        self.results: dict[str, bytes] = {}
        self.failed = 0
        self.done = 0
        self.there = 0

    def run(self) -> Sweep:
        begin = time.perf_counter()
        left = [run for run in self.runs if not self._is_there(run)]
        self.there = self.done
        interrupted = False
        with self._sources(left) as sources, Stop() as stop:
            try:
                self._spread(left, sources, stop)
            except KeyboardInterrupt:
                interrupted = True
            interrupted |= stop.asked
        found = Sweep(
            manifest=manifest(self.plan),
            results=self.results,
            folders=() if self.store is None else (str(self.store.folder),),
            there=self.there,
            seconds=time.perf_counter() - begin,
            complete=not interrupted,
        )
        if interrupted:
            raise SweepInterrupted(found)
        return found

    def _is_there(self, run: Run) -> bool:
        result = None if self.store is None else self.store.get(run.key)
        if result is None or (self.retry and result["error"]):
            return False
        self.done += 1
        self.failed += result["error"] is not None
        return True

    def _spread(self, runs: list[Run], sources: dict[int, shared.Shared], stop: Stop) -> None:
        where = None if self.store is None else (str(self.store.folder.absolute()), MANIFEST)
        total = len(self.runs)
        tasks = spread(runs, sources, where, stop, jobs=self.jobs, executor=self.executor, together=self.together)
        for task in tasks:
            for done in task:
                if done.result is not None:  # else it is in the store already
                    if self.store is not None:
                        self.store.put(done.result)
                    else:
                        self.results[done.run] = packed(done.result)
                self.done += 1
                self.failed += done.error is not None
            self.progress(self.done, self.failed, total, stop.asked)

    @contextmanager
    def _sources(self, runs: list[Run]) -> Iterator[dict[int, shared.Shared]]:
        """The sources of runs, ready for other processes."""
        needed = dict.fromkeys(run.source for run in runs)
        arrays = any(self.plan.sources[number].recording is not None for number in needed)
        above = None
        if arrays and self.executor is not None and self.store is not None:
            above = self.store.folder  # where other machines may find it
        folder = tempfile.mkdtemp(prefix=".recordings-" if above else "shadowcore-", dir=above) if arrays else None
        found: dict[int, shared.Shared] = {}
        try:
            for number in needed:
                found[number] = shared.share(self.plan.sources[number], Path(str(folder)) / str(number))
            yield found
        finally:
            for each in found.values():
                shared.forget(each)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
