"""Prices, and what counters come to."""

import dataclasses
import json
import re

import pytest
from commands import refused, run

import shadowcore as sc
from shadowcore.engine.costs import COMPONENTS, find
from shadowcore.engine.levels import LEVELS
from shadowcore.engine.presets import ALIASES, PRESETS

COUNTERS = {
    "instructions": 1000,
    "accesses": 100,
    "walk_references": 400,
    "exits_fill": 7,
    "exits_write": 3,
    "exits_emulate": 5,
    "exits_guest": 2,
    "exits_cr3": 11,
    "exits_invlpg": 4,
    "pf_emulate": 5,
    "guest_walk_references": 60,
    "guest_cr3_loads": 13,
    "guest_invlpg": 9,
    "guest_faults": 2,
    "mmu_cache_miss": 6,
    "mmu_shadow_zapped": 2,
    "spte_installed": 30,
    "spte_removed": 10,
    "host_faults": 5,
    "host_faults_large": 2,
}


def plain(**changes):
    """All prices 0, but for some."""
    zero = {f.name: 0.0 for f in dataclasses.fields(sc.Costs) if f.type == "float"}
    fixed = {
        "name": "test",
        "clock_ghz": 2.0,
        "leaf_shares": (1, 0, 0, 0),
        "leaf_latencies": (0, 0, 0, 0),
    }
    return sc.Costs(**(zero | fixed | changes))


@pytest.mark.parametrize(
    ("price", "component", "count"),
    [
        ("instruction", "work", 1000),
        ("tlb_miss", "translation", 100),
        ("upper_reference", "translation", 300),
        ("cr3_load", "guest", 2),
        ("invlpg", "guest", 5),
        ("guest_fault", "guest", 2),
        ("exit_fault", "switches", 17),
        ("exit_register", "switches", 11),
        ("exit_invlpg", "switches", 4),
        ("dispatch", "dispatch", 32),
        ("fill", "faults", 7),
        ("rights", "faults", 3),
        ("inject", "faults", 2),
        ("guest_reference", "faults", 60),
        ("emulate", "emulation", 5),
        ("register", "registers", 11),
        ("flush_page", "registers", 4),
        ("page_new", "pages", 6),
        ("page_zap", "pages", 2),
        ("entry", "pages", 40),
        ("first_touch", "backing", 3),
        ("first_touch_large", "backing", 2),
    ],
)
def test_each_price_is_paid_as_often_as_it_should(price, component, count):
    """One price at a time, of 3 cycles."""
    cost = plain(**{price: 3.0}).of(COUNTERS)
    assert cost.components == {name: 3.0 * count if name == component else 0 for name in COMPONENTS}
    assert cost.total == 3 * count
    assert cost.microseconds == pytest.approx(3 * count / 2000)


def test_leaf_entries_wait_for_a_level_of_the_cache():
    costs = plain(leaf_shares=(0.5, 0.25, 0.15, 0.1), leaf_latencies=(4, 12, 40, 200))
    assert costs.leaf_reference == pytest.approx(2 + 3 + 6 + 20)
    assert costs.of(COUNTERS).total == pytest.approx(31 * 100)
    with_tlb = COUNTERS | {"tlb_hits": 80, "tlb_misses": 20}
    assert costs.of(with_tlb).total == pytest.approx(31 * 20)


def test_levels_say_how_often_a_price_is_paid():
    """32 exits: two changes of world each, or four and two exits to the outer hypervisor."""
    costs = plain(exit_fault=10, exit_register=10, exit_invlpg=10, dispatch=5, outer_exit=7)
    one = costs.of(COUNTERS).components
    assert (one["switches"], one["outer"], one["dispatch"]) == (32 * 10, 0, 32 * 5)
    for levels in ("shadow-on-ept", LEVELS["shadow-on-ept"]):
        two = costs.replace(levels=levels).of(COUNTERS).components
        assert (two["switches"], two["outer"], two["dispatch"]) == (32 * 20, 32 * 14, 32 * 5)
    assert costs.replace(levels="pvm-on-ept").of(COUNTERS).components == one
    three = costs.replace(levels=LEVELS["shadow-on-ept"].replace(exit_switches=6, exit_outer=3)).of(COUNTERS)
    assert three.components["outer"] == 32 * 21


@pytest.mark.parametrize("missing", range(5))
def test_the_formulas_of_the_paper(missing):
    """Huang et al., SOSP 2023: changes of world, and exits to the outer hypervisor, of a first touch."""
    assert LEVELS["shadow-on-ept"].first_touch(missing) == (4 * missing + 8, 2 * missing + 4)
    assert LEVELS["ept-on-ept"].first_touch(missing) == (2 * missing + 6, missing + 3)
    assert LEVELS["pvm-on-ept"].first_touch(missing) == (2 * missing + 4, 0)
    assert LEVELS["ept"].first_touch(missing) == (2, 0)
    assert LEVELS["ept-on-ept"].counts(backed=3) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hypervisors": 0}, "levels.paging: 'shadow' contradicts hypervisors: 0"),
        ({"paging": "none"}, "levels.paging: 'none' contradicts hypervisors: 1"),
        ({"control": "none"}, "levels.control: 'none' contradicts hypervisors: 1"),
        ({"control": "user", "paging": "ept"}, "levels.paging: 'ept' contradicts control: 'user'"),
        ({"exit_outer": 1}, "levels.exit_outer: 1 contradicts the rest: no outer hypervisor"),
        ({"violation_switches": 2}, "levels.violation_switches: 2 contradicts the rest: there are no EPT violations"),
        ({"table_outer": 1}, "levels.table_outer: 1 contradicts the rest"),
        ({"hypervisors": 2, "exit_outer": 3, "exit_switches": 4}, "levels.exit_outer: 3 exits take 6 switches"),
        ({"hypervisors": 3}, "levels.hypervisors: a number from 0 to 2"),
        ({"hypervisors": True}, "levels.hypervisors"),
        ({"exit_switches": -1}, "levels.exit_switches"),
        ({"paging": "epd"}, "levels.paging: 'epd' is not one of none, shadow, ept"),
        ({"name": ""}, "levels.name"),
        ({"depth": 1}, "levels: there is no 'depth'"),
    ],
)
def test_levels_that_contradict_each_other(changes, what):
    with pytest.raises(sc.ConfigError, match=re.escape(what)):
        LEVELS["shadow"].replace(**{"exit_switches": None, **changes})


def test_levels_of_a_study():
    found = {}
    for levels in ("shadow", "shadow-on-ept", LEVELS["pvm"]):
        study = sc.study("demand", ("native", "unsync"), operations=5_000, windows=0, levels=levels)
        found[study.settings["levels"]] = study
        assert study.designs["native"].cost.components["switches"] == 0
    cost = {name: study.designs["unsync"].cost for name, study in found.items()}
    assert cost["shadow-on-ept"].components["switches"] == 2 * cost["shadow"].components["switches"]
    assert cost["shadow-on-ept"].components["outer"] > 0 == cost["shadow"].components["outer"]
    assert "--set levels=shadow-on-ept" in found["shadow-on-ept"].command
    for bad, what in (("ept", "'ept' has EPT, and unsync"), ("none", "no hypervisor"), ("shadw", "'shadow'")):
        with pytest.raises(sc.ConfigError, match=what):
            sc.study("demand", ("unsync",), operations=5_000, windows=0, levels=bad)
    with pytest.raises(sc.ConfigError, match="levels"):
        sc.study("demand", ("unsync",), operations=5_000, windows=0, levels=7)


def test_an_outer_host_that_finds_a_page_takes_an_exit():
    costs = plain(
        exit_fault=10, dispatch=5, violation=3, first_touch=100, first_touch_large=1000, levels="shadow-on-ept"
    )
    counters = {"accesses": 1, "outer_faults": 7, "outer_faults_large": 2}
    assert costs.of(counters).components["backing"] == 7 * 18 + 5 * 100 + 2 * 1000
    study = sc.study(
        "demand", ["unsync"], operations=5_000, windows=0, costs="nested", backing="thp", outer_backing="cold"
    )
    found = study.designs["unsync"]
    assert found.counters["outer_faults"] == 512 * found.counters["host_faults"]
    assert "--set outer_backing=cold" in study.command
    with pytest.raises(sc.ConfigError, match="levels: 'shadow' has no outer hypervisor, and outer_backing is 'cold'"):
        sc.study("demand", ["unsync"], operations=5_000, backing="thp", outer_backing="cold")


def test_a_cold_host_costs_something():
    settings = {"backing": "cold", "pages": 600}
    study = sc.study("page-fault", ("native", "unsync"), operations=5_000, windows=0, settings=settings)
    for design in study.designs.values():
        assert design.counters["host_faults"] >= 600
        assert design.cost.components["backing"] == design.counters["host_faults"] * study.costs.first_touch
    with pytest.raises(sc.ConfigError, match="backing"):
        sc.study("page-fault", operations=5_000, backing="frozen")


def test_work_without_instructions_is_operations_or_accesses():
    costs = plain(access=2)
    assert costs.of({"operations": 50, "accesses": 70}).total == 100
    assert costs.of({"accesses": 70}).total == 140


def test_slow_down_and_dict():
    costs = plain(instruction=1, dispatch=10)
    cost = costs.of(COUNTERS, {"instructions": 1000})
    assert cost.slow_down == pytest.approx(1.32)
    assert costs.of(COUNTERS).slow_down is None
    shown = cost.as_dict()
    assert shown["cycles"] == cost.total == sum(shown["cycles_by_component"].values())
    assert (shown["costs"], shown["clock_ghz"], shown["slow_down"]) == ("test", 2.0, cost.slow_down)


def test_counters_of_a_vm_are_enough():
    vm = sc.VM("16MiB", "cached")
    sc.Kernel(vm).spawn()
    assert sc.Costs.modern().of(vm.stats.as_dict()).total > 0


def test_presets():
    assert set(PRESETS) > {"kvm-2023-8269cy", "pvm-2026-13900hk", "core2007"}
    assert set(ALIASES) == {"modern", "pvm", "nested"}
    for name in (*PRESETS, *ALIASES):
        costs = sc.Costs.preset(name)
        assert costs.name == ALIASES.get(name, name)
        assert find(name) == costs == find(costs)
        assert costs.as_dict()["leaf_shares"] == list(costs.leaf_shares)
        priced = {f.name for f in dataclasses.fields(costs)} - {"name", "tlb", "levels", "sources"}
        given = set(costs.sources)
        assert all(costs.sources.values())
        assert {field for field in priced - given if getattr(costs, field)} == set()  # nothing without a source
        with pytest.raises(dataclasses.FrozenInstanceError):
            costs.fill = 1
    for alias in ("modern", "pvm", "nested", "core2007"):
        assert getattr(sc.Costs, alias)() == sc.Costs.preset(alias)
    exits = {"accesses": 1, "exits_cr3": 100}
    slow = {name: sc.Costs.preset(name).of(exits).microseconds for name in ("modern", "nested", "core2007")}
    assert slow["modern"] < slow["core2007"] < slow["nested"]
    assert sc.Costs.modern().replace(fill=3).sources["fill"] == "set by the caller"


def test_presets_give_back_what_they_were_made_of():
    """Round trips of PVM (SOSP 2023), tables 1 and 2, in microseconds."""
    faults = {"accesses": 1, "exits_guest": 100, "guest_faults": 0, "guest_walk_references": 400}
    loads = {"accesses": 1, "exits_cr3": 100}
    for name, exception in (("kvm-2023-8269cy", 1.66), ("pvm-2023-8269cy", 1.67), ("nested-2023-8269cy", 9.20)):
        bare = sc.Costs.preset(name).replace(tlb_miss=0, leaf_latencies=(0, 0, 0, 0))
        free = bare.replace(access=0)
        assert free.of(faults).microseconds / 100 == pytest.approx(exception, abs=0.002), name
    kvm = sc.Costs.preset("kvm-2023-8269cy").replace(tlb_miss=0, leaf_latencies=(0, 0, 0, 0), access=0)
    assert 0.06 + 2 * kvm.of(loads).microseconds / 100 == pytest.approx(2.09, abs=0.002)
    native = kvm.of({"accesses": 1, "guest_cr3_loads": 200}).microseconds / 100
    assert 0.06 + native == pytest.approx(0.22, abs=0.002)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"fill": -1}, "costs.fill"),
        ({"fill": float("nan")}, "costs.fill"),
        ({"fill": float("inf")}, "costs.fill"),
        ({"fill": "3"}, "costs.fill"),
        ({"fill": True}, "costs.fill"),
        ({"clock_ghz": 0}, "costs.clock_ghz"),
        ({"levels": "shadw"}, "levels: there is no 'shadw'; did you mean 'shadow'"),
        ({"leaf_shares": (1, 1, 0, 0)}, "costs.leaf_shares"),
        ({"leaf_shares": (1, 0, 0)}, "costs.leaf_shares"),
        ({"leaf_latencies": 4}, "costs.leaf_latencies"),
        ({"name": ""}, "costs.name"),
        ({"tlb": 64}, "costs.tlb"),
        ({"fil": 1}, "there is no 'fil'"),
    ],
)
def test_refused_prices(changes, what):
    with pytest.raises(sc.ConfigError, match=what):
        sc.Costs.modern().replace(**changes)


@pytest.mark.parametrize(
    ("counters", "what"),
    [
        ({}, "nothing says what was done"),
        ({"accesses": -1}, "'accesses'"),
        ({"accesses": "many"}, "'accesses'"),
        ({"accesses": 1, "exits_cr3": None}, "'exits_cr3'"),
        (7, "a mapping"),
    ],
)
def test_refused_counters(counters, what):
    with pytest.raises(sc.ConfigError, match=what):
        sc.Costs.modern().of(counters)
    with pytest.raises(sc.ConfigError, match="native_counters"):
        sc.Costs.modern().of({"accesses": 1}, counters)


def test_refused_names():
    with pytest.raises(sc.ConfigError, match="'xyz' is not one of modern, pvm, nested, kvm-2023"):
        find("xyz")
    with pytest.raises(sc.ConfigError, match="did you mean 'kvm-2023-8269cy'"):
        find("kvm-2023-8269")
    with pytest.raises(sc.ConfigError, match="is not one of"):
        find(7)


def test_the_command():
    listed = run("costs")
    for name in (*PRESETS, *ALIASES, *LEVELS):
        assert name in listed
    one = run("costs", "pvm")
    assert "pvm-2026-13900hk" in one
    assert "shadowbox" in one
    for price in PRESETS["pvm-2026-13900hk"].prices:
        assert price in one
    plain = json.loads(run("costs", "--json"))
    assert plain["aliases"] == ALIASES
    assert plain["costs"]["kvm-2023-8269cy"]["sources"]["fill"].startswith("inject")
    assert json.loads(run("costs", "nested", "--json"))["nested-2023-8269cy"]["levels"]["exit_outer"] == 2
    assert "did you mean 'modern'" in refused("costs", "modrn")
    assert "did you mean 'pvm'" in refused("compare", "syscall", "--costs", "pmv")
