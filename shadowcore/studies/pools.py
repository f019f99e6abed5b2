"""How many shadow pages a guest needs: exits over sizes of the pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import POOL_MAX, Shadow, check_int
from ..engine.costs import find as find_costs
from ..engine.future import recorder_of
from ..engine.policies.references import stack_distances
from ..errors import ConfigError, PoolExhausted
from ..recording.format import GUEST
from .source import Setup, Source, find
from .study import prepared

if TYPE_CHECKING:
    from numpy.typing import NDArray

WITHIN = (0.05, 0.01)
"""Of how much more exits than an endless pool takes the smallest pool is looked for."""
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Pools of the curve, where nothing else is said, as far as they are smaller than what the guest uses."""


@dataclasses.dataclass(frozen=True)
class PoolPoint:
    """A run with one size of the pool.

    pages: in the pool. exits: all of them. made: shadow pages that were made. recycled: those that were recycled.
    """

    pages: int
    exits: int
    made: int
    recycled: int


@dataclasses.dataclass(frozen=True)
class PoolStudy:
    """What `pool_study` found.

    workload, design: their names. points: runs, by pages. endless: the run in which nothing is recycled; its `pages`
        are those that were in use at most.
    within: of each share of WITHIN, the smallest pool whose exits are within that share of those of the endless one.
    bend: the pool from which on more pages help much less than before: the point of the curve, both axes logarithmic,
        that is furthest below the line between its ends.
    distance: misses of a `lru` that sees every use, by pages (index), of one run: the analysis of stack distances.
    exhausted: pools in which the roots and tables that one access needs found no room.
    """

    workload: str
    design: str
    points: tuple[PoolPoint, ...]
    endless: PoolPoint
    within: Mapping[float, int]
    bend: int
    distance: NDArray[np.uint64]
    exhausted: tuple[int, ...]

    def misses(self, pages: int) -> int:
        """Of a `lru` that sees every use, with one page recycled for each that is made, in a pool of so many."""
        return int(self.distance[min(pages, len(self.distance) - 1)])

    def as_dict(self) -> dict[str, Any]:
        """In plain types, as `shadowcore pool --json` prints it."""
        return {
            "workload": self.workload,
            "design": self.design,
            "endless": dataclasses.asdict(self.endless),
            "points": [dataclasses.asdict(point) | {"misses": self.misses(point.pages)} for point in self.points],
            "within": {f"{share:.0%}": pages for share, pages in self.within.items()},
            "bend": self.bend,
            "exhausted": list(self.exhausted),
        }


def pool_study(
    source: Any = None,
    mmu: str | Shadow = "cached",
    *,
    sizes: Iterable[int] | None = None,
    operations: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> PoolStudy:
    """Run a workload, or replay a recording, with pools of several sizes, and find how many shadow pages it needs.

    source: as for `study`. mmu: the design, or its name. sizes: pools of the curve; None: SIZES. operations: of a
        workload (None: a million), or records of a recording, at most (None: all). seed: of a workload. settings: as
        for `study`. progress: told what is run next. ConfigError, TraceError.
    """
    found = find(source)
    job = prepared(found, mmu, dict(settings or {}), costs=find_costs("modern"), operations=operations, seed=seed)
    made, setup = job.made, job.setup
    if not isinstance(made, Shadow):
        raise ConfigError(f"mmu: {made.name!r} has no shadow pages; a design that has is needed")
    if made.policy == "optimal":
        raise ConfigError("policy: 'optimal' is no policy to size a pool for")
    if found.kind != "workload" and found.stream != GUEST:
        raise ConfigError("workload: a workload, or a recording of a guest, is needed")
    wanted = SIZES if sizes is None else tuple(check_int("sizes", size, 4, POOL_MAX) for size in sizes)
    run = _Runs(found, made, setup, progress or (lambda _: None))
    endless, keys = run.endless()
    for size in sorted(set(wanted)):
        if size < endless.pages + made.refill:
            run.at(size)
    within = {share: run.smallest(share, endless) for share in WITHIN}
    points = tuple(point for _, point in sorted(run.done.items()) if point is not None)
    return PoolStudy(
        workload=found.name,
        design=made.name,
        points=points,
        endless=endless,
        within=within,
        bend=_bend(points, endless),
        distance=stack_distances(keys),
        exhausted=tuple(size for size, point in sorted(run.done.items()) if point is None),
    )


def _bend(points: tuple[PoolPoint, ...], endless: PoolPoint) -> int:
    if len(points) < 3 or points[0].exits <= endless.exits:
        return points[0].pages if points else endless.pages
    x = np.log([point.pages for point in points])
    y = np.log([point.exits for point in points])
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return points[int(np.argmax(line - y))].pages


class _Runs:
    """Runs of one source under one design, each size once."""

    def __init__(self, source: Source, made: Shadow, setup: Setup, told: Callable[[str], None]) -> None:
        self.source, self.made, self.setup, self.told = source, made, setup, told
        self.done: dict[int, PoolPoint | None] = {}

    def endless(self) -> tuple[PoolPoint, NDArray[np.uint64]]:
        """The run in which nothing is recycled, with what it used; its pool is the largest that was in use."""
        self.told("endless")
        outcome = self.source.run(recorder_of(self.made), dataclasses.replace(self.setup, record_uses=True), None)
        assert outcome.future is not None
        counters = outcome.counters
        point = PoolPoint(outcome.pages_max, counters["exits_total"], counters["mmu_cache_miss"], 0)
        return point, outcome.future.keys

    def at(self, pages: int) -> PoolPoint | None:
        """The run with so many; None if they do not suffice for one access."""
        if pages not in self.done:
            self.told(f"{pages} pages")
            made = dataclasses.replace(self.made, pool_pages=pages)
            try:
                counters = self.source.run(made, self.setup, None).counters
            except PoolExhausted:
                self.done[pages] = None
            else:
                self.done[pages] = PoolPoint(
                    pages, counters["exits_total"], counters["mmu_cache_miss"], counters["mmu_recycled"]
                )
        return self.done[pages]

    def smallest(self, share: float, endless: PoolPoint) -> int:
        """The smallest pool within `share` of the endless one, by halving; more pages are taken never to cost more."""
        low, high = 3, endless.pages + self.made.refill
        limit = endless.exits * (1 + share)
        for size, point in sorted(self.done.items()):
            if point is None or point.exits > limit:
                low = max(low, size)
        above = [size for size, point in self.done.items() if size > low and point and point.exits <= limit]
        high = min(above, default=high)
        while high - low > max(1, low // 64):
            middle = (low + high) // 2
            point = self.at(middle)
            if point is not None and point.exits <= limit:
                high = middle
            else:
                low = middle
        return high
