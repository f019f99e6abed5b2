"""Studies over several settings at once: the table, JSON, CSV, page and timeline of `compare --over A --over B`."""

import csv
import json

import pytest
from commands import refused, run

import shadowcore as sc

SHORT = ("compare", "pingpong", "--operations", 1000, "--mmu", "native", "--mmu", "cached")
OVERS = ("--over", "pool=16..64 x2", "--over", "flood_threshold=1,none")


@pytest.fixture(scope="module")
def swept():
    over = {"pool": [16, 32, 64], "flood_threshold": [1, None]}
    return sc.compare("pingpong", ["native", "cached"], over=over, operations=1000, windows=100)


def test_every_combination_is_a_study(swept):
    assert swept.names == ("pool", "flood_threshold")
    assert [value for value, _ in swept.points] == [(p, t) for p in (16, 32, 64) for t in (1, None)]
    for (pool, threshold), made in swept.points:
        alone = sc.study("pingpong", ["cached"], operations=1000, pool=pool, flood_threshold=threshold, windows=0)
        assert made.designs["cached"].counters == alone.designs["cached"].counters
        assert (made.settings["pool"], made.settings["flood_threshold"]) == (pool, threshold)


def test_json_and_csv(swept, tmp_path):
    plain = json.loads(run(*SHORT, *OVERS, "--json", "--csv", tmp_path / "a.csv"))
    assert plain["over"] == ["pool", "flood_threshold"]
    assert plain["values"] == [list(value) for value, _ in swept.points]
    exits = [study["designs"]["cached"]["exits_total"] for study in plain["studies"]]
    assert exits == [study.designs["cached"].exits_total for _, study in swept.points]
    with open(tmp_path / "a.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["design"] == "cached"]
    assert [(int(row["pool"]), row["flood_threshold"]) for row in rows] == [
        (p, t) for p in (16, 32, 64) for t in ("1", "")
    ]
    assert [int(row["exits_total"]) for row in rows] == exits


def test_a_setting_that_is_called_as_a_column_is():
    rows = sc.compare("pingpong", ["cached"], over={"operations": [500, 1000]}, windows=0).rows()
    assert [row["set_operations"] for row in rows] == [500, 1000]
    assert all(row["operations"] >= row["set_operations"] for row in rows)


def test_the_table():
    output = run(*SHORT, *OVERS)
    body = [line.split() for line in output.splitlines()]
    assert [line[1] for line in body if line[:1] == ["native"]] == ["0"]  # one row, with neither setting
    assert ["cached", "16", "1"] in [line[:3] for line in body]
    assert ["cached", "64", "none"] in [line[:3] for line in body]
    assert "…" not in output


def test_the_page(swept, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the extra report")
    from shadowcore.report.panels import Shown
    from shadowcore.report.sweep import _told

    run(*SHORT, "--over", "pool=16..64 x2", "--over", "seed=1,2", "--html", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text("utf-8")
    assert "estimated" in text
    assert "standard deviation" in text
    told = _told(swept)
    (panel,) = Shown(told.rows, told.axes).panels("exits_total")[:1]
    for spot in panel.lines["cached"]:
        (expected,) = (s.designs["cached"].exits_total for (p, t), s in swept.points if (p, t) == (spot.x, 1))
        assert spot.y == expected


def test_the_timeline(tmp_path):
    run(*SHORT, "--over", "pool=16,32", "--timeline", tmp_path / "a.json")
    events = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == [f"{design}, pool={pool} (pingpong)" for pool in (16, 32) for design in ("native", "cached")]
    assert {event["pid"] for event in events if event["ph"] == "C"} == {1, 2, 3, 4}


def test_a_base_beside_another_setting():
    over = {"isolation": [False, True], "pool": [64, 256]}
    found = sc.compare("pingpong", ["cached"], over=over, base=False, operations=2000, windows=0)
    alone = sc.compare("pingpong", ["cached"], over={"isolation": [False, True]}, pool=64, operations=2000, windows=0)
    slow = {value: study.designs["cached"].cost.slow_down for value, study in found.points}
    expected = {value: study.designs["cached"].cost.slow_down for value, study in alone.points}
    assert slow[False, 64] == pytest.approx(expected[False])
    assert slow[True, 64] == pytest.approx(expected[True])
    assert found.base == alone.base == "isolation=false"
    with pytest.raises(sc.ConfigError, match=r"base: .* one is needed, not isolation and pcid"):
        sc.compare("pingpong", over={"isolation": [False, True], "pcid": [False, True]}, base=True)


def test_what_cannot_be():
    assert "pool is given twice" in refused(*SHORT, "--over", "pool=16", "--over", "pool=32")
    assert "leads nowhere" in refused(*SHORT, "--over", "pool=64..16")
    assert "--windows: " in refused(*SHORT, "--over", "pool=16,64", "--windows", 10)
    with pytest.raises(sc.ConfigError, match="over: settings with their values"):
        sc.compare("pingpong", over={})
