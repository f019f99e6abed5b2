"""The figures of January 2007: calibration, predictions, and the page that shows them."""

import json

import pytest
from commands import refused, run
from places import ROOT

import shadowcore as sc
from shadowcore.studies import reproduction

PAGE = ROOT / "docs" / "reproduction.md"


@pytest.fixture(scope="module")
def found():
    return reproduction.reproduce()


def figure(found, test, column):
    return next(f for f in found.figures if (f.test, f.column) == (test, column))


def test_the_page_is_current(found):
    """All of it is made of counters, which are the same on every machine."""
    assert PAGE.read_text("utf-8") == reproduction.page(found)


def test_two_figures_calibrate(found):
    calibrated = [(f.test, f.column) for f in found.figures if f.calibrated]
    assert calibrated == [(reproduction.SWITCH, "native"), (reproduction.SWITCH, "caching")]
    for f in found.figures:
        if f.calibrated:
            assert f.predicted == pytest.approx(f.published, rel=1e-9)
    assert len(found.figures) == 9


def test_the_preset_is_what_is_calibrated(found):
    preset = sc.Costs.core2007()
    assert preset.access == pytest.approx(found.costs.access, rel=1e-3)
    assert preset.dispatch == pytest.approx(found.costs.dispatch, rel=1e-3)


def test_predictions(found):
    """What is claimed: the context switch without caching within 15 %, hackbench given native within 35 %, and the
    order of the columns."""
    assert abs(figure(found, reproduction.SWITCH, "no caching").predicted / 53.01 - 1) < 0.15
    for test in (reproduction.HACKBENCH_1, reproduction.HACKBENCH_5):
        native, none, caching = (figure(found, test, column) for column in reproduction.COLUMNS)
        assert native.predicted < caching.predicted < none.predicted
        for f in (none, caching):
            assert abs(f.given_native / f.published - 1) < 0.35


def test_a_small_pool_thrashes_with_200_tasks_only(found):
    small, large = (found.pools[test] for test in (reproduction.HACKBENCH_1, reproduction.HACKBENCH_5))
    assert small[256] == small[2048]
    assert large[256][0] > 3 * large[2048][0]
    assert large[2048][1] == 0 < large[256][1]


def test_the_guest_does_the_same():
    vary = iter(range(3, 9))
    with pytest.raises(sc.ConfigError, match="did not do the same"):
        reproduction.columns(lambda guest: reproduction.context_switch(guest, next(vary)), 2, 0)


def test_the_command(tmp_path, found, monkeypatch):
    target = tmp_path / "page.md"
    assert "hackbench 5" in run("reproduce", "--write", target)
    assert target.read_text("utf-8") == PAGE.read_text("utf-8")
    plain = json.loads(run("reproduce", "--check", PAGE, "--json"))
    assert len(plain["figures"]) == 9
    target.write_text("old", "utf-8")
    monkeypatch.setattr(reproduction, "reproduce", lambda progress: found)  # it has been run often enough
    for arguments in (("--check", target), ("--check", tmp_path / "none"), ("--write", tmp_path)):
        refused("reproduce", *arguments)
