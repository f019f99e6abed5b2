"""What settings about stores to guest tables gain and lose: `python -m bench.stores`, in the root of the repository.

A study of this repository, and not a command of `shadowcore`: it prints the tables of docs/stores.md. Each setting is
changed by itself, under `cached` and under `unsync`, on all workloads and the two recordings of a Linux guest, and
compared with the same design as it is by default.
"""

import statistics
from functools import partial

import click

from bench.studied import RECORDINGS, ran, walked
from shadowcore.config import design
from shadowcore.engine.costs import find as find_costs

CHANGES = {
    "cached": (
        {"update_in_place": True},
        *({"prefetch": n} for n in (2, 4, 8, 16, 32)),
        {"update_in_place": True, "prefetch": 8},
        {"flood_threshold": None},
        {"flood_reset": True},
        {"flood_pages": True},
        *({"flood_pages": True, "flood_forget": n} for n in (1, 4, 16)),
        {"update_in_place": True, "prefetch": 8, "flood_pages": True},
    ),
    "unsync": (
        {"update_in_place": True},
        *({"prefetch": n} for n in (0, 2, 4, 16, 32)),
        {"flood_threshold": None},
        *({"flood_forget": n} for n in (1, 4, 16)),
    ),
}
"""What is changed, by design."""


def written(change):
    return ", ".join(
        f"`{name}={str(value).lower() if value in (None, True) else value}`" for name, value in change.items()
    )


def runs(source, seed, operations, records):
    """(design, change, exits and cycles over those of the design itself) of a source and seed. A recording has one."""

    def counted(made):
        counters, _, _ = ran(source, made, seed=seed, operations=operations, records=records)
        return counters["exits_total"], find_costs("modern").of(counters).total

    rows = []
    if source in RECORDINGS and seed:
        return rows
    for name, changes in CHANGES.items():
        base = counted(design(name))
        for change in changes:
            found = counted(design(name, **change))
            if base[0]:  # a guest without exits tells nothing
                rows.append((name, written(change), *(max(1, a) / b for a, b in zip(found, base, strict=True)), source))
    return rows


def table(rows):
    """Of each change the mean over sources, and where it gains and loses most."""
    by_change = {}
    for _, change, exits, cycles, source in rows:
        by_change.setdefault(change, {}).setdefault(source, []).append((exits, cycles))
    lines = ["| setting | exits | cycles | most gained | | most lost | |", "|---|---|---|---|---|---|---|"]
    for change, by_source in by_change.items():
        means = {
            source: [statistics.fmean(column) for column in zip(*got, strict=True)] for source, got in by_source.items()
        }
        exits, cycles = (statistics.geometric_mean(column) for column in zip(*means.values(), strict=True))
        best, worst = (pick(means, key=lambda source: means[source][1]) for pick in (min, max))
        cells = (f"{exits:.3f}", f"{cycles:.3f}", *(c for s in (best, worst) for c in (f"{means[s][1]:.3f}", f"`{s}`")))
        lines.append(f"| {change} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--operations", default=40_000, help="Of each run of a workload.  [default: 40000]")
@click.option("--records", default=200_000, help="Of each replay of a recording.  [default: 200000]")
@click.option("--seeds", default=3, help="Seeds of each workload.  [default: 3]")
@click.option("--source", "sources", multiple=True, help="A workload or recording.  [default: all]")
@click.option("--processes", default=1, help="At a time.  [default: 1]")
def main(operations, records, seeds, sources, processes):
    """Exits and cycles of each setting, over those of its design: the mean of all sources, the best and the worst."""
    rows = walked(partial(runs, operations=operations, records=records), sources, seeds, processes)
    for name in CHANGES:
        print(f"\n`{name}`:\n\n{table([row for row in rows if row[0] == name])}")


if __name__ == "__main__":
    main()
