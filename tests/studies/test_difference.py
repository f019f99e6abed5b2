"""Two saved studies, and what changed between them."""

import json

import pytest
from commands import refused, run

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.studies.difference import difference

COMPARE = ("compare", "pingpong", "--operations", 500, "--mmu", "native", "--mmu", "cached", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("saved")
    (made / "a.json").write_text(run(*COMPARE))
    (made / "b.json").write_text(run(*COMPARE, "--seed", 3, "--set", "flood_threshold=1", "--set", "pages=40"))
    (made / "over.json").write_text(run(*COMPARE, "--over", "pool=64,256"))
    return made


def changed(folder, name, **figures):
    """The first study with other figures of `cached`."""
    plain = json.loads((folder / "a.json").read_text())
    plain["designs"]["cached"] |= figures
    (folder / name).write_text(json.dumps(plain))
    return folder / name


def test_a_study_is_equal_to_itself(folder):
    (folder / "again.json").write_text(run(*COMPARE))
    found = difference(folder / "a.json", folder / "again.json")
    assert (found.cases, found.changes, found.settings) == (2, (), ())
    assert found.figures > 60
    assert "2 cases" in run("diff", folder / "a.json", folder / "again.json", "--fail-over", 0)


def test_what_changed_is_told(folder):
    found = difference(folder / "a.json", folder / "b.json")
    assert {name for name, _, _ in found.settings} >= {"seed", "flood_threshold"}
    a, b = (json.loads((folder / name).read_text())["designs"] for name in ("a.json", "b.json"))
    told = {(change.case, change.figure): (change.first, change.second) for change in found.changes}
    for design in a:
        for name in ("exits_total", "zapped", "cycles", "pages_mean"):
            if a[design][name] != b[design][name]:
                assert told[f"pingpong, {design}", name] == (a[design][name], b[design][name])
    assert ("pingpong, cached", "exits_total") in told
    output = run("diff", folder / "a.json", folder / "b.json")
    assert "seed: 0 was, 3 is" in output
    assert "flood_threshold: None was, 1 is" in output


@pytest.mark.parametrize(
    ("grown", "over", "status"),
    [(1.06, "5%", 1), (1.04, "5%", 0), (1.04, "0.03", 1), (0.5, "0", 0), (1, "0", 0), (1.001, "0%", 1)],
)
def test_the_exit_status(folder, grown, over, status):
    exits = json.loads((folder / "a.json").read_text())["designs"]["cached"]["exits_total"]
    other = changed(folder, "grown.json", exits_total=exits * grown)
    assert "changed" in run("diff", folder / "a.json", other, "--fail-over", over, status=status)
    run("diff", folder / "a.json", other)
    run("diff", folder / "a.json", other, "--fail-over", over, "--figure", "zapped")
    plain = json.loads(run("diff", folder / "a.json", other, "--fail-over", over, "--json", status=status))
    assert plain["failed"] is bool(status)
    assert plain["over"] == [{"case": "pingpong, cached", "figure": "exits_total"}] * status


def test_another_guest_is_too_much_by_any_measure(folder):
    other = changed(folder, "history.json", history="0x0000000000000001")
    run("diff", folder / "a.json", other, "--fail-over", "1000%", status=1)


def test_a_case_that_is_gone(folder):
    plain = json.loads((folder / "a.json").read_text())
    del plain["designs"]["cached"]
    (folder / "less.json").write_text(json.dumps(plain))
    output = run("diff", folder / "a.json", folder / "less.json", "--fail-over", "5%", status=1)
    assert "Only in the first: 1 (pingpong, cached)." in output
    assert "Only in the second: 1" in run("diff", folder / "less.json", folder / "a.json", "--fail-over", "5%")


def test_studies_over_values(folder):
    plain = json.loads((folder / "over.json").read_text())
    plain["studies"][1]["designs"]["cached"]["exits_total"] += 1
    (folder / "over2.json").write_text(json.dumps(plain))
    (change,) = difference(folder / "over.json", folder / "over2.json").changes
    assert change.case == "pingpong, cached pool=256"
    assert change.second == change.first + 1


def test_sweeps(tmp_path):
    recording = trace.load().head(3000)
    spec = {"sources": recording, "designs": ["native", "cached"], "operations": [1000, 2000]}
    sc.sweep(spec, store=tmp_path / "a", jobs=1)
    sc.sweep(dict(spec, operations=[1000, 3000]), store=tmp_path / "b", jobs=1)
    found = difference(tmp_path / "a", tmp_path / "b")
    assert found.cases == 2
    assert found.changes == ()
    assert len(found.first_only) == len(found.second_only) == 2
    (tmp_path / "a.json").write_text(run("collect", tmp_path / "a", "--json"))
    assert difference(tmp_path / "a.json", tmp_path / "a").changes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no JSON"),
        ("[]", "a study is needed"),
        ('{"rows": []}', "a study is needed"),
        ('{"designs": 3}', "a study"),
    ],
)
def test_files_that_are_none(folder, tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    assert message in refused("diff", folder / "a.json", tmp_path / "x.json")


def test_what_cannot_be_compared(folder, tmp_path):
    assert "it cannot be read: No such file" in refused("diff", folder / "a.json", "nosuch.json")
    assert "a study is needed to compare with" in refused("diff", folder / "a.json", folder / "over.json")
    plain = json.loads((folder / "a.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(plain | {"workload": "other"}))
    assert "it has no case in common with" in refused("diff", folder / "a.json", tmp_path / "x.json")
    assert "'many' is not a percentage" in refused("diff", folder / "a.json", folder / "b.json", "--fail-over", "many")
    assert "there is no 'exits_totl'; did you mean 'exits_total'?" in refused(
        "diff", folder / "a.json", folder / "b.json", "--figure", "exits_totl"
    )
