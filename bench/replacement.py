"""Which policy recycles shadow pages best: `python -m bench.replacement`, in the root of the repository.

A study of this repository, and not a command of `shadowcore`: it makes the figures and the picture of
docs/replacement.md, which stay as they are until somebody runs it again. Sources are recordings of a Linux guest (the
one in the package, the one of the tests) and workloads, each with pools that are smaller than what the guest uses;
policies are compared with `optimal`, which knows what is to come. A seed is of a workload, and of `random`; a recording
has one run, for `random` one of each seed.
"""

import csv
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from bench.studied import RECORDINGS, ran, walked
from shadowcore.config import POLICIES, Shadow
from shadowcore.engine.costs import find as find_costs
from shadowcore.engine.future import recorder_of
from shadowcore.errors import PoolExhausted

KEPT = Path(__file__).resolve().parents[1] / "docs" / "replacement"
"""Figures of each run, and a picture: .csv, .svg."""
POOLS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def runs(source, seed, operations, records, uses):
    """Rows of one source and seed: of each pool and policy what it came to. Of a recording seeds are `random`'s."""
    names = ("fifo", "random") if source in RECORDINGS and seed else POLICIES
    made = Shadow.cached(uses=uses)
    costs = find_costs("modern")

    def one(design, **more):
        return ran(source, design, seed=seed, operations=operations, records=records, **more)

    endless, future, most = one(recorder_of(made), record_uses=True)
    rows = []
    for pool in POOLS:
        if pool > most + made.refill:
            break
        for policy in names:
            try:
                design = replace(made, pool_pages=pool, policy=policy, policy_seed=seed)
                counters, _, _ = one(design, future=future if policy == "optimal" else None)
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
    rows = walked(partial(runs, operations=operations, records=records, uses=uses), sources, seeds, processes)
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
