"""The sentence under a study: who is fastest, by how much, and what is chance."""

from types import SimpleNamespace

import pytest
from commands import run

import shadowcore as sc
from shadowcore.studies import verdict


def design(slow, exits, name="cached"):
    return SimpleNamespace(cost=SimpleNamespace(slow_down=slow, total=1e6 * slow), exits_total=exits, design=name)


def of(**designs):
    return verdict.of_study(SimpleNamespace(designs=designs))


def seeds(**designs):
    """A sweep over seeds, of a list of (slow-down, exits) for each design."""
    count = len(next(iter(designs.values())))
    points = [
        (seed, SimpleNamespace(designs={name: design(*runs[seed]) for name, runs in designs.items()}))
        for seed in range(count)
    ]
    return verdict.of_sweep(SimpleNamespace(names=("seed",), points=points, labels=lambda value: {"seed": value}))


def test_ratios():
    said = of(native=design(1, 0), flush=design(4.2, 1060), cached=design(2.0, 100), unsync=design(3.0, 80))
    assert said == (
        "At these prices the guest is fastest under cached: 1.50 times faster than under unsync, with 1.2 times as "
        "many exits; 2.10 times faster than under flush, with 10.6 times fewer exits."
    )


def test_the_figures_are_those_of_the_study():
    study = sc.study("fork-storm", ["native", "flush", "cached"], operations=20_000, windows=0)
    flush, cached = study.designs["flush"], study.designs["cached"]
    fast, slow = sorted((flush, cached), key=lambda each: each.cost.slow_down)
    assert study.verdict.startswith(f"At these prices the guest is fastest under {fast.name}: ")
    assert f"{slow.cost.slow_down / fast.cost.slow_down:,.2f} times faster than under {slow.name}" in study.verdict
    assert study.as_dict()["verdict"] == study.verdict


def test_no_choice_no_verdict():
    assert of(native=design(1, 0), cached=design(2, 9)) == ""
    assert of(native=design(1, 0)) == ""


def test_the_same():
    assert of(a=design(2.0, 9), b=design(2.004, 9)).endswith("under a: no difference to b.")
    assert "1.01 times faster" in of(a=design(2.0, 9), b=design(2.02, 9))


def test_exits():
    assert of(a=design(1, 0), b=design(2, 10)).endswith("with no exits.")
    assert of(a=design(1, 10), b=design(2, 0)).endswith("with 10 exits against none.")
    assert of(a=design(1, 10), b=design(2, 10)).endswith("with as many exits.")
    assert of(a=design(1, 1000), b=design(2, 1010)).endswith("with 1.0% fewer exits.")


def test_within_the_spread_of_seeds():
    same = seeds(native=[(1, 0)] * 3, a=[(2.0, 9), (2.2, 9), (2.1, 9)], b=[(2.1, 9), (2.1, 9), (2.2, 9)])
    assert same == (
        "At these prices the guest is fastest under a, over 3 seeds: within the spread of 3 seeds no difference to b."
    )
    far = seeds(a=[(2.0, 10), (2.2, 12)], b=[(4.0, 30), (4.5, 36)], c=[(2.1, 10), (2.2, 11)])
    assert "2.02 ± 0.03 times faster than under b, with 3.0 times fewer exits" in far
    assert far.endswith("within the spread of 2 seeds no difference to c.")


def test_seeds_on_the_command_line():
    output = run("compare", "fork-storm", "--operations", 3_000, "--over", "seed=1..3")
    assert "over 3 seeds" in " ".join(output.split())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({1: (2, 3), 2: (2, 3)}, "At these prices the guest is fastest under a at every value."),
        (
            {1: (2, 3), 2: (4, 3), 4: (5, 3)},
            "At these prices the guest is fastest under a at pages=1; under b at all others.",
        ),
    ],
)
def test_by_value(values, expected):
    points = [(v, SimpleNamespace(designs={"a": design(a, 1), "b": design(b, 1)})) for v, (a, b) in values.items()]
    swept = SimpleNamespace(names=("pages",), points=points, labels=lambda value: {"pages": value})
    assert verdict.of_sweep(swept) == expected


def test_the_best_value_of_one_design():
    made = sc.compare("fork-storm", ["cached"], over={"flood_threshold": (1, None)}, operations=10_000)
    slow = {value: study.designs["cached"].cost.slow_down for value, study in made.points}
    assert made.verdict == (
        f"cached: slowed down least at flood_threshold=1 ({slow[1]:,.2f}), most at flood_threshold=none "
        f"({slow[None]:,.2f})."
    )
