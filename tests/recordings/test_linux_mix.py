"""The two recordings of recorder/make-recording.sh: what the first table that a newcomer sees says, and the second."""

import re

import pytest
from places import LINUX_MIX, ROOT

import shadowcore as sc

DESIGNS = ("native", "flush", "cached", "unsync")


@pytest.fixture(scope="module")
def found():
    return {file: sc.study(file, DESIGNS, windows=0) for file in (None, str(LINUX_MIX))}


def cells(page, first):
    (line,) = re.findall(rf"^\| {first} \| (.*) \|$", (ROOT / page).read_text("utf-8"), re.M)
    return line.split(" | ")


def test_the_table_of_the_readme_is_what_compare_prints(found):
    """With isolation, and the verdict below it. Else: shadowcore compare."""
    designs = found[None].designs.values()
    assert cells("README.md", "VM exits, all") == [f"{design.exits_total:,}" for design in designs]
    assert cells("README.md", "in the boot") == [f"{design.result.boot.exits_total:,}" for design in designs]
    assert cells("README.md", "in the workload") == [f"{design.result.workload.exits_total:,}" for design in designs]
    slow_down = [f"{design.cost.slow_down:.2f}" for design in designs]
    assert cells("README.md", "slow-down against native, estimated") == slow_down
    assert f"> {found[None].verdict}\n" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["pingpong", "fork-storm"])
def test_what_the_readme_says_of_a_workload(name):
    """In the comments beside the commands; in exits and times of cached by those of flush."""
    (said,) = re.findall(rf"^shadowcore compare {name} +# (.*)$", (ROOT / "README.md").read_text("utf-8"), re.M)
    made = sc.study(name, ("native", "flush", "cached"), windows=0).designs
    flush, cached = made["flush"], made["cached"]
    slower = cached.cost.slow_down / flush.cost.slow_down
    if slower < 1:
        fewer = round(flush.exits_total / cached.exits_total)
        assert said == f"cached: {fewer} times fewer exits than flush, {1 / slower:.0f} times faster"
    else:
        assert cached.exits_total > flush.exits_total
        assert said == f"cached: more exits than flush, {slower:.1f} times slower"


def test_the_picture_is_what_compare_prints(found):
    """With isolation. Else: python docs/make_images.py."""
    svg = (ROOT / "docs" / "images" / "compare.svg").read_text("utf-8").replace("&#160;", " ")
    lines = [re.sub("<[^>]*>", "", line) for line in svg.splitlines()]
    designs = found[None].designs.values()
    for row, each in (
        ("VM exits, all", [f"{design.exits_total:,}" for design in designs]),
        ("slow-down against native, estimated", [f"{design.cost.slow_down:.2f}" for design in designs]),
    ):
        (line,) = [line for line in lines if row in line]
        assert line.split()[-4:] == each


def test_isolation_is_what_the_mechanism_was_made_for(found):
    """With it shadow tables that survive CR3 loads take a tenth of the exits; without it the workload gains nothing."""
    isolated, plain = (found[file].designs for file in (None, str(LINUX_MIX)))
    assert isolated["cached"].exits_total < isolated["flush"].exits_total / 10
    assert isolated["flush"].cost.slow_down > 2 * isolated["cached"].cost.slow_down
    assert plain["cached"].result.workload.exits_total > plain["flush"].result.workload.exits_total
    for designs in (isolated, plain):
        assert designs["unsync"].exits_total < designs["cached"].exits_total


@pytest.mark.parametrize(("row", "file"), [("with isolation, 3.8 MB", None), ("without, 2.1 MB", LINUX_MIX)])
def test_the_table_of_the_page(found, row, file):
    study, recording = found[file and str(file)], sc.trace.load(file)
    exits = [f"{study.designs[name].exits_total:,}" for name in DESIGNS[1:]]
    counts = (recording.operations, round(recording.instructions / 1e6), recording.counts["cr3_loads"])
    assert cells("docs/recording-guests.md", row) == [f"{count:,}" for count in counts] + exits


@pytest.mark.parametrize("file", [None, LINUX_MIX])
def test_its_phases_have_names(file):
    opened = sc.trace.open_recording(file and str(file))
    assert list(opened.phases) == ["boot", "pipelines", "interpreter", "files", "server", "end"]
    assert opened.phases == sc.trace.load(file and str(file)).phases
