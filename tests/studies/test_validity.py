"""What was published of real hypervisors, predicted: calibration, predictions, what is said of misses, and the page."""

import json
import re

import pytest
from commands import refused, run
from places import ROOT

import shadowcore as sc
from shadowcore.engine.presets import PRESETS
from shadowcore.report import validity as report
from shadowcore.studies import predictions, shadowbox, validity
from shadowcore.studies import published as seen

PAGE = ROOT / "docs" / "validity.md"


@pytest.fixture(scope="module")
def pvm():
    return validity.validity("pvm-2023")


@pytest.fixture(scope="module")
def times():
    """Table B of shadowbox alone: the rest takes longer, and its counts have tests of their own (test_first_touch)."""
    return {(row.test, row.column): row for row in shadowbox._times_2026(predictions.Machine(lambda: None))}


def rows(found, **what):
    return [row for row in found.rows if all(getattr(row, name) == value for name, value in what.items())]


def test_what_calibrates_comes_out_as_published(pvm):
    calibrated = [row for row in pvm.rows if row.kind == "calibrates"]
    assert {(row.table, row.test) for row in calibrated} == {
        ("table 1", "hypercall"),
        ("table 1", "exception"),
        ("table 2", "getpid"),
    }
    for row in calibrated:
        assert row.predicted == pytest.approx(row.published, rel=0.005), row


def test_no_price_names_a_row_that_is_predicted():
    """Sources are round trips, getpid, and what shadowbox gives of the inside of its hypervisor."""
    for name in ("kvm-2023-8269cy", "pvm-2023-8269cy", "nested-2023-8269cy"):
        for _, source in PRESETS[name].prices.values():
            assert not re.search(r"table [3-9]|figure", source), source


def test_system_calls_are_two_cr3_exits_each(pvm):
    """Of shadow tables within 3 percent; open and close do more."""
    for test in ("null I/O", "stat", "select, TCP", "signal installed"):
        (row,) = rows(pvm, table="table 3", test=test, column=seen.KVM_SPT)
        assert row.counts == {"CR3": 2}
        assert abs(row.error) < 3
    (row,) = rows(pvm, test="getpid, no isolation")
    assert row.counts == {}
    assert row.predicted == row.published


def test_faults_of_one_process(pvm):
    """One passed on and one filled a page; with fresh memory an EPT violation."""
    for row in rows(pvm, table="figure 10", column=seen.KVM_SPT):
        assert row.counts["passed on"] == pytest.approx(1, abs=0.001)
        assert row.counts["CR3"] == pytest.approx(2, abs=0.02)
        assert abs(row.error) < 25
    for row in rows(pvm, table="figure 10", column=seen.PVM_BM):
        assert abs(row.error) < 15
    fresh, recycled = (
        rows(pvm, test=f"page faults, {how}", column=seen.EPT_IN_A_VM)[0]
        for how in ("all memory fresh", "1 MiB again and again")
    )
    assert fresh.counts["EPT violations"] == pytest.approx(1, abs=0.01)
    assert not any({"fills", "EPT violations"} <= set(row.counts) for row in pvm.rows)  # counted once
    assert "EPT violations" not in recycled.counts
    assert recycled.predicted < recycled.published < fresh.predicted


def test_order_of_processes_and_builds(pvm):
    """EPT, then PVM, then shadow tables."""
    for test in ("fork", "exec", "sh", "kernel build, 1 container"):
        ept, spt, pvm_ = (rows(pvm, test=test, column=c)[0] for c in (seen.KVM_EPT, seen.KVM_SPT, seen.PVM_BM))
        assert ept.predicted < pvm_.predicted < spt.predicted
        assert ept.published < pvm_.published < spt.published


def test_misses_are_told_and_nothing_else(pvm, times):
    for row in [*pvm.rows, *times.values()]:
        assert bool(row.why) is row.far, row
    assert sum(not row.far for row in pvm.predicted) > len(pvm.predicted) / 2


def test_backing_turns_the_comparison_over(times):
    """With huge pages under the guest PVM takes four times as long as EPT, with cold small ones it is faster."""
    warm, cold = (times[test, "pvm to kvm-ept"] for test in ("page-fault", "page-fault, cold"))
    assert warm.published > 4 < warm.predicted
    assert cold.published < 1 > cold.predicted
    assert abs(warm.error) < 15 > abs(cold.error)
    for test in ("page-fault", "page-fault, cold", "parallel-fault", "fault-scaling, cold"):
        assert abs(times[test, "pvm"].error) < 15
    assert abs(times["fault-scaling, cold", "kvm-spt"].error) < 10
    assert abs(times["fault-scaling, cold", "kvm-ept"].error) < 15


def test_the_page(pvm):
    text = report.page([pvm], "a.svg", "shadowcore")
    assert "![Predicted by published figures](a.svg)" in text
    for row in pvm.rows:
        assert f"| {row.test} | {row.column} | {report.published(row)} | {report.number(row.predicted)} |" in text
        assert not row.far or f"{row.test}, {row.column} ({report.error(row)})" in " ".join(text.split())
    picture = report.picture([pvm])
    assert picture == report.picture([pvm])
    assert picture.startswith("<?xml")
    with pytest.raises(sc.ConfigError, match="at least one"):
        report.page([], "a.svg", "shadowcore")


def test_the_command(tmp_path, pvm, monkeypatch):
    monkeypatch.setattr(validity, "validity", lambda source, progress: pvm)
    target = tmp_path / "page.md"
    shown = run("reproduce", "--source", "pvm-2023", "--write", target)
    assert "predictions are within 20 percent" in shown
    assert (tmp_path / "page.svg").read_text("utf-8") == report.picture([pvm])
    plain = json.loads(run("reproduce", "--source", "pvm-2023", "--check", target, "--json"))
    assert len(plain["rows"]) == len(pvm.rows)
    target.write_text("old", "utf-8")
    assert "makes today" in refused("reproduce", "--source", "pvm-2023", "--check", target)
    assert "same name" in refused("reproduce", "--source", "pvm-2023", "--write", tmp_path / "a.svg")
    assert "did you mean 'pvm-2023'" in refused("reproduce", "--source", "pvm-2032")


def test_refused_sources():
    with pytest.raises(sc.ConfigError, match="'pvm' is not one of pvm-2023"):
        validity.validity("pvm")


@pytest.mark.slow
def test_the_page_is_current():
    """All of it is made of counts, which are the same on every machine."""
    found = [validity.validity(source) for source in validity.SOURCES]
    command = "shadowcore reproduce --source all --write docs/validity.md"
    assert PAGE.read_text("utf-8") == report.page(found, "validity.svg", command)
    for row in found[1].rows:
        if row.table == "A" and ("1 vCPU" in row.test or "fault-scaling" in row.test):
            assert abs(row.error) < 0.5, row
