"""The page of a study: its tables, pictures and embedded JSON agree with the study; nothing of it needs a network."""

import html
import itertools
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import studies
from browsers import rendered
from places import LINUX_FORK
from samples import sampled

import shadowcore as sc
from shadowcore import files
from shadowcore.recording import replay as trace
from shadowcore.report import document
from shadowcore.studies.heat import heat

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'shadowcore[report]'")

from html_pages import Parsed, by_row, check_against_json, embedded

from shadowcore.report import page

DESIGNS = ("native", "flush", "cached")


@pytest.fixture(scope="module")
def text(study, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.html"
    page.write(study, path)
    return path.read_text("utf-8")


def test_tables_show_what_the_embedded_study_says(text):
    parsed = Parsed(text)
    check_against_json(parsed.tables, embedded(parsed))


def test_the_embedded_study_is_the_study(study, text):
    plain = embedded(Parsed(text))
    assert plain["workload"] == study.workload
    assert plain["operations"] == study.operations
    assert plain["command"] == study.command
    assert plain["settings"] == study.settings
    for name, result in study.designs.items():
        shown = plain["designs"][name]
        assert shown["counters"] == result.counters
        assert shown["cost"]["cycles"] == result.cost.cycles
        for key, values in result.windows.items():
            assert shown["windows"][key] == pytest.approx(values.tolist())
            if key in result.counters:
                assert sum(shown["windows"][key]) == result.counters[key]
    assert plain["processes"]["names"] == study.processes["names"]
    assert plain["frames"]["counts"] == study.frames["counts"].tolist()


def test_settings_and_command_are_shown(study, text):
    parsed = Parsed(text)
    rows = dict(parsed.tables["settings"][1:])
    assert rows["pool_pages"] == "256"
    assert rows["costs.name"] == "made up"
    assert rows["costs.walks"] == str(studies.CYCLES["walks"])
    assert "".join(parsed.texts["command"]) == study.command


def test_the_page_fetches_nothing(text):
    for tag, attributes in Parsed(text).tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base"), tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:50])
    assert not re.findall(r"url\((?!#)", text)
    assert "@import" not in text
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in text


def test_pictures(text):
    parsed = Parsed(text)
    pictures = [attributes for tag, attributes in parsed.tags if tag == "svg" and "role" in attributes]
    assert len(pictures) >= 10
    assert all(len(attributes["aria-label"]) > 20 for attributes in pictures)
    identifiers = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert referred <= set(identifiers)
    # Every colour is a variable of the style sheet, so that a dark page is dark.
    used = set(re.findall(r"var\(--([\w-]+)\)", text))
    sheet = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert used <= set(re.findall(r"--([\w-]+):", sheet))
    assert not re.findall(r"#0102[0-9a-f]{2}", text)
    # Of each hover description: the path leads to numbers, as many as there are windows or columns.
    plain = embedded(parsed)

    def at(path):
        value = plain
        for key in path:
            value = value[key]
        return value

    hovers = [json.loads(a["data-values"]) for _, a in parsed.tags if "data-values" in a]
    assert len(hovers) >= 10
    for values in hovers:
        ends = at(values["operation"])
        assert ends == sorted(ends)
        if "rows" in values:
            counts = at(values["counts"])
            assert len(counts) == len(values["rows"])
            assert all(len(row) == len(ends) for row in counts)
        else:
            assert values["series"]
            assert all(len(at(path)) == len(ends) for _, path in values["series"])


def test_the_stacked_picture_is_as_high_as_the_exits(study, text):
    """The outline of the uppermost layer, read from the SVG, is the exits of each window."""
    place = DESIGNS.index("cached")
    start = text.index(f'id="exits-{place}-figure_1"')
    axes = json.loads(re.findall(r'data-axes="([^"]*)"', text[:start])[-1])
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text[:start])[-1])
    layers = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: var\(--(\w+)\)"', text[start : text.index("</svg>", start)]
    )
    outline, name = [layer for layer in layers if layer[1] in page.EXITS][-1]
    assert name == "invlpg"  # the last that occurs
    points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", outline)]
    windows = study.designs["cached"].windows
    ends = np.concatenate(([0], windows["operation"]))
    rates = 1000 * windows["exits_total"] / np.diff(ends)
    left, right, top, bottom = axes[0] * width, axes[1] * width, axes[2] * height, axes[3] * height
    for i, rate in enumerate(rates):
        x = left + (right - left) * (ends[i] + ends[i + 1]) / 2 / ends[-1]
        level = min(
            a[1] for a, b in itertools.pairwise(points) if a[1] == b[1] and min(a[0], b[0]) < x < max(a[0], b[0])
        )
        shown = (bottom - level) / (bottom - top) * 1.04 * rates.max()
        assert shown == pytest.approx(rate, abs=rates.max() / 1000), i


@pytest.mark.parametrize("windows", [1, 7, 320, 321, 1000])
def test_few_and_many_windows(tmp_path, windows):
    study = studies.study(20_000, ("cached",), windows)
    page.write(study, tmp_path / "out.html")
    plain = embedded(Parsed((tmp_path / "out.html").read_text("utf-8")))
    shown, given = plain["designs"]["cached"]["windows"], study.designs["cached"].windows
    assert 0 < len(shown["operation"]) <= document.WINDOWS
    assert shown["operation"][-1] == given["operation"][-1]
    assert sum(shown["exits_total"]) == given["exits_total"].sum() > 0
    assert max(shown["pages_max"]) == given["pages_max"].max() > 0
    lengths = np.diff([0, *given["operation"]])
    weighted = float((given["pages_mean"] * lengths).sum() / lengths.sum())
    assert plain["designs"]["cached"]["pages_mean"] == pytest.approx(weighted)


@sampled("designs", 10, part=2)
def test_under_five_megabytes(tmp_path, study, designs):
    """With as many designs as a sweep has, and long windows."""
    wide = SimpleNamespace(**vars(study))
    long = studies.study(designs=("cached",), windows=3000).designs["cached"]
    wide.designs = {f"cached, pool {2**n}": long for n in range(designs)}
    page.write(wide, tmp_path / "out.html")
    assert 100_000 < (tmp_path / "out.html").stat().st_size < 5_000_000


def test_too_large_is_refused_and_leaves_nothing(tmp_path, small):
    huge = SimpleNamespace(**vars(small))
    huge.settings = {f"setting {n}": "x" * 1000 for n in range(6000)}
    (tmp_path / "out.html").write_text("older")
    with pytest.raises(sc.ConfigError, match="5,000,000"):
        page.write(huge, tmp_path / "out.html")
    assert [each.name for each in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == "older"


def test_names_cannot_break_the_page(tmp_path, small):
    nasty = "</script><script>alert(1)</script><!-- \u2028 \"quoted\" & 'single'"
    renamed = SimpleNamespace(**vars(small))
    renamed.workload = renamed.command = nasty
    renamed.settings = {nasty: nasty}
    renamed.designs = {nasty: small.designs["cached"], "not a number": small.designs["flush"]}
    page.write(renamed, tmp_path / "out.html")
    parsed = Parsed((tmp_path / "out.html").read_text("utf-8"))
    assert sum(tag == "script" for tag, _ in parsed.tags) == 2
    plain = embedded(parsed)
    assert plain["workload"] == nasty
    assert next(iter(plain["designs"])) == nasty
    assert dict(parsed.tables["settings"][1:]) == {nasty: nasty}
    assert parsed.tables["summary"][0][1] == nasty
    assert "".join(parsed.texts["command"]) == nasty


def without_pictures():
    return SimpleNamespace(
        workload="bare",
        settings={},
        command="shadowcore compare",
        operations=0,
        designs={
            "cached": SimpleNamespace(
                counters={"exits_total": 3}, cost=None, seconds=float("nan"), operations=0, windows={}
            )
        },
    )


def test_what_a_study_may_lack(tmp_path):
    """No windows, no heat, no cost, counters that are no numbers: sections are left out, the rest stands."""
    page.write(without_pictures(), tmp_path / "out.html")
    parsed = Parsed((tmp_path / "out.html").read_text("utf-8"))
    assert embedded(parsed)["designs"]["cached"]["seconds"] is None
    assert by_row(parsed.tables["summary"])["VM exits, all"] == [3]
    assert "cost" not in parsed.tables
    assert not [a for tag, a in parsed.tags if tag == "svg" and "role" in a]


def test_disk_trouble_is_an_oserror_and_nothing_is_lost(tmp_path, monkeypatch):
    study = without_pictures()
    with pytest.raises(FileNotFoundError) as caught:
        page.write(study, tmp_path / "missing" / "out.html")
    assert caught.value.filename == str(tmp_path / "missing" / "out.html")
    (tmp_path / "out.html").write_text("older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as caught:
        page.write(study, tmp_path / "out.html")
    assert caught.value.filename == str(tmp_path / "out.html")
    assert "\n" not in str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["out.html"]
    assert (tmp_path / "out.html").read_text() == "older"


def test_replace_goes_through_links_and_keeps_the_usual_rights(tmp_path):
    (tmp_path / "real.html").write_text("older")
    (tmp_path / "link.html").symlink_to("real.html")
    files.replace(tmp_path / "link.html", b"newer")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_bytes() == b"newer"
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "real.html").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(IsADirectoryError):
        files.replace(tmp_path, b"")


def test_the_same_study_gives_the_same_page(tmp_path, study, text):
    page.write(study, tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text("utf-8") == text


def test_refaults_are_no_more_than_was_removed():
    filled, removed = np.array([5.0, 5, 5, 0, 9]), np.array([0.0, 3, 4, 4, 1])
    assert document.refaults(filled, removed).tolist() == [0, 3, 4, 0, 5]


def test_a_study_of_the_package(tmp_path):
    module = pytest.importorskip("shadowcore.studies.study", reason="there is no shadowcore.studies.study yet")
    recording = trace.load().head(60_000)
    made = module.study(recording, DESIGNS)
    warm = heat(recording, [result.design for result in made.designs.values()])
    page.write(made, tmp_path / "out.html", heat=warm)
    parsed = Parsed((tmp_path / "out.html").read_text("utf-8"))
    plain = embedded(parsed)
    check_against_json(parsed.tables, plain)
    for name, result in made.designs.items():
        assert plain["designs"][name]["counters"]["exits_total"] == result.exits_total
        assert plain["compare"]["designs"][name]["exits_total"] == result.exits_total
    assert "".join(parsed.texts["command"]) == made.command
    made = module.study("pingpong", DESIGNS, operations=200_000)
    page.write(made, tmp_path / "out.html")
    parsed = Parsed((tmp_path / "out.html").read_text("utf-8"))
    assert by_row(parsed.tables["summary"])["VM exits, all"] == [each.exits_total for each in made.designs.values()]


def test_many_address_spaces_are_gathered(study):
    many = SimpleNamespace(**vars(study))
    counts = np.arange(50 * 4).reshape(50, 4)
    many.processes = {"counts": counts, "names": [f"p{n}" for n in range(50)], "exits": {"cached": counts * 2}}
    shown = document.document(many)["processes"]
    assert shown["names"][0] == "p18"
    assert shown["names"][-1] == "18 others"
    assert np.sum(shown["counts"]) == counts.sum()
    assert np.sum(shown["exits"]["cached"]) == 2 * counts.sum()


def test_what_is_estimated_says_so_and_by_what(tmp_path):
    made = sc.study("pingpong", ["native", "cached", "unsync"], operations=1_000, windows=500)
    page.write(made, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text("utf-8")
    parsed = Parsed(text)
    summary = by_row(parsed.tables["summary"])
    estimated = {name for name in summary if name.startswith(("cycles", "slow-down", "microseconds"))}
    assert len(estimated) == 3
    assert all("estimated" in name for name in estimated)
    assert ">Cost, estimated</a></h2>" in text
    assert made.verdict in html.unescape(text)
    prices = {row[0]: row[1:] for row in parsed.tables["prices"][1:]}
    priced = {name: value for name, value in made.costs.as_dict().items() if isinstance(value, float)}
    assert {name: float(prices[name][0].replace(",", "")) for name in priced} == pytest.approx(priced, rel=1e-5)
    assert all(prices[name][1] == made.costs.sources[name] for name in priced if name in made.costs.sources)


def test_boot_and_phases_are_told_and_marked():
    made = sc.study(LINUX_FORK, ["native", "cached"], windows=20_000)
    plain = document.document(made)
    text = page._summary(plain) + page._pages_in_use(plain)
    boot = made.recording.phases["boot"]
    assert plain["phases"]["boot ends"] == boot
    summary = by_row(Parsed(text).tables["summary"])
    design = made.designs["cached"]
    assert summary["in the boot"][1] == design.details["boot"]["exits_total"]
    assert summary["in the workload"][1] == design.details["workload"]["exits_total"]
    assert text.count(">boot ends</text>") == 2  # in each picture over time
    began = SimpleNamespace(**vars(made) | {"warm_up": boot})
    assert "boot ends" not in document.document(began)["phases"]


@pytest.mark.parametrize(("lengths", "expected"), [([10, 10, 10, 4], [10, 10, 14]), ([10, 10, 10, 6], [10, 10, 10, 6])])
def test_no_window_is_a_remnant(lengths, expected):
    windows = {"operation": np.cumsum(lengths), "exits_fill": np.array(lengths), "pages_max": np.array([1, 2, 3, 9])}
    made = document.merged(windows, 320)
    assert np.diff(made["operation"], prepend=0).tolist() == expected
    assert made["exits_fill"].tolist() == expected
    assert made["pages_max"][-1] == 9
    long = {"operation": np.cumsum([10] * 41 + [3]), "exits_fill": np.ones(42)}
    assert np.diff(document.merged(long, 20)["operation"], prepend=0).min() >= 15


# In a browser.

PROBE = """
<script>
(() => {
  const errors = [];
  const shown = [];
  for (const plot of document.querySelectorAll(".plot[data-values]")) {
    const box = plot.querySelector("svg").getBoundingClientRect();
    const [left, right, top, bottom] = JSON.parse(plot.dataset.axes);
    const x = box.left + box.width * (left + 0.4 * (right - left));
    const y = box.top + box.height * (top + 0.6 * (bottom - top));
    const finger = { clientX: x, clientY: y, bubbles: true, pointerType: "touch" };
    plot.dispatchEvent(new PointerEvent("pointerdown", finger));
    plot.focus();
    const touched = plot.querySelector(".tip").textContent;
    const below = getComputedStyle(plot.querySelector(".tip")).position;
    plot.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, bubbles: true }));
    shown.push({ values: JSON.parse(plot.dataset.values), tip: plot.querySelector(".tip").textContent,
      touched, below,
      width: box.width, height: box.height });
  }
  const tables = {};
  for (const table of document.querySelectorAll("table"))
    tables[table.id] = [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
  const found = document.createElement("pre");
  found.id = "probe";
  found.textContent = JSON.stringify({ ready: document.documentElement.dataset.ready, shown, tables,
    study: JSON.parse(document.getElementById("study").textContent) });
  document.body.append(found);
})();
</script>
</body>"""


def test_in_chromium(tmp_path, study, text):
    """What a browser makes of the page: its tables against its JSON, and what the pointer is told of each picture."""
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE), "utf-8")
    found = re.search(r'<pre id="probe">(.*?)</pre>', rendered(tmp_path / "probed.html"), re.S)
    assert found, "the page's script, or the one that looks at it, failed"
    seen = json.loads(html.unescape(found[1]))
    assert seen["ready"] == "yes"
    check_against_json(seen["tables"], seen["study"])
    assert seen["study"]["designs"]["cached"]["counters"] == study.designs["cached"].counters
    assert len(seen["shown"]) >= 10
    for plot in seen["shown"]:
        assert plot["width"] > 200
        assert plot["height"] > 80
        assert plot["touched"] == plot["tip"]  # a finger shows what is under it, beside the picture
        assert plot["below"] == "static"
        head, *lines = plot["tip"].split("\n")
        first, last = (int(n.replace(",", "")) for n in re.fullmatch(r"operations ([\d,]+) to ([\d,]+)", head).groups())

        def at(path):
            value = seen["study"]
            for key in path:
                value = value[key]
            return value

        ends = at(plot["values"]["operation"])
        column = ends.index(last)
        assert first <= 0.4 * ends[-1] <= last
        if "rows" in plot["values"]:
            row = int(0.6 * len(plot["values"]["rows"]))
            value = at(plot["values"]["counts"])[row][column]
            assert lines == [f"{plot['values']['rows'][row]}: {value:,} {plot['values']['unit']}"]
        else:
            assert len(lines) == len(plot["values"]["series"])
            for line, (label, path) in zip(lines, plot["values"]["series"], strict=True):
                name, _, value = line.rpartition(": ")
                assert name == label
                if per := plot["values"].get("per"):
                    rate, value = re.fullmatch(rf"(.*) for {per:,}, (.*) in all", value).groups()
                    expected = per * at(path)[column] / (last - first)
                    assert float(rate.replace(",", "")) == pytest.approx(expected, abs=1e-4)
                assert float(value.replace(",", "")) == pytest.approx(at(path)[column], abs=1e-4)
