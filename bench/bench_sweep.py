"""A sweep by processes beside as many bare ones: 200 points of about 25 ms, each kept in a file.

    python bench/bench_sweep.py

Bare processes are forked and share the same runs out beforehand, an equal number each, and keep nothing: no start of an
interpreter, no queue, no file. Both go on in turns; the ratio of their rates is the median of six rounds.
"""

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import pytest

import shadowcore as sc
from shadowcore.studies import shared
from shadowcore.studies.plan import planned
from shadowcore.studies.spread import processors
from shadowcore.studies.work import Task, work

ROUNDS = 6


def spec(points: int = 200, operations: int = 100_000) -> dict[str, object]:
    """Half of the points are runs of `native`, that the others are measured against."""
    return {
        "sources": "pingpong",
        "designs": ["native", "cached"],
        "operations": operations,
        "seed": range(points // 2),
    }


def bare(asked: dict[str, object], jobs: int) -> float:
    """Seconds that bare processes take."""
    plan = planned(asked)
    runs = list(plan.runs.values())
    with tempfile.TemporaryDirectory() as folder:
        sources = {n: shared.share(source, Path(folder) / str(n)) for n, source in enumerate(plan.sources)}
        begin = time.perf_counter()
        context = multiprocessing.get_context("fork")
        started = [
            context.Process(target=work, args=(Task(tuple(runs[number::jobs]), sources, None),))
            for number in range(jobs)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        return time.perf_counter() - begin


def swept(asked: dict[str, object], jobs: int) -> float:
    """Seconds that a sweep takes, with its planning and its store."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        found = sc.sweep(asked, store=folder, jobs=jobs)
        seconds = time.perf_counter() - begin
        assert found.counts()["done"] == len(found.manifest["points"])
        return seconds


def compared(points: int = 200, operations: int = 100_000, rounds: int = ROUNDS) -> dict[str, float]:
    """Medians over rounds: milliseconds of a run by itself, and rates by those of bare processes."""
    asked, jobs = spec(points, operations), processors()
    begin = time.perf_counter()
    sc.sweep(asked, seed=range(5), jobs=1)
    alone = (time.perf_counter() - begin) / 10
    ratios = []
    for _ in range(rounds):
        ratios.append(bare(asked, jobs) / swept(asked, jobs))
    return {
        "ms": 1e3 * alone,
        "jobs": jobs,
        "rate": statistics.median(ratios),
        "lowest": min(ratios),
        "best": max(ratios),
    }


@pytest.mark.benchmark(group="sweep")
def test_sweep(benchmark) -> None:
    """A small one; the comparison with bare processes takes minutes, and all processors."""
    benchmark.pedantic(lambda: swept(spec(20, 2000), 2), rounds=1)


if __name__ == "__main__":
    print(compared())
