"""Which policy recycles shadow pages best: `python -m bench.replacement`, in the root of the repository.

A study of this repository, and not a command of `shadowcore`: it makes the figures and the picture of
docs/replacement.md, which stay as they are until somebody runs it again. Sources are recordings of a Linux guest (the
one in the package, the one of the tests) and workloads, each with pools that are smaller than what the guest uses;
policies are compared with `optimal`, which knows what is to come. A seed is of a workload, and of `random`; a recording
has one run, for `random` one of each seed.
"""

import csv
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import click

from shadowcore import workload
from shadowcore.config import POLICIES, Features, Shadow
from shadowcore.engine.costs import find as find_costs
from shadowcore.engine.future import Future, recorder_of
from shadowcore.engine.machine import VM
from shadowcore.errors import PoolExhausted
from shadowcore.recording import replay as trace

KEPT = Path(__file__).resolve().parents[1] / "docs" / "replacement"
"""Figures of each run, and a picture: .csv, .svg."""
POOLS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RECORDINGS = {
    "linux-mix-pti": None,
    "linux-mix": Path(__file__).resolve().parents[1] / "tests" / "data" / "recordings" / "linux-mix.screc",
}
"""Recordings and their files; None: the one in the package."""


def runs(source, seed, operations, records, uses, names):
    """Rows of one source and seed: of each pool and policy what it came to."""
    made = Shadow.cached(uses=uses)
    costs = find_costs("modern")

    def one(design, future=None, record=False):
        if source in RECORDINGS:
            recording = trace.open_recording(RECORDINGS[source])
            stop = min(records, recording.operations)
            result = trace.replay(recording, design, stop=stop, future=future, record_uses=record)
            return result.whole.counters, result.future, result.pages_max
        vm = VM(workload.find(source).memory, design, features=Features(), future=future, record_uses=record)
        result = workload.run(source, vm, seed=seed, operations=operations, window=max(1, operations // 100))
        return result.stats, Future.of(vm.mmu) if record else None, result.pages_max

    endless, future, most = one(recorder_of(made), record=True)
    rows = []
    for pool in POOLS:
        if pool > most + made.refill:
            break
        for policy in names:
            try:
                design = replace(made, pool_pages=pool, policy=policy, policy_seed=seed)
                counters, _, _ = one(design, future if policy == "optimal" else None)
            except PoolExhausted:
                break
            rows.append(
                {
                    "source": source,
                    "seed": seed,
                    "pool": pool,
                    "policy": policy,
                    "exits": counters["exits_total"],
                    "refaults": counters["mmu_cache_miss"] - endless["mmu_cache_miss"],
                    "made": counters["mmu_cache_miss"],
                    "cycles": round(costs.of(counters).total),
                    "exits_endless": endless["exits_total"],
                }
            )
    return rows


def summary(rows):
    """Of each policy: how it compares with fifo and optimal, over (source, pool), means over seeds; and the least and
    the most that the mean against fifo is for a seed."""
    grouped = {}
    for row in rows:
        grouped.setdefault((row["source"], row["pool"]), {}).setdefault(row["policy"], []).append(row)
    found = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        told = {"points": 0}
        for what in ("exits", "cycles"):
            against = {"fifo": [], "optimal": []}
            seeds = {}
            for by_policy in grouped.values():
                if policy not in by_policy:
                    continue
                mean = statistics.fmean(row[what] for row in by_policy[policy])
                fifo = {row["seed"]: row[what] for row in by_policy["fifo"]}
                known = {row["seed"]: row[what] for row in by_policy[policy]}
                for seed in fifo:
                    seeds.setdefault(seed, []).append(known.get(seed, known[min(known)]) / fifo[seed])
                for other in against:
                    if other in by_policy:
                        against[other].append(mean / statistics.fmean(row[what] for row in by_policy[other]))
            told["points"] = len(against["fifo"])
            told[what] = {
                "worst_of_fifo": max(against["fifo"]),
                "mean_of_fifo": statistics.geometric_mean(against["fifo"]),
                "mean_of_optimal": statistics.geometric_mean(against["optimal"]),
                "seeds_of_fifo": [pick(map(statistics.geometric_mean, seeds.values())) for pick in (min, max)],
            }
        found[policy] = told
    return found


def printed(found):
    head = f"{'policy':<10}{'exits':>9}{'worst':>9}{'optimal':>9}{'cycles':>9}{'worst':>9}{'optimal':>9}{'seeds':>14}"
    lines = [head]
    for policy, told in found.items():
        cells = [
            told[what][key]
            for what in ("exits", "cycles")
            for key in ("mean_of_fifo", "worst_of_fifo", "mean_of_optimal")
        ]
        lines.append(
            f"{policy:<10}"
            + "".join(f"{cell:>9.3f}" for cell in cells)
            + "{:>8.3f}-{:.3f}".format(*told["exits"]["seeds_of_fifo"])
        )
    return "\n".join(lines)


def point(row):
    return row["source"], row["pool"], row["seed"]


def picture(rows, file):
    """Of each policy the exits, over those of fifo, by how much of what the guest uses the pool holds."""
    import matplotlib
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(row["policy"] for row in rows))
    with matplotlib.rc_context({"svg.hashsalt": "shadowcore", "font.size": 8}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        base = {point(row): row["exits"] for row in rows if row["policy"] == "fifo"}
        data = [[row["exits"] / base[point(row)] for row in rows if row["policy"] == name] for name in policies]
        axes.boxplot(data, sym="", widths=0.5, medianprops={"color": "#c05000"})
        axes.set_xticks(range(1, len(policies) + 1), policies)
        axes.axhline(1, color="#888888", linewidth=0.7)
        axes.set_ylabel("exits, fifo = 1")
        figure.savefig(file, format="svg", metadata={"Date": None})


@click.command()
@click.option("--operations", default=40_000, help="Of each run of a workload.  [default: 40000]")
@click.option("--records", default=200_000, help="Of each replay of a recording.  [default: 200000]")
@click.option("--seeds", default=5, help="Seeds of each workload.  [default: 5]")
@click.option("--uses", default="fault+link+cr3", help="What is a use.  [default: fault+link+cr3]")
@click.option("--source", "sources", multiple=True, help="A workload or recording.  [default: all]")
@click.option("--processes", default=1, help="At a time.  [default: 1]")
@click.option("--update", is_flag=True, help="Keep figures and picture for docs/replacement.md.")
def main(operations, records, seeds, uses, sources, processes, update):
    """Refaults, exits and cycles of each policy, over sources and pools, against fifo and optimal."""
    wanted = sources or [*RECORDINGS, *workload.WORKLOADS]
    jobs = [(source, seed) for source in wanted for seed in range(seeds)]
    rows = []
    with ProcessPoolExecutor(processes) as pool:
        futures = [
            pool.submit(
                runs,
                source,
                seed,
                operations,
                records,
                uses,
                ("fifo", "random") if source in RECORDINGS and seed else POLICIES,
            )
            for source, seed in jobs
        ]
        for (source, seed), future in zip(jobs, futures, strict=True):
            rows += future.result()
            print(f"{source}, seed {seed}: {len(rows)} rows", file=sys.stderr, flush=True)
    found = summary(rows)
    print(printed(found))
    if update:
        with KEPT.with_suffix(".csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        picture(rows, KEPT.with_suffix(".svg"))


if __name__ == "__main__":
    main()
