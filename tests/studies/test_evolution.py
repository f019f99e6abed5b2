"""KVM's shadow MMU by release: settings, exits, and the page and the picture that show them."""

import itertools
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from commands import run
from places import ROOT

import shadowcore as sc
from shadowcore import Quirk
from shadowcore.report import evolution as picture
from shadowcore.studies import evolution

PAGE = (ROOT / "docs" / "evolution.md").read_text("utf-8")
NAMES = [each.name for each in evolution.RELEASES]


@pytest.fixture(scope="module")
def found():
    """Of the sources, those that take least time, and one in which a release stops."""
    return evolution.evolution([None, "pingpong", "analytics"])


def row(source):
    (line,) = re.findall(rf"^\| {source} \| (.*) \|$", PAGE, re.M)
    return line.split(" | ")


def test_the_page_is_current(found):
    """Else: shadowcore evolution --write docs/evolution.md --svg docs/images/evolution.svg."""
    for source in found.studies:
        assert row(source) == [found.shown(source, name) for name in NAMES]
    head = evolution.page(found).partition("## VM exits")[0]
    assert PAGE.startswith(head)


def test_the_picture_has_the_numbers_of_the_page():
    texts = re.findall(r'class="number"[^>]*>([^<]*)<', (ROOT / "docs" / "images" / "evolution.svg").read_text("utf-8"))
    rows = re.findall(r"^\| [\w-]+ \| ((?:[\d,*]+|stopped)(?: \| (?:[\d,*]+|stopped))+) \|$", PAGE, re.M)
    assert texts == [cell for line in rows for cell in line.split(" | ")]


def test_a_defect_that_ends_the_guest(found):
    """Until 2.6.22 two large pages of one frame share a table whatever their rights are."""
    assert [name for name in NAMES if found.stopped("analytics", name)] == ["the series", "2.6.20", "2.6.21"]
    assert found.exits("analytics", "2.6.20") == {}
    assert not found.same("analytics", "2.6.20")
    assert found.same("pingpong", "the series")


def test_releases_are_what_their_names_say():
    by_name = {each.name: each.made(1 << 14) for each in evolution.RELEASES}
    assert by_name["the series"] == sc.Shadow.kvm_2007(name="the series")
    assert by_name["2.6.20-rc3"] == sc.Shadow.flush(name="2.6.20-rc3")
    assert by_name["6.1"] == sc.Shadow.kvm_6_1(name="6.1", pool_pages=(1 << 14) // 50)
    assert by_name["6.12"] == replace(by_name["6.1"], name="6.12", release="6.12")
    assert evolution.RELEASES[-1].made(100).pool_pages == 64
    assert by_name["2.6.25"] == replace(by_name["2.6.23"], name="2.6.25", pool_pages=327, notpresent_marker="page")
    first = {"release": "2.6.28", "notpresent_marker": "page"}
    assert by_name["2.6.28"] == replace(by_name["unsync alone"], name="2.6.28", **first)
    assert by_name["2.6.20"].quirks & Quirk.ROLE_WITHOUT_ACCESS
    assert not by_name["2.6.22"].quirks & Quirk.ROLE_WITHOUT_ACCESS
    mended = [by_name[name].quirks for name in ("the series", "2.6.20", "2.6.21", "2.6.22", "2.6.23")]
    assert all(later & ~earlier == 0 and later != earlier for earlier, later in itertools.pairwise(mended))


def test_what_the_markers_and_the_single_role_came_to():
    """Of the guest's own faults nearly all cost no exit in 2.6.25; in 2.6.28 they do again, but for one a table."""
    found = evolution.evolution(["demand"], operations=20_000)
    exits = {name: found.exits("demand", name) for name in NAMES}
    assert exits["2.6.25"]["guest"] < exits["2.6.23"]["guest"] / 100
    assert {**exits["2.6.25"], "guest": 0} == {**exits["2.6.23"], "guest": 0}
    assert exits["unsync alone"]["guest"] == exits["2.6.23"]["guest"]
    assert 0 < exits["unsync alone"]["guest"] - exits["2.6.28"]["guest"] < exits["2.6.23"]["guest"] / 100


def test_every_quirk_says_the_release_that_the_rows_say():
    """The docstring of a quirk names the commit that mended it, and its release; so do the rows."""
    source = (ROOT / "shadowcore" / "config.py").read_text("utf-8")
    said = dict(re.findall(r'^    (\w+) = 1 << \d+\n    """.*?(2\.6\.2[0-3])(?:-rc4)?[);]', source, re.M | re.S))
    mended = {
        "2.6.20": evolution.MENDED_2_6_20,
        "2.6.21": evolution.MENDED_2_6_21,
        "2.6.22": evolution.MENDED_2_6_22,
        "2.6.23": evolution.MENDED_2_6_23,
    }
    for name, quirks in mended.items():
        for quirk in Quirk:
            if quirk & quirks and quirk.name in said:
                assert said[quirk.name] <= name, quirk


def test_the_command_prints_a_table_or_json(tmp_path, monkeypatch, found):
    monkeypatch.setattr(evolution, "evolution", lambda **options: found)
    page, svg = tmp_path / "page.md", tmp_path / "picture.svg"
    text = run("evolution", "--write", page, "--svg", svg)
    assert "1,579,242" in text
    assert "…" not in text
    assert page.read_text("utf-8") == evolution.page(found)
    assert ElementTree.fromstring(svg.read_text("utf-8")).tag.endswith("svg")
    assert svg.read_text("utf-8") == picture.svg(found)
    plain = json.loads(run("evolution", "--json"))
    assert list(plain["exits"]["pingpong"]) == NAMES
    assert plain["exits"]["analytics"]["2.6.21"]["stopped"]
