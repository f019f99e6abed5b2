"""What sweeps are asked to do: specifications, the grid, keys of runs."""

import dataclasses

import pytest

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.studies.plan import planned, read_spec


def plan(**spec):
    return planned({"operations": 2000} | spec)


def column(made, name):
    return [point.labels.get(name) for point in made.points]


def test_a_grid():
    made = plan(sources="shell", designs=["native", "cached"], settings={"pool": "64..256 x2"}, seed="1..2")
    assert made.axes == ("design", "seed", "pool")
    # Native has no pool: it has one point for each seed, and each is what two others are measured against.
    assert column(made, "design") == ["native"] * 2 + ["cached"] * 6
    assert column(made, "pool") == [None] * 2 + [64, 64, 128, 128, 256, 256]
    assert column(made, "seed") == [1, 2] * 4
    assert len(made.runs) == 8
    natives = {p.labels["seed"]: p.run for p in made.points if p.labels["design"] == "native"}
    assert all(point.native == natives[point.labels["seed"]] for point in made.points)


def test_native_is_run_where_it_is_no_point():
    made = plan(sources="shell", designs="cached", settings={"pool": [64, 128]})
    assert len(made.points) == 2
    assert len(made.runs) == 3
    assert made.axes == ("pool",)


def test_prices_alone_make_no_run():
    made = plan(sources="shell", designs="cached", costs=["modern", "pvm"], prices={"dispatch": [100, 200]})
    assert column(made, "costs") == ["modern", "modern", "pvm", "pvm"]
    assert column(made, "dispatch") == [100, 200, 100, 200]
    assert {made.costs[point.costs].dispatch for point in made.points} == {100, 200}
    assert len({point.costs for point in made.points}) == 4
    # The two lists are of processors with other TLBs, which runs model.
    for name in ("modern", "pvm"):
        assert len({point.run for point in made.points if point.labels["costs"] == name}) == 1


def test_sources_with_tables():
    made = plan(sources=["shell", {"source": "hackbench", "groups": [1, 2]}], designs="cached")
    assert column(made, "source") == ["shell", "hackbench", "hackbench"]
    assert column(made, "groups") == [None, 1, 2]


def test_a_list_of_points():
    made = plan(
        sources=["shell", "idle"],
        designs="cached",
        settings={"pool": 64},
        points=[{"pool": [128, 256]}, {"source": "idle", "design": "unsync", "seed": "1..2", "operations": 100}],
    )
    assert column(made, "pool") == [128, 256, 128, 256, 64, 64]
    assert column(made, "source") == ["shell", "shell", "idle", "idle", "idle", "idle"]
    assert column(made, "design") == ["cached"] * 4 + ["unsync"] * 2
    assert column(made, "operations") == [2000] * 4 + [100] * 2


def test_conditions_choose():
    made = plan(sources="shell", designs=["flush", "cached"], settings={"pool": [64, 256]}, when="pool > 64")
    assert column(made, "pool") == [256, 256]
    with pytest.raises(sc.ConfigError, match="no point is left"):
        plan(sources="shell", settings={"pool": [64]}, when="pool > 64")
    with pytest.raises(sc.ConfigError, match=r"no setting is called 'pol'; did you mean 'pool'\?"):
        plan(sources="shell", settings={"pool": [64]}, when=["pol > 64"])


def test_recordings_have_no_seed():
    recording = trace.load().head(2000)
    made = plan(sources=["shell", recording], designs="cached", seed="1..3")
    assert column(made, "seed") == [1, 2, 3, None]
    with pytest.raises(sc.ConfigError, match="seed: a workload is needed"):
        plan(sources=recording, seed="1..3")


# One of these more, or another value, is another run.
BASE = {"sources": "hackbench", "designs": "cached"}
OTHERS = {
    "source": {"sources": "shell"},
    "design": {"designs": "unsync"},
    "quirks": {"designs": "kvm-2007"},
    "pool": {"settings": {"pool": 128}},
    "threshold": {"settings": {"flood_threshold": "none"}},
    "memory": {"settings": {"memory": "96MiB"}},
    "tlb": {"settings": {"tlb": 32}},
    "no tlb": {"settings": {"tlb": "none"}},
    "vcpus": {"settings": {"vcpus": 2}},
    "guest": {"settings": {"pcid": True}},
    "parameter": {"settings": {"groups": 3}},
    "seed": {"seed": 1},
    "operations": {"operations": 2001},
}


def test_keys_tell_apart_what_differs():
    keys = {name: plan(**BASE | other).points[0].run for name, other in ({"base": {}} | OTHERS).items()}
    assert len(set(keys.values())) == len(OTHERS) + 1
    # And no more than that: what is the same by another name is the same run.
    same = {
        "pool": {"settings": {"pool": 256}},
        "memory": {"settings": {"memory": str(sc.workload.WORKLOADS["hackbench"].memory)}},
        "name": {"designs": dataclasses.replace(sc.Shadow.cached(), name="mine"), "name": "other"},
        "prices": {"prices": {"dispatch": 17}},
        "levels": {"settings": {"levels": "shadow-on-ept"}},
        "seed": {"seed": 0},
    }
    for name, other in same.items():
        assert plan(**BASE | other).points[0].run == keys["base"], name


def test_a_recording_is_told_by_its_bytes(tmp_path):
    recording = trace.load().head(2000)
    recording.save(tmp_path / "a.screc")
    recording.save(tmp_path / "b.npz")
    key = plan(sources=recording, designs="cached").points[0].run
    assert plan(sources=str(tmp_path / "b.npz"), designs="cached").points[0].run == key
    file = plan(sources=str(tmp_path / "a.screc"), designs="cached").points[0].run
    value = recording.value.copy()
    value[100] ^= 1 << 20
    assert plan(sources=dataclasses.replace(recording, value=value), designs="cached").points[0].run not in (key, file)


def test_a_warm_up_is_part_of_keys():
    keys = {plan(sources="pingpong", designs="cached", warm_up=n).points[0].run for n in (0, 100, 200)}
    assert len(keys) == 3
    recording = trace.load()
    by_name = plan(sources=recording, designs="cached", operations=10**6, warm_up="boot")
    count = recording.phases["boot"]
    assert plan(sources=recording, designs="cached", operations=10**6, warm_up=count).points[0].run == (
        by_name.points[0].run
    )
    (run,) = (run for run in by_name.runs.values() if run.design.name == "cached")
    assert run.warm_up == count


def test_the_version_of_results_is_part_of_keys(monkeypatch):
    before = plan(**BASE).points[0].run
    monkeypatch.setattr("shadowcore.studies.plan.RESULTS", 10**6)
    assert plan(**BASE).points[0].run != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "shell"}, r"spec: there is no 'source'; did you mean 'sources'\?"),
        ({"settingz": {}}, "did you mean 'settings'"),
        ({"settings": {"pol": 3}}, "there is no setting 'pol'; did you mean 'pool'"),
        ({"settings": 3}, "settings: a table"),
        ({"sources": "shel"}, "shel"),
        ({"sources": []}, "sources: at least one"),
        ({"sources": [{"workload": "shell"}]}, r"sources\[0\]: 'source' is needed"),
        ({"sources": 3}, "a name, a path or a recording is needed"),
        ({"designs": "cachd"}, "'cachd' is not one of"),
        ({"designs": []}, "designs: at least one"),
        ({"costs": "modrn"}, "'modrn'"),
        ({"prices": {"dispatc": 3}}, "prices: there is no 'dispatc'; did you mean 'dispatch'"),
        ({"prices": {"dispatch": "many"}}, "dispatch: a number is needed"),
        ({"seed": "many"}, "seed: "),
        ({"operations": 0}, "operations: "),
        ({"settings": {"pool": 3}}, r"pool: .*\(at source=shell, design=flush, pool=3"),
        ({"designs": "native", "settings": {"pool": 64}}, "pool: no design of the sweep has it"),
        ({"points": {"pool": 3}}, "points: a list of tables"),
        ({"points": [3]}, r"points\[0\]: a table"),
        ({"points": [{"designs": "cached"}]}, r"points\[0\]: there is no 'designs'; did you mean 'design'"),
        ({"points": []}, "points: at least one"),
        ({"when": "pool >"}, "when: "),
        ({"skip_boot": 1}, "skip_boot: true or false"),
        ({"skip_boot": True}, "skip_boot: a recording is needed"),
        ({"name": ""}, "name: "),
        ({"settings": {"pool": "1..100000", "min_free": "0..99"}}, "combinations of pool, min_free"),
    ],
)
def test_specifications_that_cannot_be(spec, message):
    with pytest.raises(sc.ConfigError, match=message):
        plan(**{"sources": "shell"} | spec)


def test_a_file(tmp_path):
    trace.load().head(2000).save(tmp_path / "mine.screc")
    file = tmp_path / "pool.toml"
    file.write_text('sources = ["mine.screc", {source = "mine.screc"}, "shell"]\n[settings]\npool = "64..128 x2"\n')
    spec = read_spec(file)
    assert spec["name"] == "pool"
    made = planned(spec | {"designs": "cached", "operations": 500})
    assert column(made, "source") == [trace.BUNDLED, trace.BUNDLED, "shell", "shell"]
    file.write_text("sources = [")
    with pytest.raises(sc.ConfigError, match="no TOML"):
        read_spec(file)
    with pytest.raises(sc.ConfigError, match="cannot be read: No such file"):
        read_spec(tmp_path / "nosuch.toml")


def test_two_sources_of_one_name(tmp_path):
    for place, records in enumerate((2000, 3000, 4000)):
        (tmp_path / str(place)).mkdir()
        trace.load().head(records).save(tmp_path / str(place) / "mine.screc")
    paths = [str(tmp_path / str(place) / "mine.screc") for place in range(3)]
    assert column(plan(sources=paths, designs="cached"), "source") == [trace.BUNDLED, *paths[1:]]
