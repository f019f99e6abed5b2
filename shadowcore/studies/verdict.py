"""What a study comes to, in a sentence: which design the guest is fastest under, and by how much.

Runs with other seeds tell how much of a difference is chance: a difference that is smaller than the spread of its own
value over the seeds is called none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .settings import effective, written

SEED = "seed"
_TOLD = 4
"""Designs that the fastest one is compared with, at most."""
_SAME = 0.005
"""Shares of time that are no difference, where there is one seed: two figures that print alike."""

Runs = Sequence[Any]
"""What one design did, as results.StudyDesign, with each seed."""


def of_study(study: Any) -> str:
    """One results.Study: the designs, one run each. Nothing where fewer than two shadow designs were run."""
    return _ranked({name: [design] for name, design in study.designs.items()})


def of_sweep(swept: Any) -> str:
    """A results.Swept: designs over their seeds, where seeds are all that was swept; else which design is fastest at
    which values, or, of one design, the best value."""
    others = [name for name in swept.names if name != SEED]
    cases: dict[tuple[str, ...], dict[str, list[Any]]] = {}
    for value, study in swept.points:
        labels = swept.labels(value)
        key = tuple(f"{name}={written(labels[name])}" for name in others)
        for name, design in study.designs.items():
            cases.setdefault(key, {}).setdefault(name, []).append(design)
    if not others:
        return _ranked(cases[()]) if cases else ""
    shadows = [name for name in dict.fromkeys(n for case in cases.values() for n in case) if name != "native"]
    if len(shadows) > 1:
        return _by_value(cases)
    if len(shadows) == 1:
        return _by_setting(shadows[0], swept, others)
    return ""


def _ranked(designs: Mapping[str, Runs]) -> str:
    shadows = {name: runs for name, runs in designs.items() if name != "native"}
    if len(shadows) < 2:
        return ""
    order = sorted(shadows, key=lambda name: fmean(_time(run) for run in shadows[name]))
    best = order[0]
    seeds = len(shadows[best])
    told = [_against(shadows[best], shadows[name], name) for name in order[1:]]
    same = [name for name, (text, equal) in zip(order[1:], told, strict=True) if equal]
    more = [text for text, equal in told if not equal]
    if len(more) > _TOLD:
        more = [*more[: _TOLD - 1], more[-1]]
    over = f", over {seeds} seeds" if seeds > 1 else ""
    parts = [f"At these prices the guest is fastest under {best}{over}"]
    if more:
        parts.append(": " + "; ".join(more))
    if same:
        within = f"within the spread of {seeds} seeds " if seeds > 1 else ""
        parts.append(("; " if more else ": ") + f"{within}no difference to {' and '.join(same)}")
    return "".join(parts) + "."


def _against(best: Runs, other: Runs, name: str) -> tuple[str, bool]:
    """What the best is against another one, and whether they are the same."""
    times = [_time(b) / _time(a) if _time(a) else math.inf for a, b in zip(best, other, strict=False)]
    mean, spread = fmean(times), stdev(times) if len(times) > 1 else 0.0
    if abs(mean - 1) <= max(spread, _SAME):
        return "", True
    shown = f"{mean:,.2f}" + (f" ± {spread:.2f}" if len(times) > 1 else "")
    return f"{shown} times faster than under {name}, with {_exits(best, other)}", False


def _exits(best: Runs, other: Runs) -> str:
    mine, theirs = (fmean(run.exits_total for run in runs) for runs in (best, other))
    if mine == theirs:
        return "as many exits"
    if not mine or not theirs:
        return "no exits" if not mine else f"{mine:,.0f} exits against none"
    fewer = theirs / mine
    if abs(fewer - 1) < 0.05:
        return f"{abs(mine - theirs) / theirs:.1%} {'fewer' if fewer > 1 else 'more'} exits"
    return f"{fewer:,.1f} times fewer exits" if fewer > 1 else f"{1 / fewer:,.1f} times as many exits"


def _by_value(cases: Mapping[tuple[str, ...], Mapping[str, Runs]]) -> str:
    """At which values which design is fastest."""
    first: dict[str, list[str]] = {}
    for key, designs in cases.items():
        shadows = {name: fmean(_time(run) for run in runs) for name, runs in designs.items() if name != "native"}
        if len(shadows) > 1:
            first.setdefault(min(shadows, key=lambda name: shadows[name]), []).append(" ".join(key))
    if not first:
        return ""
    if len(first) == 1:
        return f"At these prices the guest is fastest under {next(iter(first))} at every value."
    most = max(first, key=lambda name: len(first[name]))
    parts = [f"under {name} at {_listed(keys)}" for name, keys in first.items() if name != most]
    return f"At these prices the guest is fastest {'; '.join(parts)}; under {most} at all others."


def _by_setting(name: str, swept: Any, others: Sequence[str]) -> str:
    """Which value is best for one design."""
    found: dict[str, list[float]] = {}
    for value, study in swept.points:
        if name in study.designs:
            design = study.designs[name]
            labels = effective(swept.labels(value), design.design)
            key = " ".join(f"{label}={written(labels[label])}" for label in others if label in labels)
            if key and design.cost.slow_down is not None:
                found.setdefault(key, []).append(design.cost.slow_down)
    means = {key: fmean(values) for key, values in found.items()}
    if len(means) < 2:
        return ""
    low, high = min(means, key=lambda key: means[key]), max(means, key=lambda key: means[key])
    if means[high] - means[low] < _SAME:
        return f"{name}: no value makes a difference to the slow-down, which is {means[low]:,.2f}."
    return f"{name}: slowed down least at {low} ({means[low]:,.2f}), most at {high} ({means[high]:,.2f})."


def _time(design: Any) -> float:
    """What designs are compared by: the slow-down, or, where native was not run, cycles."""
    slow: float | None = design.cost.slow_down
    return float(design.cost.total) if slow is None else slow


def _listed(keys: Sequence[Any]) -> str:
    shown = [str(key) for key in keys[:5]] + (["..."] if len(keys) > 5 else [])
    return ", ".join(shown)
