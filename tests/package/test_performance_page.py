"""docs/performance.md is what its figures say, and its pictures are there."""

import itertools
import json
import re
from pathlib import Path

import pytest
import report

FIGURES = report.FIGURES
CURVES = [path.stem for path in sorted(FIGURES.glob("*.json")) if path.stem not in ("table", "growth")]


def test_page_is_up_to_date():
    text = report.PAGE.read_text("utf-8")
    assert report.written(text) == text


def test_markers_are_needed():
    with pytest.raises(ValueError, match="table of goals"):
        report.written("nothing")


def test_pictures_are_shown():
    shown = re.findall(r"\]\(performance/([\w-]+)\.svg\)", report.PAGE.read_text("utf-8"))
    assert sorted(shown) == CURVES
    assert len(shown) == 5


@pytest.mark.parametrize("name", CURVES)
def test_picture(name):
    """It has a figure for each point, and no date in it."""
    data = json.loads((FIGURES / f"{name}.json").read_text("utf-8"))
    assert {len(costs) for costs in data["ns"].values()} == {len(data["x"])}
    assert "dc:date" not in (FIGURES / f"{name}.svg").read_text("utf-8")


@pytest.mark.parametrize("name", CURVES)
def test_pictures_are_drawn_the_same_twice(name, tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    drawn = []
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        source = Path(tmp_path / directory / f"{name}.json")
        source.write_text((FIGURES / f"{name}.json").read_text("utf-8"))
        drawn.append(plots.draw(source).read_bytes())
    assert drawn[0] == drawn[1]
    # Text is kept as paths: a picture looks the same where its fonts are missing.
    assert b"<text" not in drawn[0]


def test_growth_is_of_every_curve():
    growth = json.loads((FIGURES / "growth.json").read_text("utf-8"))
    assert sorted(growth["instructions"]) == CURVES
    for lines in growth["instructions"].values():
        for name, (small, large) in lines.items():
            assert name.startswith("hit, ") or large <= 1.03 * small


@pytest.mark.parametrize("levels", [[], [0.5], [0.1, 0.1, 0.1], [0.1, 0.5, 0.51]])
def test_labels_do_not_cover_each_other(levels):
    plots = pytest.importorskip("plots")
    moved = plots.apart(levels, 0.05)
    assert len(moved) == len(levels)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(moved))


def test_figures_of_the_table_have_their_machine():
    table = json.loads((FIGURES / "table.json").read_text("utf-8"))
    assert set(table["machine"]) == {"processor", "Python", "numpy"}
    rows = {str(result["row"]) for result in table["results"]}
    assert {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "14", "16", "I", "R", "T"} <= rows
