"""Sweeps over a setting of the guest: what a piece of work costs, against native of one of the guests."""

import json

import pytest
from commands import run
from program_recordings import FAMILY

import shadowcore as sc

SHORT = {"operations": 60_000}


def rows(text):
    """Cells of a table's rows, by design and value."""
    cells = [line.split() for line in text.splitlines() if line.startswith(("native", "cached")) and ":" not in line]
    return {(row[0], row[1]): [float(cell.replace(",", "")) for cell in row[2:]] for row in cells}


def test_isolation_costs_something():
    text = run(
        "compare",
        "webserver",
        "--operations",
        "60K",
        "--over",
        "isolation=false,true",
        "--mmu",
        "native",
        "--mmu",
        "cached",
    )
    head = next(line for line in text.splitlines() if line.startswith("design"))
    assert head.split()[:4] == ["design", "isolation", "cycles", "slow-down"]
    assert "against native with isolation=false" in " ".join(text.split())
    found = rows(text)
    for design in ("native", "cached"):
        for column in (0, 1):
            assert found[design, "true"][column] > found[design, "false"][column]
    assert found["native", "false"][1] == 1
    for cycles, slow, *_ in found.values():
        assert slow == pytest.approx(cycles / found["native", "false"][0], rel=0.01)


@pytest.mark.parametrize("source", ["webserver", str(FAMILY)])
def test_the_base_is_named(source):
    over = {"isolation": [False, True]}
    first = sc.compare(source, ["cached"], over=over, **({} if "family" in source else SHORT))
    other = sc.compare(source, ["cached"], over=over, base=True, **({} if "family" in source else SHORT))
    assert (first.base, other.base) == ("isolation=false", "isolation=true")
    slow = {}
    for swept in (first, other):
        for value, study in swept.points:
            cost = study.designs["cached"].cost
            assert cost.base == swept.base
            assert cost.as_dict()["slow_down_against"] == f"native, {swept.base}"
            slow[swept.base, value] = cost.slow_down
    assert slow["isolation=false", True] > slow["isolation=true", True]
    assert slow["isolation=false", True] > slow["isolation=false", False]
    alone = sc.compare(source, ["cached"], isolation=True, **({} if "family" in source else SHORT))
    assert slow["isolation=true", True] == pytest.approx(alone.designs["cached"].cost.slow_down)
    assert alone.designs["cached"].cost.as_dict()["slow_down_against"] == "native"


def test_work_is_that_of_user_code():
    """Programs do the same under any guest: cycles compare as they are."""
    swept = sc.compare(FAMILY, ["native"], over={"isolation": [False, True]})
    (_, plain), (_, isolated) = swept.points
    assert plain.designs["native"].work == isolated.designs["native"].work > 10_000
    cost, base = isolated.designs["native"].cost, plain.designs["native"].cost
    assert cost.slow_down == pytest.approx(cost.total / base.total)


def test_other_settings_have_no_base():
    plain = json.loads(run("compare", "pingpong", "--operations", 5000, "--over", "pages=4,64", "--json"))
    assert plain["base"] is None
    assert {study["designs"]["native"]["slow_down"] for study in plain["studies"]} == {1}
    with_base = json.loads(
        run("compare", "pingpong", "--operations", 5000, "--over", "mode=64,la57", "--base", "la57", "--json")
    )
    assert with_base["base"] == "mode=la57"
    assert with_base["studies"][1]["designs"]["native"]["slow_down"] == 1


def test_interrupted_before_the_base_was_run(monkeypatch):
    """What was done is shown, with slow-downs against its own native."""
    from shadowcore.studies import source

    run_one, calls = source.WorkloadSource.run, []

    def interrupted(self, made, plan, report):
        calls.append(made.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_one(self, made, plan, report)

    monkeypatch.setattr(source.WorkloadSource, "run", interrupted)
    with pytest.raises(sc.StudyInterrupted) as caught:
        sc.compare("idle", ["native", "cached"], over={"pcid": [False, True]}, base=True, operations=2000)
    swept = caught.value.study
    assert not swept.complete
    assert [value for value, _ in swept.points] == [False]
    assert swept.points[0][1].designs["cached"].cost.slow_down > 0
