"""Warm-ups: figures from some operation on, of guest and shadow as what came before has left them."""

import json

import numpy as np
import pytest
import sources
from commands import refused, run
from places import LINUX_FORK
from program_recordings import FAMILY

import shadowcore as sc
from shadowcore import workload
from shadowcore.recording import operations as replayed
from shadowcore.recording import replay as trace

COUNTERS = ("exits_total", "walk_references", "mmu_shadow_zapped", "spte_installed", "accesses")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("warm")


@pytest.fixture(scope="module")
def marked(folder):
    return sources.marked(folder / "marked.screc")


def test_what_is_counted_and_what_is_not_are_the_whole(folder):
    """Of each kind of source: figures from N on are those of all, less those up to N."""
    ops = sources.operations(folder / "ops.screc")
    guest = trace.load(LINUX_FORK).head(9000)
    for design in ("native", "flush", "cached", "unsync"):
        runs = {
            "guest": lambda design=design, **more: trace.replay(guest, design, **more).whole.counters,
            "operations": lambda design=design, **more: replayed.run(ops, design, **more).stats,
            "program": lambda design=design, **more: sc.programs.run(FAMILY, design, **more).stats,
        }
        for kind, one in runs.items():
            name = "stop" if kind == "guest" else "operations"
            whole, before, after = one(), one(**{name: 2500}), one(warm_up=2500)
            for counter in COUNTERS:
                # Programs end where the recording is cut, and their memory goes.
                if kind != "program":
                    assert before[counter] + after[counter] == whole[counter], (kind, design, counter)
                assert after[counter] <= whole[counter]


def test_programs_add_up():
    """Of two warm-ups, what lies between them is in the windows of the first."""
    early, late = (sc.programs.run(FAMILY, "cached", warm_up=n, windows=500) for n in (2000, 5000))
    assert (early.warm_up, late.warm_up) == (2000, 5000)
    assert early.accesses == 10_470 - 2000
    assert early.history == late.history == sc.programs.run(FAMILY, "cached").history
    assert early.windows["operation"][-1] == 8470
    for name in (*COUNTERS, "kernel.faults"):
        assert np.array_equal(early.windows[name][6:], late.windows[name]), name
    assert sum(each["accesses"] for each in late.processes) == late.accesses
    assert int(late.windows["exits_total"].sum()) == late.stats["exits_total"]
    assert int(late.windows["kernel.faults"].sum()) == late.counters["faults"]


@pytest.mark.parametrize("name", ["webserver", "pingpong", "shell"])
def test_workloads(name):
    """The same run, counted from later on: what the guest did in all is the same, and the counters are of the rest."""
    whole = workload.run(name, "cached", operations=60_000, seed=5)
    warm = workload.run(name, "cached", operations=60_000, seed=5, warm_up=20_000, window=1000)
    assert (warm.history, warm.setup) == (whole.history, whole.setup)
    assert 20_000 <= warm.warm_up < 300_000  # the first call of a shell is long
    assert warm.operations == whole.operations - warm.warm_up
    assert 0 < warm.stats["exits_total"] < whole.stats["exits_total"]
    assert int(warm.windows["exits_total"].sum()) == warm.stats["exits_total"]
    assert int(warm.windows["operation"][-1]) == warm.operations
    for counter in whole.counters:
        assert warm.counters[counter] <= whole.counters[counter]
    assert int(warm.windows["faults"].sum()) == warm.counters["faults"]
    plain = workload.run(name, "cached", operations=60_000, seed=5, warm_up=20_000)
    assert plain.windows is None
    assert plain.operations + plain.warm_up == whole.operations


def test_replays_are_split_where_boot_ends():
    recording = trace.load(LINUX_FORK).head(560_000)
    boot = recording.first_user
    assert recording.phases == {"boot": boot}
    cold, warm = trace.replay(recording, "cached"), trace.replay(recording, "cached", warm_up=boot, window=5000)
    assert warm.boot is None
    assert warm.workload == warm.whole == cold.workload
    assert warm.warm_up == boot
    assert int(warm.windows["operation"][-1]) == 560_000 - boot
    assert int(warm.windows["exits_total"].sum()) == warm.whole.exits_total
    half = trace.replay(recording, "cached", warm_up=boot // 2)
    assert half.boot.records == boot - boot // 2
    assert half.workload == cold.workload
    assert half.boot.exits_total < cold.boot.exits_total
    late = trace.replay(recording, "cached", start=1000, warm_up=boot - 1000)
    assert late.whole.records == 560_000 - boot


# -- on the command line ---------------------------------------------------------------------------------------------


def test_phases(marked):
    path, places = marked
    names = {"boot": places[0] + 1, "loop": places[0], "again": places[1], "last": places[2]}
    assert sc.trace.open_recording(path).phases == names
    for name, place in names.items():
        plain = json.loads(run("compare", path, "--mmu", "cached", "--warm-up", name, "--json"))
        assert plain["warm_up"] == place
        assert plain["designs"]["cached"]["operations"] == places[2] + 201 - place
        assert f"--warm-up {name}" in plain["command"]
    assert plain["designs"]["cached"]["exits_total"] == 0  # all of it is in the shadow
    assert "did you mean 'last'" in refused("compare", path, "--warm-up", "lst")
    assert "there are boot, loop, again, last" in refused("compare", path, "--warm-up", "x")


def test_marks_without_names(folder):
    path, places = sources.marked(folder / "nameless.screc", names=False)
    found = sc.trace.open_recording(path).phases
    assert found == {"boot": places[0] + 1, "mark-1": places[0], "mark-2": places[1], "mark-3": places[2]}
    assert sc.trace.load(path).phases == found


def test_both_ways_past_the_boot(marked):
    """--skip-boot begins with a new shadow, --warm-up boot with the one that boot has made."""
    path, places = marked
    skipped = ("compare", path, "--mmu", "cached", "--skip-boot", "--json")
    cold = json.loads(run(*skipped))["designs"]["cached"]
    warm = json.loads(run("compare", path, "--mmu", "cached", "--warm-up", places[0] + 201, "--json"))["designs"][
        "cached"
    ]
    assert cold["exits_total"] > warm["exits_total"] == 0
    assert "again" in refused(*skipped[:-1], "--operations", 50, "--warm-up", "agx")
    both = json.loads(run(*skipped, "--warm-up", "again"))
    assert both["warm_up"] == places[1] - places[0] - 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("pingpong", "--warm-up", "boot"), "a number of operations"),
        (("pingpong", "--operations", 1000, "--warm-up", 1000), "fewer than the 1,000 operations that are run"),
        (("pingpong", "--warm-up", "1.2"), "is not a count"),
        (("pingpong", "--warm-up", "2Z"), "is not a count"),
        (("FAMILY", "--warm-up", 10_470), "fewer than the 10,470 accesses that are run"),
        (("FAMILY", "--warm-up", "boot"), "a number of accesses"),
        (
            ("LINUX", "--operations", 1000, "--warm-up", "boot"),
            "fewer than the 1,000 records that are run",
        ),
        (("LINUX", "--skip-boot", "--warm-up", "bot"), "did you mean 'boot'"),
        (("pingpong", "--warm-up", "1K", "--over", "warm_up=1,2"), "warm_up is set to one value as well"),
    ],
    ids=lambda a: " ".join(map(str, a)) if isinstance(a, tuple) else "",
)
def test_refused(arguments, why):
    files = {"FAMILY": FAMILY, "LINUX": LINUX_FORK}
    assert why in refused("compare", *(files.get(a, a) for a in arguments))


def test_a_workload_runs_its_million_after_the_warm_up():
    study = sc.compare("idle", ["native"], warm_up="20K")
    assert (study.operations, study.warm_up) == (1_020_000, 20_000)
    assert study.designs["native"].operations >= 1_000_000 - 20_000
    assert "--warm-up 20K" in study.command
    assert "--operations" not in study.command


def test_a_cold_start_is_told(marked):
    text = " ".join(run("compare", marked[0], "--mmu", "cached", "--mmu", "native").split())
    assert "Cold start, or a change of phase: of cached's exits" in text
    assert "--warm-up boot counts from there on." in text
    plain = json.loads(run("compare", marked[0], "--mmu", "cached", "--mmu", "native", "--json"))
    assert plain["unsteady"] == ["cached"]
    first, second = plain["designs"]["cached"]["exits_by_half"]
    assert first + second == plain["designs"]["cached"]["exits_total"]
    assert first > 1.2 * second


def test_a_steady_run_is_not():
    study = sc.compare("pingpong", ["cached"], operations=100_000, warm_up=50_000, windows=0)
    assert study.designs["cached"].halves is not None
    assert study.designs["cached"].steady
    assert study.cold_start == ""
    assert "Cold start" not in run("compare", "pingpong", "--mmu", "cached", "--operations", "100K", "--warm-up", "50K")


def test_halves_are_those_of_the_windows():
    study = sc.compare(trace.load(LINUX_FORK).head(60_000), ["cached"], windows=1000)
    exits = study.designs["cached"].windows["exits_total"]
    assert study.designs["cached"].halves == (int(exits[:30].sum()), int(exits[30:].sum()))
    assert (
        sc.compare(trace.load(LINUX_FORK).head(60_000), ["cached"], windows=0).designs["cached"].halves
        == study.designs["cached"].halves
    )
