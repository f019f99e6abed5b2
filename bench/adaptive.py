"""What design `adaptive` gains, and each of its rules: `python -m bench.adaptive`, in the root of the repository.

A study of this repository, and not a command of `shadowcore`: it prints the tables of docs/adaptive.md. Sources are all
workloads, the two recordings of a Linux guest, whole, and two mixtures that are made here of workloads: what one guest
does in turns. `adaptive`, and the fixed designs with the settings that serve them best, are compared with the best of
`flush`, `cached` and `unsync` as they are by default. `nested` is other hardware and left out.
"""

import statistics
from functools import partial

import click

from bench.studied import RECORDINGS, ran, walked
from shadowcore import workload
from shadowcore.config import RULES, design
from shadowcore.engine.costs import find as find_costs
from shadowcore.workload.script import WORKLOADS
from shadowcore.workload.script import workload as register

FIXED = {name: design(name) for name in ("flush", "cached", "unsync")}
TUNED = {
    "cached, tuned": design("cached", update_in_place=True, prefetch=16, flood_pages=True),
    "unsync, tuned": design("unsync", prefetch=16),
}
ADAPTIVE = {"adaptive": design("adaptive")}
ABLATION = {
    **{f"without `{rule}`": design("adaptive", rules=tuple(r for r in RULES if r != rule)) for rule in RULES},
    "none of them": design("adaptive", rules=()),
    "`update_in_place=false`": design("adaptive", update_in_place=False),
    "`prefetch=8`": design("adaptive", prefetch=8),
}
DESIGNS = FIXED | TUNED | ADAPTIVE | ABLATION
MIXTURES = {"shell beside database": ("shell", "database"), "shell beside compile": ("shell", "compile")}
"""Workloads of which one guest does a round of each in turn; `kbuild` and `kbuild-like` are mixtures, too."""


def _in_turns(names, guest):
    rounds = []
    for name in names:
        made = workload.find(name)
        rounds.append(made.function(guest, **made.checked({})))
    while True:
        for each in rounds:
            next(each)
        yield


for _name, _parts in MIXTURES.items():
    _function = partial(_in_turns, _parts)
    _function.__doc__ = f"Processes of {_parts[0]} and {_parts[1]} in one guest, a round of each in turn."
    register(_name, "320MiB")(_function)


def runs(source, seed, operations, records):
    """Cycles of a source and seed under each design, over those of the best fixed one. A recording has one."""
    if source in RECORDINGS and seed:
        return []
    costs = find_costs("modern")
    found = {}
    for name, made in DESIGNS.items():
        counters, _, _ = ran(source, made, seed=seed, operations=operations, records=records)
        found[name] = costs.of(counters).total
    best = min(found[name] for name in FIXED)
    return [(source, {name: cycles / best for name, cycles in found.items()})]


def means(rows):
    """Of each source the mean over seeds, by design."""
    by_source = {}
    for source, row in rows:
        by_source.setdefault(source, []).append(row)
    return {
        source: {name: statistics.fmean(row[name] for row in each) for name in DESIGNS}
        for source, each in by_source.items()
    }


def sources_table(found):
    """A row a source: cycles of the fixed designs, and of this one, over the best fixed one."""
    names = [*FIXED, *TUNED, *ADAPTIVE]
    lines = [f"| source | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for source, row in found.items():
        lines.append(f"| {source} | {' | '.join(f'{row[name]:.3f}' for name in names)} |")
    over = [statistics.geometric_mean(row[name] for row in found.values()) for name in names]
    most = [max(row[name] for row in found.values()) for name in names]
    lines.append(f"| mean | {' | '.join(f'{mean:.3f}' for mean in over)} |")
    lines.append(f"| worst | {' | '.join(f'{worst:.3f}' for worst in most)} |")
    return "\n".join(lines)


def rules_table(found):
    """A row a change of `adaptive`: cycles over those without it, the mean, and where it gains and loses most."""
    lines = ["| change | cycles | most gained | | most lost | |", "|---|---|---|---|---|---|"]
    for name in ABLATION:
        ratios = {source: row[name] / row["adaptive"] for source, row in found.items()}
        best, worst = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        mean = statistics.geometric_mean(ratios.values())
        lines.append(f"| {name} | {mean:.3f} | {ratios[best]:.3f} | {best} | {ratios[worst]:.3f} | {worst} |")
    return "\n".join(lines)


@click.command()
@click.option("--operations", default=20_000, help="Of each run of a workload.  [default: 20000]")
@click.option("--records", default=10**9, help="Of each replay of a recording.  [default: all]")
@click.option("--seeds", default=1, help="Seeds of each workload.  [default: 1]")
@click.option("--source", "sources", multiple=True, help="A workload, recording or mixture.  [default: all]")
@click.option("--processes", default=1, help="At a time.  [default: 1]")
def main(operations, records, seeds, sources, processes):
    """Cycles of `adaptive` over those of the best fixed design, and of each of its rules switched off."""
    wanted = sources or [*RECORDINGS, *WORKLOADS]
    job = partial(runs, operations=operations, records=records)
    found = means(walked(job, wanted, seeds, processes))
    print(sources_table(found))
    print(f"\n{rules_table(found)}")


if __name__ == "__main__":
    main()
