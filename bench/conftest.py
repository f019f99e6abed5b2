"""Fixtures of the benchmarks: the yardsticks, and the measurement of two things side by side."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from yardsticks import NoCompiler, Yardsticks

ROUNDS, REPEATS = 6, 5
"""Rounds of a comparison, and measurements of each side in a round, of which the fastest counts."""


@pytest.fixture(scope="session")
def cpus() -> set[int]:
    """The CPUs that the process was started on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


@pytest.fixture(scope="session", autouse=True)
def one_cpu(cpus: set[int]) -> Iterator[None]:
    """Stay on one CPU, so that both sides of a comparison run on the same."""
    if not cpus:
        yield
        return
    os.sched_setaffinity(0, {max(cpus)})
    yield
    os.sched_setaffinity(0, cpus)


@pytest.fixture(scope="session")
def yardsticks() -> Iterator[Yardsticks]:
    try:
        built = Yardsticks()
    except NoCompiler as error:
        pytest.skip(str(error))
    yield built
    built.close()


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    """Nanoseconds that a call takes, and what it returns."""
    start = time.perf_counter_ns()
    result = function()
    return time.perf_counter_ns() - start, result


class SideBySide:
    """Measures a path of the engine and a yardstick in turns, and stores the figures in `extra_info`.

    row, what: of the table of goals. ours: what is measured, `operations` of them a call.
    yardstick: what it is measured against, `units` a call; an operation is compared with `factor` of them.
    named: what the yardstick stands for. goal: the ratio to reach, None where there is none.
    check: called with the result of each call of `ours`; it asserts.
    prepare, prepare_yardstick: called before each call of either side, outside of the time.
    warm: without them the side is called once more before, so that its data are in the caches.
    again: the same operations once more, when they meet no exit: less these, the exits alone are left.
    """

    def __init__(self, benchmark: Any, config: pytest.Config) -> None:
        self.benchmark = benchmark
        # A quick pass (--benchmark-min-rounds below its default, 5) takes each side that many times.
        asked = int(config.getoption("benchmark_min_rounds"))
        self.rounds, self.repeats = (ROUNDS, REPEATS) if asked >= 5 else (asked, 1)

    def __call__(
        self,
        *,
        row: int | str,
        what: str,
        goal: float | None,
        ours: Callable[[], Any],
        operations: int,
        yardstick: Callable[[], Any] | None,
        units: int = 1,
        factor: float = 1.0,
        named: str = "C",
        check: Callable[[Any], None] | None = None,
        counters: Callable[[Any], dict[str, int]] | None = None,
        prepare: Callable[[], Any] | None = None,
        prepare_yardstick: Callable[[], Any] | None = None,
        again: Callable[[], Any] | None = None,
        repeats: int = REPEATS,
        warm: bool = True,
    ) -> Any:
        times: dict[str, list[float]] = {"ours": [], "yardstick": [], "again": []}
        repeats = min(repeats, self.repeats)

        def before() -> None:
            if yardstick is not None:
                if warm or prepare_yardstick is not None:
                    (prepare_yardstick or yardstick)()
                times["yardstick"].append(clock(yardstick)[0] * factor / units)
            if warm or prepare is not None:
                (prepare or ours)()

        def target() -> Any:
            elapsed, result = clock(ours)
            times["ours"].append(elapsed / operations)
            last.append(result)
            return result

        def after() -> None:
            result = last.pop()
            last.clear()
            if check is not None:
                check(result)
            if again is not None:
                times["again"].append(clock(again)[0] / operations)

        last: list[Any] = []
        gc.collect()
        gc.disable()  # a collection between prepare and ours would take what was prepared out of the caches
        try:
            result = self.benchmark.pedantic(target, setup=before, teardown=after, rounds=self.rounds * repeats)
            if last:  # disabled: the call was made once, without what comes after
                after()
        finally:
            gc.enable()
        info = self.benchmark.extra_info
        info.update(row=row, what=what, goal=goal, operations=operations, yardstick=named)
        info.update(figures(times, repeats))
        if counters is not None:
            info["counters"] = counters(result)
        elif hasattr(result, "stats"):
            info["counters"] = {name: n for name, n in result.stats.as_dict().items() if n}
        return result


class Figure:
    """Stores one figure of another kind than time, measured by `ours`, beside what it may be at most."""

    def __init__(self, benchmark: Any) -> None:
        self.benchmark = benchmark

    def __call__(
        self,
        *,
        row: int | str,
        what: str,
        goal: float | None,
        ours: Callable[[], float],
        yardstick: float,
        named: str,
        unit: str,
    ) -> None:
        found = self.benchmark.pedantic(ours, rounds=1)
        self.benchmark.extra_info.update(
            row=row,
            what=what,
            goal=goal,
            yardstick=named,
            unit=unit,
            ours=found,
            ratio=found / yardstick,
        )


def figures(times: dict[str, list[float]], repeats: int) -> dict[str, float]:
    """Of each round the fastest; of the rounds the median, and the median of their ratios."""
    best = {
        name: [min(values[i : i + repeats]) for i in range(0, len(values), repeats)] for name, values in times.items()
    }
    found = {"rounds": len(best["ours"]), "ours_ns": statistics.median(best["ours"])}
    if best["yardstick"]:
        ratios = [a / b for a, b in zip(best["ours"], best["yardstick"], strict=True)]
        found["yardstick_ns"] = statistics.median(best["yardstick"])
        found["ratio"] = statistics.median(ratios)
        found["ratio_min"], found["ratio_max"] = min(ratios), max(ratios)
    if best["again"]:
        exits = [a - b for a, b in zip(best["ours"], best["again"], strict=True)]
        found["exit_ns"] = statistics.median(exits)
        if best["yardstick"]:
            found["exit_ratio"] = statistics.median([a / b for a, b in zip(exits, best["yardstick"], strict=True)])
    return found


@pytest.fixture
def side_by_side(benchmark: Any, request: pytest.FixtureRequest) -> SideBySide:
    return SideBySide(benchmark, request.config)


@pytest.fixture
def figure(benchmark: Any) -> Figure:
    return Figure(benchmark)
