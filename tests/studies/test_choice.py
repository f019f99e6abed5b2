"""Which design when: the studies behind it, the table and the page."""

import json
import re

import pytest
from commands import refused, run
from places import ROOT

import shadowcore as sc
from shadowcore.config import DESIGNS
from shadowcore.engine.costs import Costs
from shadowcore.engine.levels import LEVELS, of_design
from shadowcore.studies import choice
from shadowcore.workload import WORKLOADS

PAGE = ROOT / "docs" / "designs.md"
SOURCES = ("context-switch", "lmbench-page-fault")


@pytest.fixture(scope="module")
def found():
    return choice.choice(SOURCES, 5_000)


def test_slow_downs_are_those_of_studies(found):
    assert found.designs == tuple(name for name in DESIGNS if name not in (*choice.LEFT_OUT, "native"))
    for preset in choice.PRESETS:
        for source in SOURCES:
            study = sc.study(source, ["native", *found.designs], operations=10_000, warm_up=5_000, windows=0)
            native = study.designs["native"].counters
            for name in found.designs:
                made = study.designs[name]
                assert found.exits[source][name] == made.exits_per_million
                costs = Costs.preset(preset)
                priced = costs.replace(levels=of_design(costs.levels, made.design.engine))
                assert found.slow[preset][source][name] == priced.of(made.counters, native).slow_down
    assert found.faults["context-switch"] == 0 < found.faults["lmbench-page-fault"]


def test_levels_have_a_place_for_each_design():
    assert of_design(LEVELS["shadow"], "unsync") is LEVELS["shadow"]
    assert of_design(LEVELS["shadow"], "nested") is LEVELS["ept"]
    assert of_design(LEVELS["shadow-on-ept"], "nested") is of_design(LEVELS["pvm-on-ept"], "nested")
    assert of_design(LEVELS["ept-on-ept"], "nested") is LEVELS["ept-on-ept"]


def test_the_best(found):
    for preset in choice.PRESETS:
        by = found.slow[preset]["context-switch"]
        assert "flush" not in found.best(preset, "context-switch")
        assert min(by, key=by.get) in found.best(preset, "context-switch")


def test_the_page(found):
    text = choice.page(found, "shadowcore designs")
    for preset in choice.PRESETS:
        section = text.split(f"## At the prices of {preset}")[1].split("\n## ")[0]
        for source in SOURCES:
            (line,) = re.findall(rf"^\| {source} \| (.*) \|$", section, re.M)
            assert [float(cell.strip("*")) for cell in line.split(" | ")] == pytest.approx(
                list(found.slow[preset][source].values()), abs=0.005
            )
            assert line.count("**") == 2 * len(found.best(preset, source))
    with pytest.raises(sc.ConfigError, match="sources"):
        choice.choice([])


def test_the_command(tmp_path):
    target = tmp_path / "page.md"
    shown = run("designs", *SOURCES, "--operations", 5000, "--write", target)
    assert all(source in shown for source in SOURCES)
    assert "shadowcore designs context-switch lmbench-page-fault --write" in target.read_text("utf-8")
    plain = json.loads(run("designs", "syscall", "--operations", 1000, "--json"))
    assert list(plain["slow"]) == list(choice.PRESETS)
    assert "did you mean 'syscall'" in refused("designs", "syscal")


def test_the_page_has_every_source():
    text = PAGE.read_text("utf-8")
    for name in WORKLOADS:
        assert text.count(f"\n| {name} | ") == len(choice.PRESETS) + 1
    heads = re.findall(r"^\|  \| (`.*`) \|$", text, re.M)
    assert len(heads) == len(choice.PRESETS)
    for head in heads:
        names = {cell.strip("`") for cell in head.split(" | ")}
        assert {"flush", "cached", "unsync"} <= names <= set(DESIGNS) - set(choice.LEFT_OUT)


@pytest.mark.slow
def test_the_page_is_current():
    assert PAGE.read_text("utf-8") == choice.page(choice.choice(), "shadowcore designs --write docs/designs.md")
