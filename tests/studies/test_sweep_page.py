"""The page of a sweep: its panels are the rows, and what a browser makes of it."""

import html
import json
import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
from browsers import rendered
from commands import run
from html_pages import Parsed

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.report.panels import METRICS, Shown
from shadowcore.report.sweep import page

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra report")


@pytest.fixture(scope="module")
def grid():
    """Two settings with numbers, two sources, three seeds."""
    return sc.sweep(
        sources=["pingpong", "fork-storm"],
        designs=["native", "flush", "cached"],
        seed=[0, 1, 2],
        operations=2000,
        settings={"pool": [8, 16, 256], "flood_threshold": [1, 3], "memory": "16MiB"},
        jobs=1,
    )


@pytest.fixture(scope="module")
def parsed(grid):
    return Parsed(page(grid))


def expected(found, metric, **labels):
    values = [row[metric] for row in found.rows() if all(row[name] == value for name, value in labels.items())]
    assert len(values) == 3
    return statistics.mean(values), statistics.stdev(values), min(values), max(values)


def test_panels_are_the_rows(grid):
    shown = Shown(grid.rows(), grid.axes)
    assert (shown.across, shown.down) == ("pool", "flood_threshold")
    for metric in METRICS:
        panels = shown.panels(metric)
        titles = [f"{source}, flood_threshold {n}" for source in ("pingpong", "fork-storm") for n in (1, 3)]
        assert [panel.title for panel in panels] == titles
        for panel in panels:
            source, threshold = panel.title.split(", ")[0], int(panel.title.split()[-1])
            assert [spot.x for spot in panel.lines["native"]] == [None]
            assert [spot.x for spot in panel.lines["flush"]] == [8, 16, 256]
            for design, more in (("native", {}), ("flush", {}), ("cached", {"flood_threshold": threshold})):
                for spot in panel.lines[design]:
                    pool = {} if spot.x is None else {"pool": spot.x}
                    mean, spread, low, high = expected(grid, metric, source=source, design=design, **more, **pool)
                    assert (spot.y, spot.spread) == pytest.approx((mean, spread))
                    assert (spot.low, spot.high, spot.count) == (low, high, 3)


def test_maps_are_the_rows(grid):
    found = Shown(grid.rows(), grid.axes).maps("exits_total")
    assert len(found) == 2  # of `cached` alone: the others have no threshold
    for each in found:
        assert (each.x_axis, each.columns, each.y_axis, each.rows) == (
            "pool", ("8", "16", "256"), "flood_threshold", ("1", "3")
        )  # fmt: skip
        source = "pingpong" if "pingpong" in each.title else "fork-storm"
        for y, threshold in enumerate((1, 3)):
            for x, pool in enumerate((8, 16, 256)):
                labels = {"source": source, "design": "cached", "pool": pool, "flood_threshold": threshold}
                assert each.values[y][x] == pytest.approx(expected(grid, "exits_total", **labels)[0])


def test_without_numbers_there_are_marks_side_by_side():
    found = sc.sweep(sources=["pingpong", "fork-storm"], designs=["flush", "cached"], operations=1000, jobs=1)
    (panel,) = Shown(found.rows(), found.axes).panels("exits_total")
    assert panel.names == ("pingpong", "fork-storm")
    for design, spots in panel.lines.items():
        assert [round(spot.x) for spot in spots] == [0, 1]
        for spot in spots:
            (row,) = (r for r in found.rows() if (r["source"], r["design"]) == (spot.label, design))
            assert spot.y == row["exits_total"]
    assert len({spot.x for spots in panel.lines.values() for spot in spots}) == 4
    assert "flush" in page(found)


def test_sizes_are_numbers():
    found = sc.sweep(sources="pingpong", designs="cached", memory=["16MiB", "32MiB", "1GiB"], operations=500, jobs=1)
    (panel,) = Shown(found.rows(), found.axes).panels("exits_total")
    assert panel.axis == "memory"
    assert panel.log
    assert [spot.x for spot in panel.lines["cached"]] == [1 << 24, 1 << 25, 1 << 30]


def test_the_table_is_the_rows(grid, parsed):
    head, *rows = parsed.tables["all"]
    assert head[:5] == ["design", "pool", "source", "flood_threshold", "seeds"]
    at = {name: head.index(name) for name in ("design", "pool", "source", "flood_threshold", METRICS["exits_total"][0])}
    assert len(rows) == 2 * (1 + 3 + 3 * 2)
    for row in rows:
        labels = {"design": row[at["design"]], "source": row[at["source"]]}
        labels |= {name: int(row[at[name]]) for name in ("pool", "flood_threshold") if row[at[name]]}
        shown = float(row[at[METRICS["exits_total"][0]]].replace(",", ""))
        assert shown == pytest.approx(expected(grid, "exits_total", **labels)[0], abs=0.5)


def test_nothing_is_fetched(grid, parsed):
    text = page(grid)
    assert "http://" not in re.sub(r'http://www\.w3\.org/[^"]*', "", text)
    assert "https://" not in text.split('id="panels"')[0]
    assert not [
        tag for tag, attributes in parsed.tags if tag == "link" or attributes.get("src", "data:")[:5] != "data:"
    ]
    assert "estimated" in text


def test_failures_are_told():
    found = sc.sweep(sources="fork-storm", designs="cached", operations=500, memory=["2MiB", "16MiB"], jobs=1)
    parsed = Parsed(page(found))
    assert parsed.tables["failed"][1][-1].startswith("GuestOutOfMemory")
    alone = sc.sweep(sources="fork-storm", designs="cached", operations=500, memory="2MiB", jobs=1)
    with pytest.raises(sc.ConfigError, match="no point of the sweep is done"):
        page(alone)


def test_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace.load().head(3000).save(tmp_path / "a.screc")
    (tmp_path / "a.toml").write_text('sources = "a.screc"\ndesigns = "cached"\noperations = [1000, 3000]\n')
    run("sweep", "a.toml", "--jobs", 1, "--html", "a.html")
    run("collect", "a.results", "--html", "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# What a browser does when lines are switched, a picture is zoomed, a table is sorted, a picture saved.
PROBE = """
<script>
(async () => {
  const { views, marks, alone, csv, png } = window.sweep, seen = { ready: document.documentElement.dataset.ready };
  const view = views[0], svg = view.svg;
  const parts = (n) => [...svg.querySelectorAll(`[id^="${view.panel.name}-series-${n}-"]`)];
  const state = (display) => [parts(2).every((part) => part.style.display === display),
    document.querySelectorAll("button.series")[2].getAttribute("aria-pressed"), marks(view).length];
  seen.marks = views.map((each) => marks(each).map((mark) => mark.says));
  const box = svg.getBoundingClientRect();
  const at = (type, x, y) => svg.dispatchEvent(new PointerEvent(type, { bubbles: true, pointerId: 1,
    clientX: box.left + box.width * x / view.width, clientY: box.top + box.height * y / view.height }));
  const mark = marks(view)[2];
  at("pointermove", mark.x, mark.y);
  seen.tip = view.tip.textContent;
  seen.parts = parts(2).length;
  const button = document.querySelectorAll("button.series")[2];
  button.click();
  seen.off = state("none");
  button.click();
  seen.on = state("");
  const { left, right, top, bottom } = view.box;
  at("pointerdown", left - 20, top);
  at("pointermove", (left + right) / 2, (top + bottom) / 2);
  at("pointerup", (left + right) / 2, (top + bottom) / 2);
  seen.zoom = { x: view.x, y: view.y, hidden: view.still.every((each) => each.style.display === "none"),
    circles: svg.querySelectorAll(".zoomed circle").length, texts: svg.querySelectorAll(".zoomed text").length };
  seen.zoomed = alone(view);
  svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  seen.back = [view.x === view.panel.x, svg.querySelector(".zoomed") === null, view.still[0].style.display];
  seen.alone = alone(view);
  seen.csv = views.map(csv);
  const image = await png(view);
  seen.png = [image.type, image.size];
  const table = document.getElementById("all"), column = table.rows[0].cells.length - 2, sorted = () =>
    [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value));
  table.rows[0].cells[column].click();
  seen.up = sorted();
  table.rows[0].cells[column].click();
  seen.down = sorted();
  const found = document.createElement("pre");
  found.id = "probe";
  found.textContent = JSON.stringify(seen);
  document.body.append(found);
})();
</script>
</body>"""


def test_in_chromium(grid, tmp_path):
    (tmp_path / "probed.html").write_text(page(grid).replace("</body>", PROBE), "utf-8")
    found = re.search(r'<pre id="probe">(.*?)</pre>', rendered(tmp_path / "probed.html"), re.S)
    assert found, "the page's script, or the one that looks at it, failed"
    seen = json.loads(html.unescape(found[1]))
    assert seen["ready"] == "yes"
    shown = Shown(grid.rows(), grid.axes)
    panel = shown.panels("slow_down")[0]
    spots = [spot for spots in panel.lines.values() for spot in spots]
    assert len(seen["marks"][0]) == len(spots) == 7
    for says, spot in zip(seen["marks"][0], spots, strict=True):
        told = re.match(r".*: ([\d,.]+) times\n([\d,.]+) to ([\d,.]+) over 3 seeds, deviation ([\d,.]+)$", says)
        numbers = [float(each.replace(",", "")) for each in told.groups()]
        assert numbers == pytest.approx([spot.y, spot.low, spot.high, spot.spread], rel=1e-4)
    assert seen["tip"] == seen["marks"][0][2]
    assert seen["parts"] >= 2
    assert seen["off"] == [True, "false", 4]
    assert seen["on"] == [True, "true", 7]
    assert seen["zoom"]["hidden"]
    assert seen["zoom"]["x"][0] < 8 < seen["zoom"]["x"][1] < 256
    assert seen["zoom"]["y"][1] == pytest.approx(2 * seen["zoom"]["y"][0], rel=1e-6)
    assert seen["zoom"]["circles"] >= 2
    assert seen["zoom"]["texts"] >= 4
    assert seen["back"] == [True, True, ""]
    for text in (seen["alone"], seen["zoomed"]):
        assert "var(" not in text
        assert "#d55e00" in text or "#f0803c" in text
        ElementTree.fromstring(text)
    lines = seen["csv"][0].strip().split("\n")
    assert lines[0] == "design,pool,times,deviation,lowest,highest,seeds"
    assert [float(line.split(",")[2]) for line in lines[1:]] == [spot.y for spot in spots]
    assert seen["png"][0] == "image/png"
    assert seen["png"][1] > 3000
    assert seen["up"] == sorted(seen["up"])
    assert seen["down"] == sorted(seen["up"], reverse=True)
